// The exact flow of one component of the replica graph, by one block: ranks above a limit K push
// their excess towards ranks below it, layer by layer of a shortest-path layering that is made anew
// in each round: preflow-push (Goldberg and Tarjan 1988) in waves, with exact labels. Where excess
// cannot reach a rank below K, the set S of ranks that it does reach is a cut, load(S) / |S| a lower
// bound, and its ceiling the next K: Newton's method on the parametric cut, as in the CPU's
// definition. All numbers are whole, and no result depends on the order of atomics.
//
// Ranks are lanes of one warp and sets of ranks are bits of a word, so a layer costs a vote.

#pragma once

typedef unsigned long long Set;

constexpr int RANKS = RANKS_PER_LANE * 32;

struct __align__(16) Arc {      // a copy of an expert that has several
    Set ranks;                  // local ranks that hold a copy
    int quota;                  // its place in [E, C]
    short place;                // where the expert's copies begin in `copies`, by local rank
    short rank;                 // its own local rank
};

struct __align__(16) Shape { int ranks, arcs, experts, unused; };

// Tables of one component, each at a fixed stride so that all are read at once.
struct Network {
    const Shape* shape;         // [G]
    const Arc* arcs;            // [G, MAX_ARCS] by rank, then expert
    const short* copies;        // [G, MAX_ARCS] arcs by expert, then local rank
    const short* first_arc;     // [G, RANKS + 1] of each local rank
    const int* experts;         // [G, MAX_EXPERTS] expert | local rank of its home << 16, RANKS if it has several copies
    const int* ranks;           // [G, RANKS] local → global
    int max_arcs, max_experts;
};

__device__ Set vote(const bool (&flag)[RANKS_PER_LANE]) {
    Set set = 0;
    #pragma unroll
    for (int i = 0; i < RANKS_PER_LANE; ++i)
        set |= Set(__ballot_sync(~0u, flag[i])) << (32 * i);
    return set;
}

__device__ Set unite(Set mine) {
    Set set = __reduce_or_sync(~0u, unsigned(mine));
    if (RANKS_PER_LANE > 1) set |= Set(__reduce_or_sync(~0u, unsigned(mine >> 32))) << 32;
    return set;
}

struct Component {              // in shared memory
    const Arc* arcs;
    const short* copies;
    const short* first_arc;
    int* tokens;                // [arcs] at each copy
    int* arriving;              // [arcs] pushed to it, not yet seen by its rank
    int* received;              // [ranks] likewise, the sum over its copies
    int* room;                  // [ranks] tokens below the limit
    int num_ranks, num_arcs;
};

// Pushes the positive part of `over` (a rank's load above its limit) to where it is negative.
// Returns the ranks that stay above, with all that their load still reaches: empty if none does,
// or if the rounds are used up.
__device__ Set balance(const Component& c, int (&over)[RANKS_PER_LANE], int& rounds) {
    int lane = threadIdx.x;
    for (; rounds > 0; --rounds) {
        Set next[RANKS_PER_LANE], down[RANKS_PER_LANE];
        int label[RANKS_PER_LANE];
        bool flag[RANKS_PER_LANE];
        #pragma unroll
        for (int i = 0; i < RANKS_PER_LANE; ++i) {
            int rank = lane + 32 * i;
            next[i] = down[i] = 0;
            label[i] = -1;
            flag[i] = false;
            if (rank >= c.num_ranks) continue;
            for (int a = c.first_arc[rank]; a < c.first_arc[rank + 1]; ++a)
                if (c.tokens[a] + c.arriving[a] > 0) next[i] |= c.arcs[a].ranks;
            over[i] += c.received[rank];
            c.received[rank] = 0;
            c.room[rank] = max(0, -over[i]);
            flag[i] = over[i] > 0;
        }
        Set excess = vote(flag);
        if (excess == 0) return 0;
        #pragma unroll
        for (int i = 0; i < RANKS_PER_LANE; ++i) {
            flag[i] = lane + 32 * i < c.num_ranks && over[i] < 0;
            if (flag[i]) label[i] = 0;
        }
        Set layer = vote(flag), reached = layer;
        int top = 0;
        while (layer != 0 && (excess & ~reached) != 0) {
            ++top;
            #pragma unroll
            for (int i = 0; i < RANKS_PER_LANE; ++i) {
                flag[i] = label[i] < 0 && (next[i] & layer) != 0;
                if (flag[i]) { label[i] = top; down[i] = layer; }
            }
            layer = vote(flag);
            reached |= layer;
        }
        Set stuck = excess & ~reached;
        if (stuck != 0) {
            for (Set grown = 0; grown != stuck;) {
                grown = stuck;
                Set mine = 0;
                #pragma unroll
                for (int i = 0; i < RANKS_PER_LANE; ++i)
                    if (stuck >> (lane + 32 * i) & 1) mine |= next[i];
                stuck |= unite(mine);
            }
            return stuck;
        }
        for (; top > 0; --top) {
            __syncwarp();
            #pragma unroll
            for (int i = 0; i < RANKS_PER_LANE; ++i) {
                if (label[i] != top) continue;
                int rank = lane + 32 * i;
                over[i] += c.received[rank];
                c.received[rank] = 0;
                for (int a = c.first_arc[rank]; a < c.first_arc[rank + 1] && over[i] > 0; ++a) {
                    Arc arc = c.arcs[a];
                    Set targets = arc.ranks & down[i];
                    int here = c.tokens[a] + c.arriving[a];
                    if (targets == 0 || here == 0) continue;
                    c.arriving[a] = 0;
                    while (targets != 0 && here > 0 && over[i] > 0) {
                        // Neighbours begin at different targets, not to fill all the same one.
                        Set later = targets >> rank;
                        int target = later ? rank + __ffsll(later) - 1 : __ffsll(targets) - 1;
                        targets &= ~(Set(1) << target);
                        int push = min(here, over[i]), room = c.room[target];
                        if (top == 1) push = min(push, room);
                        int to = c.copies[arc.place + __popcll(arc.ranks & ((Set(1) << target) - 1))];
                        atomicAdd(&c.arriving[to], push);
                        atomicAdd(&c.received[target], push);
                        here -= push;
                        over[i] -= push;
                    }
                    c.tokens[a] = here;
                }
            }
        }
        __syncwarp();
    }
    return 0;
}

// Lays the component's tables out in shared memory and spreads each expert evenly over its copies.
// Writes the quotas of experts with one copy.
__device__ Component begin(
    char* shared, const Network& net, const int* __restrict__ load, int* __restrict__ quota,
    int max_replicas) {
    int g = blockIdx.x;
    Arc* arcs = reinterpret_cast<Arc*>(shared);
    int* tokens = reinterpret_cast<int*>(arcs + net.max_arcs);
    int* arriving = tokens + net.max_arcs;
    int* received = arriving + net.max_arcs;
    int* room = received + RANKS;
    short* copies = reinterpret_cast<short*>(room + RANKS);
    short* first_arc = copies + net.max_arcs;

    Shape shape = net.shape[g];
    for (int r = threadIdx.x; r <= RANKS; r += blockDim.x) {
        first_arc[r] = net.first_arc[g * (RANKS + 1) + r];
        if (r < RANKS) received[r] = 0;
    }
    __syncthreads();
    for (int a = threadIdx.x; a < net.max_arcs; a += blockDim.x) {
        Arc arc = net.arcs[g * net.max_arcs + a];
        arcs[a] = arc;
        copies[a] = net.copies[g * net.max_arcs + a];
        arriving[a] = 0;
        if (a >= shape.arcs) continue;
        // The even split is where to start: half as many rounds as from the homes.
        int total = load[arc.quota / max_replicas], number = __popcll(arc.ranks);
        int place = __popcll(arc.ranks & ((Set(1) << arc.rank) - 1));
        tokens[a] = total / number + (place < total % number);
        atomicAdd(&received[arc.rank], tokens[a]);
    }
    for (int i = threadIdx.x; i < shape.experts; i += blockDim.x) {
        int packed = net.experts[g * net.max_experts + i], expert = packed & 0xffff, home = packed >> 16;
        int number = home < RANKS ? load[expert] : 0;
        if (home < RANKS) atomicAdd(&received[home], number);
        for (int c = 0; c < max_replicas; ++c)
            quota[expert * max_replicas + c] = c == 0 ? number : 0;
    }
    __syncthreads();
    return {arcs, copies, first_arc, tokens, arriving, received, room, shape.ranks, shape.arcs};
}

// Makes the split exact and writes the quotas of experts with several copies.
__device__ void finish(
    const Component& c, const Network& net, int* __restrict__ quota, int* __restrict__ rank_load,
    int* __restrict__ status, int num_ranks, int max_rounds) {
    int g = blockIdx.x, batch = blockIdx.y, lane = threadIdx.x;
    if (threadIdx.x < 32) {
        int over[RANKS_PER_LANE], total = 0, rounds = max_rounds;
        #pragma unroll
        for (int i = 0; i < RANKS_PER_LANE; ++i) {
            int rank = lane + 32 * i;
            over[i] = rank < c.num_ranks ? c.received[rank] : 0;
            if (rank < c.num_ranks) c.received[rank] = 0;
            total += over[i];
        }
        total = __reduce_add_sync(~0u, total);
        int limit = total / c.num_ranks + (total % c.num_ranks != 0);
        #pragma unroll
        for (int i = 0; i < RANKS_PER_LANE; ++i) over[i] -= limit;
        while (Set stuck = balance(c, over, rounds)) {
            int excess = 0, size = __popcll(stuck);
            #pragma unroll
            for (int i = 0; i < RANKS_PER_LANE; ++i)
                if (stuck >> (lane + 32 * i) & 1) excess += over[i];
            excess = __reduce_add_sync(~0u, excess);
            int rise = (excess + size - 1) / size;
            limit += rise;
            #pragma unroll
            for (int i = 0; i < RANKS_PER_LANE; ++i) over[i] -= rise;
        }
        #pragma unroll
        for (int i = 0; i < RANKS_PER_LANE; ++i) {
            int rank = lane + 32 * i;
            if (rank < c.num_ranks)  // what was received last is only unseen if the rounds ran out
                rank_load[batch * num_ranks + net.ranks[g * RANKS + rank]] =
                    over[i] + c.received[rank] + limit;
        }
        if (lane == 0 && rounds == 0) status[batch] = 1;
    }
    __syncthreads();
    for (int a = threadIdx.x; a < c.num_arcs; a += blockDim.x)
        quota[c.arcs[a].quota] = c.tokens[a] + c.arriving[a];
}
