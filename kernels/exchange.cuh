// Rows of counts between ranks that write each other's memory. A word is an integer of a row beside
// the number of its batch, 8 bytes that are written at once, so each word says itself that it has
// come: no flags, no fences (NCCL's protocol "LL" does so). Windows are for even and odd batches by
// turns: a rank sends batch n + 2 when it has every row of n + 1, which each sender sent when it had
// read those of n.
//
// Windows are of the ranks of a node. The first rank of each puts its node's rows into the memory of
// the first of every other node, with a signal, and writes what comes from there into the windows of
// its own: `gather`, NVSHMEM's puts, `spread`.
#pragma once

#include "plan.cuh"

typedef unsigned long long Word;

struct Window {
    Word* const* of;        // [R] each rank's, [2, R, HEAD + E] words, null on other nodes; or null, if
                            // rows travel by other means
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

// Waits for the rows of `count` ranks from `first`, but no longer than the limit; with one block.
__device__ void receive(const Window& window, int batch, int first, int count, int size, int* rows) {
    constexpr int AT_ONCE = 4, LATE = -1;  // which no word of a row is
    const Word* words = window.of[window.rank] + window.at(batch, first, size);
    int number = count * size;
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
            rows[begin + j * THREADS] = came ? int(word[j]) : LATE;
            any_late |= !came || int(word[j]) == TIMED_OUT;  // of another node, if it begins a row
        }
    }
    if (!__syncthreads_or(any_late)) return;
    for (int i = threadIdx.x; i < number; i += THREADS) {
        int source = i / size;
        bool begins = i == source * size;
        if (rows[i] != LATE && !(begins && rows[i] == TIMED_OUT)) continue;
        if (!begins) rows[i] = 0;
        rows[source * size] = TIMED_OUT;
        window.missing[first + source] = 1;
    }
}

__device__ void write(Word* to, int batch, int value) {
    Word word = Word(unsigned(batch)) << 32 | unsigned(value);
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" :: "l"(to), "l"(word) : "memory");
}

// Sends this rank's row to every rank of the node and waits for those of all ranks, by the last block
// that calls it; leaves the row zeroed. `shared`: [HEAD + E].
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
    int number = window.num_ranks * size;
    if (window.waits_before)
        receive(window, (batch - 1) & MAX_TOTAL, 0, window.num_ranks, size, window.rows);
    __syncthreads();  // what all threads have read may be overwritten now
    for (int i = threadIdx.x; i < number; i += THREADS) {
        Word* window_of = window.of[i / size];
        if (window_of != nullptr)
            write(window_of + window.at(batch, window.rank, size) + i % size, batch, shared[i % size]);
    }
    if (window.waits) receive(window, batch, 0, window.num_ranks, size, window.rows);
}

// What the first rank of a node has for the others; in NVSHMEM's symmetric memory.
struct Relay {
    int* sent;             // [2, node_size, HEAD + E]
    const int* received;   // [nodes, 2, node_size, HEAD + E]
    const Word* signals;   // [nodes] how many batches each node has sent
    int node, node_size;
};

// Collects the rows of a node to be sent; one block.
extern "C" __global__ void __launch_bounds__(THREADS) gather(
    const Window window, const Relay relay, const int* __restrict__ num_batches, int size) {
    int batch = *num_batches, count = relay.node_size;
    int* rows = relay.sent + (batch & 1) * count * size;
    receive(window, batch, relay.node * count, count, size, rows);
}

// Hands the rows of the other nodes to the ranks of this one, and waits for all; one block.
extern "C" __global__ void __launch_bounds__(THREADS) spread(
    const Window window, const Relay relay, const int* __restrict__ num_batches, int size) {
    int batch = *num_batches, count = relay.node_size, number = count * size;
    long long start = nanoseconds();
    for (int node = 0; node < window.num_ranks / count; ++node) {
        if (node == relay.node) continue;
        bool came;
        do {
            Word sent;
            asm volatile("ld.acquire.sys.global.u64 %0, [%1];"
                         : "=l"(sent) : "l"(relay.signals + node) : "memory");
            came = ((unsigned(sent) - unsigned(batch)) & MAX_TOTAL) <= MAX_TOTAL / 2;
        } while (!came && nanoseconds() - start <= window.limit_ns);
        if (!__syncthreads_and(came)) continue;  // they are missed where they are waited for
        const int* rows = relay.received + (2 * node + (batch & 1)) * number;
        for (int i = threadIdx.x; i < count * number; i += THREADS) {
            Word* to = window.of[relay.node * count + i / number];
            write(to + window.at(batch, node * count, size) + i % number, batch, __ldcv(rows + i % number));
        }
    }
    receive(window, batch, 0, window.num_ranks, size, window.rows);
}
