// Plans by active slots, by cost, or the cheapest of several: one block solves one component for one batch.
//
// The flow makes two exact solutions: of tokens, and of one unit for each expert with tokens. The search improves them.
#pragma once

#include "flow.cuh"
#include "search.cuh"

namespace lplb {

// What the searches need beside the flow, in shared memory.
template <typename V>
struct Workplace {
    Ranks<V> ranks;
    int* steps;                 // [2, MAX_COST_STEPS + 1] what rows cost
    int *by_tokens, *by_experts;  // [arcs] rows by these objectives

    // Lays it out from `at`, a multiple of 8, and returns where it ends. Steps are there behind the next barrier.
    __device__ char* lay_out(const Objective& o, int max_arcs, char* at) {
        at = ranks.lay_out(at);
        steps = reinterpret_cast<int*>(at);
        by_tokens = steps + 2 * (MAX_COST_STEPS + 2);  // a multiple of 16 bytes in all
        by_experts = by_tokens + max_arcs;
        for (int i = threadIdx.x; i < 2 * (MAX_COST_STEPS + 1); i += V::threads) steps[i] = o.costs[i];
        return reinterpret_cast<char*>(by_experts + max_arcs);
    }
};

// A component of a batch, by another objective than tokens.
template <typename V>
struct ByObjective {
    const Problem& p;
    const Objective& o;
    const Component<V>& c;
    int g;                      // of the component
    const int* quota;           // [E, C] where loads of experts with one copy are written
    const int* load;            // [arcs] of experts with several, by place
    const Ranks<V>& ranks;
    int *by_tokens, *by_experts;  // [arcs] rows by these objectives
    CountCosts costs;
    const int* least;           // [1 + steps] the least that a load costs, by tiles
    Amount least_cost = 0, of_home = 0, of_experts = 0;  // no plan costs less; what these plans cost

    // The least that an expert of so many rows costs, over any copies.
    __device__ Amount least_of(int rows) const {
        int tiles = costs.tiles_of(rows);
        if (tiles <= o.num_steps) return least[tiles];
        return max(Amount(least[o.num_steps]), Amount(tiles) * o.least_cost / o.least_tiles);
    }

    // Counts what stays on each rank. `c.staying()` has the tokens.
    __device__ void count_staying() const {
        if (threadIdx.x < V::size) {
            int r = threadIdx.x, base = p.base != nullptr && r < c.shape.ranks ? p.base[c.ranks[r]] : 0;
            ranks.staying_tokens[r] = c.staying()[r];
            ranks.staying_cost[r] = costs.of(base);
            ranks.staying_active[r] = base > 0;
        }
        __syncthreads();  // base loads are there before experts are added
        for (int i = threadIdx.x; i < p.net.max_experts; i += V::threads) {
            int packed = p.net.experts[g * p.net.max_experts + i], rank = packed >> 16;
            if (packed < 0 || rank >= V::size) continue;
            int rows = quota[(packed & 0xffff) * p.max_replicas];
            if (rows == 0) continue;
            atomicAdd(reinterpret_cast<Key*>(ranks.staying_cost) + rank, Key(costs.of(rows)));
            atomicAdd(&ranks.staying_active[rank], 1);
        }
        __syncthreads();  // all are added before the sums are read
    }

    // The start of a flow: a unit of each expert with tokens is on its first copy.
    __device__ void start_units() const {
        if (threadIdx.x < V::size) {
            c.staying()[threadIdx.x] = ranks.staying_active[threadIdx.x];
            c.movable()[threadIdx.x] = 0;
        }
        __syncthreads();  // sums are zero before units are added
        for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) {
            Arc arc = c.arcs[a];
            bool is_here = load[arc.place] > 0 && c.copies[arc.place] == a;
            c.tokens[a] = is_here;
            if (is_here) atomicAdd(&c.movable()[arc.rank], 1);
        }
        __syncthreads();  // units and their sums are there before the flow reads them
    }

    // The start of the other flow: all tokens, split evenly.
    __device__ void start_tokens() const {
        if (threadIdx.x < V::size) {
            c.staying()[threadIdx.x] = int(ranks.staying_tokens[threadIdx.x]);
            c.movable()[threadIdx.x] = 0;
        }
        __syncthreads();  // sums are zero before tokens are added
        split_evenly(c, load);
        __syncthreads();  // tokens and their sums are there before the flow reads them
    }

    // The sum of what ranks count, and of what experts with several copies count at least, over the ranks. Between two
    // calls is a barrier.
    template <typename Least>
    __device__ Amount bound_of(const Amount* staying, Least least_rows) const {
        __shared__ Amount total;
        if (threadIdx.x == 0) total = 0;
        __syncthreads();  // it is zero before any thread adds to it
        Amount sum = threadIdx.x < c.shape.ranks ? staying[threadIdx.x] : 0;
        for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) {
            Arc arc = c.arcs[a];
            if (c.copies[arc.place] == a) sum += least_rows(load[arc.place]);
        }
        if (sum != 0) atomicAdd(reinterpret_cast<Key*>(&total), Key(sum));
        __syncthreads();  // the sum is whole
        int who;
        Amount mean = (total + c.shape.ranks - 1) / c.shape.ranks, most = largest_of(c, staying, who);
        return max(mean, most);
    }

    // What the largest rank costs with these rows of the arcs.
    template <typename Rows>
    __device__ Amount cost_of(Rows rows_of) const {
        int who;
        add_up_ranks(c, ranks, costs, ranks.staying_cost, rows_of);
        return largest_of(c, ranks.amount, who);
    }

    // The rows of an arc with all tokens at home.
    __device__ int at_home(int a) const {
        Arc arc = c.arcs[a];
        return arc.quota % p.max_replicas == 0 ? load[arc.place] : 0;
    }

    // Rows by active slots, from the units of a flow in `c.tokens`. Whether that or home is what the objective asks
    // for, the same to every thread.
    __device__ bool improve_experts() {
        int most_active = 0;
        for (int r = 0; r < c.shape.ranks; ++r) most_active = max(most_active, c.load()[r]);
        if (o.kind != AIM_EXPERTS) {
            least_cost = max(bound_of(ranks.staying_cost, [&](int rows) { return least_of(rows); }),
                             Amount(most_active) * costs.steps[1]);
            of_home = cost_of([&](int a) { return at_home(a); });
            if (o.kind == AIM_AUTO && of_home <= least_cost) {
                for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) c.tokens[a] = at_home(a);
                return true;
            }
        }
        for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads)
            c.tokens[a] = c.tokens[a] > 0 ? load[c.arcs[a].place] : 0;
        Amount bound = bound_of(ranks.staying_tokens, [](int rows) { return Amount(rows); });
        Search<V, CountTokens>{c, ranks, {}, ranks.staying_tokens, load, bound, most_active, o.tile}.run();
        if (o.kind == AIM_EXPERTS) return true;
        for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) by_experts[a] = c.tokens[a];
        of_experts = cost_of([&](int a) { return by_experts[a]; });
        return of_experts <= least_cost;
    }

    // Rows by cost, or of the cheapest plan, from the tokens of a flow in `c.tokens`.
    __device__ void improve_cost() const {
        for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) by_tokens[a] = c.tokens[a];
        Amount of_tokens = cost_of([&](int a) { return by_tokens[a]; });
        const int* start = of_experts <= of_tokens ? by_experts : by_tokens;
        for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) c.tokens[a] = start[a];
        Search<V, CountCosts>{c, ranks, costs, ranks.staying_cost, load, least_cost, NO_LIMIT, -1}.run();
        if (o.kind == AIM_COST) return;
        Amount of_best = cost_of([&](int a) { return c.tokens[a]; });
        // The first of the cheapest, in this order.
        Amount cheapest = min(min(of_home, of_experts), min(of_tokens, of_best));
        for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) {
            if (of_home == cheapest) c.tokens[a] = at_home(a);
            else if (of_experts == cheapest) c.tokens[a] = by_experts[a];
            else if (of_tokens == cheapest) c.tokens[a] = by_tokens[a];
        }
    }

    // Adds up the tokens of each rank.
    __device__ void add_up_loads() const {
        if (threadIdx.x < V::size) c.load()[threadIdx.x] = int(ranks.staying_tokens[threadIdx.x]);
        __syncthreads();  // what stays is there before rows are added
        for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) atomicAdd(&c.load()[c.arcs[a].rank], c.tokens[a]);
        __syncthreads();  // the sums are whole
    }
};

// A solver by another objective than tokens, as `ByTokens` is one by them.
template <typename V>
struct ByAim {
    const Objective& o;
    Workplace<V> place{};

    __device__ char* lay_out(const Problem& p, char* at) { return place.lay_out(o, p.net.max_arcs, at); }

    __device__ void move(const Problem& p, int g, const Component<V>& c, const ResidualEdge<V> (&edges)[V::turns],
                         Ending& ending, const int* quota) const {
        const int* load = reinterpret_cast<const int*>(c.arcs + p.net.max_arcs);
        CountCosts costs{place.steps, o.num_steps, o.tile, o.slope};
        ByObjective<V> by{p, o, c, g, quota, load, place.ranks, place.by_tokens, place.by_experts, costs,
                          place.steps + MAX_COST_STEPS + 1};
        by.count_staying();
        by.start_units();
        run_flow<V, false>(p, c, edges, ending);
        if (!by.improve_experts()) {
            by.start_tokens();
            run_flow<V, false>(p, c, edges, ending);
            by.improve_cost();
        }
        by.add_up_loads();
    }
};

}  // namespace lplb
