// The functions of kernels/ptx.cuh for a host compiler. A thread that reads what another rank may write
// lets the others go on.
#pragma once

inline long long nanoseconds() { return emulated_clock(); }

inline unsigned long long load_relaxed(const unsigned long long* from) { return emulated_load(from); }
inline void store_relaxed(unsigned long long* to, unsigned long long word) { emulated_store(to, word); }
inline unsigned long long load_acquire(const unsigned long long* from) { return emulated_load(from); }
inline void store_release(unsigned long long* to, unsigned long long word) { emulated_store(to, word); }
inline void fence_system() {}

// Bulk copies are late: a load comes when it is waited for, a store reads and writes then.
inline void arrivals_init(unsigned long long* arrivals) { emulated_arrivals_init(arrivals); }
inline void arrivals_are_ready() {}
inline void fence_bulk() {}
inline void arrivals_expect(unsigned long long* arrivals, int bytes) { emulated_arrivals_expect(arrivals, bytes); }
inline void arrivals_wait(unsigned long long* arrivals, int parity) { emulated_arrivals_wait(arrivals, parity); }
inline void bulk_load(void* shared, const void* from, int bytes, unsigned long long* arrivals) {
    emulated_bulk_load(shared, from, bytes, arrivals);
}
inline void bulk_store(void* to, const void* shared, int bytes) { emulated_bulk_store(to, shared, bytes); }
inline void bulk_end_group() { emulated_bulk_end_group(); }
template <int number>
void bulk_wait_read() {
    emulated_bulk_wait(number, 0);
}
inline void bulk_wait() { emulated_bulk_wait(0, 1); }

inline void arrivals_are_ready_for_cluster() {}
inline void cluster_arrive() { emulated_cluster_arrive(); }
inline void cluster_wait() { emulated_cluster_wait(); }
template <typename T>
void send(int block, T* to, T value, unsigned long long* arrivals) {
    emulated_send(block, to, &value, sizeof value, 0, arrivals);
}
inline void send_at_least(int block, unsigned* to, unsigned value, unsigned long long* arrivals) {
    emulated_send(block, to, &value, sizeof value, 1, arrivals);
}

template <int threads>
void barrier_of_first() {
    emulated_barrier_of_first(threads);
}

template <typename T>
void keep_in_register(T*&) {}
