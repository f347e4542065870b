// A barrier between ranks on their streams, before and after copies into each other's memory.

#include "ptx.cuh"

// One block with a thread for each rank. All ranks see what this rank's stream did before, once they are past their
// barriers of this number. It waits without a limit, since the work behind it reads what other ranks copied. A rank
// that has not come within the limit is named in the host's memory.
extern "C" __global__ void barrier(
    unsigned long long* const* flags,  // [R] each rank's [R]: the number that each rank came to last
    int num_ranks, int rank, unsigned long long number,
    long long limit_ns,
    volatile int* missing) {           // [R] in the host's memory
    int other = threadIdx.x;
    if (other >= num_ranks) return;
    fence_system();
    store_release(flags[other] + rank, number);
    const unsigned long long* theirs = flags[rank] + other;
    long long start = nanoseconds();
    unsigned long long seen;
    do {
        seen = load_acquire(theirs);
        if (seen < number && nanoseconds() - start > limit_ns) {
            missing[other] = 1;
            limit_ns = 0x7fffffffffffffff;  // reported once
        }
    } while (seen < number);
    fence_system();
}
