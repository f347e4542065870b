// Adds up and checks the rows of counts.
#pragma once

#include "counts.cuh"
#include "variant.cuh"

namespace lplb {

// Checks the heads of the rows, and raises `status` in shared memory to the largest status that they show.
template <int threads>
__device__ void check_heads(const Counts& counts, int* status) {
    block_stride<threads>(counts.num_rows * counts.head, [&](int i) {
        int word = i % HEAD, value = counts_of(counts, i / HEAD)[word - HEAD];
        // A row that is not of this exchange may have any value there.
        if (word == HEAD_STATUS && unsigned(value) >= NUM_STATUSES) value = OUT_OF_STEP;
        if (word == HEAD_STATUS && value != OPTIMAL) atomicMax(status, value);
        if (word > HEAD_STATUS && value != counts_of(counts, counts.rank)[word - HEAD])
            atomicMax(status, OUT_OF_STEP);
    });
}

constexpr int FEW_COLUMNS = 8;  // up to so many, a thread writes all quotas of its expert

// Writes the quotas that experts have before the flow, by whole warps, since a row of many columns then takes few stores.
// `mine`: whether this thread has an expert. `first`: the quota of its first copy.
__device__ void write_rows(int* __restrict__ quota, int max_replicas, bool mine, int expert, int first) {
    for (unsigned left = __ballot_sync(~0u, mine); left != 0; left &= left - 1) {
        int lane = __ffs(int(left)) - 1, row = __shfl_sync(~0u, expert, lane) * max_replicas;
        int value = __shfl_sync(~0u, first, lane);
        #pragma unroll 1
        for (int c = threadIdx.x % 32; c < max_replicas; c += 32) quota[row + c] = c == 0 ? value : 0;
    }
}

// Adds up the counts of the experts of component g, and writes the quotas of those with one copy.
//
// `load` [arcs] gets the load of each expert with several copies, by its place. The loads of the other experts are
// added to `staying` [size], by rank. `packed` is this thread's first expert, and `base` the base load of this
// thread's rank.
//
// Returns the batch's status and total, the same to every thread. The status is BAD_COUNTS if a count is
// negative or the total too large, and INFEASIBLE if an only copy may not have its tokens.
template <typename V, bool general>
__device__ Ending add_up(const Problem& p, int g, int* load, int* staying, int* __restrict__ quota, int sharing,
                         int packed, int base) {
    const Counts& counts = p.counts;
    const Network& net = p.net;
    int max_replicas = p.max_replicas;
    __shared__ int status;
    __shared__ Total total;
    if (threadIdx.x == 0) {
        status = OPTIMAL;
        total = {0, 0};
    }
    __syncthreads();  // both and `staying` are initialised before any thread adds to them
    for (int i = threadIdx.x / sharing, row = threadIdx.x % sharing;;) {
        int expert = packed & 0xffff, home = packed >> 16, signs = 0;
        long long sum = 0;
        auto take = [&](int number) {
            sum += number;
            signs |= number;
        };
        const int* at = counts_of(counts, row) + expert;
        if (packed >= 0 && counts.num_rows <= 8 * sharing)
            each<8>(at, row, counts.num_rows, sharing, counts.stride, take);
        else if (packed >= 0)
            each<32>(at, row, counts.num_rows, sharing, counts.stride, take);
        for (int other = 1; other < sharing; other *= 2) {
            sum += __shfl_xor_sync(~0u, sum, other);
            signs |= __shfl_xor_sync(~0u, signs, other);
        }
        if (signs < 0 || sum > MAX_TOTAL) {
            atomicMax(&status, BAD_COUNTS);
            sum = 0;
        }
        bool mine = packed >= 0 && row == 0;
        total.add(mine ? unsigned(sum) : 0);
        if (mine) {
            if (home < V::size) atomicAdd(&staying[home], int(sum));
            else load[home - V::size] = int(sum);
            #pragma unroll 1
            for (int c = 0; !V::guests && c < max_replicas && max_replicas <= FEW_COLUMNS; ++c)
                quota[expert * max_replicas + c] = c == 0 && home < V::size ? int(sum) : 0;
            if (general && p.cap != nullptr && home < V::size && sum > p.cap[expert * max_replicas])
                atomicMax(&status, INFEASIBLE);
        }
        if (!V::guests && max_replicas > FEW_COLUMNS)
            write_rows(quota, max_replicas, mine, expert, home < V::size ? int(sum) : 0);
        i += V::threads / sharing;
        if (i - threadIdx.x / sharing >= net.max_experts) break;
        packed = i < net.max_experts ? net.experts[g * net.max_experts + i] : -1;
    }
    check_heads<V::threads>(counts, &status);
    if (p.base != nullptr) total.add(base);
    __syncthreads();  // all is added, and `load` and the arcs are written, before any thread reads them
    if (total.value() > MAX_TOTAL) return {max(status, BAD_COUNTS), 0, 0, 0};
    return {status, int(total.value()), 0, 0};
}

}  // namespace lplb
