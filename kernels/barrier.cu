// Ranks wait for one another on their streams, around copies into each other's memory.

#include "ptx.cuh"

// One block with a thread for each rank. What its stream did before is seen by all ranks behind their barriers
// of this number. It never gives up, for the next reads are of what others copied. A rank that has not come
// within the limit is named in the host's memory.
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
            limit_ns = 0x7fffffffffffffff;  // said once
        }
    } while (seen < number);
    fence_system();
}
