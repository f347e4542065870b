// Plans by active slots or by cost: one block solves one component for one batch.
//
// The flow finds an exact solution: by tokens, or by one unit for each expert with tokens. The search improves it, or
// the plan with all tokens at home. Where no plan can cost less than the latter, neither flow nor search runs.
#pragma once

#include "flow.cuh"
#include "search.cuh"

namespace lplb {

// The memory of the search beside that of the flow, in shared memory.
template <typename V>
struct Workplace {
    char* at = nullptr;
    int max_arcs = 0;
    static constexpr int LONG = V::size * sizeof(Amount), WORDS = V::size * sizeof(int);
    static constexpr int STEPS = LONG + 13 * WORDS, OWN = STEPS + 2 * (MAX_COST_STEPS + 2) * int(sizeof(int));

    // Lays it out from `begin`, a multiple of 8, and returns its end. Steps are readable behind the next barrier.
    __device__ char* lay_out(const Objective& o, int arcs, char* begin) {
        at = begin;
        max_arcs = arcs;
        block_stride<V::threads>(2 * (MAX_COST_STEPS + 1), [&](int i) { steps()[i] = o.costs[i]; });
        return at + of_warps() + V::threads / 32 * Reach<V>::num_bytes(max_arcs);
    }

    // [size] amounts of ranks; their parts that stay; and the parts of movable rows, at home and by tokens.
    __device__ Amount* amount() const { return in_shared<Amount>(at, 0); }
    __device__ Sums of_stays() const { return {in_shared<unsigned>(at, LONG), V::size}; }
    __device__ Sums of_home() const { return {in_shared<unsigned>(at, LONG + 3 * WORDS), V::size}; }
    __device__ Sums of_tokens() const { return {in_shared<unsigned>(at, LONG + 6 * WORDS), V::size}; }
    // [size] of experts with one copy and base loads.
    __device__ int* staying_tokens() const { return in_shared<int>(at, LONG + 9 * WORDS); }
    __device__ int* staying_active() const { return in_shared<int>(at, LONG + 10 * WORDS); }
    // [size] active slots, and tokens in the end.
    __device__ int* active() const { return in_shared<int>(at, LONG + 11 * WORDS); }
    __device__ int* load() const { return in_shared<int>(at, LONG + 12 * WORDS); }
    // [2, MAX_COST_STEPS + 1] costs of rows.
    __device__ int* steps() const { return in_shared<int>(at, STEPS); }
    // [arcs] what rows count; and rows of another plan.
    __device__ Amount* own() const { return in_shared<Amount>(at, OWN); }
    __device__ int* kept() const { return in_shared<int>(at, OWN + max_arcs * int(sizeof(Amount))); }
    // Of this warp.
    __device__ Reach<V> reach() const {
        return {at + of_warps() + int(threadIdx.x / 32) * Reach<V>::num_bytes(max_arcs)};
    }

    // Behind the arrays of the block.
    __device__ int of_warps() const { return OWN + max_arcs * int(sizeof(Amount) + sizeof(int)); }
};

// What stays on the ranks of the component g, where there are no guests.
template <typename V>
struct Staying {
    const Problem& p;
    int g;
    const int* quota;  // [E, C] where loads of experts with one copy are written

    // Nanoseconds that this thread's rank waits for guests.
    __device__ Amount wait() const { return 0; }

    // Calls `take` for the rank and the rows of each expert with one copy.
    template <typename Take>
    __device__ void each_single(Take take) const {
        #pragma unroll 1
        for (int i = threadIdx.x; i < p.net.max_experts; i += V::threads) {
            int packed = p.net.experts[g * p.net.max_experts + i], rank = packed >> 16;
            if (packed >= 0 && rank < V::size) take(rank, quota[(packed & 0xffff) * p.max_replicas]);
        }
    }
};

// A component of a batch, by another objective than tokens. `Stays`: as `Staying`. `Flow`: calls `run_flow`.
template <typename V, typename Stays, typename Flow>
struct ByObjective {
    const Problem& p;
    const Objective& o;
    const Component<V>& c;
    const Stays& stays;
    const Flow& flow;
    const int* load;            // [arcs] of experts with several, by place
    const Workplace<V>& place;
    CountCosts costs;
    ChainVerdicts<V>& verdicts;
    Sums total;                 // of one place: the least that all experts cost
    int& num_active;            // base loads and experts with tokens

    // The least cost of an expert with so many rows, over any copies. `per`: divides by `least_tiles`.
    __device__ Amount least_of(int rows, const Divisor& per) const {
        const int* least = place.steps() + MAX_COST_STEPS + 1;
        int tiles = costs.tiles_of(rows);
        if (tiles <= o.num_steps) return least[tiles];
        return max(Amount(least[o.num_steps]), per.of_amount(Amount(tiles) * o.least_cost));
    }

    // The rows of an arc with all tokens at home.
    __device__ int at_home(int a) const {
        Arc arc = c.arcs[a];
        return arc.quota % p.max_replicas == 0 ? load[arc.place] : 0;
    }

    // Adds up what stays on each rank. By cost, also the cost of all tokens at home, and the least cost of all experts.
    __device__ void count() const {
        Divisor per(o.least_tiles);
        Amount sum = 0;
        int number = 0;
        if (threadIdx.x < V::size) {
            int r = threadIdx.x, base = p.base != nullptr && r < c.shape.ranks ? p.base[c.ranks[r]] : 0;
            place.staying_tokens()[r] = place.load()[r] = c.staying()[r];
            place.staying_active()[r] = number = base > 0;
            sum = costs.of(base) + stays.wait();
            place.of_stays().set(r, sum);
            place.of_home().set(r, 0);
            place.of_tokens().set(r, 0);
        }
        if (threadIdx.x == 0) {
            total.set(0, 0);
            num_active = 0;
        }
        __syncthreads();  // sums are initialised before any thread adds to them
        stays.each_single([&](int rank, int rows) {
            if (rows == 0) return;
            atomicAdd(&place.staying_active()[rank], 1);
            ++number;
            if (o.kind == AIM_EXPERTS) return;
            Amount cost = costs.of(rows);
            place.of_stays().add(rank, cost);
            sum += cost;
        });
        if (o.kind != AIM_EXPERTS) {
            #pragma unroll 1
            for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) {
                Arc arc = c.arcs[a];
                int rows = at_home(a);
                if (rows > 0) place.of_home().add(arc.rank, costs.of(rows));
                if (c.arc_at(arc.place) != a) continue;
                number += load[arc.place] > 0;
                sum += least_of(load[arc.place], per);
            }
            total.add_of_warp(0, sum);
            number = __reduce_add_sync(~0u, number);
            if (threadIdx.x % 32 == 0 && number > 0) atomicAdd(&num_active, number);
        }
        __syncthreads();  // all is added before the sums are read
    }

    // The largest amount of a rank: what stays and, where given, these rows.
    __device__ Amount largest_with(const Sums& rows) const {
        Amount counts[V::words];
        int who;
        #pragma unroll
        for (int i = 0; i < V::words; ++i) {
            int rank = threadIdx.x % 32 + 32 * i;
            counts[i] = -1;
            if (rank < c.shape.ranks) counts[i] = place.of_stays().at(rank) + (rows.parts == nullptr ? 0 : rows.at(rank));
        }
        return largest_of<V>(counts, who);
    }

    // A lower bound of the cost of every plan. `by_slots`: the bound by active slots alone.
    __device__ Amount least_cost(Amount& by_slots) const {
        Divisor ranks(c.shape.ranks);
        int most = 0;
        #pragma unroll
        for (int i = 0; i < V::words; ++i) {
            int rank = threadIdx.x % 32 + 32 * i;
            if (rank < c.shape.ranks) most = max(most, place.staying_active()[rank]);
        }
        // Some rank has at least the mean number of active slots, and each costs the first step.
        int active = max(__reduce_max_sync(~0u, most), int(ranks.of(unsigned(num_active + c.shape.ranks - 1))));
        by_slots = Amount(active) * costs.steps[1];
        Amount mean = ranks.of_amount(total.at(0) + c.shape.ranks - 1);
        return max(max(mean, largest_with({nullptr, 0})), by_slots);
    }

    // Puts all tokens home, and keeps the rows of the plan before.
    __device__ void put_home() const {
        #pragma unroll 1
        for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) {
            place.kept()[a] = c.tokens[a];
            c.tokens[a] = at_home(a);
        }
    }

    __device__ void take_kept() const {
        #pragma unroll 1
        for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) {
            int rows = c.tokens[a];
            c.tokens[a] = place.kept()[a];
            place.kept()[a] = rows;
        }
    }

    // Improves the rows `c.tokens`. `rows`: their amounts by rank.
    __device__ Amount improve_cost(const Sums& rows, Amount least) const {
        if (threadIdx.x < V::size) place.amount()[threadIdx.x] = place.of_stays().at(threadIdx.x) + rows.at(threadIdx.x);
        return Search<V, CountCosts>{c, place.amount(), place.active(), place.own(), verdicts, place.reach(), costs, load, least, 0, 0}.run();
    }

    // Plans by cost: the rows replace the even split in `c.tokens`. `tokens`: their number.
    __device__ void solve_cost(int tokens) const {
        count();
        Amount by_slots, least = least_cost(by_slots);
        Amount of_home = largest_with(place.of_home()), of_best = 0, of_tokens = 0;
        if (of_home <= least) return put_home();
        // By `cost` the search runs before the flow where it would begin at home in any case. If it reaches the bound, no
        // flow is needed. Else the search runs behind the flow. The loop has the code of both once.
        bool searches = tokens <= Amount(o.most_rows) * num_active, may_begin = searches && 2 * by_slots >= least;
        bool is_near = may_begin && o.least_gap == 0 && 2 * of_home <= 3 * least, from_home = is_near;
        #pragma unroll 1
        for (int turn = is_near; turn < 1 + searches + is_near; ++turn) {
            if (turn == 1) {
                if (from_home) put_home();
                of_best = improve_cost(from_home ? place.of_home() : place.of_tokens(), least);
                if (is_near && of_best <= least) return;
                continue;
            }
            if (is_near) {
                take_kept();
                __syncthreads();  // the even split is restored before the flow reads it
            }
            flow();
            add_up_costs();
            __syncthreads();  // the cost of the plan by tokens is added up before it is read
            of_tokens = largest_with(place.of_tokens());
            if (o.least_gap > 0) searches &= min(of_home, of_tokens) - least > Amount(o.least_gap) * c.shape.ranks;
            if (!searches) of_best = of_tokens;
            from_home |= may_begin && 2 * of_home <= 3 * of_tokens;
        }
        // The cheapest, in this order: all at home, the improved plan, the plan by tokens. One of two plans is in `kept`.
        if (of_home <= min(of_best, of_tokens)) put_home();
        else if ((of_best <= of_tokens) == is_near) take_kept();
    }

    // Adds up what the rows `c.tokens` cost, by rank.
    __device__ void add_up_costs() const {
        #pragma unroll 1
        for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) {
            int rows = c.tokens[a];
            if (rows > 0) place.of_tokens().add(c.arcs[a].rank, costs.of(rows));
        }
    }

    // Plans by active slots: the rows are in `c.tokens`. `tokens`: their number.
    __device__ void solve_experts(int tokens) const {
        count();
        if (threadIdx.x < V::size) {
            c.staying()[threadIdx.x] = place.active()[threadIdx.x] = place.staying_active()[threadIdx.x];
            c.movable()[threadIdx.x] = 0;
        }
        __syncthreads();  // sums are zero before units are added
        #pragma unroll 1
        for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) {
            Arc arc = c.arcs[a];
            bool is_here = load[arc.place] > 0 && c.arc_at(arc.place) == a;
            c.tokens[a] = is_here;
            if (is_here) atomicAdd(&c.movable()[arc.rank], 1);
        }
        __syncthreads();  // a unit of each expert is on its first copy, and their sums are whole, before the flow
        flow();
        int most_active = 0, most = 0;
        #pragma unroll
        for (int i = 0; i < V::words; ++i) {
            int rank = threadIdx.x % 32 + 32 * i;
            if (rank >= c.shape.ranks) continue;
            most_active = max(most_active, c.load()[rank]);
            most = max(most, place.staying_tokens()[rank]);
        }
        most_active = __reduce_max_sync(~0u, most_active);
        most = __reduce_max_sync(~0u, most);
        #pragma unroll 1
        for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) {
            int rows = c.tokens[a] > 0 ? load[c.arcs[a].place] : 0, rank = c.arcs[a].rank;
            c.tokens[a] = rows;
            if (rows == 0) continue;
            place.of_tokens().add(rank, rows);
            atomicAdd(&place.active()[rank], 1);
        }
        __syncthreads();  // rows of whole experts are added up before the sums are read
        if (threadIdx.x < V::size)
            place.amount()[threadIdx.x] = place.staying_tokens()[threadIdx.x] + place.of_tokens().at(threadIdx.x);
        int ranks = c.shape.ranks, mean = tokens / ranks + (tokens % ranks != 0);
        Search<V, CountTokens>{c, place.amount(), place.active(), place.own(), verdicts, place.reach(), {}, load, max(mean, most), most_active,
                               o.free_rows}.run();
    }

    // Adds up the tokens of each rank. Only the thread of a rank may read its sum without a barrier.
    __device__ void add_up_loads() const {
        block_stride<V::threads>(c.shape.arcs, [&](int a) { atomicAdd(&place.load()[c.arcs[a].rank], c.tokens[a]); });
        __syncthreads();  // the loads are added up before they are read
        if (threadIdx.x < V::size) c.load()[threadIdx.x] = place.load()[threadIdx.x];
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
        __shared__ ChainVerdicts<V> verdicts;
        __shared__ unsigned total[3];
        __shared__ int num_active;
        const int* load = reinterpret_cast<const int*>(c.arcs + p.net.max_arcs);
        CountCosts costs(place.steps(), o.num_steps, o.tile, o.slope);
        Staying<V> stays{p, g, quota};
        auto flow = [&] { run_flow<V, false>(p, c, edges, ending); };
        ByObjective<V, Staying<V>, decltype(flow)> by{p,     o,        c,          stays,     flow, load, place,
                                                      costs, verdicts, {total, 1}, num_active};
        if (o.kind == AIM_EXPERTS) by.solve_experts(ending.total);
        else by.solve_cost(ending.total);
        by.add_up_loads();
    }
};

}  // namespace lplb
