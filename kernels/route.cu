// Counting picks, exchanging the counts, sharing out quotas by source rank, and rewriting picks to slots.

#include "counts.cuh"
#include "number.cuh"
#include "relay.cuh"
#include "shares.cuh"

using namespace lplb;

typedef INDEX Index;              // int or long long, as the caller's topk_idx
constexpr int threads = THREADS;  // of a block
static_assert(threads % 32 == 0, "sums are made by whole warps");
static_assert(HEAD == 5 && HEAD_BATCH == 4, "what a row begins with, behind its status, is an int4");

// The logical expert of an id as callers give it; -1: none. `wrong`: the id is neither -1 nor an expert's.
__device__ int expert_of(Index id, const int* __restrict__ logical, int num_ids, bool& wrong) {
    int expert = id < 0 || id >= num_ids ? -1 : logical == nullptr ? int(id) : logical[id];
    wrong |= expert < 0 && id != -1;
    return expert;
}

extern "C" __global__ void __launch_bounds__(threads) count(
    const Index* __restrict__ topk_idx,  // [num_picks] ids in [0, num_ids), -1: none
    const Picks picks,
    const int* __restrict__ logical,     // [num_ids] the expert of each id, -1: none; or null, ids are experts
    int num_ids,
    int num_topk,                        // picks of a token, of which no two may be of one expert; or 0
    int* __restrict__ row,               // [HEAD + E], zeroed; or null
    int4* __restrict__ head,             // what the row begins with behind its status; the number of
                                         // the batch is counted here, so that a replayed graph does it too
    volatile int* error_flags,           // in the host's memory
    const Window window,
    int status) {
    extern __shared__ int histogram[];  // [HEAD + E]
    for (int e = threadIdx.x; e < picks.num_experts; e += threads) histogram[e] = 0;
    __syncthreads();  // all is zero before any thread counts
    bool wrong = false, repeated = false;
    int end = first_pick(picks, blockIdx.x + 1);
    for (int n = first_pick(picks, blockIdx.x) + threadIdx.x; n < end; n += threads) {
        int expert = expert_of(topk_idx[n], logical, num_ids, wrong);
        picks.experts[n] = short(expert);
        if (expert < 0) continue;
        atomicAdd(&histogram[expert], 1);
        if (num_topk == 0) continue;
        bool ignored;  // the thread that has the other pick says whether it is wrong
        for (int later = num_topk - 1 - n % num_topk; later > 0; --later)
            repeated |= expert_of(topk_idx[n + later], logical, num_ids, ignored) == expert;
    }
    if (wrong) error_flags[FLAG_OUT_OF_RANGE] = 1;
    if (repeated) error_flags[FLAG_REPEATED_PICK] = 1;
    if ((wrong || repeated) && row != nullptr) atomicMax(&row[HEAD_STATUS], REFUSED);
    __syncthreads();  // all have counted before the numbers are read
    for (int e = threadIdx.x; e < picks.num_experts; e += threads) {
        int number = histogram[e];
        picks.histograms[size_t(blockIdx.x) * picks.num_experts + e] = number;
        if (row != nullptr && number != 0) atomicAdd(&row[HEAD + e], number);
    }
    if (row == nullptr) return;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        int4 words = *head;
        head->w = words.w = (words.w + 1) & MAX_TOTAL;
        atomicMax(&row[HEAD_STATUS], status);
        row[HEAD_PLACEMENT] = words.x;
        row[HEAD_SLOT] = words.y;
        row[HEAD_PLANNER] = words.z;
        row[HEAD_BATCH] = words.w;
    }
    if (window.peers != nullptr) exchange<threads>(window, row, HEAD + picks.num_experts, histogram);
}

// Of the first rank of a node, one block each: they take the node's rows to other nodes, and theirs to it.
extern "C" __global__ void __launch_bounds__(threads) gather(
    const Window window, const Relay relay, const int* __restrict__ num_batches, int size) {
    gather_rows<threads>(window, relay, *num_batches, size);
}

extern "C" __global__ void __launch_bounds__(threads) broadcast(
    const Window window, const Relay relay, const int* __restrict__ num_batches, int size) {
    broadcast_rows<threads>(window, relay, *num_batches, size);
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
            shares[(size_t(r) * E + e) * C] = counts[size_t(r) * E + e];
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
    __syncthreads();  // the copies and the nodes' tokens are there before threads share them out
    Expert expert{N, rank, node, local, remote, supply, nodes};
    for (int r = threadIdx.x; r < R; r += blockDim.x) {
        int before = 0, home = r / table.num_ranks_per_node;
        for (int k = home * table.num_ranks_per_node; k < r; ++k) before += counts[size_t(k) * E + e];
        expert.share_out(r, home, counts[size_t(r) * E + e], before, own);
        for (int c = 0; c < N; ++c)
            shares[size_t(r) * E * C + copies[c].quota] = own[c];
    }
}

// Sends all tokens home; with invalid counts, none.
__device__ void send_home(const Table& table, const Batch& batch, bool counted) {
    int first = blockIdx.x * threads + threadIdx.x, step = gridDim.x * threads, lane = threadIdx.x % 32;
    int E = table.num_experts, C = table.max_replicas, R = table.num_ranks;
    for (int i = first; i < E * C; i += step) {
        int load = 0;
        for (int r = 0; counted && i % C == 0 && r < R; ++r) load += batch.counts[size_t(r) * E + i / C];
        batch.quota[i] = load;
    }
    for (int rank = first / 32; rank < R; rank += step / 32) {
        int load = 0;
        for (int i = lane; counted && i < R * E; i += 32)
            if (table.home_rank[i % E] == rank) load += batch.counts[i];
        load = __reduce_add_sync(~0u, load);
        if (lane == 0) batch.rank_load[rank] = load;
    }
    for (int i = first; !counted && i < R * E; i += step) batch.counts[i] = 0;
    for (int i = first; i < batch.num_guests; i += step) batch.guests[i] = -1;
}

// How the batch ends, by the worst status that each thread saw. The same to every thread of every block, for
// no block writes what it goes by.
__device__ int conclude(const Batch& batch, int worst) {
    __shared__ int status;
    __shared__ Total total;
    bool fine = !__syncthreads_or(worst);  // all endings are read; the tables of the caller are whole, too
    if (fine && batch.num_components == 1) return OPTIMAL;
    if (threadIdx.x == 0) {
        status = OPTIMAL;
        total = {0, 0};
    }
    __syncthreads();  // both are there before any thread adds to them
    if (worst != OPTIMAL) atomicMax(&status, worst);
    // Components know their own totals only.
    #pragma unroll 1
    for (int g = threadIdx.x; g < (batch.num_components + 31) / 32 * 32; g += threads)
        total.add(g < batch.num_components ? batch.endings[g].total : 0);
    __syncthreads();  // all is added before it is read
    return total.value() > MAX_TOTAL ? max(status, BAD_COUNTS) : status;
}

extern "C" __global__ void __launch_bounds__(threads) route(
    const Picks picks, const Table table, const Batch batch,
    Index* __restrict__ physical) {  // [num_picks] slots, -1: none
    extern __shared__ int shared[];
    int E = table.num_experts, M = table.num_several, N = table.num_copies;
    int node_size = table.num_ranks_per_node, nodes = table.num_ranks / node_size;
    int* lookup = shared;          // [E]
    int* first_copy = lookup + E;  // [M + 1]
    int* rank = first_copy + M + 1;
    int *node = rank + N, *slot = node + N, *local = slot + N, *remote = local + N;  // [N] each
    int* ends = remote + N;
    int* supply = ends + N;        // [M, nodes] tokens of each node
    int *before = supply + M * nodes, *mine = before + M;  // [M] of earlier ranks of this node, of this

    int n = first_pick(picks, blockIdx.x) + threadIdx.x, end = first_pick(picks, blockIdx.x + 1);
    int expert = n < end ? picks.experts[n] : -1, position = n < end ? picks.positions[n] : 0;
    int worst = OPTIMAL;
    #pragma unroll 1
    for (int g = threadIdx.x; g < batch.num_components; g += threads)
        worst = max(worst, batch.endings[g].status);
    for (int e = threadIdx.x; e < E; e += threads) lookup[e] = table.lookup[e];
    for (int m = threadIdx.x; m <= M; m += threads) first_copy[m] = table.first[m];
    for (int i = threadIdx.x; i < N; i += threads) {
        Copy copy = table.copies[i];
        int quota = batch.quota[copy.quota];
        int number = min(batch.counts[copy.rank * E + copy.expert], quota);
        rank[i] = copy.rank;
        node[i] = copy.node;
        slot[i] = copy.slot;
        local[i] = number;
        remote[i] = quota - number;
    }
    // By the last threads, while the first wait for the copies' loads. With a single node its tokens
    // are not asked for.
    int home = batch.rank / node_size;
    for (int i = threads - 1 - threadIdx.x + (nodes == 1 ? M : 0); i < M * (nodes + 1); i += threads) {
        int n = i / M, m = i - n * M, sum = 0;
        int begin = (n < nodes ? n : home) * node_size, last = n < nodes ? begin + node_size : batch.rank;
        const int* count = batch.counts + begin * E + table.experts[m];
        if (n == nodes) mine[m] = count[(batch.rank - begin) * E];
        each<16>(count, begin, last, 1, E, [&](int number) { sum += number; });
        if (n < nodes) supply[m * nodes + n] = sum;
        else before[m] = sum;
    }
    int status = conclude(batch, worst);  // behind its barrier the tables above are whole
    for (int m = threadIdx.x; m < M; m += threads) {
        int at = first_copy[m], number = first_copy[m + 1] - at;
        if (status == OPTIMAL) {
            Expert one{number, rank + at, node + at, local + at, remote + at, supply + m * nodes, nodes};
            one.share_out(batch.rank, home, mine[m], before[m], ends + at);
        }
        for (int c = 0; c < number; ++c)
            ends[at + c] = status != OPTIMAL ? int(MAX_TOTAL) : ends[at + c] + (c ? ends[at + c - 1] : 0);
    }
    __syncthreads();  // the ends of all shares are there before picks look for theirs
    for (; n < end; n += threads) {
        int at = expert < 0 ? -1 : lookup[expert];
        if (expert >= 0 && at < 0) {
            int c = first_copy[~at], last = first_copy[~at + 1] - 1;
            // More picks than were counted go to the last copy: any computes them right.
            while (c < last && position >= ends[c]) ++c;
            at = slot[c];
        }
        physical[n] = Index(at);
        if (n + threads < end) {
            expert = picks.experts[n + threads];
            position = picks.positions[n + threads];
        }
    }
    if (status != OPTIMAL) send_home(table, batch, status < BAD_COUNTS);
    if (blockIdx.x != 0) return;
    for (int i = threadIdx.x; batch.row != nullptr && i < HEAD + E; i += threads) batch.row[i] = 0;
    if (threadIdx.x != 0) return;
    *batch.status = status;
    ++batch.num_by_status[status];
    if (status != OPTIMAL) batch.error_flags[status] = 1;
}

// Slots for picks that were planned in the place of others: where a pick was none, it has none.
extern "C" __global__ void mask(
    const Index* given,    // [num_picks] -1: none
    const Index* planned,  // [num_picks]
    Index* out,            // [num_picks], may be either of them
    int num_picks) {
    int step = gridDim.x * blockDim.x;
    for (int n = blockIdx.x * blockDim.x + threadIdx.x; n < num_picks; n += step)
        out[n] = given[n] < 0 ? Index(-1) : planned[n];
}
