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
    const Resident* residents;  // [number], in device memory
    int* load;                  // [number]
    typename V::Set* ranks;     // [number] that hold a copy
    short* place;               // [number] where the arcs of an expert with several copies begin
    short* guests;              // [size, num_slots] the expert in each guest slot, -1: none
    int* filled;                // [size, num_local_slots] tokens of each place in the fill that chose them
    unsigned* of_rank;          // [size, words] experts with several copies, as bits
    int* num_edges;             // [size] of each rank
    int in_place;               // the expert in this thread's place, of those of all ranks; -1: none, or a guest slot
    Arc* arcs;                  // [max_arcs] by expert, then rank
    int* tokens;                // [max_arcs] of each copy
    int* load_by_place;         // [max_arcs] of experts with several copies
    Edge* edges;                // [size * max_edges] by rank
};

// Makes the quotas of the component's experts zero, by whole warps: most copies do not exist. A component alone
// has all of them, in a row.
template <typename V>
__device__ void zero_quotas(const Problem& p, const Experts<V>& experts, int* __restrict__ quota) {
    if (p.num_components == 1) {
        #pragma unroll 8
        for (int i = threadIdx.x; i < p.num_experts * p.max_replicas; i += V::threads) quota[i] = 0;
        return;
    }
    int lane = threadIdx.x % 32;
    for (int first = threadIdx.x - lane; first < experts.number; first += V::threads) {
        int own = first + lane < experts.number ? experts.residents[first + lane].expert : 0;
        for (int i = 0; i < min(32, experts.number - first); ++i) {
            int* of_expert = quota + __shfl_sync(~0u, own, i) * p.max_replicas;
            for (int column = lane; column < p.max_replicas; column += 32) of_expert[column] = 0;
        }
    }
}

// Finds where the arcs of each expert with several copies begin, and writes what `route` knows of it.
// Returns the number of all arcs, the same to every thread.
template <typename V>
__device__ int place_arcs(const Problem& p, const Guests& g, const Experts<V>& experts) {
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
    int first_several = blockIdx.x * g.max_several, first_copy = blockIdx.x * g.max_copies;
    for (int tile = 0; tile < tiles; ++tile) {
        int i = (warp * tiles + tile) * 32 + lane, number = copies_of(i), own = count(number), end = own;
        #pragma unroll
        for (int other = 1; other < 32; other *= 2) {
            int its = __shfl_up_sync(~0u, end, other);
            if (other <= lane) end += its;
        }
        int begin = before + end - own, m = first_several + (begin >> 16), place = begin & 0xffff;
        before += __shfl_sync(~0u, end, 31);
        if (i >= experts.number) continue;
        experts.place[i] = short(place);
        if (number > 1) experts.load_by_place[place] = experts.load[i];
        if (g.lookup == nullptr) continue;
        int expert = experts.residents[i].expert;
        g.lookup[expert] = number > 1 ? ~m : experts.residents[i].slot;
        if (number == 1) continue;
        g.experts[m] = expert;
        g.first[m] = first_copy + place;
    }
    // What lies behind the last has no copies.
    int end = g.lookup == nullptr ? 0 : g.max_several + (blockIdx.x == p.num_components - 1);
    for (int m = (total >> 16) + threadIdx.x; m < end; m += V::threads)
        g.first[first_several + m] = first_copy + (total & 0xffff);
    return total & 0xffff;
}

// Puts a copy of an expert with several in its place: its arc, and what `route` knows of it. `nth`: copies in
// lower columns that may get tokens, too.
template <typename V>
__device__ void put_copy(const Problem& p, const Guests& g, const Experts<V>& experts, const int* ranks, int i,
                         int rank, int column, int nth, int slot) {
    typename V::Set holders = experts.ranks[i];
    int place = experts.place[i], expert = experts.residents[i].expert, quota = expert * p.max_replicas + column;
    experts.arcs[place + number_of<V>(holders & below<V>(rank))] = Arc{holders, quota, short(place), short(rank)};
    atomicOr(&experts.of_rank[rank * experts.words + i / 32], 1u << i % 32);
    atomicAdd(&experts.num_edges[rank], number_of<V>(holders) - 1);
    if (g.lookup == nullptr) return;
    int global = ranks[rank];
    g.copies[blockIdx.x * g.max_copies + place + nth] =
        Copy{short(global), short(global / g.num_ranks_per_node), slot, expert, quota};
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

// Puts all copies in their places, and says which guests there are. Experts with one copy have their quota
// then, and their ranks the load.
template <typename V>
__device__ void put_copies(const Problem& p, const Guests& g, const Experts<V>& experts, const Component<V>& c,
                           int* __restrict__ quota, int* __restrict__ chosen) {
    for (int i = threadIdx.x; i < experts.number; i += V::threads) {
        Resident one = experts.residents[i];
        if (number_of<V>(experts.ranks[i]) > 1) {
            put_copy(p, g, experts, c.ranks, i, one.home, 0, 0, one.slot);
        } else {
            atomicAdd(&c.staying()[one.home], experts.load[i]);
            quota[one.expert * p.max_replicas] = experts.load[i];
        }
    }
    for (int i = threadIdx.x; i < g.max_replicas; i += V::threads) {
        Replica one = g.replicas[blockIdx.x * g.max_replicas + i];
        if (one.expert < 0) break;
        put_copy(p, g, experts, c.ranks, one.expert, one.rank, one.column, one.nth, one.slot);
    }
    for (int i = threadIdx.x; i < c.shape.ranks * g.num_slots; i += V::threads) {
        int expert = experts.guests[i], rank = i / g.num_slots, place = c.ranks[rank] * g.num_slots + i % g.num_slots;
        chosen[place] = expert < 0 ? -1 : experts.residents[expert].expert;
        if (expert < 0) continue;
        typename V::Set residents = experts.residents[expert].ranks;
        int earlier = earlier_guests(experts, g.num_slots, expert, i, experts.ranks[expert] & ~residents);
        int slot = (c.ranks[rank] + 1) * g.num_local_slots - g.num_slots + i % g.num_slots;
        put_copy(p, g, experts, c.ranks, expert, rank, experts.residents[expert].columns + earlier,
                 number_of<V>(residents) + earlier, slot);
    }
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

// Lays out the component in shared memory. The ranks of the experts come later.
template <typename V>
__device__ Experts<V> lay_out(const Problem& p, const Guests& g, char* shared) {
    const Network& net = p.net;
    Experts<V> experts;
    experts.number = g.num_experts[blockIdx.x];
    experts.words = (net.max_experts + 31) / 32;
    experts.residents = g.residents + blockIdx.x * net.max_experts;
    experts.ranks = reinterpret_cast<typename V::Set*>(shared);
    experts.load = reinterpret_cast<int*>(experts.ranks + net.max_experts);
    experts.filled = experts.load + net.max_experts;
    experts.num_edges = experts.filled + V::size * g.num_local_slots;
    experts.of_rank = reinterpret_cast<unsigned*>(experts.num_edges + V::size);
    experts.place = reinterpret_cast<short*>(experts.of_rank + V::size * experts.words);
    experts.guests = experts.place + net.max_experts;
    int of_rank = 4 * g.num_local_slots + 4 + 4 * experts.words + 2 * g.num_slots;
    int end = net.max_experts * (sizeof(typename V::Set) + 6) + V::size * of_rank;
    experts.arcs = reinterpret_cast<Arc*>(shared + (end + 15) / 16 * 16);
    experts.edges = reinterpret_cast<Edge*>(experts.arcs + net.max_arcs);
    experts.load_by_place = reinterpret_cast<int*>(experts.edges + V::size * net.max_edges);
    experts.tokens = experts.load_by_place + net.max_arcs;
    experts.in_place = resident_in<V>(g, threadIdx.x);
    for (int i = threadIdx.x; i < V::size * g.num_slots; i += V::threads) experts.guests[i] = -1;
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

// Solves the component over its residents and guests. Returns false if the rounds did not suffice. `solves`: the
// batch goes well so far. `is_filled`: a fill chose the guests.
template <typename V, bool general>
__device__ bool solve_filled(const Problem& p, const Guests& g, const Experts<V>& experts, Component<V>& c, int base,
                             bool solves, bool is_filled, int* __restrict__ quota, int* __restrict__ rank_load,
                             int* __restrict__ chosen) {
    if (threadIdx.x < V::size) {
        c.staying()[threadIdx.x] = base;
        c.movable()[threadIdx.x] = 0;
        experts.num_edges[threadIdx.x] = 0;
    }
    for (int i = threadIdx.x; i < V::size * experts.words; i += V::threads) experts.of_rank[i] = 0;
    for (int i = threadIdx.x; i < c.shape.ranks * g.num_slots; i += V::threads)
        if (experts.guests[i] >= 0) add_to_set(&experts.ranks[experts.guests[i]], i / g.num_slots);
    __syncthreads();  // sums are zero, and every expert has its guests, before copies are counted
    c.shape.arcs = place_arcs(p, g, experts);
    __syncthreads();  // every expert has its place before its copies come there
    put_copies(p, g, experts, c, quota, chosen);
    __syncthreads();  // all copies are there before any thread reads them
    if (!solves) return true;
    bool balances = threadIdx.x < V::pushing, is_balanced = true;
    ResidualEdge<V> edges[V::turns];
    if (balances) {
        make_edges(experts, c);
        make_ready<V>(c.edges, c.own_edges, 0, edges);
    }
    if (is_filled) start_filled(g, experts, c);
    else split_evenly(c, experts.load_by_place);
    __syncthreads();  // all copies have their tokens, and ranks their sums, before any thread reads them
    if (c.shape.arcs > 0) {  // else nothing can move
        if (balances) is_balanced = balance<V, general>(c, edges, p.max_rounds);
        __syncthreads();  // tokens and loads are final before any thread reads them
    }
    for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) quota[c.arcs[a].quota] = c.tokens[a];
    if (threadIdx.x < c.shape.ranks) {
        int rank = c.ranks[threadIdx.x];
        rank_load[rank] = c.load()[threadIdx.x] - (p.base == nullptr ? 0 : p.base[rank]);
    }
    return !__syncthreads_or(!is_balanced);  // tokens and loads are read before others take their place
}

// One block chooses the guests of a component for one batch, and solves it over residents and guests. Where it
// has replicas, the flow over the residents says whether guests are wanted.
template <typename V, bool general, typename Choose>
__device__ void solve_with_guests(const Problem& p, const Guests& g, char* shared, Choose choose) {
    typedef typename V::Set Set;
    if (blockIdx.x >= p.num_components) {
        number_picks<V>(p, shared);
        return;
    }
    const Network& net = p.net;
    __shared__ Set targets[V::size], layers[V::size];
    __shared__ int first_of_rank[V::size], second_of_rank[V::size];
    int* quota = p.quota + size_t(blockIdx.y) * p.num_experts * p.max_replicas;
    int* rank_load = p.rank_load + size_t(blockIdx.y) * p.num_ranks;
    int* chosen = g.chosen + size_t(blockIdx.y) * p.num_ranks * g.num_slots;

    // Neighbouring threads share the rows of one expert where there are more threads than experts.
    int sharing = 1;
    while (sharing < 32 && 2 * sharing <= p.counts.num_rows && 2 * sharing * net.max_experts <= V::threads)
        sharing *= 2;
    int expert = threadIdx.x / sharing;
    int packed = expert < net.max_experts ? net.experts[blockIdx.x * net.max_experts + expert] : -1;
    Experts<V> experts = lay_out<V>(p, g, shared);
    // Needed late, so it is under way early. Behind the last expert there are no ranks.
    auto ranks_of = [&](int i) { return i < net.max_experts ? Set(experts.residents[i].ranks) : Set(0); };
    Set ranks = ranks_of(threadIdx.x);
    Component<V> c{experts.arcs, nullptr, experts.tokens, first_of_rank, second_of_rank, targets, layers,
                   net.shape[blockIdx.x], nullptr, net.ranks + blockIdx.x * V::size, p.speed, nullptr, 0};
    int base = p.base && threadIdx.x < c.shape.ranks ? p.base[c.ranks[threadIdx.x]] : 0;
    Ending ending = add_up<V, general>(p, experts.load, c.staying(), quota, sharing, packed, base);
    for (int i = threadIdx.x; i < net.max_experts; i += V::threads)
        experts.ranks[i] = i < V::threads ? ranks : ranks_of(i);
    zero_quotas(p, experts, quota);
    ending.status = max(ending.status, p.status);
    bool is_filled = false;
    #pragma unroll 1
    for (bool is_last = ending.status != OPTIMAL || c.shape.ranks < 2;; is_last = true) {
        if (is_last || g.max_replicas > 0) {
            bool solves = ending.status == OPTIMAL && c.shape.ranks > 0;
            if (!solve_filled<V, general>(p, g, experts, c, base, solves, is_filled, quota, rank_load, chosen))
                ending.status = NOT_CONVERGED;
        }
        if (is_last || ending.status != OPTIMAL) break;
        bool has_guests = choose(experts, c, ending.total);
        if (!has_guests && g.max_replicas > 0) break;
        is_filled = has_guests && Choose::fills;
    }
    if (threadIdx.x == 0) p.endings[blockIdx.y * p.num_components + blockIdx.x] = ending;
}

// How the guests are chosen, by the level of the residents in `c.load()` where there are replicas.
template <typename V, bool general>
struct Chooser {
    static constexpr bool fills = true;
    const Problem& p;
    const Guests& g;

    __device__ bool operator()(const Experts<V>& experts, const Component<V>& c, int total) const {
        return choose<V, general>(p, g, experts.ranks, experts.load, c, reinterpret_cast<char*>(experts.arcs), total,
                                  experts.in_place, experts.guests, experts.filled);
    }
};

}  // namespace lplb
