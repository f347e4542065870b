// A greedy fill of a domain's guest slots, by one warp, in whole numbers.
//
// Ranks above a limit give tokens along copies that are there, or to a guest on a rank below it.
#pragma once

#include "component.cuh"

namespace lplb {

// How a fill decides, from a word of `RULES`.
struct Rule {
    bool by_excess;  // the rank with most excess gives next, else that with the highest priority
    bool widest;     // guests go to the rank with most slack, else to the one where they fit best
    bool largest;    // a guest is of the expert with most tokens, else of the one that fits best
    int shift;       // the slack of all ranks, halved so often, is what a guest may fill beyond need
    int noise;       // how much slacks are disguised, in 1024; 0 or a power of two

    __device__ explicit Rule(int word)
        : by_excess(word & 1), widest(word >> 1 & 1), largest(word >> 2 & 1), shift(word >> 3 & 31),
          noise(word >> 8) {}
};

// What all fills begin from, in shared memory. A rank has `num_places` places: its residents by expert, then
// its guest slots.
template <typename V>
struct Start {
    int ranks, num_experts, num_places, num_slots, node_size;
    const Resident* residents;       // [num_experts]
    const typename V::Set* holders;  // [num_experts] ranks with a resident copy
    int* tokens;                     // [size, num_places]
    short* expert;                   // [size, num_places] its number in the component; -1: none
    int* load;                       // [size]
};

// The state of a fill: what a warp has in shared memory, and what its lanes have of their ranks.
template <typename V>
struct Fill {
    __device__ Fill(char* shared, int num_experts, int num_places)
        : holders(reinterpret_cast<typename V::Set*>(shared)),
          tokens(reinterpret_cast<int*>(holders + num_experts)), sent_of(tokens + V::size * num_places),
          expert(reinterpret_cast<short*>(sent_of + V::size)), copies(0) {}

    typename V::Set* holders;  // [num_experts]
    int* tokens;               // [size, num_places]
    int* sent_of;              // [size] guests of each home, counted at the end
    short* expert;             // [size, num_places]
    int slack[V::words];       // the limit less the load of this lane's ranks
    int priority[V::words], used[V::words];
    unsigned noise[V::words];  // in 2 to the 32
    bool is_narrow;            // whether sums of slack are below 2 to the 31
    int copies;
};

// Of the rank `rank`, the value that its lane has.
template <typename V>
__device__ int of_rank(const int (&values)[V::words], int rank) {
    int value = values[0];
    if (V::words > 1 && rank >= 32) value = values[V::words - 1];
    return __shfl_sync(~0u, value, rank % 32);
}

// The first rank whose flag is set; one is.
template <typename V>
__device__ int first_of(const bool (&flag)[V::words]) {
    unsigned set = __ballot_sync(~0u, flag[0]);
    if (V::words == 1) return __ffs(set) - 1;
    unsigned high = __ballot_sync(~0u, flag[V::words - 1]);
    return set != 0 ? __ffs(set) - 1 : __ffs(high) + 31;
}

// Moves tokens from rank to rank, as far as their slack goes.
template <typename V>
__device__ void move_load(Fill<V>& fill, int from, int to, int tokens) {
    int lane = threadIdx.x % 32;
    #pragma unroll
    for (int i = 0; i < V::words; ++i) {
        if (lane + 32 * i == from) fill.slack[i] += tokens;
        if (lane + 32 * i == to) fill.slack[i] -= tokens;
    }
}

// Whether slack of `rest` > 0 is more than there is to spare, over 2 to `shift`. That is the sum of slack over ranks
// above their limit, or with a guest slot left.
template <typename V>
__device__ bool is_wasted(const Fill<V>& fill, int num_slots, int rest, int shift) {
    if (fill.is_narrow && shift == 31) return true;
    unsigned low = 0;
    int high = 0;
    #pragma unroll
    for (int i = 0; i < V::words; ++i) {
        int slack = fill.slack[i] < 0 || fill.used[i] < num_slots ? fill.slack[i] : 0;
        low += fill.is_narrow ? slack : slack & 0xffff;
        high += slack >> 16;
    }
    low = __reduce_add_sync(~0u, low);
    if (fill.is_narrow) return rest > int(low) >> shift;
    high = __reduce_add_sync(~0u, high);
    return rest > ((long long)high * 65536 + low) >> shift;
}

// Copies an array by a warp. Several loads are under way at once, before any store that could change what they read.
template <typename T>
__device__ void copy_shared(T* to, const T* from, int number) {
    constexpr int at_once = 8;
    #pragma unroll 1
    for (int first = threadIdx.x % 32; first < number; first += 32 * at_once) {
        T several[at_once];
        #pragma unroll
        for (int i = 0; i < at_once; ++i) several[i] = first + 32 * i < number ? from[first + 32 * i] : T(0);
        #pragma unroll
        for (int i = 0; i < at_once; ++i)
            if (first + 32 * i < number) to[first + 32 * i] = several[i];
    }
}

// Begins a fill with a limit of each of this lane's ranks. Ranks behind the last neither give nor take.
template <typename V>
__device__ void begin_fill(const Start<V>& start, Fill<V>& fill, const Rule& rule, int number,
                           const int (&limit)[V::words]) {
    int lane = threadIdx.x % 32, highest = 0;
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
    }
    fill.is_narrow = __reduce_max_sync(~0u, highest) <= MAX_TOTAL / start.ranks;
    copy_shared(fill.holders, start.holders, start.num_experts);
    copy_shared(fill.tokens, start.tokens, start.ranks * start.num_places);
    copy_shared(fill.expert, start.expert, start.ranks * start.num_places);
    fill.copies = 0;
    __syncwarp();  // the state is whole before the first step
}

// One fill, by a warp: at most so many steps. `parts`: places of a rank for each lane. `fewest`: ~the fewest guests
// of a fill of this round that reached the target, or 0. Returns false for a fill with more, which is given up: it
// cannot be the best, and no round follows.
template <typename V, int parts, int unrolled = parts <= 2 ? parts : 1>
__device__ bool make_fill(const Start<V>& start, Fill<V>& fill, const Rule& rule, int least, int steps,
                          unsigned* fewest) {
    typedef typename V::Set Set;
    int lane = threadIdx.x % 32, S = start.num_places, G = start.num_slots;
    bool flag[V::words], stuck[V::words] = {};
    #pragma unroll 1
    for (; steps > 0; --steps) {
        // The rank that gives.
        int value[V::words], best = -1;
        #pragma unroll
        for (int i = 0; i < V::words; ++i) {
            bool may = -fill.slack[i] >= least && !stuck[i];
            value[i] = !may ? -1 : rule.by_excess ? -fill.slack[i] : fill.priority[i];
            best = max(best, value[i]);
        }
        best = __reduce_max_sync(~0u, best);
        if (best < 0) return true;
        #pragma unroll
        for (int i = 0; i < V::words; ++i) flag[i] = value[i] == best;
        int from = first_of<V>(flag), need = rule.by_excess ? best : -of_rank<V>(fill.slack, from);
        int* tokens = fill.tokens + from * S;
        const short* experts = fill.expert + from * S;

        // Along a copy that is there. Lanes have places first: what they hold, and which other ranks hold it, too.
        int x[parts], expert[parts], most = 0;
        Set others[parts];
        #pragma unroll unrolled
        for (int i = 0; i < parts; ++i) {
            int place = lane + 32 * i;
            x[i] = place < S ? tokens[place] : 0;
            expert[i] = place < S ? experts[place] : -1;
        }
        #pragma unroll unrolled
        for (int i = 0; i < parts; ++i) {
            others[i] = x[i] > 0 ? fill.holders[expert[i]] & ~(Set(1) << from) : 0;
            most = max(most, x[i]);
        }
        // Then they have ranks, and look at what each of them could take from place after place.
        bool is_shared = false;
        int moved = 0;
        unsigned move = 0, first[V::words];  // a place * 64 + a rank; the first place whose expert a rank holds
        #pragma unroll
        for (int w = 0; w < V::words; ++w) first[w] = ~0u;
        #pragma unroll unrolled
        for (int i = 0; i < parts; ++i) {
            unsigned left = __ballot_sync(~0u, others[i] != 0);
            is_shared |= left != 0;
            #pragma unroll 1
            for (; left != 0; left &= left - 1) {
                int owner = __ffs(left) - 1, able = min(__shfl_sync(~0u, x[i], owner), need);
                unsigned place = owner + 32 * i;
                #pragma unroll
                for (int w = 0; w < V::words; ++w) {
                    unsigned holders = __shfl_sync(~0u, unsigned(others[i] >> (V::words - 1) * 32 * w), owner);
                    if (!(holders >> lane & 1)) continue;
                    int taken = min(able, fill.slack[w]);
                    first[w] = min(first[w], place);
                    if (taken <= moved) continue;
                    moved = taken;
                    move = place * 64 + lane + 32 * w;
                }
            }
        }
        if (is_shared) {
            unsigned key = moved, highest = __reduce_max_sync(~0u, key);
            bool by_priority = highest == 0 && !rule.by_excess;
            if (by_priority) {  // `best` is that of the rank that gives; no two ranks have the same
                #pragma unroll
                for (int w = 0; w < V::words; ++w) {
                    unsigned lower = fill.priority[w];
                    if (first[w] == ~0u || lower >= unsigned(best) || ~lower <= key) continue;
                    key = ~lower;
                    move = first[w] * 64 + lane + 32 * w;
                }
                highest = __reduce_max_sync(~0u, key);
            }
            if (highest != 0) {
                move = __reduce_min_sync(~0u, key == highest ? move : ~0u);
                int place = move / 64, to = move % 64, what = experts[place];
                moved = highest;
                if (by_priority) {
                    moved = min(tokens[place], need);
                    __syncwarp();  // all lanes have read the tokens before one writes them
                }
                #pragma unroll unrolled
                for (int i = 0; i < parts; ++i) {
                    int other = lane + 32 * i;
                    if (other == place) tokens[other] = x[i] - moved;
                    if (other < S && fill.expert[to * S + other] == what) fill.tokens[to * S + other] += moved;
                }
                move_load(fill, from, to, moved);
                __syncwarp();  // the move is made before the next step reads tokens
                continue;
            }
        }

        unsigned most_copies = lane == 0 ? ~atomicMax(fewest, 0u) : ~0u;  // under way until the guest is there

        // The rank of a guest, which is on the node of this one, and so is its home.
        bool near[V::words];
        #pragma unroll
        for (int i = 0; i < V::words; ++i) near[i] = true;
        if (start.node_size < start.ranks) {
            int node = from / start.node_size, begin = node * start.node_size;
            #pragma unroll
            for (int i = 0; i < V::words; ++i) near[i] = unsigned(lane + 32 * i - begin) < unsigned(start.node_size);
            most = 0;
            #pragma unroll unrolled
            for (int i = 0; i < parts; ++i) {
                if (x[i] > 0 && start.residents[expert[i]].home / start.node_size != node) x[i] = 0;
                most = max(most, x[i]);
            }
        }
        most = __reduce_max_sync(~0u, most);
        unsigned width[V::words], key = 0;
        bool may[V::words], fits[V::words], any = false;
        #pragma unroll
        for (int i = 0; i < V::words; ++i) {
            int rank = lane + 32 * i, slack = fill.slack[i];
            may[i] = most >= least && rank != from && slack >= least && fill.used[i] < G && near[i];
            width[i] = slack + unsigned((unsigned long long)unsigned(slack) * fill.noise[i] >> 32);
            fits[i] = may[i] && !rule.widest && slack >= min(need, most);
            any |= fits[i];
        }
        any = __any_sync(~0u, any);
        #pragma unroll
        for (int i = 0; i < V::words; ++i) {
            width[i] = any ? (fits[i] ? ~width[i] : 0) : may[i] ? width[i] : 0;
            key = max(key, width[i]);
        }
        key = __reduce_max_sync(~0u, key);
        if (key == 0) {
            #pragma unroll
            for (int i = 0; i < V::words; ++i) stuck[i] |= lane + 32 * i == from;
            __syncwarp();  // all lanes have read holders and tokens before a later step writes them
            continue;
        }
        #pragma unroll
        for (int i = 0; i < V::words; ++i) flag[i] = width[i] == key;
        int to = first_of<V>(flag), slack = of_rank<V>(fill.slack, to), used = G == 1 ? 0 : of_rank<V>(fill.used, to);
        // No more than the excess, but all of the slack where the rest of it would be wasted.
        int aim = min(need, slack);
        if (slack > need && used == G - 1 && of_rank<V>(fill.used, from) < G &&
            is_wasted(fill, G, slack - need, rule.shift))
            aim = slack;

        // Its expert: that with fewest tokens of those that suffice, else that with most. The rank holds none that
        // has tokens here, or they would have moved along that copy.
        int had = most;
        unsigned chosen = ~0u;
        if (!rule.largest && most >= aim) {
            #pragma unroll unrolled
            for (int i = 0; i < parts; ++i)
                if (x[i] >= aim) chosen = min(chosen, unsigned(x[i]));
            had = int(__reduce_min_sync(~0u, chosen));
        }
        chosen = ~0u;
        #pragma unroll unrolled
        for (int i = 0; i < parts; ++i)
            if (x[i] == had) chosen = min(chosen, unsigned(lane + 32 * i));
        int place = int(__reduce_min_sync(~0u, chosen));
        moved = min(aim, had);
        if (lane == place % 32) {  // it alone has read what it writes
            int slot = to * S + S - G + used, what = experts[place];
            tokens[place] = had - moved;
            fill.tokens[slot] = moved;
            fill.expert[slot] = short(what);
            fill.holders[what] |= Set(1) << to;
        }
        #pragma unroll
        for (int i = 0; i < V::words; ++i) {
            fill.used[i] += lane + 32 * i == to;
            stuck[i] = false;
        }
        move_load(fill, from, to, moved);
        ++fill.copies;
        if (__any_sync(~0u, unsigned(fill.copies) > most_copies)) return false;
        __syncwarp();  // the guest is there before the next step reads what there is
    }
    return true;
}

// The most guests of experts with one home, in a fill that is done.
template <typename V>
__device__ int most_sent(const Start<V>& start, Fill<V>& fill) {
    int lane = threadIdx.x % 32, G = start.num_slots, most = 0;
    for (int rank = lane; rank < V::size; rank += 32) fill.sent_of[rank] = 0;
    __syncwarp();  // all numbers are zero before any is raised
    for (int i = lane; i < start.ranks * G; i += 32) {
        int expert = fill.expert[i / G * start.num_places + start.num_places - G + i % G];
        if (expert >= 0) atomicAdd(&fill.sent_of[start.residents[expert].home], 1);
    }
    __syncwarp();  // all guests are counted before the most is looked for
    for (int rank = lane; rank < V::size; rank += 32) most = max(most, fill.sent_of[rank]);
    return __reduce_max_sync(~0u, most);
}

}  // namespace lplb
