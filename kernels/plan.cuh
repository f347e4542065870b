// What the kernels of a plan share: the counts of all ranks, and this rank's picks.
#pragma once

#include "abi.cuh"

// A rank's counts, of the batch that the block has.
__device__ const int* counts_of(const Counts& counts, int rank) {
    return counts.rows + size_t(blockIdx.y) * counts.batch_stride + size_t(rank) * counts.stride + counts.head;
}

// A total that may exceed 32 bits, in shared memory, in halves that cannot.
struct Total {
    unsigned low, high;

    __device__ void add(unsigned value) {  // by whole warps
        unsigned low_sum = __reduce_add_sync(~0u, value & 0xffff);
        unsigned high_sum = __reduce_add_sync(~0u, value >> 16);
        if (threadIdx.x % 32 != 0) return;
        atomicAdd(&low, low_sum);
        atomicAdd(&high, high_sum);
    }

    __device__ unsigned long long value() const { return ((unsigned long long)high << 16) + low; }
};

// Takes every `by`-th of the numbers from `from` up to `to`, which lie `step` apart in memory. N loads
// at a time are guarded, not rolled up: all are under way at once. Zeros may come behind the last.
template <int N, typename Take>
__device__ void each(const int* at, int from, int to, int by, int step, Take take) {
    #pragma unroll 1
    for (int i = from; i < to; i += N * by, at += N * by * step) {
        int several[N];
        #pragma unroll
        for (int j = 0; j < N; ++j) several[j] = i + j * by < to ? at[j * by * step] : 0;
        #pragma unroll
        for (int j = 0; j < N; ++j) take(several[j]);
    }
}

// The first pick of a chunk, or the end of the last.
__device__ int first_pick(const Picks& picks, int chunk) { return min(picks.num_picks, chunk * picks.chunk); }

// Numbers the picks of one chunk, with all threads of a block, whatever the timing: by the votes of
// a warp, which takes a run of picks, then over the runs of a tile, then over earlier tiles and chunks.
__device__ void number(const Picks& picks, int chunk, const int* own_counts, volatile int* error_flags,
                       int* shared /* [1 + warps, E] */) {
    constexpr int WARPS = THREADS / 32, PER_LANE = THREADS < 1024 ? 1024 / THREADS : 1;
    int E = picks.num_experts, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int first = first_pick(picks, chunk), end = first_pick(picks, chunk + 1);
    int *before = shared, *runs = before + E, *seen = runs + warp * E;
    for (int tile = first; tile == first || tile < end; tile += THREADS * PER_LANE) {
        int expert[PER_LANE], nth[PER_LANE], begin = tile + warp * 32 * PER_LANE + lane;
        #pragma unroll
        for (int j = 0; j < PER_LANE; ++j)
            expert[j] = begin + 32 * j < end ? picks.experts[begin + 32 * j] : -1;
        for (int e = threadIdx.x; tile == first && e < E; e += THREADS) {
            int sum = 0;
            each<16>(picks.histograms + e, 0, chunk, 1, E, [&](int number) { sum += number; });
            before[e] = sum;
        }
        for (int i = threadIdx.x; i < WARPS * E; i += THREADS) runs[i] = 0;
        __syncthreads();
        #pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            unsigned same = __match_any_sync(~0u, expert[j]), lower = same & ((1u << lane) - 1);
            int earlier = expert[j] < 0 ? 0 : seen[expert[j]];
            nth[j] = earlier + __popc(lower);
            __syncwarp();
            if (expert[j] >= 0 && lower == 0) seen[expert[j]] = earlier + __popc(same);
            __syncwarp();
        }
        __syncthreads();
        for (int e = threadIdx.x; e < E; e += THREADS) {
            int sum = before[e];
            #pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                int of_run = runs[w * E + e];
                runs[w * E + e] = sum;
                sum += of_run;
            }
            before[e] = sum;
        }
        __syncthreads();
        #pragma unroll
        for (int j = 0; j < PER_LANE; ++j)
            if (begin + 32 * j < end)
                picks.positions[begin + 32 * j] = expert[j] < 0 ? 0 : seen[expert[j]] + nth[j];
        __syncthreads();
    }
    for (int e = threadIdx.x; chunk == picks.num_chunks - 1 && e < E; e += THREADS)
        if (before[e] != own_counts[e]) error_flags[FLAG_MISCOUNTED] = 1;
}
