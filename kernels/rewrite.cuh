// Rewriting a rank's picks to slots, by the quotas of a batch.
#pragma once

#include "counts.cuh"
#include "number.cuh"
#include "shares.cuh"

namespace lplb {

// The tables by which a block rewrites picks, in shared memory.
struct Routes {
    int E, M, N, nodes;
    int* lookup;                        // [E] as the struct Table has it, and so is `first`
    int* first;                         // [M + 1]
    int *rank, *node, *slot;            // [N] of each copy
    int *local, *remote;                // [N] its tokens of its own rank, and of others
    int* ends;                          // [N] where its share of this rank's tokens ends
    int* supply;                        // [M, nodes] tokens of each node
    int *before, *mine;                 // [M] of earlier ranks of this node, of this rank

    __device__ Routes(const Table& table, int* shared)
        : E(table.num_experts), M(table.num_several), N(table.num_copies),
          nodes(table.num_ranks / table.num_ranks_per_node), lookup(shared), first(lookup + E), rank(first + M + 1),
          node(rank + N), slot(node + N), local(slot + N), remote(local + N), ends(remote + N), supply(ends + N),
          before(supply + M * nodes), mine(before + M) {}

    // Loads the copies' quotas and the ranks' counts. The counts of two neighbouring ranks are `stride` apart.
    template <int threads>
    __device__ void load(const Table& table, const int* counts, int stride, const int* quota, int this_rank) const {
        block_stride<threads>(E, [&](int e) { lookup[e] = table.lookup[e]; });
        block_stride<threads>(M + 1, [&](int m) { first[m] = table.first[m]; });
        block_stride<threads>(N, [&](int i) {
            Copy copy = table.copies[i];
            int tokens = quota[copy.quota];
            int number = min(counts[copy.rank * stride + copy.expert], tokens);
            rank[i] = copy.rank;
            node[i] = copy.node;
            slot[i] = copy.slot;
            local[i] = number;
            remote[i] = tokens - number;
        });
        // By the last threads, while the first threads wait for loads of copies. The tokens of a single node are
        // not needed.
        int size = table.num_ranks_per_node, home = this_rank / size;
        #pragma unroll 1
        for (int i = threads - 1 - threadIdx.x + (nodes == 1 ? M : 0); i < M * (nodes + 1); i += threads) {
            int n = i / M, m = i - n * M, sum = 0;
            int begin = (n < nodes ? n : home) * size, last = n < nodes ? begin + size : this_rank;
            const int* count = counts + begin * stride + table.experts[m];
            if (n == nodes) mine[m] = count[(this_rank - begin) * stride];
            each<16>(count, begin, last, 1, stride, [&](int number) { sum += number; });
            if (n < nodes) supply[m * nodes + n] = sum;
            else before[m] = sum;
        }
    }

    // Computes this rank's shares of the quotas. A barrier comes before.
    template <int threads>
    __device__ void share_out(int status, int this_rank, int home) const {
        block_stride<threads>(M, [&](int m) {
            int at = first[m], number = first[m + 1] - at;
            if (status == OPTIMAL) {
                Expert one{number, rank + at, node + at, local + at, remote + at, supply + m * nodes, nodes};
                one.share_out(this_rank, home, mine[m], before[m], ends + at);
            }
            #pragma unroll 1
            for (int c = 0; c < number; ++c)
                ends[at + c] = status != OPTIMAL ? int(MAX_TOTAL) : ends[at + c] + (c ? ends[at + c - 1] : 0);
        });
    }

    // Splits this rank's picks in proportion to the quotas: the CPU's `reuse` is the definition. A barrier comes before.
    template <int threads>
    __device__ void reuse(const Table& table, const int* own, int this_rank) const {
        int R = table.num_ranks;
        block_stride<threads>(M, [&](int m) {
            int at = first[m], number = first[m + 1] - at, expert = table.experts[m];
            long long picks = own[expert], total = 0, end = 0;
            #pragma unroll 1
            for (int c = 0; c < number; ++c) total += local[at + c] + remote[at + c];
            long long begin = total * (2 * ((this_rank + expert) % R) + 1) / (2 * R);
            #pragma unroll 1
            for (int c = 0; c < number; ++c) {
                end += local[at + c] + remote[at + c];
                ends[at + c] = total == 0 ? int(MAX_TOTAL) : int((picks * end - begin + total - 1) / total);
            }
        });
    }

    // The slot of a pick; -1: none. A barrier comes before.
    __device__ int slot_of(int expert, int position) const {
        int at = expert < 0 ? -1 : lookup[expert];
        if (expert < 0 || at >= 0) return at;
        int c = first[~at], last = first[~at + 1] - 1;
        // If there are more picks than were counted, the last copy takes them: every copy computes them correctly.
        #pragma unroll 1
        while (c < last && position >= ends[c]) ++c;
        return slot[c];
    }
};

// The worst status of the components that this thread looks at.
template <int threads>
__device__ int look_at_endings(const Batch& batch) {
    int worst = OPTIMAL;
    block_stride<threads>(batch.num_components, [&](int g) { worst = max(worst, batch.endings[g].status); });
    return worst;
}

// The status of the batch, from the worst status that each thread saw. It is the same to every thread of every block,
// since no block writes its input. general: with a least gain.
template <int threads, bool general>
__device__ int conclude(const Batch& batch, int worst) {
    __shared__ int status, home, bound;
    __shared__ Total total;
    bool fine = !__syncthreads_or(worst);  // all endings are read, and the tables of the caller are complete
    int least_gain = general ? batch.least_gain : 0;
    if (fine && batch.num_components == 1 && least_gain == 0) return OPTIMAL;
    if (threadIdx.x == 0) {
        status = OPTIMAL;
        home = bound = 0;
        total = {0, 0};
    }
    __syncthreads();  // all four are initialised before any thread adds to them
    if (worst != OPTIMAL) atomicMax(&status, worst);
    // Each component has checked its own total alone.
    #pragma unroll 1
    for (int g = threadIdx.x; g < (batch.num_components + 31) / 32 * 32; g += threads)
        total.add(g < batch.num_components ? batch.endings[g].total : 0);
    block_stride<threads>(least_gain == 0 ? 0 : batch.num_components, [&](int g) {
        atomicMax(&home, batch.endings[g].home);
        atomicMax(&bound, batch.endings[g].bound);
    });
    __syncthreads();  // all is added before it is read
    int ends = total.value() > MAX_TOTAL ? max(status, BAD_COUNTS) : status;
    // A component may have run out of rounds in a batch that stays at home.
    bool stays = home - bound < least_gain && (ends == OPTIMAL || ends == NOT_CONVERGED);
    return stays ? STAYED : ends;
}

// Sends all tokens home; with invalid counts, none. By the first blocks of the grid.
template <int threads>
__device__ void send_home(const Table& table, const Batch& batch, bool counted, int num_blocks) {
    int first = blockIdx.x * threads + threadIdx.x, step = num_blocks * threads, lane = threadIdx.x % 32;
    int E = table.num_experts, C = table.max_replicas, R = table.num_ranks;
    #pragma unroll 1
    for (int i = first; i < E * C; i += step) {
        int load = 0;
        for (int r = 0; counted && i % C == 0 && r < R; ++r) load += batch.counts[size_t(r) * E + i / C];
        batch.quota[i] = load;
    }
    #pragma unroll 1
    for (int rank = first / 32; rank < R; rank += step / 32) {
        int load = 0;
        for (int i = lane; counted && i < R * E; i += 32)
            if (table.home_rank[i % E] == rank) load += batch.counts[i];
        load = __reduce_add_sync(~0u, load);
        if (lane == 0) batch.rank_load[rank] = load;
    }
    #pragma unroll 1
    for (int i = first; !counted && i < R * E; i += step) batch.counts[i] = 0;
    #pragma unroll 1
    for (int i = first; i < batch.num_guests; i += step) batch.guests[i] = -1;
}

// Writes the load of each rank where picks keep the slots that they came with. No quotas are known then. By the first
// blocks of the grid.
template <int threads>
__device__ void keep_slots(const Table& table, const Batch& batch, int num_blocks) {
    int first = blockIdx.x * threads + threadIdx.x, step = num_blocks * threads;
    #pragma unroll 1
    for (int i = first; i < table.num_experts * table.max_replicas; i += step) batch.quota[i] = 0;
    #pragma unroll 1
    for (int r = first; r < table.num_ranks; r += step) batch.rank_load[r] = batch.given_load[r];
}

// Whether a batch with this status keeps the slots that it came with instead of going home.
__device__ bool keeps_slots(const Batch& batch, int status) { return status == STAYED && batch.given_load != nullptr; }

// Writes the status of the batch, by one thread.
__device__ void end_batch(const Batch& batch, int status) {
    *batch.status = status;
    if (status > STAYED && status != REUSED) batch.error_flags[status] = 1;
}

}  // namespace lplb
