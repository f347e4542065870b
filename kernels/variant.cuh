// The sizes that a kernel of the flow is compiled for, as a type.
#pragma once

#include "sets.cuh"

namespace lplb {

template <int size_, int parts_, int turns_, bool more_, int threads_, bool guests_ = false, int blocks_ = 1,
          int choices_ = 1>
struct Variant {
    static constexpr int size = size_;        // the most ranks of a component
    static constexpr int parts = parts_;      // threads that share the edges of a rank
    static constexpr int turns = turns_;      // edges that each of them keeps in registers
    static constexpr bool more = more_;       // whether a rank may have further edges, read when needed
    static constexpr int threads = threads_;  // of a block
    static constexpr bool guests = guests_;   // whether copies differ from batch to batch
    static constexpr int blocks = blocks_;    // blocks of a cluster, which share a component
    // Blocks of a component that plan by cost, each with other guests; 1: one block, or a cluster, plans by tokens.
    static constexpr int choices = choices_;
    static constexpr int words = (size + 31) / 32;  // ranks of a lane, since each warp works on all ranks
    static constexpr int pushing = size * parts;    // threads that push: the first of the block
    // Threads that push while the others make what depends on the guests; 0: all threads do the same.
    static constexpr int apart = guests && choices == 1 ? pushing : 0;
    static constexpr int chunk = parts * turns;     // edges of a rank that tokens move along at once
    typedef typename Bits<words>::Type Set;         // ranks, as bits

    static constexpr bool wide = words > 2;         // whether a set is several words

    static_assert(size <= 256, "an edge has its target and its number in a byte each");
    static_assert(!(wide && guests), "guests and what search.cuh moves have sets of one word");
    static_assert(blocks == 1 || choices == 1, "one block plans a choice");
    static_assert(size <= threads, "a thread has each rank");
    static_assert(pushing % 32 == 0, "whole warps push: their votes and shuffles take all lanes");
    static_assert(pushing <= threads, "the threads that push are of the block");
    static_assert(32 % parts == 0, "the threads of a rank scan over their lanes, so they share a warp");
    static_assert(chunk <= 32, "the edges of a chunk are bits of a word");
    static_assert(threads % 32 == 0, "sums are made by whole warps");
};

// The number of the block's component.
template <typename V>
__device__ unsigned component() { return blockIdx.x / unsigned(V::blocks * V::choices); }

// The block's number among those of its component. Block 0 solves.
template <typename V>
__device__ int block_of_component() { return int(blockIdx.x % unsigned(V::blocks)); }

// The number of the block's choice of guests; the first has none.
template <typename V>
__device__ int choice_of_block() { return int(blockIdx.x % unsigned(V::choices)); }

// The ranks whose flag is set. A lane has the flags of the ranks `lane`, `lane` + 32, ...
template <typename V>
__device__ typename V::Set vote(const bool (&flag)[V::words]) {
    typename V::Set set{};
    #pragma unroll
    for (int i = 0; i < V::words; ++i)
        put_word(set, i, __ballot_sync(~0u, flag[i]));
    return set;
}

template <typename V>
__device__ int number_of(typename V::Set set) { return number_in(set); }

// The lowest rank of a set that is not empty.
template <typename V>
__device__ int lowest_of(typename V::Set set) {
    return (V::words == 1 ? __ffs(int(set)) : __ffsll((long long)(set))) - 1;
}

// The ranks below one.
template <typename V>
__device__ typename V::Set below(int rank) { return (typename V::Set(1) << rank) - 1; }

}  // namespace lplb
