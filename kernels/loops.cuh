// Loops over numbers: with many loads in flight at once, or with little code.
#pragma once

namespace lplb {

// Calls `take` for every `by`-th of the numbers from `from` up to `to`, which are `step` apart in memory. N guarded
// loads are unrolled, so all are in flight at once. Zeros may be passed behind the last number.
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

// Calls `take` for the numbers below `number`, each in one thread of the block, from the thread `first` on. Most threads
// have at most one of them. So the loop is not unrolled: a kernel that runs its code once waits longer for instructions
// than for anything else.
template <int threads, int first = 0, typename Take>
__device__ void block_stride(int number, Take take) {
    if (first > 0 && threadIdx.x < first) return;
    #pragma unroll 1
    for (int i = threadIdx.x - first; i < number; i += threads - first) take(i);
}

}  // namespace lplb
