// Sets of a component's ranks: a bit for each, in one word of 32 or 64 bits, or in several words.
#pragma once

namespace lplb {

// A set of more ranks than a word has bits.
template <int words>
struct __align__(16) Wide {
    unsigned word[words];

    __device__ Wide operator&(const Wide& other) const {
        Wide both;
        #pragma unroll
        for (int i = 0; i < words; ++i) both.word[i] = word[i] & other.word[i];
        return both;
    }
    __device__ Wide operator~() const {
        Wide others;
        #pragma unroll
        for (int i = 0; i < words; ++i) others.word[i] = ~word[i];
        return others;
    }
    __device__ Wide& operator|=(const Wide& other) {
        #pragma unroll
        for (int i = 0; i < words; ++i) word[i] |= other.word[i];
        return *this;
    }
};

template <int words> struct Bits { typedef Wide<words> Type; };
template <> struct Bits<1> { typedef unsigned Type; };
template <> struct Bits<2> { typedef unsigned long long Type; };

// Whether a set has any rank.
template <typename Set>
__device__ bool any(const Set& set) { return set != 0; }
template <int words>
__device__ bool any(const Wide<words>& set) {
    unsigned all = 0;
    #pragma unroll
    for (int i = 0; i < words; ++i) all |= set.word[i];
    return all != 0;
}

// A set of one rank.
template <typename Set>
__device__ void make_only(Set& set, int rank) { set = Set(1) << rank; }
template <int words>
__device__ void make_only(Wide<words>& set, int rank) {
    #pragma unroll
    for (int i = 0; i < words; ++i) set.word[i] = rank / 32 == i ? 1u << rank % 32 : 0;
}

template <typename Set>
__device__ Set only(int rank) {
    Set set;
    make_only(set, rank);
    return set;
}

template <typename Set>
__device__ bool has(const Set& set, int rank) { return set >> rank & 1; }
template <int words>
__device__ bool has(const Wide<words>& set, int rank) {
    return any(set & only<Wide<words>>(rank));  // an index into `word` would move the set from registers to memory
}

// Puts 32 ranks into a set that has none of them.
template <typename Set>
__device__ void put_word(Set& set, int i, unsigned word) { set |= Set(word) << (32 * i); }
template <int words>
__device__ void put_word(Wide<words>& set, int i, unsigned word) { set.word[i] = word; }

__device__ int number_in(unsigned set) { return __popc(set); }
__device__ int number_in(unsigned long long set) { return __popcll(set); }
template <int words>
__device__ int number_in(const Wide<words>& set) {
    int number = 0;
    #pragma unroll
    for (int i = 0; i < words; ++i) number += __popc(set.word[i]);
    return number;
}

// The set of the lane whose number differs by this bit.
template <typename Set>
__device__ Set of_lane_xor(const Set& set, int bit) { return __shfl_xor_sync(~0u, set, bit); }
template <int words>
__device__ Wide<words> of_lane_xor(const Wide<words>& set, int bit) {
    Wide<words> theirs;
    #pragma unroll
    for (int i = 0; i < words; ++i) theirs.word[i] = __shfl_xor_sync(~0u, set.word[i], bit);
    return theirs;
}

// Adds a rank to a set in shared memory, to which other threads may add others.
template <typename Set>
__device__ void add_to_set(Set* set, int rank) {
    atomicOr(reinterpret_cast<unsigned*>(set) + rank / 32, 1u << rank % 32);
}

// A load that the compiler does not move: it is issued early, and in the order of its warp's accesses.
template <typename T>
__device__ T early(const T* at) {
    return *static_cast<const volatile T*>(at);
}
// In loads of 16 bytes, which cannot be volatile. So a barrier separates it from the writers of the set.
template <int words>
__device__ Wide<words> early(const Wide<words>* at) {
    return *at;
}

}  // namespace lplb
