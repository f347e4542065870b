// Choosing the guests of a domain: `choose_guests` of planning/guests.py is the definition, bit for bit.
//
// A portfolio of greedy fills in whole numbers, one to a warp. Ranks above a limit give tokens along copies that
// are there, or to a guest on a rank below it. All begin from the even split over the residents. The best of
// them is kept. Where none comes down to its limit, rounds with higher ones follow.
#pragma once

#include "component.cuh"

namespace lplb {

constexpr int FILLS = sizeof(RULES) / sizeof(RULES[0]);  // one to a warp

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
    const Resident* residents;       // [num_experts], in device memory
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

// The speeds of this lane's ranks, and the largest of all ranks of all domains. Without speeds all are 1.
template <typename V, bool general>
struct Speeds {
    int own[V::words], largest;

    __device__ Speeds(const Problem& p, const int* ranks, int number) : largest(1) {
        #pragma unroll
        for (int i = 0; i < V::words; ++i) own[i] = 1;
        #pragma unroll
        for (int i = 0; i < V::words; ++i) {
            int rank = threadIdx.x % 32 + 32 * i;
            if (general && p.speed != nullptr && rank < number) own[i] = p.speed[ranks[rank]];
        }
        if (general && p.speed != nullptr) {
            for (int rank = threadIdx.x % 32; rank < p.num_ranks; rank += 32) largest = max(largest, p.speed[rank]);
            largest = __reduce_max_sync(~0u, largest);
        }
    }

    // The load of a rank at which it takes as long as the fastest of all with the load `level`.
    __device__ int limit(int level, int i) const {
        return general ? int((long long)level * own[i] / largest) : level;
    }

    // The reverse, rounded up.
    __device__ int level(int load, int i) const {
        return general ? int(((long long)load * largest + own[i] - 1) / own[i]) : load;
    }
};

// The expert whose resident is in a place, of those of all ranks in a row. -1: none, or a guest slot.
template <typename V>
__device__ int resident_in(const Guests& g, int i) {
    int S = g.num_local_slots, residents = S - g.num_slots, rank = i / S, place = i % S;
    if (rank >= V::size || place >= residents) return -1;
    return g.places[(blockIdx.x * V::size + rank) * residents + place];
}

// Lays out what all fills begin from: every expert evenly over its residents, the ranks' base loads beside.
// `in_place`: the expert in this thread's first place.
template <typename V>
__device__ Start<V> make_start(const Problem& p, const Guests& g, const typename V::Set* holders, const int* load,
                               const int* ranks, int num_ranks, int in_place, char* shared) {
    int num_experts = g.num_experts[blockIdx.x], S = g.num_local_slots;
    int *tokens = reinterpret_cast<int*>(shared), *load_of_rank = tokens + V::size * S;
    Start<V> start{num_ranks, num_experts, S, g.num_slots, g.num_ranks_per_node,
                   g.residents + blockIdx.x * p.net.max_experts, holders, tokens,
                   reinterpret_cast<short*>(load_of_rank + V::size), load_of_rank};
    if (threadIdx.x < V::size)
        start.load[threadIdx.x] = p.base != nullptr && threadIdx.x < num_ranks ? p.base[ranks[threadIdx.x]] : 0;
    __syncthreads();  // base loads are there before tokens are added
    for (int i = threadIdx.x; i < num_ranks * S; i += V::threads) {
        int rank = i / S, expert = i < V::threads ? in_place : resident_in<V>(g, i), own = 0;
        if (expert >= 0) {
            int number = number_of<V>(holders[expert]), nth = number_of<V>(holders[expert] & below<V>(rank));
            own = load[expert] / number + (nth < load[expert] % number);
            atomicAdd(&start.load[rank], own);
        }
        start.expert[i] = short(expert);
        start.tokens[i] = own;
    }
    __syncthreads();  // all is there before fills begin
    return start;
}

// The highest mean level of a domain, rounded up. `own`: the total of this one.
template <typename V, bool general>
__device__ int highest_mean(const Problem& p, const Speeds<V, general>& speeds, int own, int num_ranks, char* shared) {
    const Network& net = p.net;
    if (p.num_components == 1) {
        int sum = num_ranks;
        if (general && p.speed != nullptr) {
            sum = 0;
            #pragma unroll
            for (int i = 0; i < V::words; ++i) sum += threadIdx.x % 32 + 32 * i < num_ranks ? speeds.own[i] : 0;
            sum = __reduce_add_sync(~0u, sum);
        }
        return int(((long long)own * speeds.largest + sum - 1) / sum);
    }
    __shared__ int highest;
    unsigned* total = reinterpret_cast<unsigned*>(shared);  // [num_components]
    if (threadIdx.x == 0) highest = 0;
    for (int d = threadIdx.x; d < p.num_components; d += V::threads) total[d] = 0;
    __syncthreads();  // the totals are zero before any thread adds to them
    for (int i = threadIdx.x; i < p.num_components * net.max_experts; i += V::threads) {
        if (net.experts[i] < 0) continue;
        unsigned sum = 0;
        each<8>(counts_of(p.counts, 0) + (net.experts[i] & 0xffff), 0, p.counts.num_rows, 1, p.counts.stride,
                [&](int number) { sum += number; });
        atomicAdd(&total[i / net.max_experts], sum);
    }
    for (int i = threadIdx.x; p.base != nullptr && i < p.num_components * V::size; i += V::threads)
        if (i % V::size < net.shape[i / V::size].ranks) atomicAdd(&total[i / V::size], unsigned(p.base[net.ranks[i]]));
    __syncthreads();  // all is added before it is read
    for (int d = threadIdx.x; d < p.num_components; d += V::threads) {
        int ranks = net.shape[d].ranks, sum = ranks;
        if (general && p.speed != nullptr) {
            sum = 0;
            for (int r = 0; r < ranks; ++r) sum += p.speed[net.ranks[d * V::size + r]];
        }
        // Totals beyond 2^31 send the batch home, whatever is chosen here.
        long long mean = ranks == 0 ? 0 : ((long long)total[d] * speeds.largest + sum - 1) / sum;
        atomicMax(&highest, int(min(mean, (long long)MAX_TOTAL)));
    }
    __syncthreads();  // the highest is there before it is read, and `shared` is free
    return highest;
}

// Fills the guest slots of a component, in `guests` [size, num_slots], and ends with a barrier. Whether there
// are guests; then `filled` has the tokens of all places [size, num_places]. `target`: the level that is good
// enough. `level`: that of the residents alone, rounded up. `shared`: num_bytes for each warp.
template <typename V, bool general>
__device__ bool fill_slots(const Guests& g, const Start<V>& start, const Speeds<V, general>& speeds, char* shared,
                           int num_bytes, int target, int level, short* guests, int* filled) {
    static_assert(V::threads == 32 * FILLS, "each warp makes a fill");
    __shared__ unsigned bucket_of[NUM_ROUNDS][FILLS], rest_of[NUM_ROUNDS][FILLS];
    __shared__ int top_of[NUM_ROUNDS][FILLS], limit_of[NUM_ROUNDS][FILLS];
    __shared__ unsigned fewest;
    if (threadIdx.x == 0) fewest = 0;
    __syncthreads();  // `fewest` is there before any fill ends
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, G = start.num_slots;
    Fill<V> fill(shared + warp * num_bytes, start.num_experts, start.num_places);
    Rule rule(RULES[warp]);
    unsigned best_bucket = ~0u, best_rest = ~0u;
    int low = target, high = 0, width = max(1, target >> CLOSE), steps = start.ranks * (8 + G);
    #pragma unroll 1
    for (int round = 0; round < NUM_ROUNDS; ++round) {
        int at = round == 0 ? target : low + (high - low + NUM_TARGETS - 1) / NUM_TARGETS * (warp % NUM_TARGETS), limit[V::words];
        #pragma unroll
        for (int i = 0; i < V::words; ++i) limit[i] = speeds.limit(at, i);
        begin_fill(start, fill, rule, round * FILLS + warp, limit);
        int least = g.min_tokens;
        bool is_whole = start.num_places <= 32   ? make_fill<V, 1>(start, fill, rule, least, steps, &fewest)
                        : start.num_places <= 64 ? make_fill<V, 2>(start, fill, rule, least, steps, &fewest)
                                                 : make_fill<V, MAX_PLACES / 32>(start, fill, rule, least, steps,
                                                                                 &fewest);
        if (is_whole) {
            int top = 0;
            bool over = false, over_target = false;
            #pragma unroll
            for (int i = 0; i < V::words; ++i) {
                int load = limit[i] - fill.slack[i];
                if (lane + 32 * i >= start.ranks) continue;
                top = max(top, speeds.level(load, i));
                over |= -fill.slack[i] >= least;
                over_target |= load - speeds.limit(target, i) >= least;
            }
            top = __reduce_max_sync(~0u, top);
            over = __any_sync(~0u, over);
            over_target = __any_sync(~0u, over_target);
            if (lane == 0 && !over_target) atomicMax(&fewest, ~unsigned(fill.copies));
            int sent = most_sent(start, fill);
            if (lane == 0) {
                bucket_of[round][warp] = over_target ? unsigned(top - target + width - 1) / unsigned(width) : 0;
                rest_of[round][warp] =
                    unsigned(fill.copies) << 20 | unsigned(sent) << 8 | unsigned(round * FILLS + warp);
                top_of[round][warp] = top;
                limit_of[round][warp] = over ? ~at : at;
            }
        } else if (lane == 0) {
            bucket_of[round][warp] = ~0u;
            rest_of[round][warp] = ~0u;
            top_of[round][warp] = 0;
            limit_of[round][warp] = ~at;
        }
        __syncthreads();  // all fills of the round are judged before the best is looked for
        bool is_fill = lane < FILLS;
        unsigned bucket = is_fill ? bucket_of[round][lane] : ~0u, rest = is_fill ? rest_of[round][lane] : ~0u;
        unsigned least_bucket = __reduce_min_sync(~0u, bucket);
        unsigned least_rest = __reduce_min_sync(~0u, bucket == least_bucket ? rest : ~0u);
        if (least_bucket < best_bucket || (least_bucket == best_bucket && least_rest < best_rest)) {
            best_bucket = least_bucket;
            best_rest = least_rest;
            int winner = int(least_rest & 0xff) - round * FILLS;
            high = top_of[round][winner];
            for (int i = lane; winner == warp && i < start.ranks * G; i += 32)
                guests[i] = fill.expert[i / G * start.num_places + start.num_places - G + i % G];
            for (int i = lane; winner == warp && i < start.ranks * start.num_places; i += 32)
                filled[i] = fill.tokens[i];
        }
        if (best_bucket == 0) break;
        __syncwarp();  // the guests are taken from the fill before the next begins in its place
        // The next limits lie between one that was too low for all fills, and one that sufficed.
        int tried = is_fill ? limit_of[round][lane] : ~0, is_over = tried < 0;
        if (is_over) tried = ~tried;
        unsigned sufficed = min(unsigned(high), __reduce_min_sync(~0u, is_over ? ~0u : unsigned(tried)));
        unsigned too_low = __reduce_max_sync(~0u, unsigned(tried) < sufficed ? unsigned(tried) : 0u);
        if (round > 0) low = max(low, int(too_low));
    }
    bool found = best_rest >> 20 != 0 && high <= level - g.min_tokens;
    if (!found) {
        __syncthreads();  // the last guests are written before they are taken back
        for (int i = threadIdx.x; i < V::size * G; i += V::threads) guests[i] = -1;
    }
    __syncthreads();  // all guests are there, and no fill is needed any more
    return found;
}

// Chooses the guests of a component, as `fill_slots` does; `total` is its load. Where it has replicas, `c.load()` is
// that of the best plan over the residents.
template <typename V, bool general>
__device__ bool choose(const Problem& p, const Guests& g, const typename V::Set* holders, const int* load,
                       const Component<V>& c, char* shared, int total, int in_place, short* guests, int* filled) {
    Speeds<V, general> speeds(p, c.ranks, c.shape.ranks);
    int mean = highest_mean(p, speeds, total, c.shape.ranks, shared), lane = threadIdx.x % 32;
    int target = int(min(mean + (long long)mean * g.tolerance / GUEST_PARTS, (long long)MAX_TOTAL));
    Start<V> start = make_start<V>(p, g, holders, load, c.ranks, c.shape.ranks, in_place, shared);
    int level = 0;
    #pragma unroll
    for (int i = 0; i < V::words; ++i) {
        int rank = lane + 32 * i;
        if (rank >= c.shape.ranks) continue;
        level = max(level, speeds.level(g.max_replicas > 0 ? c.load()[rank] : start.load[rank], i));
    }
    level = __reduce_max_sync(~0u, level);
    if (level <= target) return false;
    int num_places = V::size * start.num_places, set = sizeof(typename V::Set);
    int of_start = (6 * num_places + 4 * V::size + 7) / 8 * 8;
    int of_fill = (set * start.num_experts + 6 * num_places + 4 * V::size + 7) / 8 * 8;
    return fill_slots<V, general>(g, start, speeds, shared + of_start, of_fill, target, level, guests, filled);
}

}  // namespace lplb
