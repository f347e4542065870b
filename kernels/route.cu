// Counting picks, exchanging the counts, sharing out quotas by source rank, and rewriting picks to slots.

#include "count.cuh"
#include "relay.cuh"
#include "rewrite.cuh"
#include "statistics.cuh"

using namespace lplb;

typedef INDEX Index;              // int or long long, as the caller's topk_idx
constexpr int threads = THREADS;  // of a block
static_assert(threads % 32 == 0, "sums are made by whole warps");

extern "C" __global__ void __launch_bounds__(threads) count(
    const Index* __restrict__ topk_idx,  // [num_picks] ids in [0, num_ids), -1: none
    const Picks picks,
    const int* __restrict__ logical,     // [num_ids] the expert of each id, -1: none; or null, ids are experts
    int num_ids,
    int num_topk,                        // picks of a token, of which no two may be of one expert; or 0
    int* __restrict__ row,               // [HEAD + E] zeroed, R more with `num_local`; or null
    int4* __restrict__ head,             // of the row, behind its status
    volatile int* error_flags,           // in the host's memory
    const Window window,
    int status,
    int num_local) {                     // slots of a rank, where picks are also counted by their slots' rank; or 0
    extern __shared__ int histogram[];  // as large as a row
    Given given{{const_cast<Index*>(topk_idx), sizeof(Index) == 8}, logical, num_ids, num_topk};
    long long ids[1];
    given.load<threads>(first_pick(picks, blockIdx.x) + threadIdx.x, first_pick(picks, blockIdx.x + 1), ids);
    block_stride<threads>(picks.num_experts, [&](int e) { histogram[e] = 0; });
    int *by_rank = histogram + picks.num_experts, num_ranks = num_local == 0 ? 0 : num_ids / num_local;
    block_stride<threads>(num_ranks, [&](int r) { by_rank[r] = 0; });
    __syncthreads();  // all is zero before any thread counts
    bool refused = count_picks<threads>(given, picks, blockIdx.x, histogram, error_flags, ids);
    if (num_local != 0) count_by_rank<threads>(given, picks, blockIdx.x, num_local, by_rank);
    if (refused && row != nullptr) atomicMax(&row[HEAD_STATUS], REFUSED);
    __syncthreads();  // all have counted before the numbers are read
    block_stride<threads>(picks.num_experts, [&](int e) {
        int number = histogram[e];
        picks.histograms[size_t(blockIdx.x) * picks.num_experts + e] = number;
        if (row != nullptr && number != 0) atomicAdd(&row[HEAD + e], number);
    });
    block_stride<threads>(num_ranks, [&](int r) {
        if (by_rank[r] != 0) atomicAdd(&row[HEAD + picks.num_experts + r], by_rank[r]);
    });
    if (row == nullptr) return;
    if (blockIdx.x == 0 && threadIdx.x == 0 && turn_of(window) == 0) begin_row(head, *head, row, status);
    if (window.peers != nullptr) exchange<threads>(window, row, histogram);
}

// Launched by the first rank of a node, one block each: rows of the node to other nodes, and rows of those back.
extern "C" __global__ void __launch_bounds__(threads) gather(
    const Window window, const Relay relay, const int* __restrict__ num_batches) {
    gather_rows<threads>(window, relay, *num_batches);
}

extern "C" __global__ void __launch_bounds__(threads) broadcast(
    const Window window, const Relay relay, const int* __restrict__ num_batches) {
    broadcast_rows<threads>(window, relay, *num_batches);
}

extern "C" __global__ void split(
    const Table table,
    const int* __restrict__ counts,  // [R, E]
    const int* __restrict__ quota,   // [E, C]
    int* __restrict__ shares) {      // [R, E, C], zeroed. One block to an expert
    extern __shared__ int shared[];
    int E = table.num_experts, C = table.max_replicas, R = table.num_ranks, e = blockIdx.x;
    int m = ~table.lookup[e], nodes = R / table.num_ranks_per_node;
    if (m < 0) {
        for (int r = threadIdx.x; r < R; r += blockDim.x)
            shares[(size_t(r) * E + e) * C] = min(counts[size_t(r) * E + e], quota[size_t(e) * C]);
        return;
    }
    const Copy* copies = table.copies + table.first[m];
    int N = table.first[m + 1] - table.first[m];
    int *rank = shared, *node = rank + N, *local = node + N, *remote = local + N, *supply = remote + N;
    int* own = supply + nodes + threadIdx.x * N;  // [threads, N]
    for (int c = threadIdx.x; c < N; c += blockDim.x) {
        rank[c] = copies[c].rank;
        node[c] = copies[c].node;
        local[c] = min(counts[size_t(rank[c]) * E + e], quota[copies[c].quota]);
        remote[c] = quota[copies[c].quota] - local[c];
    }
    for (int n = threadIdx.x; n < nodes; n += blockDim.x) {
        supply[n] = 0;
        for (int r = n * table.num_ranks_per_node; r < (n + 1) * table.num_ranks_per_node; ++r)
            supply[n] += counts[size_t(r) * E + e];
    }
    __syncthreads();  // the copies and the nodes' tokens are written before threads share them out
    Expert expert{N, rank, node, local, remote, supply, nodes};
    for (int r = threadIdx.x; r < R; r += blockDim.x) {
        int before = 0, home = r / table.num_ranks_per_node;
        for (int k = home * table.num_ranks_per_node; k < r; ++k) before += counts[size_t(k) * E + e];
        expert.share_out(r, home, counts[size_t(r) * E + e], before, own);
        for (int c = 0; c < N; ++c)
            shares[size_t(r) * E * C + copies[c].quota] = own[c];
    }
}

// The input of the block that keeps the statistics, in shared memory. It is loaded before the batch's status is known, as
// the other blocks load theirs. `tally` knows which of it is valid.
struct Kept {
    int *at_home, *rank_load;  // [R]
    int* guests;               // [num_guests]

    __device__ Kept(const Table& table, int* shared)
        : at_home(shared), rank_load(at_home + table.num_ranks), guests(rank_load + table.num_ranks) {}

    // `worst`: the worst status that this thread saw.
    __device__ void load(const Table& table, const Batch& batch, int worst) const {
        block_stride<threads>(table.num_ranks, [&](int r) { at_home[r] = 0; });
        bool solved = !__syncthreads_or(worst);  // all is zero before any thread adds to it
        block_stride<threads>(solved ? table.num_ranks : 0, [&](int r) { rank_load[r] = batch.rank_load[r]; });
        block_stride<threads>(solved ? batch.num_guests : 0, [&](int i) { guests[i] = batch.guests[i]; });
        add_at_home(table, batch.counts, table.num_experts, at_home, threadIdx.x, threads);
    }
};

// One block for each chunk of picks, and one more, which keeps the statistics. It writes nothing that the others read.
// general: batches may reuse quotas, or keep their slots.
template <bool general>
__device__ void route_picks(const Picks& picks, const Table& table, const Batch& batch, const Index* given,
                            Index* physical) {
    extern __shared__ int shared[];
    bool keeps_statistics = blockIdx.x == picks.num_chunks;
    int n = first_pick(picks, blockIdx.x) + threadIdx.x, end = first_pick(picks, blockIdx.x + 1);
    int expert = n < end ? picks.experts[n] : -1, position = n < end ? picks.positions[n] : 0;
    int worst = look_at_endings<threads>(batch);
    long long word = keeps_statistics ? word_of_totals(batch.statistics) : 0;
    Routes routes(table, shared);
    Kept kept(table, shared);
    if (keeps_statistics) kept.load(table, batch, worst);
    else routes.load<threads>(table, batch.counts, table.num_experts, batch.quota, batch.rank);
    bool reused = general && is_reused(batch.turn);
    int status = REUSED;
    if (reused) __syncthreads();  // all is loaded before any thread reads it
    else status = conclude<threads, general>(batch, worst);  // has such a barrier
    bool keeps = general && keeps_slots(batch, status);
    if (keeps_statistics) {
        if (keeps) {
            block_stride<threads>(table.num_ranks, [&](int r) { kept.rank_load[r] = batch.given_load[r]; });
            __syncthreads();  // rank loads are written before a warp adds them to the statistics
        }
        if (status < BAD_COUNTS)
            keep_sample(batch.statistics, table, batch, batch.counts, table.num_experts, word, threadIdx.x, threads);
        Batch solved = batch;
        solved.rank_load = kept.rank_load;
        solved.guests = kept.guests;
        if (threadIdx.x < 32) tally(batch.statistics, table, solved, status, keeps, kept.at_home, word);
        return;
    }
    if (keeps) {
        #pragma unroll 1
        for (; n < end; n += threads) physical[n] = given[n];
        keep_slots<threads>(table, batch, picks.num_chunks);
    } else {
        if (reused) routes.reuse<threads>(table, batch.own, batch.rank);
        else routes.share_out<threads>(status, batch.rank, batch.rank / table.num_ranks_per_node);
        __syncthreads();  // the ends of all shares are written before picks are compared with them
        for (; n < end; n += threads) {
            physical[n] = Index(routes.slot_of(expert, position));
            if (n + threads < end) {
                expert = picks.experts[n + threads];
                position = picks.positions[n + threads];
            }
        }
        if (!reused && status != OPTIMAL) send_home<threads>(table, batch, status < BAD_COUNTS, picks.num_chunks);
    }
    if (blockIdx.x != 0) return;
    int size = HEAD + picks.num_experts + (general && batch.given_load != nullptr ? table.num_ranks : 0);
    block_stride<threads>(batch.row == nullptr ? 0 : size, [&](int i) { batch.row[i] = 0; });
    if (threadIdx.x == 0) end_batch(batch, status);
}

extern "C" __global__ void __launch_bounds__(threads, 1) route(
    const Picks picks, const Table table, const Batch batch,
    const Index* __restrict__ given,  // not asked for
    Index* __restrict__ physical) {   // [num_picks] slots, -1: none
    route_picks<false>(picks, table, batch, given, physical);
}

// With a least gain, or with quotas of an earlier batch.
extern "C" __global__ void __launch_bounds__(threads, 1) route_general(
    const Picks picks, const Table table, const Batch batch,
    const Index* __restrict__ given,  // [num_picks] the slots that a batch may keep, by `given_load`
    Index* __restrict__ physical) {
    route_picks<true>(picks, table, batch, given, physical);
}

// Planned slots, without those of picks that the caller has masked since.
extern "C" __global__ void mask(
    const Index* given,    // [num_picks] -1: none
    const Index* planned,  // [num_picks]
    Index* out,            // [num_picks], may be either of them
    int num_picks) {
    int step = gridDim.x * blockDim.x;
    for (int n = blockIdx.x * blockDim.x + threadIdx.x; n < num_picks; n += step)
        out[n] = given[n] < 0 ? Index(-1) : planned[n];
}
