// What a kernel of the flow is compiled for, and sets of a component's ranks.
#pragma once

namespace lplb {

template <int words> struct Bits { typedef unsigned long long Type; };
template <> struct Bits<1> { typedef unsigned Type; };

template <int size_, int parts_, int turns_, bool more_, int threads_, bool guests_ = false, int blocks_ = 1>
struct Variant {
    static constexpr int size = size_;        // the most ranks of a component
    static constexpr int parts = parts_;      // threads that share the edges of a rank
    static constexpr int turns = turns_;      // edges that each of them keeps in registers
    static constexpr bool more = more_;       // whether a rank may have still more, read when needed
    static constexpr int threads = threads_;  // of a block
    static constexpr bool guests = guests_;   // whether the copies are another batch's others
    static constexpr int blocks = blocks_;    // that share a component: a cluster
    static constexpr int words = (size + 31) / 32;  // ranks of a lane: each warp has the whole graph
    static constexpr int pushing = size * parts;    // threads that push: the first of the block
    static constexpr int chunk = parts * turns;     // edges of a rank that are pushed along at once
    typedef typename Bits<words>::Type Set;         // ranks, as bits

    static_assert(size <= 64, "a set of ranks is one word of at most 64 bits");
    static_assert(pushing % 32 == 0, "whole warps push: their votes and shuffles take all lanes");
    static_assert(pushing <= threads, "the threads that push are of the block");
    static_assert(32 % parts == 0, "the threads of a rank scan over their lanes, so they share a warp");
    static_assert(chunk <= 32, "the edges of a chunk are bits of a word");
    static_assert(threads % 32 == 0, "sums are made by whole warps");
};

// The component that the block works on.
template <typename V>
__device__ unsigned component() { return blockIdx.x / unsigned(V::blocks); }

// Which of the component's blocks it is. The first solves.
template <typename V>
__device__ int block_of_component() { return int(blockIdx.x % unsigned(V::blocks)); }

// The ranks whose flag is set; of a lane those of the rank `lane`, and `lane` + 32.
template <typename V>
__device__ typename V::Set vote(const bool (&flag)[V::words]) {
    typename V::Set set = 0;
    #pragma unroll
    for (int i = 0; i < V::words; ++i)
        set |= typename V::Set(__ballot_sync(~0u, flag[i])) << (32 * i);
    return set;
}

template <typename V>
__device__ int number_of(typename V::Set set) {
    return V::words == 1 ? __popc(unsigned(set)) : __popcll(set);
}

// The lowest rank of a set that is not empty.
template <typename V>
__device__ int lowest_of(typename V::Set set) {
    return (V::words == 1 ? __ffs(int(set)) : __ffsll((long long)(set))) - 1;
}

// The ranks below one.
template <typename V>
__device__ typename V::Set below(int rank) { return (typename V::Set(1) << rank) - 1; }

// Adds a rank to a set in shared memory, to which other threads may add others.
template <typename Set>
__device__ void add_to_set(Set* set, int rank) {
    atomicOr(reinterpret_cast<unsigned*>(set) + rank / 32, 1u << rank % 32);
}

// A load that stays where it is written, so that it is under way early, and in the order of a warp.
template <typename T>
__device__ T early(const T* at) {
    return *static_cast<const volatile T*>(at);
}

}  // namespace lplb
