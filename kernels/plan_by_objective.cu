// As plan.cu, by another objective than tokens.

#include "objective.cuh"
#include "plan.cuh"

using namespace lplb;

extern "C" __global__ void __launch_bounds__(V::threads, 1) plan_by_objective(
    const void* topk_idx, const Picks picks, const int* logical, int num_ids, int num_topk, int4* head,
    const Window window, int status, const Problem problem, const Table table, const Batch batch, void* physical,
    int wide,
    const Objective objective) {  // and what rows cost
    extern __shared__ __align__(16) char shared[];
    make_plan<false>({{const_cast<void*>(topk_idx), wide != 0}, logical, num_ids, num_topk}, {physical, wide != 0}, picks,
                     head, window, status, problem, table, batch, shared, ByAim<V>{objective});
}
