// Rows of counts between nodes, by the first rank of each.
//
// `gather` collects its node's rows. NVSHMEM puts them into the memory of the first rank of every other node,
// with a signal. `broadcast` writes the rows of other nodes into the windows of its own node. The time limit of each
// step is a little shorter than that of the step behind it. So the ranks that wait learn which row is late.
#pragma once

#include "exchange.cuh"

namespace lplb {

// Collects the rows of a node to be sent; one block.
template <int threads>
__device__ void gather_rows(const Window& window, const Relay& relay, int batch) {
    int count = relay.node_size, size = window.size;
    Word* words = relay.sent + (batch & 1) * count * size;
    bool any_late = false;
    wait_for<threads>(window.peers[window.rank] + place_of(window, batch, relay.node * count, size), count * size,
                      batch, window.state->start + window.limit_ns / 2, [&](int i, Word word) {
                          any_late |= !is_of(word, batch);
                          words[i] = is_of(word, batch) ? word : word_of(batch, LATE);
                      });
    if (!__syncthreads_or(any_late)) return;  // all words are written before late rows are filled in
    for (int source = threadIdx.x; source < count; source += threads) {
        Word* row = words + source * size;
        bool is_late = false;
        #pragma unroll 1
        for (int i = 0; i < size; ++i)
            if (int(row[i]) == LATE) {
                row[i] = word_of(batch, 0);
                is_late = true;
            }
        if (is_late) row[HEAD_STATUS] = word_of(batch, TIMED_OUT);
    }
}

// Writes the rows of the other nodes to the ranks of this one, and waits for all rows; one block.
template <int threads>
__device__ void broadcast_rows(const Window& window, const Relay& relay, int batch) {
    int count = relay.node_size, size = window.size, number = count * size;
    int nodes = window.num_ranks / count;
    long long start = window.state->start, deadline = start + window.limit_ns / 4 * 3;
    for (int node = threadIdx.x; node < nodes; node += threads) {
        Word sent;
        do sent = load_acquire(relay.signals + node);
        while (node != relay.node && ((unsigned(sent) - unsigned(batch)) & MAX_TOTAL) > MAX_TOTAL / 2 &&
               nanoseconds() <= deadline);
    }
    __syncthreads();  // all signals have arrived before any thread reads the rows behind them
    for (int node = 0; node < nodes; ++node) {
        const Word* words = relay.received + (2 * node + (batch & 1)) * number;
        for (int i = threadIdx.x; node != relay.node && i < count * number; i += threads) {
            Word word = load_relaxed(words + i % number);
            Word* to = window.peers[relay.node * count + i / number];
            if (is_of(word, batch)) store_relaxed(to + place_of(window, batch, node * count, size) + i % number, word);
        }
    }
    receive<threads>(window, batch, start + window.limit_ns);
    if (threadIdx.x == 0) window.state->unread = 0;
}

}  // namespace lplb
