// The counts of all ranks, and sums of them.
#pragma once

#include "abi.cuh"

namespace lplb {

// Whether a batch is not exchanged and reuses the quotas of an earlier one. `turn`: batches since that one; or null.
__device__ bool is_reused(const int* turn) { return turn != nullptr && *turn != 0; }

// A rank's counts in the batch that the block has.
__device__ const int* counts_of(const Counts& counts, int rank) {
    return counts.rows + size_t(blockIdx.y) * counts.batch_stride + size_t(rank) * counts.stride + counts.head;
}

// A total in shared memory that may exceed 32 bits: sums of the terms' low and high 16 bits.
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

}  // namespace lplb
