// The exact linear program of a batch: how many tokens each copy of each expert computes.
// One block solves one component of the replica graph for one batch.

#include "flow.cuh"

extern "C" __global__ void solve(
    const int* __restrict__ load,   // [B, E]
    const Network net,
    int* __restrict__ quota,        // [B, E, C]
    int* __restrict__ rank_load,    // [B, R]
    int* __restrict__ status,       // [B]: 1 where the rounds did not suffice
    int num_ranks, int num_experts, int max_replicas, int max_rounds) {
    extern __shared__ char shared[];
    int batch = blockIdx.y;
    load += batch * num_experts;
    quota += size_t(batch) * num_experts * max_replicas;
    Component c = begin(shared, net, load, quota, max_replicas);
    finish(c, net, quota, rank_load, status, num_ranks, max_rounds);
}
