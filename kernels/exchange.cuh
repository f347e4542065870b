// Rows of counts between ranks that write each other's memory.
//
// A word is an integer of a row with the number of its batch, 8 bytes in one write. So each word shows by itself
// whether it has arrived, without flags or fences, as in NCCL's protocol "LL". A window has a part for even
// batches and one for odd ones. A rank sends batch n + 2 only when it has all rows of n + 1. A rank sends its row of
// n + 1 only when it has read the rows of n. So no row is overwritten before it was read.
#pragma once

#include "abi.cuh"
#include "loops.cuh"
#include "ptx.cuh"

namespace lplb {

constexpr int LATE = -1;  // no word of a row has this value

// The place of a source's row in a window.
__device__ size_t place_of(const Window& window, int batch, int source, int size) {
    return (size_t(batch & 1) * window.num_ranks + source) * size;
}

__device__ Word word_of(int batch, int value) { return Word(unsigned(batch)) << 32 | unsigned(value); }

__device__ bool is_of(Word word, int batch) { return int(word >> 32) == batch; }

// Waits until all `number` words are of the batch, or until the deadline. Calls `take` for each word, also for late
// words, as they are then.
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

// Waits for the rows of all ranks, by one block. Late rows get the status TIMED_OUT.
template <int threads>
__device__ void receive(const Window& window, int batch, long long deadline) {
    int size = window.size, number = window.num_ranks * size;
    bool any_late = false;
    wait_for<threads>(window.peers[window.rank] + place_of(window, batch, 0, size), number, batch, deadline,
                      [&](int i, Word word) {
                          bool came = is_of(word, batch);
                          window.rows[i] = came ? int(word) : LATE;
                          // Another node may have marked a row as late.
                          any_late |= !came || (int(word) == TIMED_OUT && i % size == HEAD_STATUS);
                      });
    // All rows are written before late ones are filled in, and before any row is read behind this.
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

// Sends this rank's row to every rank of the node, by one block. `row` is in shared memory. `unread` is that of the
// state. Returns the deadline for the rows of all ranks.
template <int threads>
__device__ long long send_row(const Window& window, const int* row, bool unread) {
    __syncthreads();  // the row is complete before it is sent; the state is read before it is overwritten
    int batch = row[HEAD_BATCH], size = window.size;
    // This rank has not waited for the last batch's rows. Their arrival shows that their senders have read the rows
    // before those, which this row overwrites.
    if (unread) {
        receive<threads>(window, (batch - 1) & MAX_TOTAL, nanoseconds() + window.limit_ns);
        __syncthreads();  // late rows of that batch are filled in before this batch overwrites them
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

// The turn of the batch that is being counted; 0: it is exchanged.
__device__ int turn_of(const Window& window) {
    return window.turn == nullptr ? 0 : (*window.turn + 1) % window.every;
}

// Sends this rank's row to every rank of the node and waits for the rows of all ranks, by the last block that
// calls it. A batch that is not exchanged is not sent: its row replaces this rank's among the rows exchanged last.
// Zeroes the row. `shared`: as large as a row.
template <int threads>
__device__ void exchange(const Window& window, int* row, int* shared) {
    __shared__ bool last;
    __syncthreads();  // the block has counted, in the row and in `shared`, before it is counted as done
    if (threadIdx.x == 0) {
        __threadfence();  // other blocks see the counts before they see that the block is done
        last = atomicAdd(&window.state->num_done, 1) == int(gridDim.x) - 1;
    }
    __syncthreads();  // `last` is written before the other threads read it
    if (!last) return;
    __threadfence();  // what the other blocks counted is visible from here on
    int turn = turn_of(window), size = window.size;
    block_stride<threads>(size, [&](int i) {
        shared[i] = __ldcg(row + i);
        row[i] = 0;
        if (turn != 0) window.rows[window.rank * size + i] = shared[i];
    });
    if (window.turn != nullptr) {
        __syncthreads();  // all threads have read the turn before it is overwritten
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
