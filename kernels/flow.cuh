// The exact flow of one component of the replica graph, by one block: ranks above a limit K push
// their excess towards ranks below it, layer by layer of a shortest-path layering that is made anew
// in each round: preflow-push (Goldberg and Tarjan 1988) in waves, with exact labels. Where excess
// cannot reach a rank below K, the ranks that cannot are a cut S, load(S) / |S| a lower bound, and
// its ceiling the next K: Newton's method on the parametric cut, as in the CPU's definition. All
// numbers are whole, and no result depends on the order of atomics.
//
// Sets of ranks are bits of a word, and a warp has the whole graph between its lanes, so that a layer
// costs a vote; every warp finds the layers for itself. PARTS threads share the edges of a rank, each has
// TURNS of them in registers; MORE: a rank may have more edges than these, which are read when needed. What
// a layer costs is the latency of its instructions, so few are wanted from one barrier to the next.

#pragma once

#include "plan.cuh"
#include "ptx.cuh"

constexpr int WORDS = (SIZE + 31) / 32;     // SIZE: the most ranks of a component
template <int words> struct Bits { typedef unsigned long long Type; };
template <> struct Bits<1> { typedef unsigned Type; };
typedef Bits<WORDS>::Type Set;
constexpr int PUSHING = SIZE * PARTS;       // threads that push
static_assert(PUSHING % 32 == 0 && PUSHING <= THREADS && 32 % PARTS == 0, "whole warps and ranks");

struct Component {              // all but the last five in shared memory
    const Arc* arcs;
    const short* copies;
    int* tokens;                // [arcs] at each copy
    int* held;                  // [SIZE] tokens of each rank: at first, of experts with one copy;
                                // while pushing, above the limit
    int* room;                  // [SIZE] at first, the other tokens; then, below the limit when the
                                // round began
    Set* next;                  // [SIZE] ranks that a rank's tokens could go to
    Set* layers;                // [SIZE] ranks by their distance from one with room
    Shape shape;
    const Edge* edges;          // [max_edges] of this thread's rank
    const int* ranks;           // [SIZE] local → global
    const int* speed;           // [R] of ranks, or null: all the same
    const int* cap;             // [E, C] the most tokens of each copy, or null: no limit

    // How many more tokens a copy may get.
    __device__ int left(int arc) const {
        return cap == nullptr ? MAX_TOTAL : cap[arcs[arc].quota] - tokens[arc];
    }
};

__device__ Set vote(const bool (&flag)[WORDS]) {
    Set set = 0;
    #pragma unroll
    for (int i = 0; i < WORDS; ++i)
        set |= Set(__ballot_sync(~0u, flag[i])) << (32 * i);
    return set;
}

__device__ int number_of(Set set) { return WORDS == 1 ? __popc(unsigned(set)) : __popcll(set); }

// A load that stays where it is written, so that it is under way early. Results do not depend on it.
template <typename T> __device__ T early(const T* at) { return *static_cast<const volatile T*>(at); }

__device__ void meet() {        // of the threads that push
    if (PUSHING == 32) __syncwarp();
    else barrier_of_first<PUSHING>();
}

constexpr int CHUNK = PARTS * TURNS;        // edges of a rank that are pushed along at once
static_assert(CHUNK <= 32, "bits of a word");

struct Way {                    // an edge, ready for use
    Set target;                 // a bit; none: no edge
    int arc, to, rank;          // where `tokens` and `held` have the two copies and the target
    unsigned same;              // edges of the same copy, as bits of the chunk
};

// This thread's edges of the chunk that begins with a rank's edge number `chunk`.
__device__ void make_ready(const Edge* edges, int number, int chunk, Way (&ways)[TURNS]) {
    #pragma unroll
    for (int i = 0; i < TURNS; ++i) {
        int place = i * PARTS + threadIdx.x % PARTS;
        Edge edge{-1, -1, 0, 0, 0};
        if (chunk + place < number) edge = edges[chunk + place];
        ways[i] = {Set(0), 0, 0, 0, 0};
        if (edge.arc < 0) continue;
        int begin = place - edge.nth;
        unsigned long long all = (1ull << edge.number) - 1;
        unsigned same(begin < 0 ? all >> -begin : all << begin);
        ways[i] = {Set(1) << edge.target, edge.arc, edge.to, edge.target, same};
    }
}

// One layer of a wave: a rank's excess `over` goes to the ranks `down`, in the layer below; those of the
// lowest layer take what they have room for. Lanes of ranks that do not push come along.
template <bool GENERAL>
__device__ void push(const Component& c, const Way (&first)[TURNS], bool pushes, Set down, bool lowest) {
    int rank = threadIdx.x / PARTS, part = threadIdx.x % PARTS, lane = threadIdx.x % 32;
    int over = pushes ? early(c.held + rank) : 0;
    Way ways[TURNS];
    #pragma unroll
    for (int i = 0; i < TURNS; ++i) ways[i] = first[i];
    for (int chunk = 0;; chunk += CHUNK) {
        int here[TURNS], room[TURNS], most[TURNS], total = 0;
        bool open[TURNS];
        #pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            open[i] = pushes && (ways[i].target & down) != 0;
            here[i] = open[i] ? early(c.tokens + ways[i].arc) : 0;
            room[i] = open[i] && lowest ? early(c.room + ways[i].rank) : MAX_TOTAL;
        }
        if (!__any_sync(~0u, over > 0)) return;
        #pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            if (GENERAL && open[i]) room[i] = min(room[i], c.left(ways[i].to));
            open[i] = over > 0 && here[i] > 0 && (!GENERAL || room[i] > 0);
            most[i] = here[i];
        }
        if (c.shape.most_nth > 0) {
            // The edges of one copy share what it has: each takes half of what the earlier ones left, the
            // last all. Those of another chunk do so with what this one leaves.
            unsigned opened = 0;
            #pragma unroll
            for (int i = 0; i < TURNS; ++i) {
                unsigned of_rank = __ballot_sync(~0u, open[i]) >> (lane - part) & ((1ull << PARTS) - 1);
                opened |= of_rank << (i * PARTS);
            }
            #pragma unroll
            for (int i = 0; i < TURNS; ++i) {
                unsigned same = opened & ways[i].same, lower = (1u << (i * PARTS + part)) - 1;
                int rest = here[i] >> __popc(same & lower);
                bool last = (same & (~lower << 1)) == 0;
                most[i] = last ? rest : rest - (rest >> 1);
            }
        }
        #pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            most[i] = open[i] ? min(most[i], room[i]) : 0;
            total += most[i];
        }
        int sum = total;
        #pragma unroll
        for (int i = 1; i < PARTS; i *= 2) {
            int other = __shfl_up_sync(~0u, sum, i, PARTS);
            if (i <= part) sum += other;
        }
        int to_give = over - (sum - total);
        #pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            int tokens = min(most[i], to_give);
            to_give -= most[i];
            if (tokens <= 0) continue;
            atomicAdd(&c.held[ways[i].rank], tokens);
            atomicAdd(&c.tokens[ways[i].to], tokens);
            atomicSub(&c.tokens[ways[i].arc], tokens);
        }
        // No one else adds to a rank while it pushes.
        if (PARTS > 1) __syncwarp();
        if (part == PARTS - 1 && over > 0) c.held[rank] = max(0, over - sum);
        if (!MORE || chunk + CHUNK >= c.shape.most_edges) return;
        over = max(0, over - __shfl_sync(~0u, sum, PARTS - 1, PARTS));
        make_ready(c.edges, c.shape.most_edges, chunk + CHUNK, ways);
        __syncwarp();
    }
}

// The least time in which the ranks of `set` take `load` tokens between them, and by it the limits of
// the ranks of this lane: numbers of whole tokens, and so of `own`.
__device__ void raise(const Component& c, Set set, int load, int (&limit)[WORDS], int& own, int rank) {
    typedef long long Long;
    int lane = threadIdx.x % 32, speed[WORDS], done[WORDS], speeds = 0, short_of = load;
    #pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        int r = lane + 32 * i;
        speed[i] = r < c.shape.ranks ? c.speed[c.ranks[r]] : 1;
        if (r < c.shape.ranks && set >> r & 1) speeds += speed[i];
    }
    speeds = __reduce_add_sync(~0u, speeds);
    #pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        bool inside = lane + 32 * i < c.shape.ranks && set >> (lane + 32 * i) & 1;
        done[i] = inside ? int(Long(load) * speed[i] / speeds) : -1;
        short_of -= __reduce_add_sync(~0u, inside ? done[i] : 0);
    }
    // Rounding down loses at most a token a rank: each goes to whoever ends it first.
    Long tokens = load, time = speeds;
    for (; short_of > 0; --short_of) {
        Long next = MAX_TOTAL, pace = 1;
        int who = -1;
        #pragma unroll
        for (int i = 0; i < WORDS; ++i)
            if (done[i] >= 0 && (who < 0 || (done[i] + Long(1)) * pace < next * speed[i])) {
                next = done[i] + Long(1);
                pace = speed[i];
                who = lane + 32 * i;
            }
        for (int other = 16; other > 0; other /= 2) {
            Long their = __shfl_xor_sync(~0u, next, other), their_pace = __shfl_xor_sync(~0u, pace, other);
            int they = __shfl_xor_sync(~0u, who, other);
            Long ahead = their * pace - next * their_pace;
            if (they >= 0 && (who < 0 || ahead < 0 || (ahead == 0 && they < who))) {
                next = their;
                pace = their_pace;
                who = they;
            }
        }
        #pragma unroll
        for (int i = 0; i < WORDS; ++i)
            if (lane + 32 * i == who) ++done[i];
        tokens = next;
        time = pace;
    }
    #pragma unroll
    for (int i = 0; i < WORDS; ++i) limit[i] = int(min(tokens * speed[i] / time, Long(MAX_TOTAL)));
    own = rank < c.shape.ranks ? int(min(tokens * c.speed[c.ranks[rank]] / time, Long(MAX_TOTAL))) : 0;
}

// Moves tokens until the largest of `held`, by the ranks' speeds, is the optimum. By the threads that
// push; false if the rounds did not suffice. GENERAL: with speeds or capacities.
template <bool GENERAL>
__device__ bool balance(const Component& c, const Way (&ways)[TURNS], int rounds) {
    int rank = threadIdx.x / PARTS, part = threadIdx.x % PARTS, lane = threadIdx.x % 32;
    int total = 0, least = 0;
    #pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        if (lane + 32 * i >= SIZE) continue;
        total += c.held[lane + 32 * i] + c.room[lane + 32 * i];
        least = max(least, c.held[lane + 32 * i]);
    }
    total = __reduce_add_sync(~0u, total);
    least = __reduce_max_sync(~0u, least);
    // K, of this thread's rank, begins at the mean or at what a rank cannot pass on; with speeds, it
    // is of the ranks of this lane, too.
    int limit = max(least, total / c.shape.ranks + (total % c.shape.ranks != 0)), limits[WORDS];
    if (GENERAL && c.speed != nullptr) raise(c, ~Set(0), total, limits, limit, rank);
    int rise = limit - c.room[rank];
    Set* layers = c.layers;
    keep_in_register(layers);  // or its address is made anew wherever it is used
    __builtin_assume(__isShared(layers));
    meet();
    for (; rounds > 0; --rounds) {
        int over = part == 0 ? early(c.held + rank) - rise : 0;
        Set reach = 0;
        #pragma unroll
        for (const Way& way : ways)
            if (c.tokens[way.arc] > 0 && (!GENERAL || c.left(way.to) > 0)) reach |= way.target;
        #pragma unroll 1
        for (int i = CHUNK + part; MORE && i < c.shape.most_edges; i += PARTS) {
            Edge edge = c.edges[i];
            if (edge.arc >= 0 && c.tokens[edge.arc] > 0 && (!GENERAL || c.left(edge.to) > 0))
                reach |= Set(1) << edge.target;
        }
        #pragma unroll
        for (int other = 1; other < PARTS; other *= 2) reach |= __shfl_xor_sync(~0u, reach, other);
        if (part == 0) {
            if (rank >= c.shape.ranks) over = 0;
            c.held[rank] = over;
            c.room[rank] = max(0, -over);
            c.next[rank] = reach;
        }
        rise = 0;
        meet();
        Set next[WORDS];
        int above[WORDS];
        bool flag[WORDS];
        #pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            bool is_rank = lane + 32 * i < SIZE;
            next[i] = is_rank ? early(c.next + lane + 32 * i) : 0;
            above[i] = is_rank ? c.held[lane + 32 * i] : 0;
            flag[i] = above[i] > 0;
        }
        Set excess = vote(flag);
        if (excess == 0) break;
        #pragma unroll
        for (int i = 0; i < WORDS; ++i) flag[i] = above[i] < 0;
        Set layer = vote(flag), reached = layer, down = 0;
        int top = 0;
        while (layer != 0 && (excess & ~reached) != 0) {
            if (threadIdx.x == 0) layers[top] = layer;
            ++top;
            down = layer;
            #pragma unroll
            for (int i = 0; i < WORDS; ++i) flag[i] = (next[i] & layer) != 0;
            layer = vote(flag) & ~reached;
            reached |= layer;
        }
        if (excess & ~reached) {
            // What does not reach a rank with room is a cut: nothing leads out of it.
            int kept = 0, size = c.shape.ranks - number_of(reached), before = limit;
            #pragma unroll
            for (int i = 0; i < WORDS; ++i)
                if (lane + 32 * i < c.shape.ranks && !(reached >> (lane + 32 * i) & 1))
                    kept += above[i] + (GENERAL && c.speed != nullptr ? limits[i] : 0);
            kept = __reduce_add_sync(~0u, kept);
            if (GENERAL && c.speed != nullptr) raise(c, ~reached, kept, limits, limit, rank);
            else limit += (kept + size - 1) / size;
            rise = limit - before;
            meet();
            continue;
        }
        for (; top > 0; --top) {
            // Two ranks could fill one copy beyond its capacity: in turn, then.
            int turns = GENERAL && c.cap != nullptr ? c.shape.ranks : 1;
            for (int turn = 0; turn < turns; ++turn) {
                meet();
                bool pushes = layer >> rank & 1 && (turns == 1 || rank == turn);
                push<GENERAL>(c, ways, pushes, down, top == 1);
            }
            layer = down;
            if (top > 1) down = layers[top - 2];
        }
        meet();
    }
    meet();
    if (part == 0 && rank < c.shape.ranks) c.held[rank] += limit - rise;
    return rounds > 0;
}

// Adds up the counts of the component's experts: `load` of those with several copies, by place, and in
// `held` what the others bring to their ranks; writes the quotas of these. Returns how the rows say
// that the batch fares, BAD_COUNTS if a count is negative or they are too many with the base loads,
// INFEASIBLE if an only copy may not have its tokens, and how many they are; the same to every thread.
template <bool GENERAL>
__device__ Ending add_up(
    const Problem& p, int* load, int* held, int* __restrict__ quota, int sharing,
    int packed /* this thread's first expert */, int base /* load of this thread's rank */) {
    const Counts& counts = p.counts;
    const Network& net = p.net;
    int max_replicas = p.max_replicas;
    __shared__ int status;
    __shared__ Total total;
    if (threadIdx.x == 0) {
        status = OPTIMAL;
        total = {0, 0};
    }
    __syncthreads();
    for (int i = threadIdx.x / sharing, row = threadIdx.x % sharing;;) {
        int expert = packed & 0xffff, home = packed >> 16, signs = 0;
        long long sum = 0;
        auto take = [&](int number) {
            sum += number;
            signs |= number;
        };
        const int* at = counts_of(counts, row) + expert;
        if (packed >= 0 && counts.num_rows <= 8 * sharing)
            each<8>(at, row, counts.num_rows, sharing, counts.stride, take);
        else if (packed >= 0)
            each<32>(at, row, counts.num_rows, sharing, counts.stride, take);
        for (int other = 1; other < sharing; other *= 2) {
            sum += __shfl_xor_sync(~0u, sum, other);
            signs |= __shfl_xor_sync(~0u, signs, other);
        }
        if (signs < 0 || sum > MAX_TOTAL) {
            atomicMax(&status, BAD_COUNTS);
            sum = 0;
        }
        bool mine = packed >= 0 && row == 0;
        total.add(mine ? unsigned(sum) : 0);
        if (mine) {
            if (home < SIZE) atomicAdd(&held[home], int(sum));
            else load[home - SIZE] = int(sum);
            for (int c = 0; c < max_replicas; ++c)
                quota[expert * max_replicas + c] = c == 0 && home < SIZE ? int(sum) : 0;
            if (GENERAL && p.cap != nullptr && home < SIZE && sum > p.cap[expert * max_replicas])
                atomicMax(&status, INFEASIBLE);
        }
        i += THREADS / sharing;
        if (i - threadIdx.x / sharing >= net.max_experts) break;
        packed = i < net.max_experts ? net.experts[blockIdx.x * net.max_experts + i] : -1;
    }
    for (int i = threadIdx.x; i < counts.num_rows * counts.head; i += THREADS) {
        int word = i % HEAD, value = counts_of(counts, i / HEAD)[word - HEAD];
        // A row of another kind may have anything in its place.
        if (word == HEAD_STATUS && unsigned(value) >= NUM_STATUSES) value = OUT_OF_STEP;
        if (word == HEAD_STATUS && value != OPTIMAL) atomicMax(&status, value);
        if (word > HEAD_STATUS && value != counts_of(counts, counts.rank)[word - HEAD]) atomicMax(&status, OUT_OF_STEP);
    }
    if (p.base != nullptr) total.add(base);
    __syncthreads();
    if (total.value() > MAX_TOTAL) return {max(status, BAD_COUNTS), 0};
    return {status, int(total.value())};
}

// Lays the component out in shared memory and spreads each expert evenly over its copies.
template <bool GENERAL>
__device__ Component begin(const Problem& p, char* shared, const Edge* edges, int* __restrict__ quota,
                           Ending& ending) {
    const Network& net = p.net;
    const Counts& counts = p.counts;
    int g = blockIdx.x;
    // What the flow reads most lies where the compiler knows.
    __shared__ Set next[SIZE], layers[SIZE];
    __shared__ int held[SIZE], room[SIZE];
    int* tokens = reinterpret_cast<int*>(shared);
    Arc* arcs = reinterpret_cast<Arc*>(tokens + net.max_arcs);
    int* load = reinterpret_cast<int*>(arcs + net.max_arcs);  // [max_arcs] of experts, by place
    short* copies = reinterpret_cast<short*>(load + net.max_arcs);

    // Neighbouring threads share the rows of one expert where there are more threads than experts.
    int sharing = 1;
    while (sharing < 32 && 2 * sharing <= counts.num_rows && 2 * sharing * net.max_experts <= THREADS)
        sharing *= 2;
    int expert = threadIdx.x / sharing;
    int packed = expert < net.max_experts ? net.experts[g * net.max_experts + expert] : -1;
    Shape shape = net.shape[g];
    int base = p.base && threadIdx.x < shape.ranks ? p.base[net.ranks[g * SIZE + threadIdx.x]] : 0;
    if (threadIdx.x < SIZE) {
        held[threadIdx.x] = base;
        room[threadIdx.x] = 0;
    }
    for (int a = threadIdx.x; a < net.max_arcs; a += THREADS) {
        arcs[a] = net.arcs[g * net.max_arcs + a];
        copies[a] = net.copies[g * net.max_arcs + a];
    }
    ending = add_up<GENERAL>(p, load, held, quota, sharing, packed, base);
    ending.status = max(ending.status, p.status);
    if (GENERAL && p.cap != nullptr) {
        bool lacks = false;
        for (int a = threadIdx.x; a < shape.arcs; a += THREADS) {
            Arc arc = arcs[a];
            if (copies[arc.place] != a) continue;
            int total = load[arc.place];
            for (int i = 0; i < number_of(arc.ranks); ++i) {
                int copy = copies[arc.place + i], most = min(total, p.cap[arcs[copy].quota]);
                tokens[copy] = most;
                atomicAdd(&room[arcs[copy].rank], most);
                total -= most;
            }
            lacks |= total > 0;
        }
        if (__syncthreads_or(lacks)) ending.status = max(ending.status, INFEASIBLE);
    } else {
        for (int a = threadIdx.x; a < shape.arcs; a += THREADS) {
            // The even split is where to start: half as many rounds as from the homes.
            Arc arc = arcs[a];
            int total = load[arc.place], number = number_of(arc.ranks);
            int place = number_of(arc.ranks & ((Set(1) << arc.rank) - 1));
            tokens[a] = total / number + (place < total % number);
            atomicAdd(&room[arc.rank], tokens[a]);
        }
    }
    __syncthreads();
    const int* ranks = net.ranks + g * SIZE;
    return {arcs, copies, tokens, held, room, next, layers, shape, edges, ranks, p.speed, p.cap};
}

// One block solves one component of the replica graph for one batch: `start` may better the even split,
// and the flow makes it exact. Where the rounds do not suffice the quotas are whole, but not the best.
// Meanwhile further blocks number this rank's picks, which takes no quotas, and copy the counts.
template <bool GENERAL, typename Start>
__device__ void solve_component(const Problem& p, char* shared, Start start) {
    int batch = blockIdx.y, g = blockIdx.x;
    if (g >= p.num_components) {
        int helper = g - p.num_components, step = (gridDim.x - p.num_components) * THREADS;
        for (int i = helper * THREADS + threadIdx.x; i < p.num_ranks * p.num_experts; i += step)
            p.counted[i] = counts_of(p.counts, i / p.num_experts)[i % p.num_experts];
        number(p.picks, helper, counts_of(p.counts, p.counts.rank), p.error_flags, reinterpret_cast<int*>(shared));
        return;
    }
    int* quota = p.quota + size_t(batch) * p.num_experts * p.max_replicas;
    int* rank_load = p.rank_load + size_t(batch) * p.num_ranks;
    // What is needed late is asked for early.
    int rank = threadIdx.x < SIZE ? p.net.ranks[g * SIZE + threadIdx.x] : 0;
    bool balances = threadIdx.x < PUSHING;
    const Edge* edges = p.net.edges + (g * SIZE + threadIdx.x / PARTS) * p.net.max_edges;
    Way ways[TURNS];
    make_ready(edges, balances ? p.net.max_edges : 0, 0, ways);
    Ending ending;
    Component c = begin<GENERAL>(p, shared, edges, quota, ending);
    if (ending.status == OPTIMAL && c.shape.ranks > 0) {
        if (c.shape.arcs > 0) {  // else nothing can move
            start(c);
            if (balances && !balance<GENERAL>(c, ways, p.max_rounds)) ending.status = NOT_CONVERGED;
            __syncthreads();
        }
        for (int a = threadIdx.x; a < c.shape.arcs; a += THREADS) quota[c.arcs[a].quota] = c.tokens[a];
        if (threadIdx.x < c.shape.ranks)
            rank_load[rank] = c.held[threadIdx.x] - (p.base == nullptr ? 0 : p.base[rank]);
    }
    if (threadIdx.x == 0) p.endings[batch * p.num_components + g] = ending;
}

// The flow alone, with speeds or capacities.
extern "C" __global__ void __launch_bounds__(THREADS, 1) solve_general(const Problem problem) {
    extern __shared__ __align__(16) char shared[];
    solve_component<true>(problem, shared, [](const Component&) {});
}
