// Choosing the guests of a domain: `choose_guests` of planning/guests.py is the definition, bit for bit.
//
// Several greedy fills, one for each warp, are shared between the blocks of a cluster. All begin from the even split
// over the residents. The best of them is kept. Where no fill reaches its limit, rounds with higher limits follow.
#pragma once

#include "fill.cuh"
#include "ptx.cuh"

namespace lplb {

// The verdicts that the blocks of a component exchange. Each block has a copy in shared memory, and all copies agree.
struct Verdicts {
    int4 of_fill[NUM_ROUNDS][FILLS];  // packed `Verdict`s
    int level;                        // of the residents alone
    unsigned fewest;                  // ~the fewest guests of a fill that reached the target, or 0; ~0: none are wanted
    Word arrived[NUM_ROUNDS], best;   // barriers for the words of each round; and for the best fill
};

// The quality of a fill. Verdicts are compared field by field in this order, and smaller is better.
struct Verdict {
    unsigned bucket;  // 0: it reaches the target, else the distance from it; ~0: the fill was stopped early
    unsigned rest;    // number of guests, the most of one home, and the fill's number in all rounds
    int top;          // its largest level
    int limit;        // the limit of the fill; its complement if the fill did not reach it

    __device__ int4 packed() const { return {int(bucket), int(rest), top, limit}; }
};

// Initialises the verdicts, and signals the other blocks. Threads wait for these signals (`cluster_wait`) before they
// send. `fewest` is a hint: if one is lost, only time is lost. So no barrier orders its initialisation.
template <typename V>
__device__ void begin_verdicts(Verdicts& verdicts) {
    if (threadIdx.x == V::threads - 1) verdicts.fewest = 0;
    if (V::blocks == 1) return;
    if (threadIdx.x == V::threads - 1) {  // whose warp has least to do
        for (Word& word : verdicts.arrived) arrivals_init(&word);
        arrivals_init(&verdicts.best);
        arrivals_are_ready_for_cluster();
        // For each fill, a verdict and the fewest guests so far arrive; from the first block also the level, likewise.
        for (int round = 0; round < NUM_ROUNDS; ++round)
            arrivals_expect(&verdicts.arrived[round],
                            FILLS * int(sizeof(int4) + sizeof(int)) + (round == 0 ? 2 * int(sizeof(int)) : 0));
    }
    __syncwarp();  // an aligned arrival wants the whole warp, behind the initialisation
    cluster_arrive();
}

// Sends one word or four to all blocks, by a lane for each, and raises `fewest`. Both count as verdicts of a round.
template <typename V, typename T>
__device__ void tell(Verdicts& verdicts, int round, T* to, T value, unsigned fewest) {
    int block = threadIdx.x % 32;
    if (block >= V::blocks) return;
    if (V::blocks == 1) {
        *to = value;
        atomicMax(&verdicts.fewest, fewest);
    } else {
        send(block, to, value, &verdicts.arrived[round]);
        send_at_least(block, &verdicts.fewest, fewest, &verdicts.arrived[round]);
    }
}

// Waits until the verdicts of a round have arrived.
template <typename V>
__device__ void hear(Verdicts& verdicts, int round) {
    if (V::blocks == 1) __syncthreads();  // all fills of the round are judged before the best is looked for
    else arrivals_wait(&verdicts.arrived[round], 0);
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

// The expert whose resident is in a place of a rank. -1: none, or a guest slot.
template <typename V>
__device__ int resident_in(const Guests& g, int rank, int place) {
    int residents = g.num_local_slots - g.num_slots;
    if (rank >= V::size || place >= residents) return -1;
    return g.places[(component<V>() * V::size + rank) * residents + place];
}

// Calls `take` for each place of a component's ranks, by the threads in turn. `take` gets the place's number, its rank,
// its number on the rank, and the expert whose resident it has. `own_rank`, `own_resident`: of the thread's first
// place, loaded earlier.
template <typename V, typename Take>
__device__ void each_place(const Guests& g, int num_ranks, int own_rank, int own_resident, Take take) {
    int S = g.num_local_slots, i = threadIdx.x;
    if (i < num_ranks * S) take(i, own_rank, i - own_rank * S, own_resident);
    #pragma unroll 1
    for (i += V::threads; i < num_ranks * S; i += V::threads)
        take(i, i / S, i % S, resident_in<V>(g, i / S, i % S));
}

// Makes the start of all fills: each expert's tokens are split evenly over its residents. `start.load` has the base
// loads. By all threads, with a barrier at the end.
template <typename V>
__device__ void split_over_residents(const Guests& g, const Start<V>& start, const int* load, int own_rank,
                                     int own_resident) {
    each_place<V>(g, start.ranks, own_rank, own_resident, [&](int i, int rank, int, int expert) {
        int own = 0, shared = 0;
        if (expert >= 0) {
            typename V::Set holders = start.holders[expert];
            int number = number_of<V>(holders);
            own = load[expert];
            if (number > 1) {
                own = own / number + (number_of<V>(holders & below<V>(rank)) < own % number);
                shared = SHARED;
            }
            atomicAdd(&start.load[rank], own);
        }
        start.places[i] = {own, expert < 0 ? -1 : expert | shared};
    });
    __syncthreads();  // all places and loads are written before fills read them
}

// The highest mean level of all domains, rounded up. `own`: the total load of this domain.
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
        if (!general) return int((unsigned(own) + unsigned(sum) - 1) / unsigned(sum));  // a long division takes long
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
    #pragma unroll 1
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

// Sends a word of the best fill to the first block.
template <typename V>
__device__ void tell_best(Verdicts& verdicts, int* to, int value) {
    if (V::blocks == 1) *to = value;
    else send(0, to, value, &verdicts.best);
}

// Passes the guests of a finished fill to `take_guest`, and the tokens of all places to `take_tokens`, by its warp.
template <typename V, typename TakeGuest, typename TakeTokens>
__device__ void take_guests(const Start<V>& start, const Fill<V>& fill, TakeGuest take_guest, TakeTokens take_tokens) {
    int lane = threadIdx.x % 32, S = start.num_places, G = start.num_slots;
    for (int rank = lane; rank < start.ranks; rank += 32)
        for (int slot = 0; slot < G; ++slot) {
            int expert = fill.places[rank * S + S - G + slot].expert;
            take_guest(rank * G + slot, expert < 0 ? -1 : expert & ~SHARED);
        }
    for (int i = lane; i < start.ranks * S; i += 32) take_tokens(i, fill.places[i].tokens);
}

// Fills the guest slots of a component, by all its blocks. Returns whether there are guests. Then the first block has
// them in `guests` [size, num_slots], and in `filled` the tokens of all places [size, num_places]. `target`: the level
// that suffices. `level`: the level of the residents alone, rounded up, known to the first block only. `fills`: whether
// this block makes fills; all but the first do. `shared`: num_bytes for each fill.
template <typename V, bool general>
__device__ bool fill_slots(const Guests& g, const Start<V>& start, const Speeds<V, general>& speeds, char* shared,
                           int num_bytes, Verdicts& verdicts, bool fills, int target, int level, int* guests,
                           int* filled) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, G = start.num_slots, block = block_of_component<V>();
    // Blocks take fills in turn. The first block has none where it solves the residents' flow at the same time.
    int first = V::blocks > 1 && g.max_replicas > 0, step = V::blocks - first, own = warp * step + block - first;
    if (block == 0 && warp == 0) tell<V>(verdicts, 0, &verdicts.level, level, level <= target ? ~0u : 0u);
    if (V::blocks > 1 && block == 0 && level <= target) return false;  // words still come, which are heard in the end
    fills &= own < FILLS;
    Fill<V> fill(shared + warp * num_bytes, start.num_experts, start.num_places);
    Rule rule(rule_of(fills ? own : 0));
    unsigned best_bucket = ~0u, best_rest = ~0u;
    int low = target, high = 0, width = max(1, target >> CLOSE), steps = start.ranks * (8 + G), best = 0;
    bool is_better = false;
    #pragma unroll 1
    for (int round = 0; round < NUM_ROUNDS; ++round) {
        if (fills) {
            int at = target, limit[V::words], least = g.min_tokens;
            if (round > 0) at = low + (high - low + NUM_TARGETS - 1) / NUM_TARGETS * (own % NUM_TARGETS);
            #pragma unroll
            for (int i = 0; i < V::words; ++i) limit[i] = speeds.limit(at, i);
            begin_fill(start, fill, rule, round * FILLS + own, limit);
            unsigned* fewest = &verdicts.fewest;
            bool is_whole = start.num_places <= 32   ? make_fill<V, 1>(start, fill, rule, least, steps, fewest)
                            : start.num_places <= 64 ? make_fill<V, 2>(start, fill, rule, least, steps, fewest)
                                                     : make_fill<V, MAX_PLACES / 32>(start, fill, rule, least, steps,
                                                                                     fewest);
            Verdict verdict{~0u, ~0u, 0, ~at};
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
                verdict.top = top = __reduce_max_sync(~0u, top);
                if (!__any_sync(~0u, over)) verdict.limit = at;
                verdict.bucket = __any_sync(~0u, over_target) ? unsigned(top - target + width - 1) / unsigned(width) : 0;
                verdict.rest = unsigned(fill.copies) << 20 | unsigned(most_sent(start, fill)) << 8 |
                               unsigned(round * FILLS + own);
            }
            tell<V>(verdicts, round, &verdicts.of_fill[round][own], verdict.packed(),
                    verdict.bucket == 0 ? ~unsigned(fill.copies) : 0u);
        }
        hear<V>(verdicts, round);
        if (verdicts.level <= target) return false;
        int4 packed = verdicts.of_fill[round][lane % FILLS];
        Verdict its{unsigned(packed.x), unsigned(packed.y), packed.z, packed.w};
        unsigned least_bucket = __reduce_min_sync(~0u, its.bucket);
        unsigned least_rest = __reduce_min_sync(~0u, its.bucket == least_bucket ? its.rest : ~0u);
        is_better = least_bucket < best_bucket || (least_bucket == best_bucket && least_rest < best_rest);
        if (is_better) {
            best_bucket = least_bucket;
            best_rest = least_rest;
            best = int(least_rest & 0xff) - round * FILLS;
            high = verdicts.of_fill[round][best].z;
        }
        if (best_bucket == 0 || round == NUM_ROUNDS - 1) break;
        if (is_better && fills && best == own)  // the next fill overwrites it
            take_guests(start, fill, [&](int i, int expert) { guests[i] = expert; },
                        [&](int i, int tokens) { filled[i] = tokens; });
        __syncthreads();  // the guests are copied before another fill overwrites them
        // The next limits lie between one that was too low for all fills and one that sufficed.
        bool is_over = its.limit < 0;
        unsigned tried = is_over ? ~its.limit : its.limit;
        unsigned sufficed = min(unsigned(high), __reduce_min_sync(~0u, is_over ? ~0u : tried));
        unsigned too_low = __reduce_max_sync(~0u, tried < sufficed ? tried : 0u);
        if (round > 0) low = max(low, int(too_low));
    }
    if (best_rest >> 20 == 0 || high > verdicts.level - g.min_tokens) return false;
    if (fills && best == own) {  // this warp has the best fill: of the last round, or kept from an earlier one
        auto put_guest = [&](int i, int expert) { tell_best<V>(verdicts, &guests[i], expert); };
        auto put_tokens = [&](int i, int tokens) { tell_best<V>(verdicts, &filled[i], tokens); };
        if (is_better) {
            take_guests(start, fill, put_guest, put_tokens);
        } else {
            for (int i = lane; i < start.ranks * G; i += 32) put_guest(i, guests[i]);
            for (int i = lane; i < start.ranks * start.num_places; i += 32) put_tokens(i, filled[i]);
        }
    }
    if (V::blocks == 1) __syncthreads();  // the best fill is written before any thread reads it
    else if (block == 0) arrivals_wait(&verdicts.best, 0);
    return true;
}

}  // namespace lplb
