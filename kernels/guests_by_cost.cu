// The plan of a batch by cost, over the residents and the guests that cost least.

#include "guests_by_cost.cuh"

typedef lplb::Variant<SIZE, PARTS, TURNS, MORE, THREADS, true, 1, NUM_CHOICES> V;

extern "C" __global__ void __launch_bounds__(V::threads, 1) solve_guests_by_cost(
    const Problem problem, const Guests guests, const Objective objective, const Choices choices) {
    extern __shared__ __align__(16) char shared[];
    lplb::solve_with_guests<V, false>(problem, guests, shared, lplb::PlanByCost<V>{guests, objective, choices});
}
