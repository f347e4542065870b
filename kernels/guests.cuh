// A component whose ranks have guest slots: the copies of a batch are its residents and the guests chosen for it.
//
// The host provides tables of the residents. All that depends on the guests is made here, by the component's block.
// Arcs and edges of the flow are in shared memory. The tables that `route` reads are in device memory.
#pragma once

#include "choose.cuh"
#include "flow.cuh"

namespace lplb {

// The experts of a component, by their numbers in it, and their copies in this batch. In shared memory.
template <typename V>
struct Experts {
    int number;                 // of experts
    Resident* residents;        // [number]
    Replica* replicas;          // [max_replicas] of residents, -1 behind the last
    typename V::Set* ranks;     // [number] that hold a copy
    int* load;                  // [number]
    int* filled;                // [size, num_local_slots] tokens of each place in the fill that chose the guests
    int* guests;                // [size, num_slots] the expert in each guest slot, -1: none
    int* first_edge;            // [size + 1] of each rank, and the number of all
    short* place;               // [number] where the arcs of an expert with several copies begin
    short* several;             // [number] how many experts with several copies come before
    int own_rank, own_resident;  // of this thread's first place: its rank, and its expert or -1
    Arc* arcs;                  // [max_arcs] by expert, then rank
    int* tokens;                // [max_arcs] of each copy
    int* load_by_place;         // [max_arcs] of experts with several copies
    Edge* edges;                // [size * max_edges] by rank
};

// Most loops in this file run once or twice. Unrolled, fetching their instructions would take longer than running them.

// Makes the quotas of the component's experts zero: most copies do not exist. By the warps from `first` on.
template <typename V>
__device__ void zero_quotas(const Problem& p, const Experts<V>& experts, int first, int* __restrict__ quota) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    #pragma unroll 1
    for (int i = warp - first; i < experts.number; i += V::threads / 32 - first) {
        int* of_expert = quota + experts.residents[i].expert * p.max_replicas;
        #pragma unroll 1
        for (int column = lane; column < p.max_replicas; column += 32) of_expert[column] = 0;
    }
}

// Sums of a value of each thread.
struct Scanned {
    int before, total;  // over the threads before this one, and over all
};

// Adds up a value of each thread. `of_warp`: memory for a word of each warp. `meet`: a barrier of the block.
template <typename V, typename Meet>
__device__ Scanned scan(int own, int* of_warp, Meet meet) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, end = own, before = 0, total = 0;
    #pragma unroll
    for (int other = 1; other < 32; other *= 2) {
        int its = __shfl_up_sync(~0u, end, other);
        if (other <= lane) end += its;
    }
    if (lane == 31) of_warp[warp] = end;
    meet();  // the sums of all warps are written before they are added
    #pragma unroll
    for (int w = 0; w < V::threads / 32; ++w) {
        int sum = of_warp[w];
        before += w < warp ? sum : 0;
        total += sum;
    }
    return {before + end - own, total};
}

// Finds where the arcs of each expert with several copies begin; a thread has one expert. Returns the number of all
// arcs, and of these experts in the bits from 16 on, the same to every thread.
template <typename V>
__device__ int place_arcs(const Experts<V>& experts) {
    static_assert(V::threads >= MAX_EXPERTS, "a thread has one expert");
    __shared__ int of_warp[V::threads / 32];
    int i = threadIdx.x, number = i < experts.number ? number_of<V>(experts.ranks[i]) : 0;
    int own = number > 1 ? 1 << 16 | number : 0;  // one expert in the high half, its arcs in the low one
    Scanned sums = scan<V>(own, of_warp, [] { __syncthreads(); });
    if (i >= experts.number) return sums.total;
    int begin = sums.before;
    experts.place[i] = short(begin & 0xffff);
    experts.several[i] = short(begin >> 16);
    if (number > 1) experts.load_by_place[begin & 0xffff] = experts.load[i];
    return sums.total;
}

// The number of an expert's guests that come before the one in a rank's slot: in lower slots, or on lower ranks.
// `holders`: of all its guests.
template <typename V>
__device__ int earlier_guests(const Experts<V>& experts, int num_slots, int expert, int rank, int slot,
                              typename V::Set holders) {
    int earlier = 0;
    if (num_slots == 1) return number_of<V>(holders & below<V>(rank));
    for (; holders != 0; holders &= holders - 1) {
        int other = lowest_of<V>(holders), nth = 0;
        while (experts.guests[other * num_slots + nth] != expert) ++nth;
        earlier += nth < slot || (nth == slot && other < rank);
    }
    return earlier;
}

// Calls `take` for each copy of an expert that has several, by the threads from `first` on, `step` in all. Guests go to
// the last threads, which have no homes. `take` gets the expert's number, the copy's local rank, its column, its place among
// the copies that may get tokens, and its slot. A slot below 0 is the rank's guest slot -1 - slot.
template <typename V, typename Take>
__device__ void each_copy(const Guests& g, const Experts<V>& experts, int num_ranks, int first, int step, Take take) {
    #pragma unroll 1
    for (int i = first; i < experts.number; i += step) {
        Resident one = experts.residents[i];
        if (number_of<V>(experts.ranks[i]) > 1) take(i, int(one.home), 0, 0, one.slot);
    }
    #pragma unroll 1
    for (int i = first; i < g.max_replicas; i += step) {
        Replica one = experts.replicas[i];
        if (one.expert < 0) break;
        take(int(one.expert), int(one.rank), int(one.column), int(one.nth), one.slot);
    }
    #pragma unroll 1
    for (int rank = step - 1 - first; rank < num_ranks; rank += step) {
        #pragma unroll 1
        for (int slot = 0; slot < g.num_slots; ++slot) {
            int expert = experts.guests[rank * g.num_slots + slot];
            if (expert < 0) continue;
            Resident one = experts.residents[expert];
            typename V::Set residents = one.ranks;
            int earlier = earlier_guests(experts, g.num_slots, expert, rank, slot, experts.ranks[expert] & ~residents);
            take(expert, rank, one.columns + earlier, number_of<V>(residents) + earlier, -1 - slot);
        }
    }
}

// Writes all copies as arcs, and adds the load of experts with one copy to their ranks.
template <typename V>
__device__ void put_copies(const Problem& p, const Guests& g, const Experts<V>& experts, const Component<V>& c) {
    int own = threadIdx.x;
    if (own < experts.number && number_of<V>(experts.ranks[own]) == 1)
        atomicAdd(&c.staying()[experts.residents[own].home], experts.load[own]);
    each_copy(g, experts, c.shape.ranks, threadIdx.x, V::threads, [&](int i, int rank, int column, int, int) {
        typename V::Set holders = experts.ranks[i];
        int place = experts.place[i], quota = experts.residents[i].expert * p.max_replicas + column;
        experts.arcs[place + number_of<V>(holders & below<V>(rank))] = Arc{holders, quota, short(place), short(rank)};
    });
}

// Writes the guests, and the tables of copies that `route` reads, by the threads from `first` on. `arcs`: as
// `place_arcs` returns them.
template <typename V>
__device__ void write_routes(const Problem& p, const Guests& g, const Experts<V>& experts, const Component<V>& c,
                             int arcs, int* __restrict__ chosen, int first) {
    constexpr int step = V::threads - V::apart;
    #pragma unroll 1
    for (int rank = first; rank < c.shape.ranks; rank += step)
        #pragma unroll 1
        for (int slot = 0; slot < g.num_slots; ++slot) {
            int expert = experts.guests[rank * g.num_slots + slot];
            chosen[c.ranks[rank] * g.num_slots + slot] = expert < 0 ? -1 : experts.residents[expert].expert;
        }
    if (g.lookup == nullptr) return;
    int first_several = component<V>() * g.max_several, first_copy = component<V>() * g.max_copies;
    #pragma unroll 1
    for (int i = first; i < experts.number; i += step) {
        bool is_several = number_of<V>(experts.ranks[i]) > 1;
        int m = first_several + experts.several[i], expert = experts.residents[i].expert;
        g.lookup[expert] = is_several ? ~m : experts.residents[i].slot;
        if (!is_several) continue;
        g.experts[m] = expert;
        g.first[m] = first_copy + experts.place[i];
    }
    // Entries beyond the last expert have no copies.
    int end = g.max_several + (component<V>() == p.num_components - 1);
    #pragma unroll 1
    for (int m = (arcs >> 16) + first; m < end; m += step) g.first[first_several + m] = first_copy + (arcs & 0xffff);
    each_copy(g, experts, c.shape.ranks, first, step, [&](int i, int rank, int column, int nth, int slot) {
        int global = c.ranks[rank], expert = experts.residents[i].expert;
        if (slot < 0) slot = (global + 1) * g.num_local_slots - g.num_slots - 1 - slot;
        g.copies[first_copy + experts.place[i] + nth] = Copy{short(global), short(global / g.num_ranks_per_node), slot,
                                                             expert, expert * p.max_replicas + column};
    });
}

// The expert in a place of a rank, or -1. `resident`: as `resident_in`.
template <typename V>
__device__ int expert_in(const Guests& g, const Experts<V>& experts, int rank, int place, int resident) {
    int residents = g.num_local_slots - g.num_slots;
    return place < residents ? resident : experts.guests[rank * g.num_slots + place - residents];
}

// Makes the edges of all ranks behind `place_arcs`, by rank and then place. A thread has one copy at a time. The first
// barrier is before places of arcs are read. Returns whether some copy has several edges, the same to every thread.
template <typename V>
__device__ bool make_edges(const Guests& g, const Experts<V>& experts, int ranks) {
    typedef typename V::Set Set;
    constexpr int bits_of_set = 8 * sizeof(Set);
    __shared__ int of_warp[2][V::threads / 32];  // of two rounds: a round is read while the next is written
    int S = g.num_local_slots, before = 0, has_several = 0;
    #pragma unroll 1
    for (int begin = 0, round = 0; begin < ranks * S; begin += V::threads, round ^= 1) {
        int i = begin + threadIdx.x, rank = experts.own_rank, resident = experts.own_resident;
        if (begin > 0) {
            rank = i / S;
            resident = rank < ranks ? resident_in<V>(g, rank, i % S) : -1;
        }
        int expert = rank < ranks ? expert_in(g, experts, rank, i - rank * S, resident) : -1;
        Set holders = expert < 0 ? Set{} : experts.ranks[expert];
        int others = max(0, number_of<V>(holders) - 1);
        // Places of arcs, too, are written before they are read.
        Scanned sums = scan<V>(others, of_warp[round], [&] { has_several |= __syncthreads_or(others > 1); });
        int first = before + sums.before;
        if (rank < ranks && i == rank * S) experts.first_edge[rank] = first;
        before += sums.total;
        if (others == 0) continue;
        // Ranks begin with different targets, so that they do not all fill the same one. The targets follow this
        // rank, which is rotated to the lowest bit.
        Set rest = holders >> rank | holders << ((bits_of_set - rank) % bits_of_set);
        int arcs = experts.place[expert], own = number_of<V>(holders & below<V>(rank));
        #pragma unroll 1
        for (int nth = 0; nth < others; ++nth) {
            rest &= rest - 1;
            int target = (lowest_of<V>(rest) + rank) % bits_of_set, behind = own + 1 + nth;
            int to = arcs + (behind <= others ? behind : behind - others - 1);
            experts.edges[first + nth] = {short(arcs + own), short(to), (unsigned char)(target), (unsigned char)(nth),
                                          (unsigned char)(others)};
        }
    }
    if (threadIdx.x + ranks <= V::size) experts.first_edge[threadIdx.x + ranks] = before;
    return has_several != 0;
}

// Lays out the component in shared memory. The experts' residents, their replicas and their loads come later.
template <typename V>
__device__ Experts<V> lay_out(const Problem& p, const Guests& g, char* shared) {
    const Network& net = p.net;
    Experts<V> experts;
    experts.number = g.num_experts[component<V>()];
    experts.residents = reinterpret_cast<Resident*>(shared);
    experts.ranks = reinterpret_cast<typename V::Set*>(experts.residents + net.max_experts);
    experts.load = reinterpret_cast<int*>(experts.ranks + net.max_experts);
    experts.filled = experts.load + net.max_experts;
    experts.guests = experts.filled + V::size * g.num_local_slots;
    experts.first_edge = experts.guests + V::size * g.num_slots;
    experts.replicas = reinterpret_cast<Replica*>(experts.first_edge + V::size + 1);
    experts.place = reinterpret_cast<short*>(experts.replicas + g.max_replicas);
    experts.several = experts.place + net.max_experts;
    int of_rank = 4 * (g.num_local_slots + g.num_slots + 1);
    int of_expert = sizeof(Resident) + sizeof(typename V::Set) + 8;
    int end = net.max_experts * of_expert + V::size * of_rank + 4 + g.max_replicas * sizeof(Replica);
    experts.arcs = reinterpret_cast<Arc*>(shared + (end + 15) / 16 * 16);
    experts.edges = reinterpret_cast<Edge*>(experts.arcs + net.max_arcs);
    experts.load_by_place = reinterpret_cast<int*>(experts.edges + (V::choices > 1 ? 0 : V::size * net.max_edges));
    experts.tokens = experts.load_by_place + net.max_arcs;
    experts.own_rank = int(threadIdx.x / unsigned(g.num_local_slots));
    experts.own_resident = resident_in<V>(g, experts.own_rank, int(threadIdx.x % unsigned(g.num_local_slots)));
    for (int i = threadIdx.x; i < V::size * g.num_slots; i += V::threads) experts.guests[i] = -1;
    return experts;
}

// Calls `take` for each place of a rank that has a copy of an expert with several: the place's number, its rank, and the arc.
template <typename V, typename Take>
__device__ void each_filled(const Guests& g, const Experts<V>& experts, int num_ranks, Take take) {
    each_place<V>(g, num_ranks, experts.own_rank, experts.own_resident, [&](int i, int rank, int place, int resident) {
        int expert = expert_in(g, experts, rank, place, resident);
        if (expert < 0) return;
        typename V::Set holders = experts.ranks[expert];
        if (number_of<V>(holders) == 1) return;
        take(i, rank, experts.place[expert] + number_of<V>(holders & below<V>(rank)));
    });
}

// The start of the flow where a fill chose the guests: the tokens of that fill.
template <typename V>
__device__ void start_filled(const Guests& g, const Experts<V>& experts, const Component<V>& c) {
    each_filled(g, experts, c.shape.ranks, [&](int i, int rank, int arc) {
        c.tokens[arc] = experts.filled[i];
        atomicAdd(&c.movable()[rank], experts.filled[i]);
    });
}

// Makes the arcs of residents and guests, and the edges of a flow. Returns numbers as `place_arcs` does.
template <typename V>
__device__ int put_guests(const Problem& p, const Guests& g, const Experts<V>& experts, Component<V>& c) {
    for (int rank = threadIdx.x; rank < c.shape.ranks; rank += V::threads) {
        c.movable()[rank] = 0;
        for (int slot = 0; slot < g.num_slots; ++slot) {
            int expert = experts.guests[rank * g.num_slots + slot];
            if (expert >= 0) add_to_set(&experts.ranks[expert], rank);
        }
    }
    __syncthreads();  // sums are zero, and every expert has its guests, before copies are counted
    int arcs = place_arcs<V>(experts);
    c.shape.arcs = arcs & 0xffff;
    if constexpr (V::choices > 1) {
        __syncthreads();  // every expert has its place before its copies are written there
    } else {
        c.shape.most_nth = make_edges(g, experts, c.shape.ranks);
    }
    put_copies(p, g, experts, c);
    return arcs;
}

// Lays out the flow over residents and guests, and solves it unless the batch failed before (`solves`). Meanwhile the
// threads that do not push write the tables for `route`, and zero the quotas (`zeroes`). Returns false if the rounds did
// not suffice. `is_filled`: a fill chose the guests.
template <typename V, bool general>
__device__ bool solve_filled(const Problem& p, const Guests& g, const Experts<V>& experts, Component<V>& c,
                             bool solves, bool is_filled, bool zeroes, int* __restrict__ quota,
                             int* __restrict__ chosen) {
    int arcs = put_guests(p, g, experts, c);
    __syncthreads();  // all copies and edges are written before any thread reads them
    bool balances = threadIdx.x < V::pushing, is_balanced = true;
    ResidualEdge<V> edges[V::turns];
    if (solves && balances) {
        int first = experts.first_edge[threadIdx.x / V::parts];
        c.edges = experts.edges + first;
        c.own_edges = experts.first_edge[threadIdx.x / V::parts + 1] - first;
        // The maximum over a warp suffices, since only the ranks of a warp run in step.
        c.shape.most_edges = __reduce_max_sync(~0u, c.own_edges);
        make_ready<V>(c.edges, c.own_edges, 0, edges);
    }
    if (is_filled) start_filled(g, experts, c);
    else split_evenly(c, experts.load_by_place);
    __syncthreads();  // all copies have their tokens, and ranks their sums, before any thread reads them
    if (!balances) {
        if (zeroes) zero_quotas(p, experts, V::pushing / 32, quota);
        write_routes(p, g, experts, c, arcs, chosen, threadIdx.x - V::pushing);
        // A warp arrives at the barrier as one: compute-sanitizer takes a warp that arrives in parts for two.
        __syncwarp();
    } else if (solves && c.shape.arcs > 0) {
        is_balanced = balance<V, general>(c, edges, p.max_rounds);
    }
    return !__syncthreads_or(!is_balanced);  // tokens and loads are final before any thread reads them
}

// The blocks of a cluster choose the guests of a component for one batch, and its first block solves it over
// residents and guests. Where it has replicas, the flow over the residents decides whether guests are wanted. It is
// solved while the other blocks make fills. By cost each of several blocks plans a choice of guests (`PlanByCost`).
template <typename V, bool general, typename Choose>
__device__ void solve_with_guests(const Problem& p, const Guests& g, char* shared, Choose choose) {
    typedef typename V::Set Set;
    if (component<V>() >= p.num_components) {
        number_picks<V>(p, shared);
        return;
    }
    const Network& net = p.net;
    __shared__ Set targets[V::size], layers[V::size];
    __shared__ int first_of_rank[V::size], second_of_rank[V::size];
    __shared__ Verdicts verdicts;
    int* quota = p.quota + size_t(blockIdx.y) * p.num_experts * p.max_replicas;
    int* rank_load = p.rank_load + size_t(blockIdx.y) * p.num_ranks;
    int* chosen = g.chosen + size_t(blockIdx.y) * p.num_ranks * g.num_slots;

    // Neighbouring threads share the rows of one expert where there are more threads than experts.
    int sharing = 1;
    while (sharing < 32 && 2 * sharing <= p.counts.num_rows && 2 * sharing * net.max_experts <= V::threads)
        sharing *= 2;
    int expert = threadIdx.x / sharing;
    int packed = expert < net.max_experts ? net.experts[component<V>() * net.max_experts + expert] : -1;
    int rank = threadIdx.x < V::size ? net.ranks[component<V>() * V::size + threadIdx.x] : 0;
    // Used late, so loaded early.
    Resident resident{};
    Replica replica{};
    const Replica* replicas = g.replicas + component<V>() * g.max_replicas;
    bool has_resident = threadIdx.x < net.max_experts, has_replica = threadIdx.x < g.max_replicas;
    if (has_resident) resident = g.residents[component<V>() * net.max_experts + threadIdx.x];
    if (has_replica) replica = replicas[threadIdx.x];
    begin_verdicts<V>(verdicts);
    Experts<V> experts = lay_out<V>(p, g, shared);
    Component<V> c{experts.arcs, nullptr, experts.tokens, first_of_rank, second_of_rank, targets, layers,
                   net.shape[component<V>()], nullptr, net.ranks + component<V>() * V::size, p.speed, nullptr, 0};
    int base = p.base && threadIdx.x < c.shape.ranks ? p.base[rank] : 0;
    if (threadIdx.x < V::size) {
        c.staying()[threadIdx.x] = base;
        c.movable()[threadIdx.x] = base;  // where the loads at the start of fills are added up
    }
    Ending ending = add_up<V, general>(p, component<V>(), experts.load, c.staying(), quota, sharing, packed, base);
    if (has_resident) {
        experts.residents[threadIdx.x] = resident;
        experts.ranks[threadIdx.x] = Set(resident.ranks);
    }
    if (has_replica) experts.replicas[threadIdx.x] = replica;
    #pragma unroll 1
    for (int i = V::threads + threadIdx.x; i < g.max_replicas; i += V::threads) experts.replicas[i] = replicas[i];
    ending.status = max(ending.status, p.status);
    bool solves = ending.status == OPTIMAL && c.shape.ranks > 0, chooses = solves && c.shape.ranks > 1;
    if constexpr (V::choices > 1) {
        if (!choose.plan(p, experts, c, solves, ending.total, base, verdicts, quota, chosen)) return;
    } else {
        bool is_first = block_of_component<V>() == 0, is_filled = false;
        bool zeroes = !chooses || g.max_replicas > 0 || V::blocks == 1 || !Choose::fills;  // else warps without a fill do it
        if (chooses) choose.aim(c, ending.total, reinterpret_cast<char*>(experts.arcs));
        if (V::blocks > 1 && is_first && threadIdx.x == 0)  // the best fill
            arrivals_expect(&verdicts.best, c.shape.ranks * (g.num_slots + g.num_local_slots) * int(sizeof(int)));
        if (V::blocks > 1) cluster_wait();  // the other blocks have begun before words are sent to them
        __syncthreads();  // experts have their residents before any thread reads them
        #pragma unroll 1
        for (bool is_last = false;; is_last = true) {
            if (is_first && (is_last || (chooses && g.max_replicas > 0))) {
                if (!solve_filled<V, general>(p, g, experts, c, solves, is_filled, zeroes, quota, chosen))
                    ending.status = NOT_CONVERGED;
                zeroes = false;
            }
            if (is_last) break;
            bool has_guests = chooses && choose(experts, c, verdicts, ending.status == OPTIMAL, base, quota);
            if (!is_first) return;  // all words for this block have arrived
            // Without guests the residents' plan stays. A single block has overwritten that plan by fills.
            if (chooses && g.max_replicas > 0 && !has_guests && V::blocks > 1) break;
            is_filled = has_guests && Choose::fills;
            if (g.max_replicas > 0) {
                __syncthreads();  // all have read the residents' loads before they are cleared
                if (threadIdx.x < V::size) c.staying()[threadIdx.x] = base;
            }
            if (!has_guests)
                for (int i = threadIdx.x; i < V::size * g.num_slots; i += V::threads) experts.guests[i] = -1;
            __syncthreads();  // useless guests and sums of the residents are cleared before copies are counted
        }
    }
    if (solves) {
        #pragma unroll 1
        for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) quota[c.arcs[a].quota] = c.tokens[a];
        #pragma unroll 1
        for (int i = threadIdx.x; i < experts.number; i += V::threads)
            if (number_of<V>(experts.ranks[i]) == 1)
                quota[experts.residents[i].expert * p.max_replicas] = experts.load[i];
        if (threadIdx.x < c.shape.ranks) rank_load[rank] = c.load()[threadIdx.x] - base;
    }
    if (threadIdx.x == 0) p.endings[blockIdx.y * p.num_components + component<V>()] = ending;
    // No word may come to a block that has ended.
    if constexpr (V::blocks > 1)
        if (Choose::fills && chooses && g.max_replicas > 0) hear<V>(verdicts, 0);
}

// Chooses the guests, by the level of the residents in `c.load()` where there are replicas.
template <typename V, bool general>
struct Chooser {
    static constexpr bool fills = true;
    const Problem& p;
    const Guests& g;
    int target = 0;  // the level that suffices

    // Sets the target; `total` is the component's load. It uses `shared`, which has no contents yet.
    __device__ void aim(const Component<V>& c, int total, char* shared) {
        int mean = highest_mean(p, Speeds<V, general>(p, c.ranks, c.shape.ranks), total, c.shape.ranks, shared);
        target = int(min(mean + (long long)mean * g.tolerance / GUEST_PARTS, (long long)MAX_TOTAL));
    }

    // As `fill_slots`. `is_solved`: whether the residents are, if there are replicas. Else `c.movable()` has the base
    // loads, and warps of the first block that make no fills make the quotas zero.
    __device__ bool operator()(const Experts<V>& experts, const Component<V>& c, Verdicts& verdicts, bool is_solved,
                               int base, int* __restrict__ quota) const {
        Speeds<V, general> speeds(p, c.ranks, c.shape.ranks);
        int S = g.num_local_slots, num_places = V::size * S, set = sizeof(typename V::Set), lane = threadIdx.x % 32;
        char* shared = reinterpret_cast<char*>(experts.arcs);
        Start<V> start{c.shape.ranks, experts.number, S, g.num_slots, g.num_ranks_per_node, g.max_replicas > 0,
                       experts.residents, experts.ranks, reinterpret_cast<Place*>(shared), c.movable()};
        // By cost there is no flow: the level of the residents is that of the even split.
        bool is_first = block_of_component<V>() == 0, has_replicas = V::choices == 1 && g.max_replicas > 0;
        // The first block solves the residents' flow instead of fills.
        bool fills = V::blocks == 1 || !has_replicas || !is_first;
        if (V::blocks == 1 && has_replicas) {
            if (threadIdx.x < V::size) start.load[threadIdx.x] = base;
            __syncthreads();  // base loads are written before tokens are added
        }
        if (fills) split_over_residents(g, start, experts.load, experts.own_rank, experts.own_resident);
        constexpr int filling = FILLS / V::blocks;
        if (V::blocks > 1 && !has_replicas && is_first && threadIdx.x / 32 >= filling)
            zero_quotas(p, experts, filling, quota);
        int level = 0;
        #pragma unroll
        for (int i = 0; i < V::words; ++i) {
            int rank = lane + 32 * i;
            if (rank >= c.shape.ranks || (has_replicas && !is_first)) continue;
            level = max(level, speeds.level(has_replicas ? c.load()[rank] : start.load[rank], i));
        }
        level = is_solved ? __reduce_max_sync(~0u, level) : 0;
        if (level <= target && (V::blocks == 1 || !has_replicas)) return false;  // every block decides the same
        int of_start = sizeof(Place) * num_places;
        int of_fill = (of_start + set * start.num_experts + 4 * V::size + 7) / 8 * 8;
        return fill_slots<V, general>(g, start, speeds, shared + of_start, of_fill, verdicts, fills, target, level,
                                      experts.guests, experts.filled);
    }
};

}  // namespace lplb
