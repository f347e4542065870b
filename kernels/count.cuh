// The experts of a rank's picks, the number of picks of each, and the head of a row of counts.
#pragma once

#include "number.cuh"

namespace lplb {

static_assert(HEAD == 5 && HEAD_BATCH == 4, "what a row begins with, behind its status, is an int4");

// Ids as callers have them, of 4 or 8 bytes.
struct Ids {
    void* at;
    bool wide;

    __device__ long long operator[](int n) const {
        return wide ? static_cast<const long long*>(at)[n] : static_cast<const int*>(at)[n];
    }
    __device__ void set(int n, int id) const {
        if (wide) static_cast<long long*>(at)[n] = id;
        else static_cast<int*>(at)[n] = id;
    }
};

// The logical expert of an id as callers give it; -1: none. `wrong`: the id is neither -1 nor an expert's.
__device__ int expert_of(long long id, const int* __restrict__ logical, int num_ids, bool& wrong) {
    int expert = id < 0 || id >= num_ids ? -1 : logical == nullptr ? int(id) : logical[id];
    wrong |= expert < 0 && id != -1;
    return expert;
}

// The input of a caller: a rank's picks by their ids.
struct Given {
    Ids ids;             // [num_picks] in [0, num_ids), -1: none
    const int* logical;  // [num_ids] the expert of each id, -1: none; or null, ids are experts
    int num_ids;
    int num_topk;        // picks of a token, of which no two may be of one expert; or 0

    // Loads a thread's ids from the pick `n` on, with all loads in flight at once.
    template <int threads, int at_once>
    __device__ void load(int n, int end, long long (&several)[at_once]) const {
        #pragma unroll
        for (int j = 0; j < at_once; ++j) several[j] = n + j * threads < end ? ids[n + j * threads] : -1;
    }
};

// Counts the picks of a chunk in `histogram`, by all threads of a block. `several`: the thread's first ids.
// Returns whether it saw one that is refused.
template <int threads, int at_once>
__device__ bool count_picks(const Given& given, const Picks& picks, int chunk, int* histogram,
                            volatile int* error_flags, long long (&several)[at_once]) {
    bool wrong = false, repeated = false;
    int end = first_pick(picks, chunk + 1);
    for (int begin = first_pick(picks, chunk) + threadIdx.x; begin < end; begin += threads * at_once) {
        #pragma unroll
        for (int j = 0; j < at_once; ++j) {
            int n = begin + j * threads;
            if (n >= end) break;
            int expert = expert_of(several[j], given.logical, given.num_ids, wrong);
            picks.experts[n] = short(expert);
            if (expert < 0) continue;
            atomicAdd(&histogram[expert], 1);
            if (given.num_topk == 0) continue;
            bool ignored;  // the thread that has the other pick reports whether it is wrong
            #pragma unroll 1
            for (int later = given.num_topk - 1 - n % given.num_topk; later > 0; --later)
                repeated |= expert_of(given.ids[n + later], given.logical, given.num_ids, ignored) == expert;
        }
        given.load<threads>(begin + threads * at_once, end, several);
    }
    if (wrong) error_flags[FLAG_OUT_OF_RANGE] = 1;
    if (repeated) error_flags[FLAG_REPEATED_PICK] = 1;
    return wrong || repeated;
}

// Counts the picks of a chunk in `numbers`, by the rank whose slot each names, by all threads of a block. `num_local`:
// slots of a rank.
template <int threads>
__device__ void count_by_rank(const Given& given, const Picks& picks, int chunk, int num_local, int* numbers) {
    int end = first_pick(picks, chunk + 1);
    #pragma unroll 1
    for (int n = first_pick(picks, chunk) + threadIdx.x; n < end; n += threads) {
        long long id = given.ids[n];
        if (id >= 0 && id < given.num_ids) atomicAdd(&numbers[int(id) / num_local], 1);
    }
}

// Writes the head of a row, by one thread, and raises the number of the batch. The GPU does it, so that replays of a
// graph do it, too. `words`: the value of `head`.
__device__ void begin_row(int4* head, int4 words, int* row, int status) {
    head->w = words.w = (words.w + 1) & MAX_TOTAL;
    atomicMax(&row[HEAD_STATUS], status);
    row[HEAD_PLACEMENT] = words.x;
    row[HEAD_SLOT] = words.y;
    row[HEAD_PLANNER] = words.z;
    row[HEAD_BATCH] = words.w;
}

}  // namespace lplb
