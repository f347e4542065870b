// A whole plan in one launch, of a batch that one block holds.
//
// The steps are those of route.cu and flow.cu, by the same functions. What those launches pass on in global memory
// stays in shared memory here. All tables are requested before the first is used. Picks are numbered while the rows
// of other ranks arrive.

#pragma once

#include "count.cuh"
#include "exchange.cuh"
#include "flow.cuh"
#include "rewrite.cuh"
#include "statistics.cuh"

namespace lplb {

typedef Variant<SIZE, PARTS, TURNS, MORE, THREADS> V;
static_assert(V::pushing < V::threads, "threads that do not push have other work meanwhile");

// An array that is being copied to shared memory. The constructor issues the loads of a thread's first elements.
template <typename T, int at_once = 1>
struct Arriving {
    const T* from;
    int number;
    T several[at_once];

    __device__ Arriving(const T* from, int number) : from(from), number(number) {
        #pragma unroll
        for (int j = 0; j < at_once; ++j)
            several[j] = threadIdx.x + j * V::threads < number ? from[threadIdx.x + j * V::threads] : T{};
    }

    __device__ const T* store(T* to) const {
        #pragma unroll
        for (int j = 0; j < at_once; ++j)
            if (threadIdx.x + j * V::threads < number) to[threadIdx.x + j * V::threads] = several[j];
        #pragma unroll 1
        for (int i = threadIdx.x + at_once * V::threads; i < number; i += V::threads) to[i] = from[i];
        return to;
    }
};

// Takes the next `number` elements of shared memory.
template <typename T>
__device__ T* take(char*& shared, int number) {
    T* first = reinterpret_cast<T*>(shared);
    shared += number * sizeof(T);
    return first;
}

// The arguments are those of the kernels; arrays that only the steps share are laid out in `shared`. `solver` is as in
// `solve_component`.
template <bool general, typename Solver>
__device__ void make_plan(const Given& given, const Ids& physical, Picks picks, int4* head, Window window, int status,
                          Problem p, Table table, Batch batch, char* shared, Solver solver) {
    int E = p.num_experts, R = p.num_ranks, M = table.num_several, C = p.max_replicas;
    bool exchanges = window.peers != nullptr;
    int size = exchanges ? window.size : HEAD + E;
    p.counts.stride = exchanges ? size : E;

    long long ids[4];
    given.load<V::threads>(threadIdx.x, picks.num_picks, ids);
    int4 words{};
    bool unread = false;
    if (exchanges) {
        if (threadIdx.x == 0) words = *head;
        unread = window.state->unread;
    }
    Arriving<Word*> peers(window.peers, exchanges ? R : 0);
    Arriving<int, 4> counts(p.counts.rows, exchanges ? 0 : R * E);
    Arriving<Copy> copies(table.copies, table.num_copies);
    Arriving<int> lookup(table.lookup, E), experts(table.experts, M), first(table.first, M + 1);
    long long word = word_of_totals(batch.statistics);
    int rank = threadIdx.x < V::size ? p.net.ranks[threadIdx.x] : 0;
    ResidualEdge<V> edges[V::turns];
    const Edge* of_rank = first_edges<V>(p, 0, edges);
    Addend addend;
    Component<V> c = lay_out_component<V>(p, 0, shared, of_rank, addend);

    char* at = shared + (p.net.max_arcs * (2 * sizeof(int) + sizeof(Arc) + sizeof(short)) + 15) / 16 * 16;
    at = solver.lay_out(p, at);
    Ending* endings = take<Ending>(at, p.num_components);
    table.copies = copies.store(take<Copy>(at, table.num_copies));
    window.peers = exchanges ? peers.store(take<Word*>(at, R)) : nullptr;
    window.rows = take<int>(at, R * p.counts.stride);
    p.counts.rows = exchanges ? window.rows : counts.store(window.rows);
    const int* all_counts = p.counts.rows + p.counts.head;  // of a rank `stride` from the next one's
    int *row = take<int>(at, size), *quota = take<int>(at, E * C);
    int *rank_load = take<int>(at, R), *at_home = take<int>(at, R);
    table.lookup = lookup.store(take<int>(at, E));
    table.experts = experts.store(take<int>(at, M));
    table.first = first.store(take<int>(at, M + 1));
    int* runs = take<int>(at, (1 + V::threads / 32) * E);
    picks.positions = take<int>(at, picks.num_picks);
    Routes routes(table, reinterpret_cast<int*>(at));
    picks.experts = reinterpret_cast<short*>(routes.mine + M);
    block_stride<V::threads>(size, [&](int i) { row[i] = 0; });
    block_stride<V::threads>(R, [&](int r) { at_home[r] = 0; });
    __syncthreads();  // all sums are zero before any thread counts

    bool refused = count_picks<V::threads>(given, picks, 0, row + HEAD, p.error_flags, ids);
    if (p.given_load != nullptr) count_by_rank<V::threads>(given, picks, 0, given.num_ids / R, row + HEAD + E);
    long long deadline = 0;
    if (exchanges) {
        if (refused) atomicMax(&row[HEAD_STATUS], REFUSED);
        if (threadIdx.x == 0) begin_row(head, words, row, status);
        deadline = send_row<V::threads>(window, row, unread);
    } else {
        __syncthreads();  // all have counted before picks are numbered
    }
    number<V::threads>(picks, 0, exchanges ? row + HEAD : all_counts + p.counts.rank * p.counts.stride, p.error_flags,
                       runs);
    if (exchanges) receive<V::threads>(window, row[HEAD_BATCH], deadline);

    int g = 0;
    #pragma unroll 1
    for (;; ++g) {
        if (g > 0) {
            __syncthreads();  // all threads have read the last component before the next one overwrites it
            rank = threadIdx.x < V::size ? p.net.ranks[g * V::size + threadIdx.x] : 0;
            of_rank = first_edges<V>(p, g, edges);
            c = lay_out_component<V>(p, g, shared, of_rank, addend);
        }
        // Tables have places for the most components that may arise; the last ones may be empty.
        bool is_last = g + 1 == p.num_components || p.net.shape[g + 1].ranks == 0;
        Ending ending = begin<V, general>(p, g, c, shared, addend, quota);
        if (is_last && threadIdx.x >= V::pushing) {
            constexpr int others = V::threads - V::pushing;
            int other = threadIdx.x - V::pushing, worst = ending.status;
            #pragma unroll 1
            for (int i = other; i < R * E; i += others) batch.counts[i] = all_counts[i / E * p.counts.stride + i % E];
            long long total = ending.total;
            #pragma unroll 1
            for (int before = 0; before < g; ++before) {
                worst = max(worst, endings[before].status);
                total += endings[before].total;
            }
            if (worst < BAD_COUNTS && total <= MAX_TOTAL) {
                keep_sample(batch.statistics, table, batch, all_counts, p.counts.stride, word, other, others);
                add_at_home(table, all_counts, p.counts.stride, at_home, other, others);
            }
        }
        finish(p, g, c, edges, rank, ending, quota, rank_load, solver);
        if (threadIdx.x == 0) endings[g] = ending;
        if (is_last) break;
    }
    __syncthreads();  // quotas and endings are written before any thread reads them

    batch.endings = endings;
    batch.num_components = g + 1;
    routes.load<V::threads>(table, all_counts, p.counts.stride, quota, batch.rank);
    status = conclude<V::threads, true>(batch, look_at_endings<V::threads>(batch));  // its barrier completes the tables above
    bool keeps = keeps_slots(batch, status);
    block_stride<V::threads>(keeps ? R : 0, [&](int r) { rank_load[r] = batch.given_load[r]; });
    routes.share_out<V::threads>(status, batch.rank, batch.rank / table.num_ranks_per_node);
    __syncthreads();  // the ends of all shares are written before picks are compared with them
    constexpr int rewriting = V::threads - 32;
    if (threadIdx.x >= rewriting) {  // one warp keeps the statistics meanwhile
        Batch solved = batch;
        solved.rank_load = rank_load;
        tally(batch.statistics, table, solved, status, keeps, at_home, word);
    } else if (keeps) {
        block_stride<rewriting>(picks.num_picks, [&](int n) { physical.set(n, int(given.ids[n])); });
    } else {
        for (int n = threadIdx.x; n < picks.num_picks; n += rewriting)
            physical.set(n, routes.slot_of(picks.experts[n], picks.positions[n]));
    }
    if (status == OPTIMAL) {
        block_stride<V::threads>(E * C, [&](int i) { batch.quota[i] = quota[i]; });
        block_stride<V::threads>(R, [&](int r) { batch.rank_load[r] = rank_load[r]; });
    } else if (keeps) {
        keep_slots<V::threads>(table, batch, 1);
    } else {
        send_home<V::threads>(table, batch, status < BAD_COUNTS, 1);
    }
    if (threadIdx.x == 0) end_batch(batch, status);
}

}  // namespace lplb
