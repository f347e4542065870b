// The exact linear program of a batch, over the residents and the guests that are chosen for it.

#include "guests.cuh"

typedef lplb::Variant<SIZE, PARTS, TURNS, MORE, THREADS, true> V;

extern "C" __global__ void __launch_bounds__(V::threads, 1) solve_guests(const Problem problem, const Guests guests) {
    extern __shared__ __align__(16) char shared[];
    lplb::solve_with_guests<V, false>(problem, guests, shared, lplb::Chooser<V, false>{problem, guests});
}

// With speeds.
extern "C" __global__ void __launch_bounds__(V::threads, 1) solve_guests_general(const Problem problem,
                                                                                 const Guests guests) {
    extern __shared__ __align__(16) char shared[];
    lplb::solve_with_guests<V, true>(problem, guests, shared, lplb::Chooser<V, true>{problem, guests});
}
