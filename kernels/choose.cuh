// Choosing the guests of a domain: `choose_guests` of planning/guests.py is the definition, bit for bit.
//
// A portfolio of greedy fills, one to a warp. All begin from the even split over the residents. The best of them is
// kept. Where none comes down to its limit, rounds with higher ones follow.
#pragma once

#include "fill.cuh"

namespace lplb {

constexpr int FILLS = sizeof(RULES) / sizeof(RULES[0]);  // one to a warp

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
