// As plan.cu, by another objective than tokens.

#include "objective.cuh"
#include "plan.cuh"

using namespace lplb;

struct ByAim {
    const Objective& objective;
    Workplace<V> place{};

    __device__ char* lay_out(const Problem& p, char* at) { return place.lay_out(objective, p.net.max_arcs, at); }

    __device__ void solve(const Problem& p, int g, const Component<V>& c, const ResidualEdge<V> (&edges)[V::turns],
                          int rank, Ending& ending, int* quota, int* rank_load) const {
        finish_by_objective<V>(p, objective, place, c, g, edges, rank, ending, quota, rank_load);
    }
};

extern "C" __global__ void __launch_bounds__(V::threads, 1) plan_by_objective(
    const void* topk_idx, const Picks picks, const int* logical, int num_ids, int num_topk, int4* head,
    const Window window, int status, const Problem problem, const Table table, const Batch batch, void* physical,
    int wide,
    const Objective objective) {  // and what rows cost
    extern __shared__ __align__(16) char shared[];
    make_plan<false>({{const_cast<void*>(topk_idx), wide != 0}, logical, num_ids, num_topk}, {physical, wide != 0}, picks,
                     head, window, status, problem, table, batch, shared, ByAim{objective});
}
