// The exact flow of one component of the replica graph, by one block.
//
// Ranks above a limit K push their excess towards ranks below it, layer by layer of a shortest-path layering.
// Each round makes the layers anew: preflow-push (Goldberg and Tarjan 1988) in waves, with exact labels. Ranks
// whose excess reaches no rank below K are a cut S. So load(S) / |S| is a lower bound, and its ceiling the next
// K: Newton's method on the parametric cut, as in the CPU's definition. All numbers are whole, and no result
// depends on the order of atomics.
//
// The lanes of each warp together have the whole graph. So a layer takes one vote, and every warp finds the layers
// itself. The time of a layer is the latency of its instructions, so there are few between two barriers.
#pragma once

#include "number.cuh"
#include "ptx.cuh"
#include "push.cuh"
#include "speeds.cuh"

namespace lplb {

// A barrier of the threads that push.
template <typename V>
__device__ void sync_pushing() {
    if (V::pushing == 32) __syncwarp();
    else barrier_of_first<V::pushing>();
}

// The ranks to which tokens of this thread's rank could go.
template <typename V, bool general>
__device__ typename V::Set targets_of(const Component<V>& c, const ResidualEdge<V> (&edges)[V::turns]) {
    typename V::Set targets{};
    #pragma unroll
    for (const ResidualEdge<V>& edge : edges)
        if (c.tokens[edge.arc] > 0 && (!general || c.capacity(edge.to) > 0)) targets |= edge.target;
    #pragma unroll 1
    for (int i = V::chunk + threadIdx.x % V::parts; V::more && i < c.end_of_edges(); i += V::parts) {
        Edge edge = c.edges[i];
        if (edge.arc >= 0 && c.tokens[edge.arc] > 0 && (!general || c.capacity(edge.to) > 0))
            targets |= only<typename V::Set>(edge.target);
    }
    #pragma unroll
    for (int other = 1; other < V::parts; other *= 2) targets |= of_lane_xor(targets, other);
    return targets;
}

// Moves tokens until the largest load of a rank, by the ranks' speeds, is the optimum. By the threads that
// push. Returns false if the rounds did not suffice. `general`: with speeds or capacities.
template <typename V, bool general>
__device__ bool balance(const Component<V>& c, const ResidualEdge<V> (&edges)[V::turns], int rounds) {
    typedef typename V::Set Set;
    int rank = threadIdx.x / V::parts, part = threadIdx.x % V::parts, lane = threadIdx.x % 32;
    int total = 0, least = 0;
    #pragma unroll
    for (int i = 0; i < V::words; ++i) {
        if (lane + 32 * i >= V::size) continue;
        total += c.staying()[lane + 32 * i] + c.movable()[lane + 32 * i];
        least = max(least, c.staying()[lane + 32 * i]);
    }
    total = __reduce_add_sync(~0u, total);
    least = __reduce_max_sync(~0u, least);
    // K of this thread's rank begins at the mean load, or at the largest load that a rank cannot pass on. With speeds
    // each rank has a K of its own, and a lane also has those of its ranks.
    int limit = max(least, total / c.shape.ranks + (total % c.shape.ranks != 0)), limits[V::words];
    if (general && c.speed != nullptr) raise_limits<V>(c, ~Set{}, total, limits, limit, rank);
    int rise = limit - c.movable()[rank];  // the increase of K since `excess` was written
    Set* layers = c.layers;
    keep_in_register(layers);  // else its address is computed again at each use
    __builtin_assume(__isShared(layers));
    sync_pushing<V>();  // all threads have read the loads before excesses overwrite them
    for (; rounds > 0; --rounds) {
        int excess = part == 0 ? early(c.excess() + rank) - rise : 0;
        Set targets = targets_of<V, general>(c, edges);
        if (part == 0) {
            if (rank >= c.shape.ranks) excess = 0;
            c.excess()[rank] = excess;
            c.deficit()[rank] = max(0, -excess);
            c.targets[rank] = targets;
        }
        rise = 0;
        sync_pushing<V>();  // excesses, deficits and targets of all ranks are written before a warp reads them
        Set next[V::words];
        int above[V::words];
        bool flag[V::words];
        #pragma unroll
        for (int i = 0; i < V::words; ++i) {
            bool is_rank = lane + 32 * i < V::size;
            next[i] = is_rank ? early(c.targets + lane + 32 * i) : Set{};
            above[i] = is_rank ? c.excess()[lane + 32 * i] : 0;
            flag[i] = above[i] > 0;
        }
        Set with_excess = vote<V>(flag);
        if (!any(with_excess)) break;
        #pragma unroll
        for (int i = 0; i < V::words; ++i) flag[i] = above[i] < 0;
        Set layer = vote<V>(flag), reached = layer, down{};
        int top = 0;
        while (any(layer) && any(with_excess & ~reached)) {
            if (threadIdx.x == 0) layers[top] = layer;
            ++top;
            down = layer;
            #pragma unroll
            for (int i = 0; i < V::words; ++i) flag[i] = any(next[i] & layer);
            layer = vote<V>(flag) & ~reached;
            reached |= layer;
        }
        if (any(with_excess & ~reached)) {
            // The ranks that reach no rank below its limit are a cut: no edge leads out of it.
            int cut_load = 0, size = c.shape.ranks - number_of<V>(reached), before = limit;
            #pragma unroll
            for (int i = 0; i < V::words; ++i)
                if (lane + 32 * i < c.shape.ranks && !has(reached, lane + 32 * i))
                    cut_load += above[i] + (general && c.speed != nullptr ? limits[i] : 0);
            cut_load = __reduce_add_sync(~0u, cut_load);
            if (general && c.speed != nullptr) raise_limits<V>(c, ~reached, cut_load, limits, limit, rank);
            else limit += (cut_load + size - 1) / size;
            rise = limit - before;
            sync_pushing<V>();  // every warp has read the excesses before the next round writes them
            continue;
        }
        for (; top > 0; --top) {
            // Two ranks at once could fill one copy beyond its capacity, so ranks push in turn.
            int turns = general && c.cap != nullptr ? c.shape.ranks : 1;
            for (int turn = 0; turn < turns; ++turn) {
                sync_pushing<V>();  // the layer above has pushed, and the layers are written
                bool pushes = has(layer, rank) && (turns == 1 || rank == turn);
                push<V, general>(c, edges, pushes, down, top == 1);
            }
            layer = down;
            if (top > 1) down = layers[top - 2];
        }
        sync_pushing<V>();  // the last layer has pushed before the next round reads excesses and tokens
    }
    sync_pushing<V>();  // every warp has read the excesses before loads overwrite them
    if (part == 0 && rank < c.shape.ranks) c.load()[rank] += limit - rise;
    return rounds > 0;
}

// The blocks behind those of the components number this rank's picks, which needs no quotas, and copy the counts.
template <typename V>
__device__ void number_picks(const Problem& p, char* shared) {
    int first = p.num_components * V::blocks * V::choices, helper = blockIdx.x - first, step = (gridDim.x - first) * V::threads;
    int number_of_counts = is_reused(p.turn) ? 0 : p.num_ranks * p.num_experts;
    #pragma unroll 1
    for (int i = helper * V::threads + threadIdx.x; i < number_of_counts; i += step)
        p.counted[i] = counts_of(p.counts, i / p.num_experts)[i % p.num_experts];
    // A grid of whole clusters may have a few more blocks than chunks.
    if (V::blocks > 1 && helper >= p.picks.num_chunks) return;
    number<V::threads>(p.picks, helper, counts_of(p.counts, p.counts.rank), p.error_flags,
                       reinterpret_cast<int*>(shared));
}

// Runs the flow of a component that `begin` has prepared, by all threads. Where the rounds do not suffice, the quotas
// are complete but not optimal.
template <typename V, bool general>
__device__ void run_flow(const Problem& p, const Component<V>& c, const ResidualEdge<V> (&edges)[V::turns],
                         Ending& ending) {
    if (threadIdx.x < V::pushing && !balance<V, general>(c, edges, p.max_rounds)) ending.status = NOT_CONVERGED;
    __syncthreads();  // tokens and loads are final before any thread reads them
}

// A solver by tokens: `start` may improve the even split, and the flow makes it exact.
template <typename V, bool general, typename Start>
struct ByTokens {
    Start start;

    // Takes its part of shared memory from `at` on, a multiple of 8. Returns the end of that part.
    __device__ char* lay_out(const Problem&, char* at) { return at; }

    // Moves the tokens of the component g, where some can move.
    __device__ void move(const Problem& p, int, const Component<V>& c, const ResidualEdge<V> (&edges)[V::turns],
                         Ending& ending, const int*) const {
        start(c);
        run_flow<V, general>(p, c, edges, ending);
    }
};

template <typename V, bool general, typename Start>
__device__ ByTokens<V, general, Start> by_tokens(Start start) { return {start}; }

// Solves a component that `begin` has prepared. `rank`: of the component's ranks the one that this thread has.
template <typename V, typename Solver>
__device__ void finish(const Problem& p, int g, const Component<V>& c, const ResidualEdge<V> (&edges)[V::turns],
                       int rank, Ending& ending, int* quota, int* rank_load, const Solver& solver) {
    if (ending.status != OPTIMAL || c.shape.ranks == 0) return;
    if (c.shape.arcs > 0) solver.move(p, g, c, edges, ending, quota);
    block_stride<V::threads>(c.shape.arcs, [&](int a) { quota[c.arcs[a].quota] = c.tokens[a]; });
    if (threadIdx.x < c.shape.ranks)
        rank_load[rank] = c.load()[threadIdx.x] - (p.base == nullptr ? 0 : p.base[rank]);
}

// This thread's edges in the component g, with addresses ready. Returns the address of all edges of its rank.
template <typename V>
__device__ const Edge* first_edges(const Problem& p, int g, ResidualEdge<V> (&edges)[V::turns]) {
    const Edge* of_rank = p.net.edges + (g * V::size + threadIdx.x / V::parts) * p.net.max_edges;
    make_ready<V>(of_rank, threadIdx.x < V::pushing ? p.net.max_edges : 0, 0, edges);
    return of_rank;
}

// One block solves one component of the replica graph for one batch.
template <typename V, bool general, typename Solver>
__device__ void solve_component(const Problem& p, char* shared, Solver solver) {
    int batch = blockIdx.y, g = blockIdx.x;
    if (g >= p.num_components) {
        number_picks<V>(p, shared);
        return;
    }
    if (is_reused(p.turn)) return;
    int* quota = p.quota + size_t(batch) * p.num_experts * p.max_replicas;
    int* rank_load = p.rank_load + size_t(batch) * p.num_ranks;
    // Values that are used late are loaded early.
    int rank = threadIdx.x < V::size ? p.net.ranks[g * V::size + threadIdx.x] : 0;
    ResidualEdge<V> edges[V::turns];
    const Edge* of_rank = first_edges<V>(p, g, edges);
    Addend addend;
    Component<V> c = lay_out_component<V>(p, g, shared, of_rank, addend);
    solver.lay_out(p, reinterpret_cast<char*>(const_cast<short*>(c.copies) + p.net.max_arcs));
    Ending ending = begin<V, general>(p, g, c, shared, addend, quota);
    finish(p, g, c, edges, rank, ending, quota, rank_load, solver);
    if (threadIdx.x == 0) p.endings[batch * p.num_components + g] = ending;
}

}  // namespace lplb
