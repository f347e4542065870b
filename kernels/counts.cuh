// The counts of all ranks, and sums of them.
#pragma once

#include "abi.cuh"
#include "loops.cuh"

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

}  // namespace lplb
