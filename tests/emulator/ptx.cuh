// The functions of kernels/ptx.cuh for a host compiler. A thread that reads what another rank may write
// lets the others go on.
#pragma once

inline long long nanoseconds() { return emulated_clock(); }

inline unsigned long long load_relaxed(const unsigned long long* from) { return emulated_load(from); }
inline void store_relaxed(unsigned long long* to, unsigned long long word) { emulated_store(to, word); }
inline unsigned long long load_acquire(const unsigned long long* from) { return emulated_load(from); }
inline void store_release(unsigned long long* to, unsigned long long word) { emulated_store(to, word); }
inline void fence_system() {}

template <int threads>
void barrier_of_first() {
    emulated_barrier_of_first(threads);
}

template <typename T>
void keep_in_register(T*&) {}
