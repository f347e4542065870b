// Plans by cost with guests: `plan_by_cost` of planning/guests_by_cost.py is the definition, bit for bit.
//
// Each block of a component plans one choice of guests: none, or those of a fill by a rule of its own. There is no flow: a
// search starts from the tokens of the fill. The last block to end takes the choice that costs least, and writes its plan.
#pragma once

#include "guests.cuh"
#include "objective.cuh"

namespace lplb {

// What stays on the ranks of a component with guests, as `Staying` has it without.
template <typename V>
struct StayingBesideGuests {
    const Experts<V>& experts;
    Amount own_wait;

    __device__ Amount wait() const { return own_wait; }

    template <typename Take>
    __device__ void each_single(Take take) const {
        #pragma unroll 1
        for (int i = threadIdx.x; i < experts.number; i += V::threads)
            if (number_of<V>(experts.ranks[i]) == 1) take(int(experts.residents[i].home), experts.load[i]);
    }
};

struct NoFlow {};

// As `solve_cost`, from the tokens that copies have instead of a flow's.
template <typename By>
__device__ void improve_start(const By& by) {
    by.count();
    by.add_up_costs();
    __syncthreads();  // the cost of the start is added up before it is read
    Amount by_slots, least = by.least_cost(by_slots);
    Amount of_home = by.largest_with(by.place.of_home()), of_start = by.largest_with(by.place.of_tokens());
    by.put_home();
    if (of_home <= least) return;
    bool from_home = 2 * by_slots >= least && 2 * of_home <= 3 * of_start;
    if (!from_home) by.take_kept();
    Amount of_best = by.improve_cost(from_home ? by.place.of_home() : by.place.of_tokens(), least);
    if (of_home <= min(of_best, of_start)) by.put_home();
    else if (from_home && of_start < of_best) by.take_kept();
}

// The number of pushes that this thread's rank waits for: of its guests, or of all that a home of one of them sends.
// `sent`: [size] any memory. With two barriers.
template <typename V>
__device__ int pushes_of_rank(const Guests& g, const Experts<V>& experts, int num_ranks, int* sent) {
    int rank = threadIdx.x, own = 0, most = 0;
    const int* guests = experts.guests + rank * g.num_slots;
    if (rank < V::size) sent[rank] = 0;
    __syncthreads();  // all numbers are zero before any thread counts
    #pragma unroll 1
    for (; rank < num_ranks && own < g.num_slots && guests[own] >= 0; ++own)
        atomicAdd(&sent[experts.residents[guests[own]].home], 1);
    __syncthreads();  // all guests are counted before the numbers are read
    #pragma unroll 1
    for (int slot = 0; slot < own; ++slot) most = max(most, sent[experts.residents[guests[slot]].home]);
    return max(own, most);
}

// Removes guests of this thread's rank that have no tokens. The others come first in its slots. Adds their number to
// `number`. Returns whether there were such.
template <typename V>
__device__ bool drop_unused(const Guests& g, const Experts<V>& experts, int num_ranks, int* number) {
    int rank = threadIdx.x, kept = 0;
    bool drops = false;
    if (rank >= num_ranks) return false;
    int *guests = experts.guests + rank * g.num_slots, *filled = experts.filled + (rank + 1) * g.num_local_slots - g.num_slots;
    #pragma unroll 1
    for (int slot = 0; slot < g.num_slots; ++slot) {
        int expert = guests[slot], tokens = filled[slot];
        guests[slot] = -1;
        if (expert < 0) continue;
        if (tokens == 0) {
            drops = true;
            continue;
        }
        guests[kept] = expert;
        filled[kept++] = tokens;
    }
    if (kept > 0) atomicAdd(number, kept);
    return drops;
}

constexpr Amount NEVER = ~0ull >> 1;  // more than any plan costs: there is none

// What a choice of guests comes to.
struct Trial {
    Amount value;  // of the largest rank
    int number;    // of guests with tokens
    bool dropped;  // whether others had none
};

// Improves the tokens of all copies by cost, and drops guests without any. The tokens are then in `experts.filled`.
template <typename V>
__device__ Trial improve(const Problem& p, const Guests& g, const Objective& o, int push, const Experts<V>& experts,
                         const Component<V>& c) {
    __shared__ ChainVerdicts<V> verdicts;
    __shared__ unsigned total[3];
    __shared__ int num_active, number;
    Workplace<V> place;
    place.lay_out(o, p.net.max_arcs, reinterpret_cast<char*>(experts.tokens + p.net.max_arcs));
    if (threadIdx.x == 0) number = 0;
    int pushes = pushes_of_rank(g, experts, c.shape.ranks, place.active());
    StayingBesideGuests<V> stays{experts, Amount(push) * pushes};
    NoFlow flow;
    CountCosts costs(place.steps(), o.num_steps, o.tile, o.slope);
    ByObjective<V, StayingBesideGuests<V>, NoFlow> by{p,     o,     c,        stays,      flow, experts.load_by_place,
                                                      place, costs, verdicts, {total, 1}, num_active};
    improve_start(by);
    __syncthreads();  // all tokens are final, and all sums are read
    block_stride<V::threads>(c.shape.ranks * g.num_local_slots, [&](int i) { experts.filled[i] = 0; });
    each_filled(g, experts, c.shape.ranks, [&](int i, int, int arc) { experts.filled[i] = c.tokens[arc]; });
    if (threadIdx.x < V::size) place.of_tokens().set(threadIdx.x, 0);
    __syncthreads();  // places have their tokens, and sums are zero, before they are used
    by.add_up_costs();
    bool dropped = __syncthreads_or(drop_unused(g, experts, c.shape.ranks, &number));  // all costs are added up
    if (dropped) {
        int fewer = pushes - pushes_of_rank(g, experts, c.shape.ranks, place.active());
        if (threadIdx.x < V::size)
            place.of_stays().set(threadIdx.x, place.of_stays().at(threadIdx.x) - Amount(push) * fewer);
        __syncthreads();  // all ranks wait for fewer pushes before the largest is looked for
    }
    return {by.largest_with(place.of_tokens()), number, dropped};
}

// A plan in device memory: the value and the number of guests, then the guests, and the tokens of all places.
constexpr int HEAD_OF_PLAN = 4;

// Leaves the plan of this block's choice for the last block to end, which takes the cheapest of them. Returns whether it is
// this one. Then the block has the guests and tokens of that plan, if there is any.
template <typename V>
__device__ bool take_cheapest(const Problem& p, const Guests& g, const Choices& choices, const Experts<V>& experts,
                              int num_ranks, const Trial& trial) {
    __shared__ bool last;
    int guests = V::size * g.num_slots, size = HEAD_OF_PLAN + guests + V::size * g.num_local_slots;
    int num_guests = num_ranks * g.num_slots, num_places = num_ranks * g.num_local_slots;
    int which = blockIdx.y * p.num_components + component<V>();
    int* plans = choices.plans + size_t(which) * V::choices * size;
    int* plan = plans + choice_of_block<V>() * size;
    if (trial.value < NEVER) {
        block_stride<V::threads>(num_guests, [&](int i) { plan[HEAD_OF_PLAN + i] = experts.guests[i]; });
        block_stride<V::threads>(num_places, [&](int i) { plan[HEAD_OF_PLAN + guests + i] = experts.filled[i]; });
    }
    if (threadIdx.x == 0) {
        *reinterpret_cast<Amount*>(plan) = trial.value;
        plan[2] = trial.number;
    }
    __syncthreads();  // the plan is written before the block is counted as done
    if (threadIdx.x == 0) {
        __threadfence();  // other blocks see the plan before they see that the block is done
        last = atomicAdd(&choices.num_done[which], 1) == V::choices - 1;
        if (last) choices.num_done[which] = 0;
    }
    __syncthreads();  // `last` is written before the other threads read it
    if (!last) return false;
    __threadfence();  // the plans of the other blocks are visible from here on
    Amount best = NEVER;
    int fewest = 0;
    #pragma unroll 1
    for (int i = 0; i < V::choices; ++i) {
        Amount its = __ldcg(reinterpret_cast<Amount*>(plans + i * size));
        int its_number = __ldcg(plans + i * size + 2);
        if (its > best || (its == best && its_number >= fewest)) continue;
        best = its;
        fewest = its_number;
        plan = plans + i * size;
    }
    if (best == NEVER) return true;
    block_stride<V::threads>(num_guests, [&](int i) { experts.guests[i] = __ldcg(plan + HEAD_OF_PLAN + i); });
    block_stride<V::threads>(num_places, [&](int i) { experts.filled[i] = __ldcg(plan + HEAD_OF_PLAN + guests + i); });
    return true;
}

// Plans a component by cost with one choice of guests for one batch, in the place of a `Chooser` and the flow.
template <typename V>
struct PlanByCost {
    const Guests& g;
    const Objective& o;
    const Choices& choices;

    // Returns whether this is the last block of the component. Then it has the cheapest plan, as arcs and their tokens, and
    // `c.load()`. `total`: of the component's tokens. `solves`: whether there is anything to plan.
    __device__ bool plan(const Problem& p, const Experts<V>& experts, Component<V>& c, bool solves, int total, int base,
                         Verdicts& verdicts, int* __restrict__ quota, int* __restrict__ chosen) const {
        bool is_filled = solves && c.shape.ranks > 1 && choice_of_block<V>() > 0;
        if (is_filled) is_filled = choose(p, experts, c, total, base, verdicts, quota);
        Trial trial{NEVER, 0, false};
        int searches = is_filled || (solves && choice_of_block<V>() == 0) ? 2 : 0, arcs = 0;
        // The loop has the code of both searches, and of the plan that is written, once.
        #pragma unroll 1
        for (bool writes = false;;) {
            if (searches > 0 || writes) {
                if (threadIdx.x < V::size) c.staying()[threadIdx.x] = base;
                block_stride<V::threads>(experts.number, [&](int i) {
                    experts.ranks[i] = typename V::Set(experts.residents[i].ranks);
                });
                __syncthreads();  // sums and holders are those without guests before these are added
                arcs = put_guests(p, g, experts, c);
                if (writes) zero_quotas(p, experts, 0, quota);
                __syncthreads();  // all copies are written before any thread reads them
                if (is_filled) start_filled(g, experts, c);
                else split_evenly(c, experts.load_by_place);
                __syncthreads();  // all copies have their tokens before any thread reads them
            }
            if (writes) break;
            if (searches > 0) {
                trial = improve(p, g, o, choices.push, experts, c);
                is_filled = true;
                if (--searches > 0 && trial.dropped) continue;
            }
            if (!take_cheapest(p, g, choices, experts, c.shape.ranks, trial)) return false;
            is_filled = solves;
            writes = true;
        }
        write_routes(p, g, experts, c, arcs, chosen, threadIdx.x);
        if (threadIdx.x < V::size) c.load()[threadIdx.x] += c.movable()[threadIdx.x];
        return true;
    }

    // Chooses guests by the rule of this block. Returns whether there are any.
    __device__ bool choose(const Problem& p, const Experts<V>& experts, const Component<V>& c, int total, int base,
                           Verdicts& verdicts, int* quota) const {
        int rule = choice_rule_of(choice_of_block<V>() - 1);
        Guests own = g;
        own.tolerance = max(g.tolerance, rule >> 1);
        if (rule & 1) own.min_tokens = choices.worth;
        Chooser<V, false> chooser{p, own};
        chooser.aim(c, total, reinterpret_cast<char*>(experts.arcs));
        __syncthreads();  // experts have their residents before any thread reads them
        return chooser(experts, c, verdicts, true, base, quota);
    }
};

}  // namespace lplb
