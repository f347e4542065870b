// As much of CUDA C++ as the kernels use, for a host compiler. Threads are fibres of threads.cpp; memory.cpp
// sees every access to memory, since the kernels are compiled with -fsanitize=thread, whose calls go there.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

using std::isfinite;

#define __device__
#define __global__
#define __constant__ static
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
// Static where it is declared in a function, and also right behind `extern`. The runtime gives each block
// its own copy.
#define __shared__ thread_local
#define __isShared(address) true
#define __builtin_assume(condition) ((void)0)

struct Index3 {
    unsigned x, y, z;
};
struct alignas(16) int4 {
    int x, y, z, w;
};

extern "C" {
// A fibre's own, all its life, so the compiler may keep what it got.
Index3 emulated_thread() __attribute__((const));
Index3 emulated_block() __attribute__((const));
Index3 emulated_block_size() __attribute__((const));
Index3 emulated_grid_size() __attribute__((const));

void __syncthreads();
int __syncthreads_or(int condition);
void __syncwarp();
void emulated_barrier_of_first(int num_threads);
void emulated_cluster_arrive();
void emulated_cluster_wait();
void emulated_send(int block, void* to, const void* value, size_t size, int raises, unsigned long long* arrivals);
unsigned __ballot_sync(unsigned mask, int condition);
unsigned emulated_match(unsigned mask, uint64_t value);
uint64_t emulated_shuffle(unsigned mask, uint64_t value, int source, int width, int how);
unsigned emulated_sum(unsigned mask, unsigned value);
int emulated_max(unsigned mask, int value);
unsigned emulated_max_unsigned(unsigned mask, unsigned value);
int emulated_add(int* to, int value);
unsigned emulated_or(unsigned* to, unsigned value);
int emulated_max_at(int* to, int value);
unsigned emulated_max_at_unsigned(unsigned* to, unsigned value);
unsigned long long emulated_add_long(unsigned long long* to, unsigned long long value);
int emulated_min_at(int* to, int value);
unsigned emulated_min_at_unsigned(unsigned* to, unsigned value);

long long emulated_clock();
unsigned long long emulated_load(const unsigned long long* from);
void emulated_store(unsigned long long* to, unsigned long long word);

void emulated_arrivals_init(unsigned long long* arrivals);
void emulated_arrivals_expect(unsigned long long* arrivals, int bytes);
void emulated_arrivals_wait(unsigned long long* arrivals, int parity);
void emulated_bulk_load(void* shared, const void* from, int bytes, unsigned long long* arrivals);
void emulated_bulk_store(void* to, const void* shared, int bytes);
void emulated_bulk_end_group();
void emulated_bulk_wait(int number, int comes);
}

#define threadIdx emulated_thread()
#define blockIdx emulated_block()
#define blockDim emulated_block_size()
#define gridDim emulated_grid_size()

inline int __any_sync(unsigned mask, int condition) { return __ballot_sync(mask, condition) != 0; }
inline unsigned __match_any_sync(unsigned mask, int value) { return emulated_match(mask, unsigned(value)); }

enum { SHUFFLE_INDEX, SHUFFLE_UP, SHUFFLE_XOR };

template <typename T>
T emulated_shuffle_of(unsigned mask, T value, int source, int width, int how) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = emulated_shuffle(mask, bits, source, width, how);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return emulated_shuffle_of(mask, value, source, width, SHUFFLE_INDEX);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int by, int width = 32) {
    return emulated_shuffle_of(mask, value, by, width, SHUFFLE_UP);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int by) {
    return emulated_shuffle_of(mask, value, by, 32, SHUFFLE_XOR);
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) { return emulated_sum(mask, value); }
inline int __reduce_add_sync(unsigned mask, int value) { return int(emulated_sum(mask, unsigned(value))); }
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
    return ~emulated_max_unsigned(mask, ~value);
}
inline int __reduce_max_sync(unsigned mask, int value) { return emulated_max(mask, value); }
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    return emulated_max_unsigned(mask, value);
}

inline int atomicAdd(int* to, int value) { return emulated_add(to, value); }
inline unsigned atomicAdd(unsigned* to, unsigned value) {
    return unsigned(emulated_add(reinterpret_cast<int*>(to), int(value)));
}
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
    return emulated_add_long(to, value);
}
inline int atomicMin(int* to, int value) { return emulated_min_at(to, value); }
inline unsigned atomicMin(unsigned* to, unsigned value) { return emulated_min_at_unsigned(to, value); }
inline int atomicSub(int* to, int value) { return emulated_add(to, int(0u - unsigned(value))); }
inline unsigned atomicOr(unsigned* to, unsigned value) { return emulated_or(to, value); }
inline int atomicMax(int* to, int value) { return emulated_max_at(to, value); }
inline unsigned atomicMax(unsigned* to, unsigned value) { return emulated_max_at_unsigned(to, value); }

inline void __threadfence() {}  // the host's threads are one, and see all that was written
template <typename T>
T __ldcg(const T* from) {
    return *from;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned((unsigned long long)x * y >> 32); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __double2int_rn(double x) { return int(std::nearbyint(x)); }
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned x) {
    float value;
    std::memcpy(&value, &x, sizeof value);
    return value;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
