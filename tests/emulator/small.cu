// A kernel for tests of the emulator, in the place of `mask`: a good one, or with BODY one that has a fault.

#include "ptx.cuh"

typedef INDEX Index;

extern "C" __global__ void mask(const Index* given, const Index* planned, Index* out, int num_picks) {
    extern __shared__ int shared[];  // [threads]
    __shared__ int one;
    int t = threadIdx.x;
#ifdef BODY
    BODY
#else
    shared[t] = given[t];
    if (t == 0) one = 0;
    __syncthreads();
    int other = shared[t ^ 32], sum = __reduce_add_sync(~0u, other);
    for (int i = 1; i < 32; i *= 2) other += __shfl_xor_sync(~0u, other, i);
    unsigned odd = __ballot_sync(~0u, t % 2), same = __match_any_sync(~0u, t % 3);
    atomicAdd(&one, 1);
    bool any = __syncthreads_or(t == 40);
    out[t] = sum == other && odd == 0xaaaaaaaau && any && (same >> t % 32 & 1) ? one : -1;
#endif
    (void)given, (void)planned, (void)out, (void)num_picks, (void)shared, (void)t, (void)one;
}
