// Pushing excess along the edges from one layer of ranks to the next.
#pragma once

#include "component.cuh"

namespace lplb {

template <typename V>
struct ResidualEdge {           // an edge along which tokens may move, with addresses ready
    typename V::Set target;     // a bit; none: no edge
    int arc, to, rank;          // indices of the two copies in `tokens`, and of the target in `excess`
    unsigned same;              // edges of the same copy, as bits of the chunk
};

// The `number` bits from `begin` on, as far as they are of the chunk.
template <typename V>
__device__ unsigned bits_of_chunk(int begin, int number) {
    if constexpr (V::wide) {
        int first = max(begin, 0), end = min(begin + number, V::chunk);
        return unsigned((1ull << max(first, end)) - (1ull << first));
    } else {
        unsigned long long all = (1ull << number) - 1;
        return unsigned(begin < 0 ? all >> -begin : all << begin);
    }
}

// This thread's edges of the chunk that begins with a rank's edge number `chunk`.
template <typename V>
__device__ void make_ready(const Edge* edges, int number, int chunk, ResidualEdge<V> (&residual)[V::turns]) {
    #pragma unroll
    for (int i = 0; i < V::turns; ++i) {
        int place = i * V::parts + threadIdx.x % V::parts;
        Edge edge{-1, -1, 0, 0, 0};
        if (chunk + place < number) edge = edges[chunk + place];
        residual[i] = {typename V::Set{}, 0, 0, 0, 0};
        if (edge.arc < 0) continue;
        int begin = place - edge.nth;
        residual[i] = {only<typename V::Set>(edge.target), edge.arc, edge.to, edge.target,
                       bits_of_chunk<V>(begin, edge.number)};
    }
}

// One layer of a wave: ranks push their excess to the ranks `down`, in the layer below. Ranks of the lowest layer
// take no more than their deficit. Lanes whose ranks do not push run along, since votes and shuffles take all lanes.
template <typename V, bool general>
__device__ void push(const Component<V>& c, const ResidualEdge<V> (&first)[V::turns], bool pushes,
                     typename V::Set down, bool lowest) {
    int rank = threadIdx.x / V::parts, part = threadIdx.x % V::parts, lane = threadIdx.x % 32;
    int excess = pushes ? early(c.excess() + rank) : 0;
    ResidualEdge<V> edges[V::turns];
    #pragma unroll
    for (int i = 0; i < V::turns; ++i) edges[i] = first[i];
    for (int chunk = 0;; chunk += V::chunk) {
        int available[V::turns], limit[V::turns], offer[V::turns], total = 0;
        bool usable[V::turns];
        #pragma unroll
        for (int i = 0; i < V::turns; ++i) {
            usable[i] = pushes && any(edges[i].target & down);
            available[i] = usable[i] ? early(c.tokens + edges[i].arc) : 0;
            limit[i] = usable[i] && lowest ? early(c.deficit() + edges[i].rank) : MAX_TOTAL;
        }
        if (!__any_sync(~0u, excess > 0)) return;
        #pragma unroll
        for (int i = 0; i < V::turns; ++i) {
            if (general && usable[i]) limit[i] = min(limit[i], c.capacity(edges[i].to));
            usable[i] = excess > 0 && available[i] > 0 && (!general || limit[i] > 0);
            offer[i] = available[i];
        }
        if (c.shape.most_nth > 0) {
            // The edges of one copy share its tokens. Each takes half of what the earlier ones left, and the last
            // takes all. Edges in the next chunk share the rest in the same way.
            unsigned usable_edges = 0;
            #pragma unroll
            for (int i = 0; i < V::turns; ++i) {
                unsigned of_rank = __ballot_sync(~0u, usable[i]) >> (lane - part) & ((1ull << V::parts) - 1);
                usable_edges |= of_rank << (i * V::parts);
            }
            #pragma unroll
            for (int i = 0; i < V::turns; ++i) {
                unsigned same = usable_edges & edges[i].same, lower = (1u << (i * V::parts + part)) - 1;
                int rest = available[i] >> __popc(same & lower);
                bool last = (same & (~lower << 1)) == 0;
                offer[i] = last ? rest : rest - (rest >> 1);
            }
        }
        #pragma unroll
        for (int i = 0; i < V::turns; ++i) {
            offer[i] = usable[i] ? min(offer[i], limit[i]) : 0;
            total += offer[i];
        }
        int sum = total;
        #pragma unroll
        for (int i = 1; i < V::parts; i *= 2) {
            int other = __shfl_up_sync(~0u, sum, i, V::parts);
            if (i <= part) sum += other;
        }
        int remaining = excess - (sum - total);
        #pragma unroll
        for (int i = 0; i < V::turns; ++i) {
            int tokens = min(offer[i], remaining);
            remaining -= offer[i];
            if (tokens <= 0) continue;
            atomicAdd(&c.excess()[edges[i].rank], tokens);
            atomicAdd(&c.tokens[edges[i].to], tokens);
            atomicSub(&c.tokens[edges[i].arc], tokens);
        }
        if (V::parts > 1) __syncwarp();  // all threads of the rank have read its excess before the last thread writes it
        // No other thread adds to a rank's excess while the rank pushes.
        if (part == V::parts - 1 && excess > 0) c.excess()[rank] = max(0, excess - sum);
        if (!V::more || chunk + V::chunk >= c.shape.most_edges) return;
        excess = max(0, excess - __shfl_sync(~0u, sum, V::parts - 1, V::parts));
        make_ready<V>(c.edges, c.end_of_edges(), chunk + V::chunk, edges);
        __syncwarp();  // this chunk's tokens are subtracted before the next chunk reads a copy's rest
    }
}

}  // namespace lplb
