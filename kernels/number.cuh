// Numbers each of a rank's picks among the picks of its expert.
#pragma once

#include "counts.cuh"

namespace lplb {

// The first pick of a chunk, or the end of the last.
__device__ int first_pick(const Picks& picks, int chunk) { return min(picks.num_picks, chunk * picks.chunk); }

// Numbers the picks of one chunk, by all threads of a block, the same for any order of threads. A tile of
// picks is cut into runs, one for each warp. A pick's number is the sum of four: of earlier chunks, earlier
// tiles, earlier runs, and earlier picks of its run.
template <int threads>
__device__ void number(const Picks& picks, int chunk, const int* own_counts, volatile int* error_flags,
                       int* shared /* [1 + warps, E] */) {
    static_assert(threads % 32 == 0, "runs are numbered by the votes of whole warps");
    constexpr int warps = threads / 32, per_lane = threads < 1024 ? 1024 / threads : 1;
    int E = picks.num_experts, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int first = first_pick(picks, chunk), end = first_pick(picks, chunk + 1);
    int *before = shared, *runs = before + E, *seen = runs + warp * E;
    for (int tile = first; tile == first || tile < end; tile += threads * per_lane) {
        int expert[per_lane], nth[per_lane], begin = tile + warp * 32 * per_lane + lane;
        #pragma unroll
        for (int j = 0; j < per_lane; ++j)
            expert[j] = begin + 32 * j < end ? picks.experts[begin + 32 * j] : -1;
        block_stride<threads>(tile == first ? E : 0, [&](int e) {
            int sum = 0;
            each<16>(picks.histograms + e, 0, chunk, 1, E, [&](int number) { sum += number; });
            before[e] = sum;
        });
        block_stride<threads>(warps * E, [&](int i) { runs[i] = 0; });
        __syncthreads();  // `runs` are zero before any warp counts in its own
        #pragma unroll
        for (int j = 0; j < per_lane; ++j) {
            unsigned same = __match_any_sync(~0u, expert[j]), lower = same & ((1u << lane) - 1);
            int earlier = expert[j] < 0 ? 0 : seen[expert[j]];
            nth[j] = earlier + __popc(lower);
            __syncwarp();  // all lanes have read `seen` before the first of each expert raises it
            if (expert[j] >= 0 && lower == 0) seen[expert[j]] = earlier + __popc(same);
            __syncwarp();  // it is raised before the next 32 picks read it
        }
        __syncthreads();  // all runs are counted before they are summed
        block_stride<threads>(E, [&](int e) {
            int sum = before[e];
            #pragma unroll
            for (int w = 0; w < warps; ++w) {
                int of_run = runs[w * E + e];
                runs[w * E + e] = sum;
                sum += of_run;
            }
            before[e] = sum;
        });
        __syncthreads();  // the sums are written before picks read them
        #pragma unroll
        for (int j = 0; j < per_lane; ++j)
            if (begin + 32 * j < end)
                picks.positions[begin + 32 * j] = expert[j] < 0 ? 0 : seen[expert[j]] + nth[j];
        __syncthreads();  // all have read them before the next tile's are zeroed
    }
    block_stride<threads>(chunk == picks.num_chunks - 1 ? E : 0, [&](int e) {
        if (before[e] != own_counts[e]) error_flags[FLAG_MISCOUNTED] = 1;
    });
}

}  // namespace lplb
