// One component of the replica graph in shared memory, and the split of its experts that the flow starts from.
#pragma once

#include "rows.cuh"

namespace lplb {

template <typename V>
struct Component {              // the pointers before `shape` are to shared memory, the others to device memory
    const Arc* arcs;
    const short* copies;        // without guests
    int* tokens;                // [arcs] of each copy
    int *first_of_rank, *second_of_rank;  // [size] see below
    typename V::Set* targets;   // [size] ranks that a rank's tokens could go to
    typename V::Set* layers;    // [size] ranks by their distance from one below its limit
    Shape shape;
    const Edge* edges;          // [end_of_edges] of this thread's rank; without guests padded by arcs of -1
    const int* ranks;           // [size] local rank to rank
    const int* speed;           // [R] of ranks, or null: all the same
    const int* cap;             // [E, C] the most tokens of each copy, or null: no limit
    int own_edges;              // with guests: of this thread's rank

    // Before the flow: a rank's load of experts with one copy, base load included; and of the other experts.
    __device__ int* staying() const { return first_of_rank; }
    __device__ int* movable() const { return second_of_rank; }
    // In the flow: the load above the limit, negative below it; and a rank's deficit when the round began.
    __device__ int* excess() const { return first_of_rank; }
    __device__ int* deficit() const { return second_of_rank; }
    // Behind the flow: the load.
    __device__ int* load() const { return first_of_rank; }

    // The arc at a place: arcs by expert, then local rank.
    __device__ int arc_at(int place) const { return V::guests ? place : copies[place]; }

    __device__ int end_of_edges() const { return V::guests ? own_edges : shape.most_edges; }

    // How many more tokens a copy may get.
    __device__ int capacity(int arc) const {
        return cap == nullptr ? MAX_TOTAL : cap[arcs[arc].quota] - tokens[arc];
    }
};

// The number of copies of an arc's expert.
template <typename V>
__device__ int number_of_copies(const Arc& arc) {
    if constexpr (V::wide) return int(arc.ranks & 0xffffffff);
    else return number_of<V>(arc.ranks);
}

// The number of these copies that are on lower ranks.
template <typename V>
__device__ int nth_of_copies(const Arc& arc) {
    if constexpr (V::wide) return int(arc.ranks >> 32);
    else return number_of<V>(arc.ranks & ((typename V::Set(1) << arc.rank) - 1));
}

// Splits each expert evenly over its copies. From there the flow takes half as many rounds as from the homes. Threads
// that push with guests make their edges ready meanwhile.
template <typename V>
__device__ void split_evenly(const Component<V>& c, const int* load) {
    block_stride<V::threads, V::apart>(c.shape.arcs, [&](int a) {
        Arc arc = c.arcs[a];
        int total = load[arc.place], number = number_of_copies<V>(arc);
        int place = nth_of_copies<V>(arc);
        c.tokens[a] = total / number + (place < total % number);
        atomicAdd(&c.movable()[arc.rank], c.tokens[a]);
    });
}

// Fills copy after copy of each expert. Returns whether all tokens found a place, the same to every thread.
template <typename V>
__device__ bool fill_copies(const Component<V>& c, const int* load) {
    bool lacks = false;
    for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) {
        Arc arc = c.arcs[a];
        if (c.copies[arc.place] != a) continue;
        int total = load[arc.place];
        for (int i = 0; i < number_of_copies<V>(arc); ++i) {
            int copy = c.copies[arc.place + i], most = min(total, c.cap[c.arcs[copy].quota]);
            c.tokens[copy] = most;
            atomicAdd(&c.movable()[c.arcs[copy].rank], most);
            total -= most;
        }
        lacks |= total > 0;
    }
    return !__syncthreads_or(lacks);  // all experts are filled before any thread decides
}

// The input of a thread's first sum, loaded early.
struct Addend {
    int sharing;  // neighbouring threads that share the rows of an expert
    int packed;   // the thread's first expert
    int base;     // the base load of the thread's rank

    template <typename V>
    __device__ static Addend of(const Problem& p, int g, int ranks) {
        const Network& net = p.net;
        // Where there are more threads than experts.
        int sharing = 1;
        while (sharing < 32 && 2 * sharing <= p.counts.num_rows && 2 * sharing * net.max_experts <= V::threads)
            sharing *= 2;
        int expert = threadIdx.x / sharing;
        int packed = expert < net.max_experts ? net.experts[g * net.max_experts + expert] : -1;
        return {sharing, packed,
                p.base && threadIdx.x < ranks ? p.base[net.ranks[g * V::size + threadIdx.x]] : 0};
    }
};

// Lays out the component g in shared memory, without its counts.
template <typename V>
__device__ Component<V> lay_out_component(const Problem& p, int g, char* shared, const Edge* edges, Addend& addend) {
    const Network& net = p.net;
    // The arrays that the flow reads most are static, so that the compiler knows their addresses.
    __shared__ typename V::Set targets[V::size], layers[V::size];
    __shared__ int first_of_rank[V::size], second_of_rank[V::size];
    int* tokens = reinterpret_cast<int*>(shared);
    Arc* arcs = reinterpret_cast<Arc*>(tokens + net.max_arcs);
    int* load = reinterpret_cast<int*>(arcs + net.max_arcs);
    short* copies = reinterpret_cast<short*>(load + net.max_arcs);
    Component<V> c{arcs, copies, tokens, first_of_rank, second_of_rank, targets, layers, net.shape[g],
                   edges, net.ranks + g * V::size, p.speed, p.cap, 0};
    addend = Addend::of<V>(p, g, c.shape.ranks);
    if (threadIdx.x < V::size) {
        c.staying()[threadIdx.x] = addend.base;
        c.movable()[threadIdx.x] = 0;
    }
    for (int a = threadIdx.x; a < net.max_arcs; a += V::threads) {
        arcs[a] = net.arcs[g * net.max_arcs + a];
        copies[a] = net.copies[g * net.max_arcs + a];
    }
    return c;
}

// Decides whether the batch stays at home, or in the slots that it came with: the CPU's `stays` is the definition. A single
// component decides here; for several `conclude` does.
template <typename V>
__device__ void look_at_home(const Problem& p, const Component<V>& c, const int* load, Ending& ending) {
    __shared__ int at_home[V::size];  // or by the given slots
    int lane = threadIdx.x % 32, stays = 0, home = 0, ranks = c.shape.ranks;
    bool is_given = p.given_load != nullptr, mine = threadIdx.x < ranks;
    int base = is_given && mine && p.base != nullptr ? p.base[c.ranks[threadIdx.x]] : 0;
    if (threadIdx.x < V::size) at_home[threadIdx.x] = is_given ? base : c.staying()[threadIdx.x];
    __syncthreads();  // loads that stay are written before other experts are added
    block_stride<V::threads>(is_given ? 0 : c.shape.arcs, [&](int a) {
        if (c.arcs[a].quota % p.max_replicas == 0) atomicAdd(&at_home[c.arcs[a].rank], load[c.arcs[a].place]);
    });
    block_stride<V::threads>(is_given ? ranks * p.counts.num_rows : 0, [&](int i) {
        atomicAdd(&at_home[i % ranks], counts_of(p.counts, i / ranks)[p.num_experts + c.ranks[i % ranks]]);
    });
    __syncthreads();  // the sums are complete before any thread reads them
    if (is_given && mine) p.given_load[c.ranks[threadIdx.x]] = at_home[threadIdx.x] - base;
    #pragma unroll
    for (int i = 0; i < V::words; ++i) {
        if (lane + 32 * i >= V::size) continue;
        stays = max(stays, c.staying()[lane + 32 * i]);
        home = max(home, at_home[lane + 32 * i]);
    }
    stays = __reduce_max_sync(~0u, stays);
    ending.home = __reduce_max_sync(~0u, home);
    ending.bound = ranks == 0 ? 0 : max(stays, ending.total / ranks + (ending.total % ranks != 0));
    if (p.num_components == 1 && ending.home - ending.bound < p.least_gain)
        ending.status = max(ending.status, STAYED);
}

// Adds up the counts and makes the start of the flow, after `lay_out_component` with the same `shared`.
template <typename V, bool general>
__device__ Ending begin(const Problem& p, int g, const Component<V>& c, char* shared, const Addend& addend,
                        int* __restrict__ quota) {
    int* load = reinterpret_cast<int*>(shared + p.net.max_arcs * (sizeof(int) + sizeof(Arc)));  // of experts, by place
    Ending ending =
        add_up<V, general>(p, g, load, c.staying(), quota, addend.sharing, addend.packed, addend.base);
    ending.status = max(ending.status, p.status);
    if (general && p.cap != nullptr) {
        if (!fill_copies(c, load)) ending.status = max(ending.status, INFEASIBLE);
    } else {
        split_evenly(c, load);
    }
    if (!general && p.least_gain > 0) look_at_home<V>(p, c, load, ending);
    __syncthreads();  // all copies have their tokens, and ranks their sums, before any thread reads them
    return ending;
}

}  // namespace lplb
