// For tests: as guests.cu, with guests that are given in the place of chosen ones.

#include "guests.cuh"

typedef lplb::Variant<SIZE, PARTS, TURNS, MORE, THREADS, true, BLOCKS> V;

namespace {

struct Given {
    static constexpr bool fills = false;
    const Guests& g;
    const int* given;  // [R, num_slots]

    __device__ void aim(const lplb::Component<V>&, int, char*) {}

    __device__ bool operator()(const lplb::Experts<V>& experts, const lplb::Component<V>& c, lplb::Verdicts&, bool, int, int*) const {
        for (int i = threadIdx.x; i < c.shape.ranks * g.num_slots; i += V::threads)
            for (int e = 0; e < experts.number; ++e)
                if (experts.residents[e].expert == given[c.ranks[i / g.num_slots] * g.num_slots + i % g.num_slots])
                    experts.guests[i] = short(e);
        __syncthreads();  // all guests are there before any thread reads them
        return true;
    }
};

// The guests that are given, in shared memory: where they lie, the chosen ones are written.
__device__ Given given(const Problem& p, const Guests& g) {
    __shared__ int guests[8 * 64];
    for (int i = threadIdx.x; i < p.num_ranks * g.num_slots; i += V::threads)
        guests[i] = g.chosen[size_t(blockIdx.y) * p.num_ranks * g.num_slots + i];
    return {g, guests};
}

}  // namespace

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(V::threads, 1)
    solve_guests(const Problem problem, const Guests guests) {
    extern __shared__ __align__(16) char shared[];
    lplb::solve_with_guests<V, false>(problem, guests, shared, given(problem, guests));
}

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(V::threads, 1)
    solve_guests_general(const Problem problem, const Guests guests) {
    extern __shared__ __align__(16) char shared[];
    lplb::solve_with_guests<V, true>(problem, guests, shared, given(problem, guests));
}
