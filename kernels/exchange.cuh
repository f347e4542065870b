// Rows of counts between ranks that write each other's memory. A word is an integer of a row beside
// the number of its batch, 8 bytes that are written at once, so each word says itself that it has
// come: no flags, no fences (NCCL's protocol "LL" does so). Windows are for even and odd batches by
// turns: a rank sends batch n + 2 when it has every row of n + 1, which each sender sent when it had
// read those of n.
#pragma once

#include "plan.cuh"

typedef unsigned long long Word;

struct Window {
    Word* const* of;   // [R] each rank's, [2, R, HEAD + E] words; null: rows travel by other means
    int* num_done;     // blocks of `count` that have counted, zeroed
    int num_ranks, rank;

    __device__ size_t at(int batch, int source, int size) const {
        return (size_t(batch & 1) * num_ranks + source) * size;
    }
};

// Sends this rank's row to every rank, by the last block that calls it; leaves the row zeroed.
// `shared`: [HEAD + E].
__device__ void send(const Window& window, int* row, int size, int* shared) {
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
    for (int i = threadIdx.x; i < window.num_ranks * size; i += THREADS) {
        Word word = Word(unsigned(batch)) << 32 | unsigned(shared[i % size]);
        Word* to = window.of[i / size] + window.at(batch, window.rank, size) + i % size;
        asm volatile("st.relaxed.sys.global.u64 [%0], %1;" :: "l"(to), "l"(word) : "memory");
    }
}

__device__ long long nanoseconds() {
    long long time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

// Waits for the rows of all ranks, a block each, but no longer than the limit.
extern "C" __global__ void __launch_bounds__(THREADS) receive(
    const Window window,
    const int* __restrict__ num_batches,
    int* __restrict__ rows,              // [R, HEAD + E]
    int size, long long limit_ns,
    volatile int* missing) {             // [R] in the host's memory
    int batch = *num_batches, source = blockIdx.x;
    const Word* words = window.of[window.rank] + window.at(batch, source, size);
    long long start = nanoseconds();
    bool late = false;
    for (int i = threadIdx.x; i < size; i += THREADS) {
        Word word;
        do asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(word) : "l"(words + i) : "memory");
        while (int(word >> 32) != batch && !(late = late || nanoseconds() - start > limit_ns));
        rows[size_t(source) * size + i] = late ? 0 : int(word);
    }
    late = __syncthreads_or(late);
    if (!late || threadIdx.x != 0) return;
    rows[size_t(source) * size] = TIMED_OUT;
    missing[source] = 1;
}
