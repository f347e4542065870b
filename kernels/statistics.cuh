// What a planner's batches come to: sums that the kernels keep, and loads of some batches.
#pragma once

#include "counts.cuh"

namespace lplb {

static_assert(NUM_TOTALS < 32, "a lane has each of the totals, and one the window");

// This lane's word of the totals, or the window; to be read early, since `tally` writes it.
__device__ long long word_of_totals(const Statistics& statistics) {
    int lane = threadIdx.x % 32;
    return lane <= NUM_TOTALS ? statistics.totals[lane] : 0;
}

// How many batches the totals have, by a whole warp.
__device__ unsigned num_batches(long long word) {
    unsigned lane = threadIdx.x % 32;
    return __reduce_add_sync(~0u, lane >= NUM_TALLIES && lane < NUM_TOTALS ? unsigned(word) : 0u);
}

// Where the loads [E] of the batch go, if it is sampled; else null. By whole warps, of a batch whose counts
// are known; `thread` is 0 of one of them. What a backward pass plans again is no further batch: layers that are
// recomputed and others have the same batches sampled. Batches without an exchange have no counts.
__device__ int* sample_of(const Statistics& statistics, const Batch& batch, int num_experts, long long word,
                          int thread) {
    if (statistics.num_samples == 0 || batch.again) return nullptr;
    unsigned lane = threadIdx.x % 32;
    bool is_other = lane == TALLY_RECOMPUTED || lane == NUM_TALLIES + REUSED;
    unsigned before = num_batches(word) - __reduce_add_sync(~0u, is_other ? unsigned(word) : 0u);
    if (before % statistics.every != 0) return nullptr;
    unsigned place = before / statistics.every % statistics.num_samples;
    if (thread == 0) statistics.sampled[place] = int(before);
    return statistics.samples + size_t(place) * num_experts;
}

// Adds up what each rank would have to do, had every token gone home: to `at_home` [R] in shared memory, all 0
// before. By the threads from 0 up to `num_threads`. A rank's counts lie `stride` from the next one's.
__device__ void add_at_home(const Table& table, const int* counts, int stride, int* sample, int* at_home,
                            int thread, int num_threads) {
    int E = table.num_experts, R = table.num_ranks;
    // Several threads share the rows of an expert, unless its load is asked for.
    int parts = sample != nullptr ? 1 : max(1, min(num_threads / E, R / 16));
    for (int i = thread; i < E * parts; i += num_threads) {
        int part = i / E, e = i - part * E, load = 0;
        each<16>(counts + part * stride + e, part, R, parts, stride, [&](int number) { load += number; });
        atomicAdd(&at_home[table.home_rank[e]], load);
        if (sample != nullptr) sample[e] = load;
    }
}

// Adds a batch to the totals, by one warp: the CPU's `add_batch` is the definition. `at_home` is whole where the
// counts are known, `word` this lane's word of the totals.
__device__ void tally(const Statistics& statistics, const Table& table, const Batch& batch, int status,
                      const int* at_home, long long word) {
    int R = table.num_ranks, rank = batch.rank, lane = threadIdx.x % 32, total_speed = 0;
    bool is_counted = status < BAD_COUNTS, is_planned = status == OPTIMAL;
    for (int r = lane; statistics.speed != nullptr && r < R; r += 32) total_speed += statistics.speed[r];
    total_speed = __reduce_add_sync(~0u, total_speed);
    int rows = 0, stays = 0, home = 0, got = 0, guests = 0, sent = 0, received = 0;
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
        if (is_planned) got = max(got, at_mean_speed(batch.rank_load[r] + base));
    }
    #pragma unroll 4
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
    got = __reduce_max_sync(~0u, is_planned ? got : home);
    guests = __reduce_add_sync(~0u, guests);
    sent = __reduce_add_sync(~0u, sent);
    received = __reduce_add_sync(~0u, received);

    // What another lane has. NVRTC 13.5 crashes on a shuffle here for sm_80.
    auto of_lane = [&](int other) { return __reduce_max_sync(~0u, lane == other ? int(word) : 0); };
    int window = of_lane(NUM_TOTALS);
    bool begins = of_lane(TALLY_WINDOW) != window;
    if (begins && lane >= TALLY_WORST_HOME && lane < TALLY_WINDOW) word = 0;
    // Whether a quotient is larger than the window's before, of two words.
    auto is_worse = [&](long long largest, int first_word) {
        long long before = of_lane(first_word), load_before = of_lane(first_word + 1);
        return load > 0 && (load_before == 0 || largest * load_before > before * load);
    };
    bool worse_home = is_worse(home, TALLY_WORST_HOME), worse = is_worse(got, TALLY_WORST);
    switch (lane) {
        case TALLY_ROWS: word += rows; break;
        case TALLY_LOAD: word += load; break;
        case TALLY_HOME: word += home; break;
        case TALLY_GOT: word += got; break;
        case TALLY_BOUND: word += is_planned && statistics.by_tokens ? got : 0; break;
        case TALLY_BOUND_LOAD: word += is_planned && statistics.by_tokens ? load : 0; break;
        case TALLY_OWN_HOME: word += is_counted ? at_home[rank] : 0; break;
        case TALLY_OWN:
            word += !is_counted ? 0 : is_planned ? batch.rank_load[rank] : at_home[rank];
            break;
        case TALLY_GUESTS: word += guests; break;
        case TALLY_SENT: word += sent; break;
        case TALLY_RECEIVED: word += received; break;
        case TALLY_RECOMPUTED: word += batch.again; break;
        case TALLY_WORST_HOME: word = worse_home ? home : word; break;
        case TALLY_WORST_HOME_LOAD: word = worse_home ? load : word; break;
        case TALLY_WORST: word = worse ? got : word; break;
        case TALLY_WORST_LOAD: word = worse ? load : word; break;
        case TALLY_WINDOW: word = window; break;
        default: word += lane == NUM_TALLIES + status;
    }
    bool marks = statistics.mark_every != 0 && num_batches(word) % statistics.mark_every == 0;
    if (lane < NUM_TOTALS) {
        statistics.totals[lane] = word;
        if (marks) statistics.totals[NUM_TOTALS + 1 + lane] = word;
    }
}

}  // namespace lplb
