// The plan of a batch by another objective than tokens.

#include "objective.cuh"

typedef lplb::Variant<SIZE, PARTS, TURNS, MORE, THREADS> V;

extern "C" __global__ void __launch_bounds__(V::threads, 1)
    solve_by_objective(const Problem problem, const Objective objective) {
    extern __shared__ __align__(16) char shared[];
    lplb::solve_component<V, false>(problem, shared, lplb::ByAim<V>{objective});
}
