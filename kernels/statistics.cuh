// Statistics of a planner's batches: sums that the kernels keep, and the loads of sampled batches.
#pragma once

#include "counts.cuh"

namespace lplb {

static_assert(NUM_TOTALS < 32, "a lane has each of the totals, and one the window");

// This lane's word of the totals, or the window. It is read before `tally` overwrites it.
__device__ long long word_of_totals(const Statistics& statistics) {
    int lane = threadIdx.x % 32;
    return lane <= NUM_TOTALS ? statistics.totals[lane] : 0;
}

// The number of batches in the totals, by a whole warp.
__device__ unsigned num_batches(long long word) {
    unsigned lane = threadIdx.x % 32;
    return __reduce_add_sync(~0u, lane >= NUM_TALLIES && lane < NUM_TOTALS ? unsigned(word) : 0u);
}

// Keeps the loads [E] of a batch whose counts are known, if it is to be sampled. By whole warps, of which one has thread
// 0. A batch that a backward pass plans again does not count: so layers with and without recompute sample the same
// batches. Batches without an exchange have no counts. A rank's counts lie `stride` from the next one's.
__device__ void keep_sample(const Statistics& statistics, const Table& table, const Batch& batch, const int* counts,
                            int stride, long long word, int thread, int num_threads) {
    if (statistics.num_samples == 0 || batch.again) return;
    unsigned lane = threadIdx.x % 32;
    bool is_other = lane == TALLY_RECOMPUTED || lane == NUM_TALLIES + REUSED;
    unsigned before = num_batches(word) - __reduce_add_sync(~0u, is_other ? unsigned(word) : 0u);
    if (before % statistics.every != 0) return;
    unsigned place = before / statistics.every % statistics.num_samples;
    if (thread == 0) statistics.sampled[place] = int(before);
    #pragma unroll 1
    for (int e = thread; e < table.num_experts; e += num_threads) {
        int load = 0;
        each<16>(counts + e, 0, table.num_ranks, 1, stride, [&](int number) { load += number; });
        statistics.samples[size_t(place) * table.num_experts + e] = load;
    }
}

// Adds up the tokens that each rank would have with every token at home, in `at_home` [R] in shared memory, all 0
// before. By the threads from 0 up to `num_threads`, of which several share the rows of an expert.
__device__ void add_at_home(const Table& table, const int* counts, int stride, int* at_home, int thread,
                            int num_threads) {
    int E = table.num_experts, R = table.num_ranks, parts = max(1, min(num_threads / E, R / 16));
    #pragma unroll 1
    for (int i = thread; i < E * parts; i += num_threads) {
        int part = i / E, e = i - part * E, load = 0, home = table.home_rank[e];
        each<16>(counts + part * stride + e, part, R, parts, stride, [&](int number) { load += number; });
        atomicAdd(&at_home[home], load);
    }
}

// Adds a batch to the totals, by one warp: the CPU's `add_batch` is the definition. `at_home` is valid where the
// counts are known. `word` is this lane's word of the totals. `keeps`: the batch keeps its slots, and has rank loads.
__device__ void tally(const Statistics& statistics, const Table& table, const Batch& batch, int status,
                      bool keeps, const int* at_home, long long word) {
    int R = table.num_ranks, rank = batch.rank, lane = threadIdx.x % 32, total_speed = 0;
    bool is_counted = status < BAD_COUNTS, is_planned = status == OPTIMAL, is_away = is_planned || keeps;
    #pragma unroll 1
    for (int r = lane; statistics.speed != nullptr && r < R; r += 32) total_speed += statistics.speed[r];
    total_speed = __reduce_add_sync(~0u, total_speed);
    int rows = 0, stays = 0, home = 0, got = 0, guests = 0, sent = 0, received = 0;
    #pragma unroll 1
    for (int r = lane; is_counted && r < R; r += 32) {
        int base = statistics.base == nullptr ? 0 : statistics.base[r];
        auto at_mean_speed = [&](long long load) {
            if (statistics.speed == nullptr) return int(load);
            long long speed = (long long)statistics.speed[r] * R;
            return int(min((load * total_speed + speed - 1) / speed, (long long)MAX_TOTAL));
        };
        rows += at_home[r];
        stays += base;
        home = max(home, at_mean_speed(at_home[r] + base));
        if (is_away) got = max(got, at_mean_speed(batch.rank_load[r] + base));
    }
    #pragma unroll 1
    for (int i = lane; is_planned && i < batch.num_guests; i += 32) {
        int expert = batch.guests[i];
        if (expert < 0) continue;
        ++guests;
        sent += table.home_rank[expert] == rank;
        received += i / (batch.num_guests / R) == rank;
    }
    rows = __reduce_add_sync(~0u, rows);
    int load = rows + __reduce_add_sync(~0u, stays);
    home = __reduce_max_sync(~0u, home);
    got = __reduce_max_sync(~0u, is_away ? got : home);
    guests = __reduce_add_sync(~0u, guests);
    sent = __reduce_add_sync(~0u, sent);
    received = __reduce_add_sync(~0u, received);

    // The word of another lane. NVRTC 13.5 crashes on a shuffle here for sm_80.
    auto of_lane = [&](int other) { return __reduce_max_sync(~0u, lane == other ? int(word) : 0); };
    int window = of_lane(NUM_TOTALS);
    bool begins = of_lane(TALLY_WINDOW) != window;
    if (begins && lane >= TALLY_WORST_HOME && lane < TALLY_WINDOW) word = 0;
    // Whether the imbalance largest / load is larger than the window's so far, which is in two words.
    auto is_worse = [&](long long largest, int first_word) {
        long long before = of_lane(first_word), load_before = of_lane(first_word + 1);
        return load > 0 && (load_before == 0 || largest * load_before > before * load);
    };
    bool worse_home = is_worse(home, TALLY_WORST_HOME), worse = is_worse(got, TALLY_WORST);
    int added = lane == NUM_TALLIES + status;
    auto add = [&](int place, int value) { added |= lane == place ? value : 0; };  // no jump by lanes
    add(TALLY_ROWS, rows);
    add(TALLY_LOAD, load);
    add(TALLY_HOME, home);
    add(TALLY_GOT, got);
    add(TALLY_BOUND, is_planned && statistics.by_tokens ? got : 0);
    add(TALLY_BOUND_LOAD, is_planned && statistics.by_tokens ? load : 0);
    add(TALLY_OWN_HOME, is_counted ? at_home[rank] : 0);
    add(TALLY_OWN, !is_counted ? 0 : is_away ? batch.rank_load[rank] : at_home[rank]);
    add(TALLY_GUESTS, guests);
    add(TALLY_SENT, sent);
    add(TALLY_RECEIVED, received);
    add(TALLY_RECOMPUTED, batch.again);
    word += added;
    auto set = [&](int place, int value) { word = lane == place ? value : word; };
    if (worse_home) {
        set(TALLY_WORST_HOME, home);
        set(TALLY_WORST_HOME_LOAD, load);
    }
    if (worse) {
        set(TALLY_WORST, got);
        set(TALLY_WORST_LOAD, load);
    }
    set(TALLY_WINDOW, window);
    bool marks = statistics.mark_every != 0 && num_batches(word) % statistics.mark_every == 0;
    if (lane < NUM_TOTALS) {
        statistics.totals[lane] = word;
        if (marks) statistics.totals[NUM_TOTALS + 1 + lane] = word;
    }
}

}  // namespace lplb
