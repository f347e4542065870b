// The exact linear program of a batch: how many tokens each copy of each expert computes. The flow starts from
// an even split.

#include "flow.cuh"

typedef lplb::Variant<SIZE, PARTS, TURNS, MORE, THREADS> V;

extern "C" __global__ void __launch_bounds__(V::threads, 1) solve(const Problem problem) {
    extern __shared__ __align__(16) char shared[];
    lplb::solve_component<V, false>(problem, shared, lplb::by_tokens<V, false>([](const lplb::Component<V>&) {}));
}

// With speeds or capacities.
extern "C" __global__ void __launch_bounds__(V::threads, 1) solve_general(const Problem problem) {
    extern __shared__ __align__(16) char shared[];
    lplb::solve_component<V, true>(problem, shared, lplb::by_tokens<V, true>([](const lplb::Component<V>&) {}));
}
