// A whole plan in one launch, of a batch that one block holds.

#include "plan.cuh"

using namespace lplb;

extern "C" __global__ void __launch_bounds__(V::threads, 1) plan(
    const void* topk_idx,    // [num_picks] ids in [0, num_ids), -1: none
    const Picks picks,       // of one chunk; its pointers are not used
    const int* logical,      // [num_ids] the expert of each id, -1: none; or null, ids are experts
    int num_ids,
    int num_topk,            // picks of a token, of which no two may be of one expert; or 0
    int4* head,              // of the row, behind its status
    const Window window,     // where rows are exchanged, if its peers are given; `rows` is not used
    int status,              // of this rank, for its row
    const Problem problem,
    const Table table,
    const Batch batch,
    void* physical,          // [num_picks] slots, -1: none
    int wide) {              // 1: ids and slots are of 8 bytes, not 4
    extern __shared__ __align__(16) char shared[];
    make_plan<false>({{const_cast<void*>(topk_idx), wide != 0}, logical, num_ids, num_topk}, {physical, wide != 0}, picks,
                     head, window, status, problem, table, batch, shared, by_tokens<V, false>([](const Component<V>&) {}));
}

// With speeds or capacities.
extern "C" __global__ void __launch_bounds__(V::threads, 1) plan_general(
    const void* topk_idx, const Picks picks, const int* logical, int num_ids, int num_topk, int4* head,
    const Window window, int status, const Problem problem, const Table table, const Batch batch, void* physical,
    int wide) {
    extern __shared__ __align__(16) char shared[];
    make_plan<true>({{const_cast<void*>(topk_idx), wide != 0}, logical, num_ids, num_topk}, {physical, wide != 0}, picks,
                    head, window, status, problem, table, batch, shared, by_tokens<V, true>([](const Component<V>&) {}));
}
