// Rows of counts between ranks that write each other's memory. A word is an integer of a row beside
// the number of its batch, 8 bytes that are written at once, so each word says itself that it has
// come: no flags, no fences (NCCL's protocol "LL" does so). Windows are for even and odd batches by
// turns: a rank sends batch n + 2 when it has every row of n + 1, which each sender sent when it had
// read those of n.
#pragma once

#include "plan.cuh"

typedef unsigned long long Word;

struct Window {
    Word* const* of;        // [R] each rank's, [2, R, HEAD + E] words; null: rows travel by other means
    int* num_done;          // blocks of `count` that have counted, zeroed
    int* rows;              // [R, HEAD + E] what was received
    volatile int* missing;  // [R] in the host's memory: ranks whose row did not come in time
    long long limit_ns;
    int num_ranks, rank;
    int waits_before, waits;  // for the rows of the batch before, and of this one

    __device__ size_t at(int batch, int source, int size) const {
        return (size_t(batch & 1) * num_ranks + source) * size;
    }
};

__device__ long long nanoseconds() {
    long long time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

// Waits for the rows of all ranks, but no longer than the limit; with one block.
__device__ void receive(const Window& window, int batch, int size) {
    constexpr int AT_ONCE = 4, LATE = -1;  // which no word of a row is
    const Word* words = window.of[window.rank] + window.at(batch, 0, size);
    int number = window.num_ranks * size;
    long long start = nanoseconds();
    bool late = false, any_late = false;
    #pragma unroll 1
    for (int begin = threadIdx.x; begin < number; begin += AT_ONCE * THREADS) {
        Word word[AT_ONCE];
        auto load = [&](int j) {
            asm volatile("ld.relaxed.sys.global.u64 %0, [%1];"
                         : "=l"(word[j]) : "l"(words + begin + j * THREADS) : "memory");
        };
        #pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
            if (begin + j * THREADS < number) load(j);
        #pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            if (begin + j * THREADS >= number) break;
            while (int(word[j] >> 32) != batch && !late) {
                late = nanoseconds() - start > window.limit_ns;
                load(j);
            }
            bool came = int(word[j] >> 32) == batch;
            any_late |= !came;
            window.rows[begin + j * THREADS] = came ? int(word[j]) : LATE;
        }
    }
    if (!__syncthreads_or(any_late)) return;
    for (int i = threadIdx.x; i < number; i += THREADS)
        if (window.rows[i] == LATE) {
            int source = i / size;
            if (i % size != 0) window.rows[i] = 0;
            window.rows[source * size] = TIMED_OUT;
            window.missing[source] = 1;
        }
}

// Sends this rank's row to every rank and waits for theirs, by the last block that calls it; leaves
// the row zeroed. `shared`: [HEAD + E].
__device__ void exchange(const Window& window, int* row, int size, int* shared) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(window.num_done, 1) == int(gridDim.x) - 1;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int i = threadIdx.x; i < size; i += THREADS) {
        shared[i] = __ldcg(row + i);
        row[i] = 0;
    }
    if (threadIdx.x == 0) *window.num_done = 0;
    __syncthreads();
    int batch = shared[HEAD - 1];
    if (window.waits_before) receive(window, (batch - 1) & MAX_TOTAL, size);
    __syncthreads();  // what all threads have read may be overwritten now
    for (int i = threadIdx.x; i < window.num_ranks * size; i += THREADS) {
        Word word = Word(unsigned(batch)) << 32 | unsigned(shared[i % size]);
        Word* to = window.of[i / size] + window.at(batch, window.rank, size) + i % size;
        asm volatile("st.relaxed.sys.global.u64 [%0], %1;" :: "l"(to), "l"(word) : "memory");
    }
    if (window.waits) receive(window, batch, size);
}
