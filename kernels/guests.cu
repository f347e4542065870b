// The exact linear program of a batch, over the residents and the guests that are chosen for it.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#undef BLOCKS
#define BLOCKS 1  // older GPUs have no clusters
#undef __cluster_dims__
#define __cluster_dims__(...)
#endif

#include "guests.cuh"

typedef lplb::Variant<SIZE, PARTS, TURNS, MORE, THREADS, true, BLOCKS> V;

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(V::threads, 1)
    solve_guests(const Problem problem, const Guests guests) {
    extern __shared__ __align__(16) char shared[];
    lplb::solve_with_guests<V, false>(problem, guests, shared, lplb::Chooser<V, false>{problem, guests});
}

// With speeds.
extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(V::threads, 1)
    solve_guests_general(const Problem problem, const Guests guests) {
    extern __shared__ __align__(16) char shared[];
    lplb::solve_with_guests<V, true>(problem, guests, shared, lplb::Chooser<V, true>{problem, guests});
}
