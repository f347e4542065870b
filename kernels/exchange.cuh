// Rows of counts between ranks that write each other's memory. A word is an integer of a row beside
// the number of its batch, 8 bytes that are written at once, so each word says itself that it has
// come: no flags, no fences (NCCL's protocol "LL" does so). Windows are for even and odd batches by
// turns: a rank sends batch n + 2 when it has every row of n + 1, which each sender sent when it had
// read those of n.
//
// Windows are of the ranks of a node. The first rank of each puts its node's rows into the memory of
// the first of every other node, with a signal, and writes what comes from there into the windows of
// its own: `gather`, NVSHMEM's puts, `broadcast`.
#pragma once

#include "plan.cuh"
#include "ptx.cuh"

// Where a source's row lies in a window.
__device__ size_t place_of(const Window& window, int batch, int source, int size) {
    return (size_t(batch & 1) * window.num_ranks + source) * size;
}

constexpr int LATE = -1;  // which no word of a row is

__device__ Word word_of(int batch, int value) { return Word(unsigned(batch)) << 32 | unsigned(value); }

__device__ bool is_of(Word word, int batch) { return int(word >> 32) == batch; }

// Waits until all of `number` words are of the batch, and hands them on, or until the deadline. Words
// that did not come are handed on as they are.
template <typename Take>
__device__ void wait_for(const Word* words, int number, int batch, long long deadline, Take take) {
    constexpr int AT_ONCE = 4;
    bool late = false;
    #pragma unroll 1
    for (int begin = threadIdx.x; begin < number; begin += AT_ONCE * THREADS) {
        Word word[AT_ONCE];
        #pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
            if (begin + j * THREADS < number) word[j] = load_relaxed(words + begin + j * THREADS);
        #pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            if (begin + j * THREADS >= number) break;
            while (!is_of(word[j], batch) && !late) {
                late = nanoseconds() > deadline;
                word[j] = load_relaxed(words + begin + j * THREADS);
            }
            take(begin + j * THREADS, word[j]);
        }
    }
}

// Waits for the rows of all ranks; with one block. Those that do not come in time are TIMED_OUT.
__device__ void receive(const Window& window, int batch, int size, long long deadline) {
    int number = window.num_ranks * size;
    bool any_late = false;
    wait_for(window.peers[window.rank] + place_of(window, batch, 0, size), number, batch, deadline,
             [&](int i, Word word) {
                 bool came = is_of(word, batch);
                 window.rows[i] = came ? int(word) : LATE;
                 // Of another node, which has missed it.
                 any_late |= !came || (int(word) == TIMED_OUT && i % size == HEAD_STATUS);
             });
    if (!__syncthreads_or(any_late)) return;
    for (int source = threadIdx.x; source < window.num_ranks; source += THREADS) {
        int* row = window.rows + source * size;
        bool is_late = row[HEAD_STATUS] == TIMED_OUT;
        for (int i = 0; i < size; ++i)
            if (row[i] == LATE) {
                row[i] = 0;
                is_late = true;
            }
        if (!is_late) continue;
        row[HEAD_STATUS] = TIMED_OUT;
        window.missing[source] = 1;
    }
}

// Sends this rank's row to every rank of the node and waits for those of all ranks, by the last block
// that calls it; leaves the row zeroed. `shared`: [HEAD + E].
__device__ void exchange(const Window& window, int* row, int size, int* shared) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(&window.state->num_done, 1) == int(gridDim.x) - 1;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int i = threadIdx.x; i < size; i += THREADS) {
        shared[i] = __ldcg(row + i);
        row[i] = 0;
    }
    long long start = nanoseconds();
    bool unread = window.state->unread;
    __syncthreads();
    int batch = shared[HEAD_BATCH];
    // They say that the others have read those of the batch before, in whose place this one's go.
    if (unread) receive(window, (batch - 1) & MAX_TOTAL, size, start + window.limit_ns);
    __syncthreads();
    for (int i = threadIdx.x; i < window.num_ranks * size; i += THREADS) {
        Word* to = window.peers[i / size];
        if (to != nullptr)
            store_relaxed(to + place_of(window, batch, window.rank, size) + i % size, word_of(batch, shared[i % size]));
    }
    start = nanoseconds();
    if (threadIdx.x == 0) *window.state = {0, !window.waits, start};
    if (window.waits) receive(window, batch, size, start + window.limit_ns);
}

// A row that is late is given up a little earlier at each station, so that those who wait for it learn which
// it is.

// Collects the rows of a node to be sent; one block.
extern "C" __global__ void __launch_bounds__(THREADS) gather(
    const Window window, const Relay relay, const int* __restrict__ num_batches, int size) {
    int batch = *num_batches, count = relay.node_size;
    Word* words = relay.sent + (batch & 1) * count * size;
    bool any_late = false;
    wait_for(window.peers[window.rank] + place_of(window, batch, relay.node * count, size), count * size, batch,
             window.state->start + window.limit_ns / 2, [&](int i, Word word) {
                 any_late |= !is_of(word, batch);
                 words[i] = is_of(word, batch) ? word : word_of(batch, LATE);
             });
    if (!__syncthreads_or(any_late)) return;
    for (int source = threadIdx.x; source < count; source += THREADS) {
        Word* row = words + source * size;
        bool is_late = false;
        for (int i = 0; i < size; ++i)
            if (int(row[i]) == LATE) {
                row[i] = word_of(batch, 0);
                is_late = true;
            }
        if (is_late) row[HEAD_STATUS] = word_of(batch, TIMED_OUT);
    }
}

// Hands the rows of the other nodes to the ranks of this one, and waits for all; one block.
extern "C" __global__ void __launch_bounds__(THREADS) broadcast(
    const Window window, const Relay relay, const int* __restrict__ num_batches, int size) {
    int batch = *num_batches, count = relay.node_size, number = count * size;
    int nodes = window.num_ranks / count;
    long long start = window.state->start, deadline = start + window.limit_ns / 4 * 3;
    for (int node = threadIdx.x; node < nodes; node += THREADS) {
        Word sent;
        do sent = load_acquire(relay.signals + node);
        while (node != relay.node && ((unsigned(sent) - unsigned(batch)) & MAX_TOTAL) > MAX_TOTAL / 2 &&
               nanoseconds() <= deadline);
    }
    __syncthreads();
    for (int node = 0; node < nodes; ++node) {
        const Word* words = relay.received + (2 * node + (batch & 1)) * number;
        for (int i = threadIdx.x; node != relay.node && i < count * number; i += THREADS) {
            Word word = load_relaxed(words + i % number);
            Word* to = window.peers[relay.node * count + i / number];
            if (is_of(word, batch)) store_relaxed(to + place_of(window, batch, node * count, size) + i % number, word);
        }
    }
    receive(window, batch, size, start + window.limit_ns);
    if (threadIdx.x == 0) window.state->unread = 0;
}
