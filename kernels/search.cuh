// The search that improves a plan by active slots or cost: lplb_ep/planning/objectives.py defines it.
//
// The rank that counts most passes rows on, along a chain of experts' copies. Threads share the arcs that may leave
// the ranks of a chain's front. Each rank keeps the best move that reaches it, as the least of 64-bit keys. So no
// result depends on the order of threads.
#pragma once

#include "component.cuh"

namespace lplb {

typedef long long Amount;       // what a rank counts: tokens, or nanoseconds
typedef unsigned long long Key;  // of a move: the least is best

// Rows count as they are.
struct CountTokens {
    __device__ Amount of(int rows) const { return rows; }
    __device__ Amount most_rows(Amount amount) const { return amount; }
};

// Rows cost nanoseconds, by tiles.
struct CountCosts {
    const int* steps;           // [1 + number] of a slot, by tiles; in shared memory
    int number, tile, slope;

    __device__ int tiles_of(int rows) const { return int((unsigned(rows) + unsigned(tile) - 1) / unsigned(tile)); }

    __device__ Amount of(int rows) const {
        int tiles = tiles_of(rows), inside = min(tiles, number);
        return steps[inside] + Amount(slope) * (tiles - inside);
    }

    // The most rows that cost at most so much, in whole tiles; -1 below 0.
    __device__ Amount most_rows(Amount amount) const {
        if (amount < 0) return -1;
        Amount tiles = 0;
        if (amount >= steps[number]) {
            Amount more = slope > 0 ? (amount - steps[number]) / slope : Amount(MAX_TOTAL);
            tiles = number + min(more, Amount(MAX_TOTAL));
        } else {
            for (int end = number; end - tiles > 1;) {
                int middle = int(tiles + end) / 2;
                if (steps[middle] <= amount) tiles = middle;
                else end = middle;
            }
        }
        return min(tiles * tile, Amount(MAX_TOTAL));
    }
};

// What the search knows of each rank; [size] each, in shared memory.
template <typename V>
struct Ranks {
    Amount *staying_tokens, *staying_cost;  // of experts with one copy and base loads
    int* staying_active;
    Amount* amount;             // what a rank counts
    int* active;                // slots with rows
    // Of those that a chain has reached: after the move that did.
    Amount* reached;
    int *reached_active, *left, *entered, *moved;  // the arcs that rows left and entered, and how many
    // The arc by which the chain left its first rank, and what that one counts since.
    int *root, *root_active;
    Amount* root_amount;
    Key* keys;                  // [2, size] of the best move to a rank, in this length of chains and the next

    __device__ char* lay_out(char* at) {
        Amount** amounts[] = {&staying_tokens, &staying_cost, &amount, &reached, &root_amount};
        #pragma unroll
        for (Amount** one : amounts) {
            *one = reinterpret_cast<Amount*>(at);
            at += sizeof(Amount) * V::size;
        }
        keys = reinterpret_cast<Key*>(at);
        at += 2 * sizeof(Key) * V::size;
        int** numbers[] = {&staying_active, &active, &reached_active, &left, &entered, &moved, &root, &root_active};
        #pragma unroll
        for (int** one : numbers) {
            *one = reinterpret_cast<int*>(at);
            at += sizeof(int) * V::size;
        }
        return at;
    }
};

// Adds up what each rank counts with these rows of the arcs. `rows_of` may read what its own thread wrote.
template <typename V, typename Measure, typename Rows>
__device__ void add_up_ranks(const Component<V>& c, const Ranks<V>& ranks, const Measure& measure,
                             const Amount* staying, Rows rows_of) {
    __syncthreads();  // earlier sums are read
    if (threadIdx.x < V::size) {
        ranks.amount[threadIdx.x] = staying[threadIdx.x];
        ranks.active[threadIdx.x] = ranks.staying_active[threadIdx.x];
    }
    __syncthreads();  // both are there before any thread adds to them
    for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) {
        int rows = rows_of(a), rank = c.arcs[a].rank;
        if (rows == 0) continue;
        atomicAdd(reinterpret_cast<Key*>(ranks.amount) + rank, Key(measure.of(rows)));
        atomicAdd(&ranks.active[rank], 1);
    }
    __syncthreads();  // the sums are whole
}

// The rank that counts most, the first of several, and what it counts; the same to every thread.
template <typename V>
__device__ Amount largest_of(const Component<V>& c, const Amount* amounts, int& who) {
    int lane = threadIdx.x % 32;
    Amount most = -1;
    who = V::size;
    #pragma unroll
    for (int i = 0; i < V::words; ++i) {
        int rank = lane + 32 * i;
        if (rank >= c.shape.ranks || amounts[rank] <= most) continue;
        most = amounts[rank];
        who = rank;
    }
    #pragma unroll
    for (int other = 16; other > 0; other /= 2) {
        Amount their = __shfl_xor_sync(~0u, most, other);
        int they = __shfl_xor_sync(~0u, who, other);
        if (their > most || (their == most && they < who)) {
            most = their;
            who = they;
        }
    }
    return most;
}

// A search: what it goes by, and its chains.
template <typename V, typename Measure>
struct Search {
    typedef typename V::Set Set;
    static constexpr Key NONE = ~Key(0), OVER = Key(1) << 63, CROWDS = Key(1) << 62;
    static_assert(LARGEST_COUNT < Key(1) << 46, "an amount has 46 bits of a key, above the arc's 16");

    const Component<V>& c;
    const Ranks<V>& ranks;
    Measure measure;
    const Amount* staying;
    const int* load;            // of experts, by place
    Amount least;               // a lower bound of the largest rank
    int most_active;            // slots of a rank that may have rows
    int splits_above;           // experts of more rows may go in parts
    Amount aim = 0;
    int worst = 0;
    bool is_whole = false;      // only whole fragments move

    // What a rank that a chain has reached passes on along an arc.
    struct Leaving {
        int moved, active;      // 0: nothing can leave; the rank's active slots behind it
        Amount rest;            // what the rank counts behind it
    };

    __device__ Leaving leaving(const Arc& arc, int rows) const {
        Amount own = measure.of(rows), reached = ranks.reached[arc.rank];
        int active = ranks.reached_active[arc.rank];
        Amount keep = min(measure.most_rows(own - reached + aim), Amount(rows - 1));
        if (is_whole || load[arc.place] <= splits_above || active > most_active) keep = min(keep, Amount(0));
        active -= keep == 0;
        if (keep < 0 || active > most_active) return {0, 0, 0};
        return {int(rows - keep), active, reached - own + measure.of(int(keep))};
    }

    // The arc of the same expert on another rank.
    __device__ int arc_on(const Arc& arc, int rank) const {
        return c.copies[arc.place + number_of<V>(Set(arc.ranks) & below<V>(rank))];
    }

    // What a rank counts, and its active slots, with more rows of an arc. Where a chain comes back to its first
    // rank, `from` is the rank that passes them on.
    __device__ Amount with(int to, int rank, int moved, int from, int& active) const {
        int rows = c.tokens[to];
        bool closes = rank == worst;
        active = (closes ? ranks.root_active[from] : ranks.active[rank]) + (rows == 0);
        return (closes ? ranks.root_amount[from] : ranks.amount[rank]) - measure.of(rows) + measure.of(rows + moved);
    }

    // Finds the best moves from the ranks `front` to others.
    __device__ void find_moves(Key* keys, Set front, Set seen, bool may_close) const {
        for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) {
            Arc arc = c.arcs[a];
            int rows = c.tokens[a];
            if (!(front >> arc.rank & 1) || rows == 0 || ranks.entered[arc.rank] == a) continue;
            Leaving leave = leaving(arc, rows);
            if (leave.moved == 0) continue;
            Set targets = Set(arc.ranks) & ~seen;
            if (may_close && Set(arc.ranks) >> worst & 1 && arc_on(arc, worst) != ranks.root[arc.rank])
                targets |= Set(1) << worst;
            for (; targets != 0; targets &= targets - 1) {
                int rank = lowest_of<V>(targets), active;
                Amount amount = with(arc_on(arc, rank), rank, leave.moved, arc.rank, active);
                Key key = Key(min(amount, Amount(LARGEST_COUNT))) << 16 | unsigned(a);
                bool crowds = active > most_active;
                if (crowds) key |= CROWDS;
                if (crowds || amount > aim) key |= OVER;
                atomicMin(&keys[rank], key);
            }
        }
    }

    // Remembers how a rank was reached.
    __device__ void take(Key key, int rank) const {
        int a = int(key & 0xffff), active;
        Arc arc = c.arcs[a];
        Leaving leave = leaving(arc, c.tokens[a]);
        int to = arc_on(arc, rank);
        ranks.reached[rank] = with(to, rank, leave.moved, arc.rank, active);
        ranks.reached_active[rank] = active;
        ranks.left[rank] = a;
        ranks.entered[rank] = to;
        ranks.moved[rank] = leave.moved;
        bool is_first = arc.rank == worst;
        ranks.root[rank] = is_first ? a : ranks.root[arc.rank];
        ranks.root_amount[rank] = is_first ? leave.rest : ranks.root_amount[arc.rank];
        ranks.root_active[rank] = is_first ? leave.active : ranks.root_active[arc.rank];
    }

    __device__ void move(int a, int to, int moved) const {
        int rows = c.tokens[a], at = c.tokens[to], rank = c.arcs[a].rank, target = c.arcs[to].rank;
        ranks.amount[rank] += measure.of(rows - moved) - measure.of(rows);
        ranks.amount[target] += measure.of(at + moved) - measure.of(at);
        ranks.active[rank] -= rows == moved;
        ranks.active[target] += at == 0;
        c.tokens[a] = rows - moved;
        c.tokens[to] = at + moved;
    }

    // Makes the moves of a chain, the last first; `rank` is where it ends. By one thread.
    __device__ void make_moves(Key key, int rank) const {
        int a = int(key & 0xffff);
        Arc arc = c.arcs[a];
        // It is found by what was there before any move.
        move(a, arc_on(arc, rank), leaving(arc, c.tokens[a]).moved);
        for (int at = arc.rank; at != worst;) {
            int before = c.arcs[ranks.left[at]].rank;
            move(ranks.left[at], ranks.entered[at], ranks.moved[at]);
            at = before;
        }
    }

    // Looks for a chain and makes its moves; whether there is one, the same to every thread.
    __device__ bool chain() const {
        int lane = threadIdx.x % 32;
        if (threadIdx.x < V::size) ranks.keys[threadIdx.x] = NONE;
        if (threadIdx.x == worst) {
            ranks.reached[worst] = ranks.amount[worst];
            ranks.reached_active[worst] = ranks.active[worst];
            ranks.entered[worst] = -1;
        }
        __syncthreads();  // no move is known, and all know where the chain begins
        Set seen = Set(1) << worst, front = seen;
        for (int length = 0; length < CHAIN; ++length) {
            Key *keys = ranks.keys + (length % 2) * V::size, *next = ranks.keys + (1 - length % 2) * V::size;
            find_moves(keys, front, seen, length > 0);
            __syncthreads();  // the best moves are known
            Key best = NONE, own = threadIdx.x < V::size ? keys[threadIdx.x] : NONE;
            int end = V::size;
            bool flag[V::words];
            #pragma unroll
            for (int i = 0; i < V::words; ++i) {
                int rank = lane + 32 * i;
                Key key = rank < V::size ? keys[rank] : NONE;
                flag[i] = key != NONE && rank != worst;
                if (key >= best) continue;
                best = key;
                end = rank;
            }
            front = vote<V>(flag);
            #pragma unroll
            for (int other = 16; other > 0; other /= 2) {
                Key their = __shfl_xor_sync(~0u, best, other);
                int they = __shfl_xor_sync(~0u, end, other);
                if (their < best || (their == best && they < end)) {
                    best = their;
                    end = they;
                }
            }
            bool ends = (best & OVER) == 0;
            if (ends && threadIdx.x == 0) make_moves(best, end);
            if (!ends && threadIdx.x < V::size) {
                if (front >> threadIdx.x & 1) take(own, threadIdx.x);
                next[threadIdx.x] = NONE;
            }
            __syncthreads();  // moves are made, or ranks are reached; and all have read the keys
            if (ends) return true;
            if (front == 0) return false;
            seen |= front;
        }
        return false;
    }

    // Improves the rows of the arcs, which are `c.tokens`.
    __device__ void run() {
        add_up_ranks(c, ranks, measure, staying, [&](int a) { return c.tokens[a]; });
        Amount finest = max(Amount(1), least >> FINEST), step = 0;
        for (int i = 0; i < MAX_SEARCHES; ++i) {
            Amount above = largest_of(c, ranks.amount, worst) - least;
            if (above <= 0) break;
            if (step == 0) step = max(finest, above / 2);
            aim = least + max(Amount(0), above - step);
            is_whole = false;
            bool is_found = chain();
            if (!is_found) {
                is_whole = true;
                is_found = chain();
            }
            if (is_found) continue;
            if (step <= finest) break;
            step = max(finest, step >> SHRINK);
        }
    }
};

}  // namespace lplb
