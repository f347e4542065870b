// A greedy fill of a domain's guest slots, by one warp, in whole numbers.
//
// Ranks above a limit pass tokens on: to a copy that another rank already has, or to a guest on a rank below the limit.
#pragma once

#include "component.cuh"

namespace lplb {

// The rule by which a fill decides, decoded from a word of `rule_of`.
struct Rule {
    bool by_excess;  // the rank with most excess passes tokens on next, else that with the highest priority
    bool widest;     // guests go to the rank with most slack, else to the one where they fit best
    bool largest;    // a guest is of the expert with most tokens, else of the one that fits best
    int shift;       // a rank's last guest fills it if it would leave more slack than all spare slack >> shift
    int noise;       // by up to how many 1024ths slacks are raised where they are compared; 0 or a power of two

    __device__ explicit Rule(int word)
        : by_excess(word & 1), widest(word >> 1 & 1), largest(word >> 2 & 1), shift(word >> 3 & 31),
          noise(word >> 8) {}
};

// A place of a rank, for a copy of an expert.
struct alignas(8) Place {
    int tokens;
    int expert;  // its number in the component, and SHARED; -1: none
};
constexpr int SHARED = 1 << 16;  // other ranks hold the expert, too

// The common start of all fills, in shared memory. A rank has `num_places` places: its residents by expert, then
// its guest slots.
template <typename V>
struct Start {
    int ranks, num_experts, num_places, num_slots, node_size;
    bool has_replicas;
    const Resident* residents;       // [num_experts]
    const typename V::Set* holders;  // [num_experts] ranks with a resident copy
    Place* places;                   // [size, num_places]
    int* load;                       // [size]
};

// The state of a fill: arrays of its warp in shared memory, and values of each lane's ranks.
template <typename V>
struct Fill {
    __device__ Fill(char* shared, int num_experts, int num_places)
        : places(reinterpret_cast<Place*>(shared)),
          holders(reinterpret_cast<typename V::Set*>(places + V::size * num_places)),
          sent_of(reinterpret_cast<int*>(holders + num_experts)), copies(0) {}

    Place* places;             // [size, num_places]
    typename V::Set* holders;  // [num_experts] of those that several ranks hold
    int* sent_of;              // [size] guests of each home, counted at the end
    int slack[V::words];       // the limit less the load of this lane's ranks
    int priority[V::words], used[V::words];
    unsigned noise[V::words];  // in 2 to the 32
    bool is_narrow;            // whether sums of slack are below 2 to the 31
    int copies;
};

// The value that the lane of `rank` has for that rank.
template <typename V>
__device__ int of_rank(const int (&values)[V::words], int rank) {
    return __shfl_sync(~0u, V::words > 1 && rank >= 32 ? values[V::words - 1] : values[0], rank & 31);
}

// The first rank, or place, whose flag is set; one is.
template <int number>
__device__ int first_of(const bool (&flag)[number]) {
    int first = 0;
    #pragma unroll
    for (int i = number - 1; i >= 0; --i) {
        unsigned set = __ballot_sync(~0u, flag[i]);
        if (set != 0) first = __ffs(set) - 1 + 32 * i;
    }
    return first;
}

// Changes the slack of two ranks, between which tokens move.
template <typename V>
__device__ void move_load(Fill<V>& fill, int from, int to, int tokens) {
    int lane = threadIdx.x % 32;
    #pragma unroll
    for (int i = 0; i < V::words; ++i) {
        if (lane + 32 * i == from) fill.slack[i] += tokens;
        if (lane + 32 * i == to) fill.slack[i] -= tokens;
    }
}

// The slack to spare, over 2 to `shift`: a guest should not leave more of it unused. It is the sum of slack over ranks
// above their limit, where it is negative, and ranks with a guest slot left.
template <typename V>
__device__ int spare_slack(const Fill<V>& fill, int num_slots, int shift) {
    int slack[V::words], low = 0;
    #pragma unroll
    for (int i = 0; i < V::words; ++i) {
        slack[i] = fill.slack[i] < 0 || fill.used[i] < num_slots ? fill.slack[i] : 0;
        low += fill.is_narrow ? slack[i] : slack[i] & 0xffff;
    }
    low = __reduce_add_sync(~0u, low);
    if (fill.is_narrow) return low >> shift;
    int high = 0;
    #pragma unroll
    for (int i = 0; i < V::words; ++i) high += slack[i] >> 16;
    high = __reduce_add_sync(~0u, high);
    long long spare = ((long long)high * 65536 + low) >> shift;
    return spare < 0 ? 0 : int(min(spare, (long long)MAX_TOTAL));
}

// Copies an array by a warp. A lane issues several loads before it stores: a later load might depend on a store.
template <typename T>
__device__ void copy_shared(T* to, const T* from, int number) {
    constexpr int at_once = 8;
    #pragma unroll 1
    for (int first = threadIdx.x % 32; first < number; first += 32 * at_once) {
        T several[at_once];
        #pragma unroll
        for (int i = 0; i < at_once; ++i) several[i] = first + 32 * i < number ? from[first + 32 * i] : T{};
        #pragma unroll
        for (int i = 0; i < at_once; ++i)
            if (first + 32 * i < number) to[first + 32 * i] = several[i];
    }
}

// Begins a fill with a limit of each of this lane's ranks. Lanes without a rank have no slack.
template <typename V>
__device__ void begin_fill(const Start<V>& start, Fill<V>& fill, const Rule& rule, int number,
                           const int (&limit)[V::words]) {
    int lane = threadIdx.x % 32, highest = 0;
    copy_shared(fill.places, start.places, start.ranks * start.num_places);
    if (start.has_replicas) copy_shared(fill.holders, start.holders, start.num_experts);
    #pragma unroll
    for (int i = 0; i < V::words; ++i) {
        int rank = lane + 32 * i;
        unsigned hash = (unsigned(number) * 64 + rank + 1) * 0x9e3779b1u;
        hash = (hash ^ hash >> 15) * 0x85ebca77u;
        hash ^= hash >> 13;
        fill.priority[i] = int(hash >> 1);
        fill.noise[i] = rule.noise == 0 ? 0 : (hash & unsigned(rule.noise - 1)) << 22;
        fill.used[i] = 0;
        fill.slack[i] = rank < start.ranks ? limit[i] - start.load[rank] : 0;
        if (rank < start.ranks) highest = max(highest, limit[i]);
        if (rank < V::size) fill.sent_of[rank] = 0;
    }
    fill.is_narrow = __reduce_max_sync(~0u, highest) <= MAX_TOTAL / start.ranks;
    fill.copies = 0;
    __syncwarp();  // the state is complete before the first step reads it
}

// Moves tokens of a rank to a copy that another rank already has. Returns whether any moved.
// `x`, `expert`: the tokens and experts of this lane's places of the rank. `need`: the rank's excess.
// `best`: its priority, unless ranks are taken by their excess.
template <typename V, int parts, int unrolled>
__device__ bool use_copies(const Start<V>& start, Fill<V>& fill, const Rule& rule, int from, int need, int best,
                           const int (&x)[parts], const int (&expert)[parts]) {
    typedef typename V::Set Set;
    int lane = threadIdx.x % 32, S = start.num_places;
    Place* places = fill.places + from * S;
    // For each place, every lane checks how much its ranks could take. The rank itself is never chosen: it has no slack,
    // and no priority below its own.
    int moved = 0;
    unsigned move = 0, first[V::words];  // a place * 64 + a rank; the first place whose expert a rank holds
    #pragma unroll
    for (int w = 0; w < V::words; ++w) first[w] = ~0u;
    #pragma unroll unrolled
    for (int i = 0; i < parts; ++i) {
        bool is_shared = x[i] > 0 && (expert[i] & SHARED);
        Set held = is_shared ? fill.holders[expert[i] & ~SHARED] : Set(0);
        unsigned left = __ballot_sync(~0u, is_shared);
        #pragma unroll 1
        for (; left != 0; left &= left - 1) {
            int owner = __ffs(left) - 1, able = min(__shfl_sync(~0u, x[i], owner), need);
            unsigned place = owner + 32 * i;
            #pragma unroll
            for (int w = 0; w < V::words; ++w) {
                unsigned holders = __shfl_sync(~0u, unsigned(held >> (V::words - 1) * 32 * w), owner);
                bool holds = holders >> lane & 1;
                int taken = holds ? min(able, fill.slack[w]) : 0;
                first[w] = holds ? min(first[w], place) : first[w];
                if (taken > moved) move = place * 64 + lane + 32 * w;
                moved = max(moved, taken);
            }
        }
    }
    unsigned key = moved, highest = __reduce_max_sync(~0u, key);
    bool by_priority = highest == 0 && !rule.by_excess;
    if (by_priority) {  // no two ranks have the same
        #pragma unroll
        for (int w = 0; w < V::words; ++w) {
            unsigned lower = fill.priority[w];
            if (first[w] == ~0u || lower >= unsigned(best) || ~lower <= key) continue;
            key = ~lower;
            move = first[w] * 64 + lane + 32 * w;
        }
        highest = __reduce_max_sync(~0u, key);
    }
    if (highest == 0) return false;
    move = __reduce_min_sync(~0u, key == highest ? move : ~0u);
    int place = move / 64, to = move % 64;
    Place from_place = places[place];
    __syncwarp();  // all lanes have read the place before one writes its tokens
    int what = from_place.expert;
    moved = by_priority ? min(from_place.tokens, need) : highest;
    #pragma unroll unrolled
    for (int i = 0; i < parts; ++i) {
        int other = lane + 32 * i;
        if (other == place) places[other].tokens = x[i] - moved;
        if (other < S && fill.places[to * S + other].expert == what) fill.places[to * S + other].tokens += moved;
    }
    move_load(fill, from, to, moved);
    return true;
}

// One fill, by a warp: at most so many steps. `parts`: places of a rank for each lane. `fewest`: ~the fewest guests
// of a fill of this round that reached the target, or 0. Returns false for a fill with more, which is given up: it
// cannot be the best, and no round follows.
//
// The time of a step is the latency of its longest chain of instructions. So loads are issued early, independent
// reductions run side by side, and choices are selects instead of branches.
template <typename V, int parts, int unrolled = parts <= 2 ? parts : 1>
__device__ bool make_fill(const Start<V>& start, Fill<V>& fill, const Rule& rule, int least, int steps,
                          unsigned* fewest) {
    typedef typename V::Set Set;
    int lane = threadIdx.x % 32, S = start.num_places, G = start.num_slots;
    bool flag[V::words], stuck[V::words] = {};
    #pragma unroll 1
    for (; steps > 0; --steps) {
        // The rank that passes tokens on. Which ranks could take a guest does not depend on it.
        int excess[V::words], value[V::words], best = -1;
        unsigned wide[V::words], widest = 0;  // keys: the largest is best, 0: none
        #pragma unroll
        for (int i = 0; i < V::words; ++i) {
            int slack = fill.slack[i];
            excess[i] = -slack;
            bool may = excess[i] >= least && !stuck[i];
            value[i] = !may ? -1 : rule.by_excess ? excess[i] : fill.priority[i];
            best = max(best, value[i]);
            unsigned width = slack + unsigned((unsigned long long)unsigned(slack) * fill.noise[i] >> 32);
            wide[i] = slack >= least && fill.used[i] < G ? width : 0;
            widest = max(widest, wide[i]);
        }
        best = __reduce_max_sync(~0u, best);
        widest = __reduce_max_sync(~0u, widest);
        int spare = spare_slack(fill, G, rule.shift);
        if (best < 0) return true;
        unsigned known = lane == 0 ? atomicMax(fewest, 0u) : 0;
        #pragma unroll
        for (int i = 0; i < V::words; ++i) flag[i] = value[i] == best;
        // Negated before it is read from its lane: NVRTC 13.0 loses a minus between that and a minimum of three.
        int from = first_of(flag), need = of_rank<V>(excess, from);
        bool has_slot = of_rank<V>(fill.used, from) < G;

        // The tokens and experts of its places.
        Place* places = fill.places + from * S;
        int x[parts], expert[parts], most = 0;
        bool is_shared = false;
        #pragma unroll unrolled
        for (int i = 0; i < parts; ++i) {
            Place own = lane + 32 * i < S ? places[lane + 32 * i] : Place{0, -1};
            x[i] = own.tokens;
            expert[i] = own.expert;
            most = max(most, x[i]);
            is_shared |= x[i] > 0 && (expert[i] & SHARED);
        }
        if (__any_sync(~0u, is_shared) &&
            use_copies<V, parts, unrolled>(start, fill, rule, from, need, best, x, expert)) {
            __syncwarp();  // the move is made before the next step reads tokens
            continue;
        }

        // The rank of a guest, which is on the node of this one, and so is its home.
        if (start.node_size < start.ranks) {
            int begin = from / start.node_size * start.node_size;
            auto is_near = [&](int rank) { return unsigned(rank - begin) < unsigned(start.node_size); };
            widest = most = 0;
            #pragma unroll
            for (int i = 0; i < V::words; ++i) {
                if (!is_near(lane + 32 * i)) wide[i] = 0;
                widest = max(widest, wide[i]);
            }
            widest = __reduce_max_sync(~0u, widest);
            #pragma unroll unrolled
            for (int i = 0; i < parts; ++i) {
                if (x[i] > 0 && !is_near(start.residents[expert[i] & ~SHARED].home)) x[i] = 0;
                most = max(most, x[i]);
            }
        }
        most = __reduce_max_sync(~0u, most);
        unsigned tight[V::words], tightest = 0;  // as `wide`
        #pragma unroll
        for (int i = 0; i < V::words; ++i) {
            bool fits = wide[i] > 0 && fill.slack[i] >= min(need, most);
            tight[i] = fits && !rule.widest ? ~wide[i] : 0;
            tightest = max(tightest, tight[i]);
        }
        tightest = __reduce_max_sync(~0u, tightest);
        if (widest == 0 || most < least) {
            #pragma unroll
            for (int i = 0; i < V::words; ++i) stuck[i] |= lane + 32 * i == from;
            __syncwarp();  // all lanes have read holders and tokens before a later step writes them
            continue;
        }
        #pragma unroll
        for (int i = 0; i < V::words; ++i) flag[i] = tightest != 0 ? tight[i] == tightest : wide[i] == widest;
        int to = first_of(flag), slack = of_rank<V>(fill.slack, to), used = of_rank<V>(fill.used, to);
        // No more than the excess, but all of the slack where the rest of the slack would stay unused.
        int aim = min(need, slack);
        if (slack > need && used == G - 1 && has_slot && slack - need > spare) aim = slack;

        // The guest's expert: of those with enough tokens the one with fewest, else the one with most. The guest's rank
        // has no copy of an expert with tokens here: `use_copies` would have moved them.
        unsigned chosen = ~0u;
        #pragma unroll unrolled
        for (int i = 0; i < parts; ++i)
            if (x[i] >= aim) chosen = min(chosen, unsigned(x[i]));
        chosen = __reduce_min_sync(~0u, chosen);
        int had = rule.largest || most < aim ? most : int(chosen), moved = min(aim, had);
        bool has[parts];
        #pragma unroll unrolled
        for (int i = 0; i < parts; ++i) has[i] = x[i] == had;
        int place = first_of(has);
        unsigned most_copies = ~__shfl_sync(~0u, known, 0);
        if (lane == place % 32) {  // it alone has read what it writes
            int what = places[place].expert, number = what & ~SHARED;
            Set others = what & SHARED ? fill.holders[number] : Set(1) << from;
            places[place] = {had - moved, number | SHARED};
            fill.places[to * S + S - G + used] = {moved, number | SHARED};
            fill.holders[number] = others | Set(1) << to;
        }
        #pragma unroll
        for (int i = 0; i < V::words; ++i) {
            fill.used[i] += lane + 32 * i == to;
            stuck[i] = false;
        }
        move_load(fill, from, to, moved);
        ++fill.copies;
        if (unsigned(fill.copies) > most_copies) return false;
        __syncwarp();  // the guest is there before the next step reads what there is
    }
    return true;
}

// The most guests of experts with one home, in a fill that is done.
template <typename V>
__device__ int most_sent(const Start<V>& start, Fill<V>& fill) {
    int lane = threadIdx.x % 32, G = start.num_slots, most = 0;
    for (int rank = lane; rank < start.ranks; rank += 32)
        for (int slot = start.num_places - G; slot < start.num_places; ++slot) {
            int expert = fill.places[rank * start.num_places + slot].expert;
            if (expert >= 0) atomicAdd(&fill.sent_of[start.residents[expert & ~SHARED].home], 1);
        }
    __syncwarp();  // all guests are counted before the most is looked for
    for (int rank = lane; rank < V::size; rank += 32) most = max(most, fill.sent_of[rank]);
    return __reduce_max_sync(~0u, most);
}

}  // namespace lplb
