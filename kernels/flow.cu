// The exact linear program of a batch: how many tokens each copy of each expert computes. The flow
// starts from an even split.

#include "flow.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) solve(const Problem problem) {
    extern __shared__ __align__(16) char shared[];
    solve_component<false>(problem, shared, [](const Component&) {});
}
