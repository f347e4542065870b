// Rows of counts between ranks that write each other's memory.
//
// A word is an integer of a row beside the number of its batch, 8 bytes that are written at once. So each word
// says itself whether it has come, without flags or fences (NCCL's protocol "LL" does so). Windows are for even
// and odd batches by turns. A rank sends batch n + 2 when it has every row of n + 1. Each sender sent that when
// it had read the rows of n.
#pragma once

#include "abi.cuh"
#include "ptx.cuh"

namespace lplb {

constexpr int LATE = -1;  // which no word of a row is

// Where a source's row lies in a window.
__device__ size_t place_of(const Window& window, int batch, int source, int size) {
    return (size_t(batch & 1) * window.num_ranks + source) * size;
}

__device__ Word word_of(int batch, int value) { return Word(unsigned(batch)) << 32 | unsigned(value); }

__device__ bool is_of(Word word, int batch) { return int(word >> 32) == batch; }

// Waits until all of `number` words are of the batch, and hands them on, or until the deadline. Words that did
// not come are handed on as they are.
template <int threads, typename Take>
__device__ void wait_for(const Word* words, int number, int batch, long long deadline, Take take) {
    constexpr int at_once = 4;
    bool late = false;
    #pragma unroll 1
    for (int begin = threadIdx.x; begin < number; begin += at_once * threads) {
        Word word[at_once];
        #pragma unroll
        for (int j = 0; j < at_once; ++j)
            if (begin + j * threads < number) word[j] = load_relaxed(words + begin + j * threads);
        #pragma unroll
        for (int j = 0; j < at_once; ++j) {
            if (begin + j * threads >= number) break;
            while (!is_of(word[j], batch) && !late) {
                late = nanoseconds() > deadline;
                word[j] = load_relaxed(words + begin + j * threads);
            }
            take(begin + j * threads, word[j]);
        }
    }
}

// Waits for the rows of all ranks; with one block. Those that do not come in time are TIMED_OUT.
template <int threads>
__device__ void receive(const Window& window, int batch, long long deadline) {
    int size = window.size, number = window.num_ranks * size;
    bool any_late = false;
    wait_for<threads>(window.peers[window.rank] + place_of(window, batch, 0, size), number, batch, deadline,
                      [&](int i, Word word) {
                          bool came = is_of(word, batch);
                          window.rows[i] = came ? int(word) : LATE;
                          // A row may say that another node has missed it.
                          any_late |= !came || (int(word) == TIMED_OUT && i % size == HEAD_STATUS);
                      });
    // All rows are written before late ones are completed, or read behind this.
    if (!__syncthreads_or(any_late)) return;
    for (int source = threadIdx.x; source < window.num_ranks; source += threads) {
        int* row = window.rows + source * size;
        bool is_late = row[HEAD_STATUS] == TIMED_OUT;
        #pragma unroll 1
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

// Sends this rank's row to every rank of the node; with one block. `row` is in shared memory, `unread` as the state has
// it. Returns until when to wait for the rows of all ranks.
template <int threads>
__device__ long long send_row(const Window& window, const int* row, bool unread) {
    __syncthreads();  // the row is whole, and all have read the state, before either is used
    int batch = row[HEAD_BATCH], size = window.size;
    // Unread rows say that the others have read those of the batch before, whose place this one's take.
    if (unread) {
        receive<threads>(window, (batch - 1) & MAX_TOTAL, nanoseconds() + window.limit_ns);
        __syncthreads();  // late rows of that batch are completed before this one's take their place
    }
    for (int i = threadIdx.x; i < window.num_ranks * size; i += threads) {
        Word* to = window.peers[i / size];
        if (to != nullptr)
            store_relaxed(to + place_of(window, batch, window.rank, size) + i % size, word_of(batch, row[i % size]));
    }
    long long start = nanoseconds();
    if (threadIdx.x == 0) *window.state = {0, !window.waits, start};
    return start + window.limit_ns;
}

// Which turn a batch has that is being counted; 0: it is exchanged.
__device__ int turn_of(const Window& window) {
    return window.turn == nullptr ? 0 : (*window.turn + 1) % window.every;
}

// Sends this rank's row to every rank of the node and waits for those of all ranks, by the last block that
// calls it. A batch whose turn it is not leaves its row with those that were exchanged last, and is not sent.
// Leaves the row zeroed. `shared`: as large as a row.
template <int threads>
__device__ void exchange(const Window& window, int* row, int* shared) {
    __shared__ bool last;
    __syncthreads();  // the block has counted, in the row and in `shared`, before it says so
    if (threadIdx.x == 0) {
        __threadfence();  // and other blocks see that before they see that it is done
        last = atomicAdd(&window.state->num_done, 1) == int(gridDim.x) - 1;
    }
    __syncthreads();  // `last` is there before the others read it
    if (!last) return;
    __threadfence();  // what the other blocks counted is seen by what follows
    int turn = turn_of(window), size = window.size;
    for (int i = threadIdx.x; i < size; i += threads) {
        shared[i] = __ldcg(row + i);
        row[i] = 0;
        if (turn != 0) window.rows[window.rank * size + i] = shared[i];
    }
    if (window.turn != nullptr) {
        __syncthreads();  // all have read the turn before it is the next
        if (threadIdx.x == 0) {
            *window.turn = turn;
            if (turn != 0) window.state->num_done = 0;
        }
        if (turn != 0) return;
    }
    long long deadline = send_row<threads>(window, shared, window.state->unread);
    if (window.waits) receive<threads>(window, shared[HEAD_BATCH], deadline);
}

}  // namespace lplb
