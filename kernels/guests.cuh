// A component whose ranks have guest slots: the copies of a batch are its residents and the guests chosen for it.
//
// The host gives tables of the residents. What depends on the guests is made here, by the component's block. Arcs
// and edges of the flow lie in shared memory, and what `route` rewrites by in device memory.
#pragma once

#include "choose.cuh"
#include "flow.cuh"

namespace lplb {

// The experts of a component, by their numbers in it, and their copies in this batch. In shared memory.
template <typename V>
struct Experts {
    int number, words;          // of experts, and of 32 experts each
    Resident* residents;        // [number]
    typename V::Set* ranks;     // [number] that hold a copy
    int* load;                  // [number]
    int* filled;                // [size, num_local_slots] tokens of each place in the fill that chose the guests
    int* guests;                // [size, num_slots] the expert in each guest slot, -1: none
    int* num_edges;             // [size] of each rank
    unsigned* of_rank;          // [size, words] experts with several copies, as bits
    short* place;               // [number] where the arcs of an expert with several copies begin
    short* several;             // [number] how many experts with several copies come before
    int in_place;               // the expert in this thread's place, of those of all ranks; -1: none, or a guest slot
    Arc* arcs;                  // [max_arcs] by expert, then rank
    int* tokens;                // [max_arcs] of each copy
    int* load_by_place;         // [max_arcs] of experts with several copies
    Edge* edges;                // [size * max_edges] by rank
};

// Makes the quotas of the component's experts zero, by the threads that do not push: most copies do not exist.
template <typename V>
__device__ void zero_quotas(const Problem& p, const Experts<V>& experts, int* __restrict__ quota) {
    int lane = threadIdx.x % 32;
    for (int i = (threadIdx.x - V::pushing) / 32; i < experts.number; i += (V::threads - V::pushing) / 32) {
        int* of_expert = quota + experts.residents[i].expert * p.max_replicas;
        for (int column = lane; column < p.max_replicas; column += 32) of_expert[column] = 0;
    }
}

// Finds where the arcs of each expert with several copies begin. Returns the number of all arcs, and of these experts
// in the bits from 16 on, the same to every thread.
template <typename V>
__device__ int place_arcs(const Experts<V>& experts) {
    constexpr int warps = V::threads / 32;
    __shared__ int of_warp[warps];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int tiles = (experts.number + V::threads - 1) / V::threads;  // of 32 neighbours, for each warp
    auto copies_of = [&](int i) { return i < experts.number ? number_of<V>(experts.ranks[i]) : 0; };
    auto count = [&](int number) { return number > 1 ? 1 << 16 | number : 0; };  // an expert and its arcs
    int sum = 0;
    for (int tile = 0; tile < tiles; ++tile) sum += count(copies_of((warp * tiles + tile) * 32 + lane));
    sum = __reduce_add_sync(~0u, sum);
    if (lane == 0) of_warp[warp] = sum;
    __syncthreads();  // the sums of all warps are there before they are added
    int before = 0, total = 0;
    #pragma unroll
    for (int w = 0; w < warps; ++w) {
        if (w == warp) before = total;
        total += of_warp[w];
    }
    for (int tile = 0; tile < tiles; ++tile) {
        int i = (warp * tiles + tile) * 32 + lane, number = copies_of(i), own = count(number), end = own;
        #pragma unroll
        for (int other = 1; other < 32; other *= 2) {
            int its = __shfl_up_sync(~0u, end, other);
            if (other <= lane) end += its;
        }
        int begin = before + end - own;
        before += __shfl_sync(~0u, end, 31);
        if (i >= experts.number) continue;
        experts.place[i] = short(begin & 0xffff);
        experts.several[i] = short(begin >> 16);
        if (number > 1) experts.load_by_place[begin & 0xffff] = experts.load[i];
    }
    return total;
}

// How many guests of an expert come before that of a slot: those of lower local slots, then of lower ranks.
// `holders`: of all its guests.
template <typename V>
__device__ int earlier_guests(const Experts<V>& experts, int num_slots, int expert, int slot,
                              typename V::Set holders) {
    int rank = slot / num_slots, earlier = 0;
    if (num_slots == 1) return number_of<V>(holders & below<V>(rank));
    for (; holders != 0; holders &= holders - 1) {
        int other = lowest_of<V>(holders), nth = 0;
        while (experts.guests[other * num_slots + nth] != expert) ++nth;
        earlier += nth < slot % num_slots || (nth == slot % num_slots && other < rank);
    }
    return earlier;
}

// Takes the copies of experts with several, by the threads from `first` on, `step` in all. `take` gets the expert's
// number, the copy's local rank, its column, how many copies in lower columns may get tokens, and its slot; -1: a
// guest slot.
template <typename V, typename Take>
__device__ void each_copy(const Guests& g, const Experts<V>& experts, int num_ranks, int first, int step, Take take) {
    for (int i = first; i < experts.number; i += step) {
        Resident one = experts.residents[i];
        if (number_of<V>(experts.ranks[i]) > 1) take(i, int(one.home), 0, 0, one.slot);
    }
    for (int i = first; i < g.max_replicas; i += step) {
        Replica one = g.replicas[component<V>() * g.max_replicas + i];
        if (one.expert < 0) break;
        take(int(one.expert), int(one.rank), int(one.column), int(one.nth), one.slot);
    }
    for (int i = first; i < num_ranks * g.num_slots; i += step) {
        int expert = experts.guests[i];
        if (expert < 0) continue;
        Resident one = experts.residents[expert];
        typename V::Set residents = one.ranks;
        int earlier = earlier_guests(experts, g.num_slots, expert, i, experts.ranks[expert] & ~residents);
        take(expert, i / g.num_slots, one.columns + earlier, number_of<V>(residents) + earlier, -1 - i % g.num_slots);
    }
}

// Puts all copies in their places as arcs, and the load of experts with one copy on their ranks.
template <typename V>
__device__ void put_copies(const Problem& p, const Guests& g, const Experts<V>& experts, const Component<V>& c) {
    for (int i = threadIdx.x; i < experts.number; i += V::threads)
        if (number_of<V>(experts.ranks[i]) == 1) atomicAdd(&c.staying()[experts.residents[i].home], experts.load[i]);
    each_copy(g, experts, c.shape.ranks, threadIdx.x, V::threads, [&](int i, int rank, int column, int, int) {
        typename V::Set holders = experts.ranks[i];
        int place = experts.place[i], quota = experts.residents[i].expert * p.max_replicas + column;
        experts.arcs[place + number_of<V>(holders & below<V>(rank))] = Arc{holders, quota, short(place), short(rank)};
        atomicOr(&experts.of_rank[rank * experts.words + i / 32], 1u << i % 32);
        atomicAdd(&experts.num_edges[rank], number_of<V>(holders) - 1);
    });
}

// Writes the guests, and what `route` knows of the copies, by the threads from `first` on. `arcs`: as `place_arcs`
// returns them.
template <typename V>
__device__ void write_routes(const Problem& p, const Guests& g, const Experts<V>& experts, const Component<V>& c,
                             int arcs, int* __restrict__ chosen, int first) {
    constexpr int step = V::threads - V::pushing;
    for (int i = first; i < c.shape.ranks * g.num_slots; i += step) {
        int expert = experts.guests[i];
        chosen[c.ranks[i / g.num_slots] * g.num_slots + i % g.num_slots] =
            expert < 0 ? -1 : experts.residents[expert].expert;
    }
    if (g.lookup == nullptr) return;
    int first_several = component<V>() * g.max_several, first_copy = component<V>() * g.max_copies;
    for (int i = first; i < experts.number; i += step) {
        bool is_several = number_of<V>(experts.ranks[i]) > 1;
        int m = first_several + experts.several[i], expert = experts.residents[i].expert;
        g.lookup[expert] = is_several ? ~m : experts.residents[i].slot;
        if (!is_several) continue;
        g.experts[m] = expert;
        g.first[m] = first_copy + experts.place[i];
    }
    // What lies behind the last has no copies.
    int end = g.max_several + (component<V>() == p.num_components - 1);
    for (int m = (arcs >> 16) + first; m < end; m += step) g.first[first_several + m] = first_copy + (arcs & 0xffff);
    each_copy(g, experts, c.shape.ranks, first, step, [&](int i, int rank, int column, int nth, int slot) {
        int global = c.ranks[rank], expert = experts.residents[i].expert;
        if (slot < 0) slot = (global + 1) * g.num_local_slots - g.num_slots - 1 - slot;
        g.copies[first_copy + experts.place[i] + nth] = Copy{short(global), short(global / g.num_ranks_per_node), slot,
                                                             expert, expert * p.max_replicas + column};
    });
}

// Makes the edges of this thread's rank, by the threads that share it.
template <typename V>
__device__ void make_edges(const Experts<V>& experts, Component<V>& c) {
    typedef typename V::Set Set;
    constexpr int bits_of_set = 8 * sizeof(Set);
    int rank = threadIdx.x / V::parts, part = threadIdx.x % V::parts, lane = threadIdx.x % 32;
    int first = 0, before = 0;
    #pragma unroll
    for (int i = 0; i < V::words; ++i) {
        int own = lane + 32 * i < V::size ? experts.num_edges[lane + 32 * i] : 0, end = own;
        #pragma unroll
        for (int other = 1; other < 32; other *= 2) {
            int its = __shfl_up_sync(~0u, end, other);
            if (other <= lane) end += its;
        }
        int begin = __shfl_sync(~0u, before + end - own, rank % 32);
        if (rank / 32 == i) first = begin;
        before += __shfl_sync(~0u, end, 31);
    }
    Edge* edges = experts.edges + first;
    int number = 0, most_nth = 0;
    for (int word = 0; word < experts.words; ++word) {
        for (unsigned bits = experts.of_rank[rank * experts.words + word]; bits != 0; bits &= bits - 1) {
            int i = word * 32 + __ffs(bits) - 1, place = experts.place[i];
            Set holders = experts.ranks[i];
            int others = number_of<V>(holders) - 1, own = number_of<V>(holders & below<V>(rank)), arc = place + own;
            // Neighbours begin with different targets, not to fill all the same one: from this rank, which is the
            // lowest bit, up and around.
            Set rest = holders >> rank | holders << ((bits_of_set - rank) % bits_of_set);
            for (int nth = 0; nth < others; ++nth) {
                rest &= rest - 1;
                if (nth % V::parts != part) continue;
                int target = (lowest_of<V>(rest) + rank) % bits_of_set, behind = own + 1 + nth;
                int to = place + (behind <= others ? behind : behind - others - 1);
                edges[number + nth] = {short(arc), short(to), (unsigned char)(target), (unsigned char)(nth),
                                       (unsigned char)(others)};
            }
            number += others;
            most_nth = max(most_nth, others - 1);
        }
    }
    // The most of a warp is enough: its ranks alone are in step.
    c.shape.most_edges = __reduce_max_sync(~0u, number);
    c.shape.most_nth = __reduce_max_sync(~0u, most_nth);
    c.edges = edges;
    c.own_edges = number;
    __syncwarp();  // the edges of a rank are made before its threads read them
}

// Lays out the component in shared memory. The loads of the experts come later.
template <typename V>
__device__ Experts<V> lay_out(const Problem& p, const Guests& g, char* shared) {
    const Network& net = p.net;
    Experts<V> experts;
    experts.number = g.num_experts[component<V>()];
    experts.words = (net.max_experts + 31) / 32;
    experts.residents = reinterpret_cast<Resident*>(shared);
    experts.ranks = reinterpret_cast<typename V::Set*>(experts.residents + net.max_experts);
    experts.load = reinterpret_cast<int*>(experts.ranks + net.max_experts);
    experts.filled = experts.load + net.max_experts;
    experts.guests = experts.filled + V::size * g.num_local_slots;
    experts.num_edges = experts.guests + V::size * g.num_slots;
    experts.of_rank = reinterpret_cast<unsigned*>(experts.num_edges + V::size);
    experts.place = reinterpret_cast<short*>(experts.of_rank + V::size * experts.words);
    experts.several = experts.place + net.max_experts;
    int of_rank = 4 * g.num_local_slots + 4 + 4 * experts.words + 4 * g.num_slots;
    int end = net.max_experts * (sizeof(Resident) + sizeof(typename V::Set) + 8) + V::size * of_rank;
    experts.arcs = reinterpret_cast<Arc*>(shared + (end + 15) / 16 * 16);
    experts.edges = reinterpret_cast<Edge*>(experts.arcs + net.max_arcs);
    experts.load_by_place = reinterpret_cast<int*>(experts.edges + V::size * net.max_edges);
    experts.tokens = experts.load_by_place + net.max_arcs;
    experts.in_place = resident_in<V>(g, threadIdx.x);
    for (int i = threadIdx.x; i < V::size * g.num_slots; i += V::threads) experts.guests[i] = -1;
    for (int i = threadIdx.x; i < net.max_experts; i += V::threads) {
        Resident one = g.residents[component<V>() * net.max_experts + i];
        experts.residents[i] = one;
        experts.ranks[i] = typename V::Set(one.ranks);
    }
    return experts;
}

// The start of the flow where a fill chose the guests: its tokens.
template <typename V>
__device__ void start_filled(const Guests& g, const Experts<V>& experts, const Component<V>& c) {
    int residents = g.num_local_slots - g.num_slots;
    for (int i = threadIdx.x; i < c.shape.ranks * g.num_local_slots; i += V::threads) {
        int rank = i / g.num_local_slots, guest = i % g.num_local_slots - residents;
        int expert = guest >= 0      ? experts.guests[rank * g.num_slots + guest]
                     : i < V::threads ? experts.in_place
                                      : resident_in<V>(g, i);
        if (expert < 0 || number_of<V>(experts.ranks[expert]) == 1) continue;
        c.tokens[experts.place[expert] + number_of<V>(experts.ranks[expert] & below<V>(rank))] = experts.filled[i];
        atomicAdd(&c.movable()[rank], experts.filled[i]);
    }
}

// Lays the flow over residents and guests out and solves it, if the batch goes well so far (`solves`). Meanwhile the
// threads that do not push make the quotas zero and write what `route` needs. Returns false if the rounds did not suffice. `is_filled`: a fill
// chose the guests.
template <typename V, bool general>
__device__ bool solve_filled(const Problem& p, const Guests& g, const Experts<V>& experts, Component<V>& c, int base,
                             bool solves, bool is_filled, int* __restrict__ quota, int* __restrict__ chosen) {
    if (threadIdx.x < V::size) {
        c.staying()[threadIdx.x] = base;
        c.movable()[threadIdx.x] = 0;
        experts.num_edges[threadIdx.x] = 0;
    }
    for (int i = threadIdx.x; i < V::size * experts.words; i += V::threads) experts.of_rank[i] = 0;
    for (int i = threadIdx.x; i < c.shape.ranks * g.num_slots; i += V::threads)
        if (experts.guests[i] >= 0) add_to_set(&experts.ranks[experts.guests[i]], i / g.num_slots);
    __syncthreads();  // sums are zero, and every expert has its guests, before copies are counted
    int arcs = place_arcs<V>(experts);
    c.shape.arcs = arcs & 0xffff;
    __syncthreads();  // every expert has its place before its copies come there
    put_copies(p, g, experts, c);
    __syncthreads();  // all copies are there before any thread reads them
    bool balances = threadIdx.x < V::pushing, is_balanced = true;
    ResidualEdge<V> edges[V::turns];
    if (solves && balances) {
        make_edges(experts, c);
        make_ready<V>(c.edges, c.own_edges, 0, edges);
    }
    if (is_filled) start_filled(g, experts, c);
    else split_evenly(c, experts.load_by_place);
    __syncthreads();  // all copies have their tokens, and ranks their sums, before any thread reads them
    if (!balances) {
        zero_quotas(p, experts, quota);
        write_routes(p, g, experts, c, arcs, chosen, threadIdx.x - V::pushing);
    } else if (solves && c.shape.arcs > 0) {
        is_balanced = balance<V, general>(c, edges, p.max_rounds);
    }
    return !__syncthreads_or(!is_balanced);  // tokens and loads are final before any thread reads them
}

// The blocks of a cluster choose the guests of a component for one batch, and its first block solves it over
// residents and guests. Where it has replicas, the flow over the residents says whether guests are wanted. It is
// solved while the other blocks make fills.
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
    begin_verdicts<V>(verdicts);
    Experts<V> experts = lay_out<V>(p, g, shared);
    Component<V> c{experts.arcs, nullptr, experts.tokens, first_of_rank, second_of_rank, targets, layers,
                   net.shape[component<V>()], nullptr, net.ranks + component<V>() * V::size, p.speed, nullptr, 0};
    int base = p.base && threadIdx.x < c.shape.ranks ? p.base[rank] : 0;
    Ending ending = add_up<V, general>(p, experts.load, c.staying(), quota, sharing, packed, base);
    ending.status = max(ending.status, p.status);
    if (V::blocks > 1) cluster_wait();  // the others are there before words are sent to them
    bool is_first = block_of_component<V>() == 0, is_filled = false;
    bool solves = ending.status == OPTIMAL && c.shape.ranks > 0, chooses = solves && c.shape.ranks > 1;
    if (chooses) choose.aim(c, ending.total, reinterpret_cast<char*>(experts.arcs));
    if (V::blocks > 1 && is_first && threadIdx.x == 0)  // the best fill
        arrivals_expect(&verdicts.best, c.shape.ranks * (g.num_slots + g.num_local_slots) * int(sizeof(int)));
    #pragma unroll 1
    for (bool is_last = false;; is_last = true) {
        if (is_first && (is_last || (chooses && g.max_replicas > 0)) &&
            !solve_filled<V, general>(p, g, experts, c, base, solves, is_filled, quota, chosen))
            ending.status = NOT_CONVERGED;
        if (is_last) break;
        bool has_guests = chooses && choose(experts, c, verdicts, ending.status == OPTIMAL);
        if (!is_first) return;  // all that is for this block has come
        // What is solved is the plan. An only block has made fills in its place.
        if (chooses && g.max_replicas > 0 && !has_guests && V::blocks > 1) break;
        is_filled = has_guests && Choose::fills;
        if (has_guests) continue;
        for (int i = threadIdx.x; i < V::size * g.num_slots; i += V::threads) experts.guests[i] = -1;
        __syncthreads();  // guests of no use are gone before the flow asks for them
    }
    if (solves) {
        for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) quota[c.arcs[a].quota] = c.tokens[a];
        for (int i = threadIdx.x; i < experts.number; i += V::threads)
            if (number_of<V>(experts.ranks[i]) == 1)
                quota[experts.residents[i].expert * p.max_replicas] = experts.load[i];
        if (threadIdx.x < c.shape.ranks) rank_load[rank] = c.load()[threadIdx.x] - base;
    }
    if (threadIdx.x == 0) p.endings[blockIdx.y * p.num_components + component<V>()] = ending;
}

// How the guests are chosen, by the level of the residents in `c.load()` where there are replicas.
template <typename V, bool general>
struct Chooser {
    static constexpr bool fills = true;
    const Problem& p;
    const Guests& g;
    int target = 0;  // the level that is good enough

    // Sets the target; `total` is the component's load. Before anything lies in `shared`.
    __device__ void aim(const Component<V>& c, int total, char* shared) {
        int mean = highest_mean(p, Speeds<V, general>(p, c.ranks, c.shape.ranks), total, c.shape.ranks, shared);
        target = int(min(mean + (long long)mean * g.tolerance / GUEST_PARTS, (long long)MAX_TOTAL));
    }

    // As `fill_slots`. `is_solved`: whether the residents are, if there are replicas.
    __device__ bool operator()(const Experts<V>& experts, const Component<V>& c, Verdicts& verdicts,
                               bool is_solved) const {
        Speeds<V, general> speeds(p, c.ranks, c.shape.ranks);
        int S = g.num_local_slots, num_places = V::size * S, set = sizeof(typename V::Set), lane = threadIdx.x % 32;
        char* shared = reinterpret_cast<char*>(experts.arcs);
        int *tokens = reinterpret_cast<int*>(shared), *load_of_rank = tokens + num_places;
        Start<V> start{c.shape.ranks, experts.number, S, g.num_slots, g.num_ranks_per_node, experts.residents,
                       experts.ranks, tokens, reinterpret_cast<short*>(load_of_rank + V::size), load_of_rank};
        // The first block has the residents' flow in the place of fills.
        bool is_first = block_of_component<V>() == 0, fills = V::blocks == 1 || g.max_replicas == 0 || !is_first;
        if (fills) split_over_residents(p, g, start, experts.load, c.ranks, experts.in_place);
        int level = 0;
        #pragma unroll
        for (int i = 0; i < V::words; ++i) {
            int rank = lane + 32 * i;
            if (rank >= c.shape.ranks || (g.max_replicas > 0 && !is_first)) continue;
            level = max(level, speeds.level(g.max_replicas > 0 ? c.load()[rank] : start.load[rank], i));
        }
        level = is_solved ? __reduce_max_sync(~0u, level) : 0;
        if (level <= target && (V::blocks == 1 || g.max_replicas == 0)) return false;  // and all blocks know it
        int of_start = (6 * num_places + 4 * V::size + 7) / 8 * 8;
        int of_fill = (set * start.num_experts + 6 * num_places + 4 * V::size + 7) / 8 * 8;
        return fill_slots<V, general>(g, start, speeds, shared + of_start, of_fill, verdicts, fills, target, level,
                                      experts.guests, experts.filled);
    }
};

}  // namespace lplb
