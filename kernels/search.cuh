// The search that improves a plan by active slots or cost: lplb_ep/planning/objectives.py defines it.
//
// The ranks with the largest amounts pass rows on, each along a chain of experts' copies. Each warp looks for one chain:
// several warps from the largest rank with different aims, the others from other ranks with the first aim. The lanes of
// a warp share the arcs that may leave the ranks of the chain's front. Each rank keeps the best move that reaches it, as
// the least of 32-bit keys. So no result depends on the order of threads. A round has two barriers of the block. It takes
// as long as its shortest chain: other warps give up once they cannot find one as short.
#pragma once

#include "component.cuh"

namespace lplb {

typedef long long Amount;  // the quantity that is balanced: tokens, or nanoseconds
typedef unsigned Key;      // of a move: the least is best

// Divides by one number repeatedly, by a multiplication instead of a division.
struct Divisor {
    unsigned number, inverse;

    __device__ explicit Divisor(int number) : number(number), inverse(~0u / unsigned(number)) {}

    __device__ unsigned of(unsigned dividend) const {
        unsigned quotient = __umulhi(dividend, inverse);  // or one less than it should be
        return quotient + (dividend - quotient * number >= number);
    }

    // Of an amount that is not negative.
    __device__ Amount of_amount(Amount dividend) const {
        return dividend >> 32 == 0 ? Amount(of(unsigned(dividend))) : dividend / number;
    }
};

// Rows count as they are, and ranks have a limit of active slots.
struct CountTokens {
    static constexpr bool limits_slots = true;

    __device__ Amount of(int rows) const { return rows; }
    __device__ int most_rows(Amount amount, Amount&) const {
        return int(max(Amount(-1), min(amount, Amount(MAX_TOTAL))));
    }
};

// Rows cost nanoseconds, by tiles.
struct CountCosts {
    static constexpr bool limits_slots = false;

    const int* steps;  // [1 + number] cost of a slot by its tiles, in shared memory
    int number, slope;
    Divisor tile, per;

    __device__ CountCosts(const int* steps, int number, int tile, int slope)
        : steps(steps), number(number), slope(slope), tile(tile), per(max(slope, 1)) {}

    __device__ int tiles_of(int rows) const { return int(tile.of(unsigned(rows) + tile.number - 1)); }

    __device__ Amount of(int rows) const {
        int tiles = tiles_of(rows), inside = min(tiles, number);
        return steps[inside] + Amount(slope) * (tiles - inside);
    }

    // The most rows, in whole tiles, that cost at most `amount`, and their cost; -1 if that is negative.
    __device__ int most_rows(Amount amount, Amount& cost) const {
        if (amount < 0) return -1;
        int last = steps[number];
        if (amount >= last) {
            Amount more = slope > 0 ? min(per.of_amount(amount - last), Amount(MAX_TOTAL)) : MAX_TOTAL;
            cost = last + slope * more;
            return int(min((number + more) * tile.number, Amount(MAX_TOTAL)));
        }
        int tiles = 0, most = int(amount);  // `amount` is below the last step, so it fits
        #pragma unroll 1
        for (int width = number < 64 ? 16 : 64; width > 0; width /= 4) {
            int enough = 0;  // steps at quarters of the range that cost no more: costs never fall
            #pragma unroll
            for (int i = 1; i < 4; ++i) enough += steps[min(tiles + i * width, number)] <= most;
            tiles += enough * width;
        }
        cost = steps[tiles];
        return int(min(Amount(tiles) * tile.number, Amount(MAX_TOTAL)));
    }
};

// Sums of amounts for several places, in shared memory. In three parts of 21 bits, since additions of 32 bits take one
// instruction each; amounts are rarely of more than one part.
struct Sums {
    unsigned* parts;  // [3, size]
    int size;

    __device__ static unsigned part_of(Amount amount, int part) { return unsigned(amount >> 21 * part) & ((1 << 21) - 1); }

    __device__ void set(int i, Amount amount) const {
        for (int part = 0; part < 3; ++part) parts[part * size + i] = part_of(amount, part);
    }
    __device__ void add(int i, Amount amount) const {
        for (int part = 0; amount >> 21 * part != 0 && part < 3; ++part)
            atomicAdd(&parts[part * size + i], part_of(amount, part));
    }
    // The amounts of a whole warp.
    __device__ void add_of_warp(int i, Amount amount) const {
        for (int part = 0; part < 3; ++part) {
            unsigned sum = __reduce_add_sync(~0u, part_of(amount, part));
            if (threadIdx.x % 32 == 0 && sum != 0) atomicAdd(&parts[part * size + i], sum);
        }
    }
    __device__ Amount at(int i) const {
        return parts[i] + (Amount(parts[size + i]) << 21) + (Amount(parts[2 * size + i]) << 42);
    }
};

// The largest of the amounts of a warp's ranks, and the first rank that has it; the same to every lane.
template <typename V>
__device__ Amount largest_of(const Amount (&amounts)[V::words], int& who) {
    Amount most = 0;
    #pragma unroll
    for (Amount amount : amounts) most = max(most, amount);
    unsigned high = __reduce_max_sync(~0u, unsigned(most >> 32));
    unsigned low = __reduce_max_sync(~0u, unsigned(most >> 32) == high ? unsigned(most) : 0u);
    most = Amount(high) << 32 | low;
    bool flag[V::words];
    #pragma unroll
    for (int i = 0; i < V::words; ++i) flag[i] = amounts[i] == most;
    who = lowest_of<V>(vote<V>(flag));
    return most;
}

// Arrays in shared memory, by how many bytes behind an address they begin: so a kernel has one address of all.
template <typename T>
__device__ T* in_shared(char* at, int offset) {
    T* array = reinterpret_cast<T*>(at + offset);
    __builtin_assume(__isShared(array));
    return array;
}

// The state of a warp's chain: the ranks that it has reached. [size] each.
template <typename V>
struct Reach {
    char* at;
    static constexpr int LONG = V::size * sizeof(Amount), WORDS = V::size * sizeof(int);

    __device__ static constexpr int num_bytes(int max_arcs) { return V::size * 48 + (max_arcs + 3) / 4 * 8; }

    // The rank's amount with the rows, and the amount without them of the rank that passed them on; and active slots.
    __device__ Amount* amount() const { return in_shared<Amount>(at, 0); }
    __device__ Amount* rest() const { return in_shared<Amount>(at, LONG); }
    __device__ int* active() const { return in_shared<int>(at, 2 * LONG); }
    __device__ int* rest_active() const { return in_shared<int>(at, 2 * LONG + WORDS); }
    // The rank that passed them on, and the chain's second rank.
    __device__ int* from() const { return in_shared<int>(at, 2 * LONG + 2 * WORDS); }
    __device__ int* via() const { return in_shared<int>(at, 2 * LONG + 3 * WORDS); }
    // The arcs that the rows left and entered, and the number of rows.
    __device__ int* left() const { return in_shared<int>(at, 2 * LONG + 4 * WORDS); }
    __device__ int* entered() const { return in_shared<int>(at, 2 * LONG + 5 * WORDS); }
    __device__ int* moved() const { return in_shared<int>(at, 2 * LONG + 6 * WORDS); }
    // The key of the best move to a rank; and [arcs] the arcs that may leave the front.
    __device__ Key* keys() const { return in_shared<Key>(at, 2 * LONG + 7 * WORDS); }
    __device__ unsigned short* leaving() const { return in_shared<unsigned short>(at, 2 * LONG + 8 * WORDS); }
};

// The results that the warps of a block exchange in a round.
template <typename V>
struct ChainVerdicts {
    typename V::Set touched[NUM_AIMS + NUM_OTHERS];  // ranks of the chain that each has found; none: no chain
    int moves[NUM_AIMS + NUM_OTHERS];                // of that chain
    int best;                                        // the least `place_of` of a chain that is known
};

// The place of a chain of so many moves among those of the largest rank: the shortest is first, then the first aim.
__device__ int place_of(int moves, int attempt) { return moves * NUM_AIMS + attempt; }
constexpr int NO_CHAIN = (CHAIN + 1) * NUM_AIMS;

// A search: its input, and this warp's chain.
template <typename V, typename Measure>
struct Search {
    typedef typename V::Set Set;
    static constexpr Key NONE = ~0u, CROWDS = 1u << 31;
    static constexpr int WARPS = V::threads / 32;
    static_assert(WARPS >= NUM_AIMS + NUM_OTHERS, "a warp looks for each chain");

    const Component<V>& c;
    Amount* amount;             // [size] of each rank
    int* active;                // [size] slots with rows, where these are limited
    Amount* own;                // [arcs] what the rows of each count
    ChainVerdicts<V>& verdicts;
    Reach<V> reach;
    Measure measure;
    const int* load;            // of experts, by place
    Amount least;               // a lower bound of the largest rank
    int most_active;            // the most slots of a rank that may have rows
    int splits_above;           // only experts with more rows may be split

    int unit = 0;               // bits that are dropped where amounts are compared
    Amount aim = 0;
    int first = 0;              // the rank at which the chain begins
    // The last move of the chain, if this lane has found it.
    bool is_mine = false;
    int arc = 0, to = 0, moved = 0, left_active = 0, end_active = 0, source = 0, target = 0;
    Amount rest = 0, end = 0;

    // The rows that a rank in the chain passes on along an arc.
    struct Leaving {
        int moved, active;      // rows, 0: none can leave; then the rank's active slots
        Amount rest;            // then the rank's amount
    };

    __device__ Leaving leaving(const Arc& arc, int a) const {
        // By cost a rank of a chain is above the aim, so it cannot keep all rows.
        Amount own = this->own[a], reached = reach.amount()[arc.rank], kept = 0;
        int rows = c.tokens[a], keep = measure.most_rows(own - reached + aim, kept), active = 0;
        if (Measure::limits_slots) {
            active = reach.active()[arc.rank];
            keep = min(keep, load[arc.place] <= splits_above || active > most_active ? 0 : rows - 1);
            active -= keep == 0;
            kept = keep;
        }
        if (keep < 0 || active > most_active) return {0, 0, 0};
        return {rows - keep, active, reached - own + kept};
    }

    // The arc of the same expert on another rank.
    __device__ int arc_on(const Arc& arc, int rank) const {
        return c.arc_at(arc.place + number_of<V>(Set(arc.ranks) & below<V>(rank)));
    }

    // The amount of a rank, and its active slots, with more rows of an arc. Where a chain returns to its first
    // rank, `from` is the rank that passes the rows on.
    __device__ Amount with(int to, int rank, int moved, int from, int& active) const {
        int rows = c.tokens[to];
        bool closes = rank == first;
        active = Measure::limits_slots ? (closes ? reach.rest_active()[reach.via()[from]] : this->active[rank]) + (rows == 0) : 0;
        return (closes ? reach.rest()[reach.via()[from]] : amount[rank]) - own[to] + measure.of(rows + moved);
    }

    // Collects the arcs that may leave the front. Returns their number.
    __device__ int find_leaving(Set front) const {
        int lane = threadIdx.x % 32, number = 0;
        #pragma unroll 1
        for (int begin = 0; begin < c.shape.arcs; begin += 32) {
            int a = begin + lane;
            bool may = false;
            if (a < c.shape.arcs) {
                int rank = c.arcs[a].rank;
                may = has(front, rank) && c.tokens[a] > 0 && reach.entered()[rank] != a;
            }
            unsigned all = __ballot_sync(~0u, may);
            if (may) reach.leaving()[number + __popc(all & ((1u << lane) - 1))] = static_cast<unsigned short>(a);
            number += __popc(all);
        }
        __syncwarp();  // the arcs are written before other lanes read them
        return number;
    }

    // Finds the best moves from the front to other ranks, and records how these are reached. The best move that ends a
    // chain stays in the lane that found it. Returns its key, the same to every lane.
    __device__ Key find_moves(int number, Set seen, bool may_close) {
        Key best = NONE;
        #pragma unroll 1
        for (int i = threadIdx.x % 32; __any_sync(~0u, i < number); i += 32) {
            int a = 0;
            Arc leaves{};
            Leaving leave{};
            Set targets{};
            if (i < number) {
                a = reach.leaving()[i];
                leaves = c.arcs[a];
                leave = leaving(leaves, a);
                targets = leave.moved > 0 ? Set(leaves.ranks) & ~seen : 0;
                if (leave.moved > 0 && may_close && has(Set(leaves.ranks), first) &&
                    arc_on(leaves, first) != reach.left()[reach.via()[leaves.rank]])
                    targets |= Set(1) << first;
            }
            #pragma unroll 1
            while (__any_sync(~0u, targets != 0)) {
                int rank = 0, enters = 0, active = 0;
                Amount count = 0;
                Key key = NONE;
                if (targets != 0) {
                    rank = lowest_of<V>(targets);
                    targets &= targets - 1;
                    enters = arc_on(leaves, rank);
                    count = with(enters, rank, leave.moved, leaves.rank, active);
                    key = Key(min(count >> unit, Amount((1 << COUNT_BITS) - 1))) << 16 | unsigned(a);
                    bool crowds = active > most_active;
                    if (crowds) key |= CROWDS;
                    if (crowds || count > aim) {
                        if (rank == first) key = NONE;
                        else atomicMin(&reach.keys()[rank], key);
                    } else {
                        if (key < best) {
                            best = key;
                            arc = a;
                            to = enters;
                            moved = leave.moved;
                            rest = leave.rest;
                            left_active = leave.active;
                            end = count;
                            end_active = active;
                            source = leaves.rank;
                            target = rank;
                        }
                        key = NONE;
                    }
                }
                __syncwarp();  // keys are lowered before they are compared
                if (key != NONE && reach.keys()[rank] == key) {
                    reach.amount()[rank] = count;
                    reach.rest()[rank] = leave.rest;
                    reach.active()[rank] = active;
                    reach.rest_active()[rank] = leave.active;
                    reach.from()[rank] = leaves.rank;
                    reach.via()[rank] = leaves.rank == first ? rank : reach.via()[leaves.rank];
                    reach.left()[rank] = a;
                    reach.entered()[rank] = enters;
                    reach.moved()[rank] = leave.moved;
                }
                __syncwarp();  // a rank is recorded before a better move to it may overwrite that
            }
        }
        __syncwarp();  // all lanes have read the arcs that may leave before those of the next front replace them
        Key least_key = __reduce_min_sync(~0u, best);
        is_mine = best == least_key;  // no two lanes have moves of the same arc
        return least_key;
    }

    // Looks for a chain. Returns the number of its moves, the same to every lane; 0: none. `attempt`: the number of the
    // largest rank's aim. The search ends where a chain is known that comes before any that it could still find.
    __device__ int find_chain(int attempt) {
        int lane = threadIdx.x % 32;
        #pragma unroll
        for (int i = 0; i < V::words; ++i)
            if (lane + 32 * i < V::size) reach.keys()[lane + 32 * i] = NONE;
        if (lane == 0) {
            reach.amount()[first] = amount[first];
            reach.entered()[first] = -1;
            if (Measure::limits_slots) reach.active()[first] = active[first];
        }
        __syncwarp();  // keys and the first rank's state are initialised before any lane uses them
        Set seen = Set(1) << first, front = seen;
        #pragma unroll 1
        for (int moves = 1; moves <= CHAIN; ++moves) {
            int known = lane == 0 && moves > 1 ? atomicMin(&verdicts.best, NO_CHAIN) : NO_CHAIN;
            int number = find_leaving(front);
            if (__shfl_sync(~0u, known, 0) < place_of(moves, attempt)) return 0;
            if (find_moves(number, seen, moves > 1) != NONE) return moves;
            bool flag[V::words];
            #pragma unroll
            for (int i = 0; i < V::words; ++i) {
                int rank = lane + 32 * i;
                flag[i] = rank < V::size && reach.keys()[rank] != NONE;
                if (flag[i]) reach.keys()[rank] = NONE;
            }
            front = vote<V>(flag);
            if (front == 0) return 0;
            seen |= front;
        }
        return 0;
    }

    // The ranks of the chain that was found, without its first and its last one.
    __device__ Set path() const {
        unsigned lane = __ffs(int(__ballot_sync(~0u, is_mine))) - 1;
        Set path{};
        for (int rank = __shfl_sync(~0u, source, lane); rank != first; rank = reach.from()[rank]) path |= Set(1) << rank;
        return path;
    }

    // Makes the moves of a chain, one by each lane. No two moves change the same rank: a chain reaches each rank once.
    __device__ void make_moves(Set path) {
        int lane = threadIdx.x % 32;
        bool closes = __any_sync(~0u, is_mine && target == first);
        #pragma unroll
        for (int i = 0; i < V::words; ++i) {
            int rank = lane + 32 * i;
            if (rank >= V::size || !has(path, rank)) continue;
            move(reach.left()[rank], reach.entered()[rank], reach.moved()[rank]);
            if (!(closes && reach.from()[rank] == first)) leave_rank(reach.from()[rank], reach.rest()[rank], reach.rest_active()[rank]);
        }
        if (!is_mine) return;
        move(arc, to, moved);
        leave_rank(source, rest, left_active);
        leave_rank(target, end, end_active);
    }

    __device__ void move(int from, int to, int rows) {
        own[from] = measure.of(c.tokens[from] -= rows);
        own[to] = measure.of(c.tokens[to] += rows);
    }

    __device__ void leave_rank(int rank, Amount count, int slots) {
        amount[rank] = count;
        if (Measure::limits_slots) active[rank] = slots;
    }

    // Improves the rows of the arcs, `c.tokens`. `amount` has the ranks' amounts with these rows. Returns the largest
    // amount in the end, the same to every thread. Barriers are before it and at its end.
    __device__ Amount run() {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32, worst;
        Amount finest = max(Amount(1), least >> FINEST), step = 0, most = 0;
        if (threadIdx.x == 0) verdicts.best = NO_CHAIN;
        block_stride<V::threads>(c.shape.arcs, [&](int a) { own[a] = measure.of(c.tokens[a]); });
        __syncthreads();  // the verdict and what rows count are initialised before any warp reads them
        #pragma unroll 1
        for (int round = 0;; ++round) {
            Amount counts[V::words];
            #pragma unroll
            for (int i = 0; i < V::words; ++i)
                counts[i] = lane + 32 * i < c.shape.ranks ? amount[lane + 32 * i] : -1;
            most = largest_of<V>(counts, worst);
            Amount above = most - least;
            if (above <= 0 || round == SEARCH_ROUNDS) break;
            unit = max(0, 64 - __clzll(most) - (COUNT_BITS - 1));
            Amount steps[NUM_AIMS];
            steps[0] = step == 0 ? max(finest, above / 2) : step;
            #pragma unroll
            for (int i = 1; i < NUM_AIMS; ++i)  // 0 behind the last step
                steps[i] = steps[i - 1] > finest ? max(finest, steps[i - 1] >> SHRINK) : 0;
            Amount mine = steps[0], last = steps[0];
            #pragma unroll
            for (int i = 1; i < NUM_AIMS; ++i) {
                if (warp == i) mine = steps[i];
                if (steps[i] > 0) last = steps[i];
            }
            aim = least + max(Amount(0), above - mine);
            first = worst;
            bool looks = mine > 0;
            if (warp >= NUM_AIMS) {
                bool flag[V::words];
                #pragma unroll
                for (int i = 0; i < V::words; ++i) flag[i] = counts[i] > aim;
                Set others = vote<V>(flag) & ~(Set(1) << worst);
                #pragma unroll 1
                for (int i = NUM_AIMS; i < warp; ++i) others &= others - 1;
                looks = others != 0 && warp < NUM_AIMS + NUM_OTHERS;
                if (looks) first = lowest_of<V>(others);
            }
            Set between{}, touched{};
            is_mine = false;
            int moves = looks ? find_chain(warp < NUM_AIMS ? warp : 0) : 0;
            if (moves > 0) {
                if (warp < NUM_AIMS && lane == 0) atomicMin(&verdicts.best, place_of(moves, warp));
                between = path();
                unsigned mine = __ffs(int(__ballot_sync(~0u, is_mine))) - 1;
                touched = between | Set(1) << first | Set(1) << __shfl_sync(~0u, target, mine);
            }
            if (lane == 0 && warp < NUM_AIMS + NUM_OTHERS) {
                verdicts.touched[warp] = touched;
                verdicts.moves[warp] = moves;
            }
            __syncthreads();  // all warps have ended their search before moves change what it reads
            // A lane has the verdict of a warp.
            bool has_verdict = lane < NUM_AIMS + NUM_OTHERS;
            Set theirs = has_verdict ? verdicts.touched[lane] : Set{};
            int their_moves = has_verdict ? verdicts.moves[lane] : 0;
            int best = lane < NUM_AIMS && theirs != 0 ? place_of(their_moves, lane) : NO_CHAIN;
            best = int(__reduce_min_sync(~0u, unsigned(best)));
            int found = best == NO_CHAIN ? -1 : best % NUM_AIMS;
            step = last;
            #pragma unroll
            for (int i = 0; i < NUM_AIMS; ++i)
                if (i == found) step = steps[i];
            if (best == NO_CHAIN) {
                if (step <= finest) break;
                step = max(finest, step >> SHRINK);
            } else {
                Set taken = __shfl_sync(~0u, theirs, found);
                bool makes = warp == found;
                // Chains of other ranks that are no longer.
                unsigned left = __ballot_sync(~0u, lane >= NUM_AIMS && theirs != 0 && their_moves <= best / NUM_AIMS);
                #pragma unroll 1
                for (; left != 0; left &= left - 1) {
                    int i = __ffs(int(left)) - 1;
                    Set other = __shfl_sync(~0u, theirs, i);
                    if ((other & taken) != 0) continue;
                    taken |= other;
                    makes |= warp == i;
                }
                if (makes) make_moves(between);
                if (threadIdx.x == 0) verdicts.best = NO_CHAIN;
            }
            __syncthreads();  // moves are made before amounts are read; verdicts are read before they are overwritten
        }
        return most;
    }
};

}  // namespace lplb
