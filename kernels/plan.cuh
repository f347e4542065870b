// What the kernels of a plan share: how batches end, the counts of all ranks, this rank's picks.
#pragma once

// `Status` of planner.py. Where parts of a batch differ, the largest holds.
enum Status { OPTIMAL, STALE, BAD_COUNTS, NOT_CONVERGED, REFUSED, OUT_OF_STEP, TIMED_OUT };

// An exchanged row begins with its rank's status and what it plans (`Planner._head`); the number of
// the batch is the last of it. The counts follow.
constexpr int HEAD = 5;
constexpr unsigned MAX_TOTAL = 0x7fffffff;

// Counts of each rank for each expert; several batches of them where blockIdx.y is used.
struct Counts {
    const int* rows;   // [num_rows] of `head` + E integers, `stride` apart
    int num_rows, stride, batch_stride;
    int head;          // HEAD, or 0 where rows are counts alone
    int rank;          // this one's row

    __device__ const int* of(int rank) const {
        return rows + size_t(blockIdx.y) * batch_stride + size_t(rank) * stride + head;
    }
};

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

    __device__ bool too_large() const { return ((unsigned long long)high << 16) + low > MAX_TOTAL; }
};

// A rank's picks in row-major order, cut into chunks. Each kernel leaves more for the next.
struct Picks {
    short* experts;   // [num_picks] -1: none
    int* positions;   // [num_picks] how many earlier picks are of the same expert
    int* histograms;  // [num_chunks, E]
    int num_picks, num_chunks, chunk, num_experts;

    __device__ int begin(int block) const { return min(num_picks, block * chunk); }
};

// Numbers the picks of one chunk, with all threads of a block, whatever the timing: by the votes of
// a warp, which takes a run of picks, then over the runs of a tile, then over earlier tiles and chunks.
__device__ void number(const Picks& picks, int chunk, const int* own_counts, volatile int* miscounted,
                       int* shared /* [1 + warps, E] */) {
    constexpr int WARPS = THREADS / 32, PER_LANE = THREADS < 1024 ? 1024 / THREADS : 1;
    int E = picks.num_experts, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int first = picks.begin(chunk), end = picks.begin(chunk + 1);
    int *before = shared, *runs = before + E, *seen = runs + warp * E;
    for (int tile = first; tile == first || tile < end; tile += THREADS * PER_LANE) {
        int expert[PER_LANE], nth[PER_LANE], begin = tile + warp * 32 * PER_LANE + lane;
        #pragma unroll
        for (int j = 0; j < PER_LANE; ++j)
            expert[j] = begin + 32 * j < end ? picks.experts[begin + 32 * j] : -1;
        for (int e = threadIdx.x; tile == first && e < E; e += THREADS) {
            int sum = 0;
            const int* of_chunk = picks.histograms + e;
            for (int b = 0; b < chunk; b += 16, of_chunk += 16 * E) {
                int several[16];
                #pragma unroll
                for (int j = 0; j < 16; ++j)  // guarded, not rolled up: all are under way at once
                    several[j] = b + j < chunk ? of_chunk[j * E] : 0;
                #pragma unroll
                for (int j = 0; j < 16; ++j) sum += several[j];
            }
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
        if (before[e] != own_counts[e]) *miscounted = 1;
}
