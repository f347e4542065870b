// Instructions that CUDA C++ has no words for, each behind a function that says what it does. Nothing else
// in these sources is written in PTX, so a host compiler needs another version of this header only.
#pragma once

// The clock that all GPUs of a host share.
__device__ long long nanoseconds() {
    long long time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

// A word that another GPU may write meanwhile: whole, as it was before or as it is after.
__device__ unsigned long long load_relaxed(const unsigned long long* from) {
    unsigned long long word;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    return word;
}

__device__ void store_relaxed(unsigned long long* to, unsigned long long word) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" :: "l"(to), "l"(word) : "memory");
}

// What the writer of the word did before its release is seen by what follows.
__device__ unsigned long long load_acquire(const unsigned long long* from) {
    unsigned long long word;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    return word;
}

__device__ void store_release(unsigned long long* to, unsigned long long word) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" :: "l"(to), "l"(word) : "memory");
}

__device__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// --- Bulk copies: one thread starts them, and they go on beside it. From sm_90 on; older GPUs are refused by the
// host. Addresses and sizes are multiples of 16 bytes.

#if __CUDA_ARCH__ >= 900
#define LPLB_BULK(...) asm volatile(__VA_ARGS__)
#else
#define LPLB_BULK(...) __trap()
#endif

__device__ unsigned shared_address(const void* shared) { return unsigned(__cvta_generic_to_shared(shared)); }

// A word of shared memory in which loads arrive; a phase ends when those that were announced have come.
__device__ void arrivals_init(unsigned long long* arrivals) {
    LPLB_BULK("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared_address(arrivals)) : "memory");
}

// What this thread wrote to shared memory is seen by the copies that follow.
__device__ void arrivals_are_ready() {
    LPLB_BULK("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}

// What this thread has seen happen in global memory is before the copies that follow.
__device__ void fence_bulk() { LPLB_BULK("fence.proxy.async.global;" ::: "memory"); }

// Begins a phase of `bytes`, loaded by the calls of `bulk_load` that follow.
__device__ void arrivals_expect(unsigned long long* arrivals, int bytes) {
    LPLB_BULK("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
              :: "r"(shared_address(arrivals)), "r"(bytes) : "memory");
}

// Waits for the end of a phase; phases have the parities 0, 1, 0, ...
__device__ void arrivals_wait(unsigned long long* arrivals, int parity) {
    unsigned done = 1;
    do
        LPLB_BULK("{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
                  : "=r"(done) : "r"(shared_address(arrivals)), "r"(parity) : "memory");
    while (done == 0);
}

__device__ void bulk_load(void* shared, const void* from, int bytes, unsigned long long* arrivals) {
    LPLB_BULK("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
              :: "r"(shared_address(shared)), "l"(from), "r"(bytes), "r"(shared_address(arrivals)) : "memory");
}

__device__ void bulk_store(void* to, const void* shared, int bytes) {
    LPLB_BULK("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
              :: "l"(to), "r"(shared_address(shared)), "r"(bytes) : "memory");
}

// The stores since the last group are one, perhaps of none.
__device__ void bulk_end_group() { LPLB_BULK("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all groups but the last `number` have read their shared memory.
template <int number>
__device__ void bulk_wait_read() {
    LPLB_BULK("cp.async.bulk.wait_group.read %0;" :: "n"(number) : "memory");
}

// Waits until all that this thread stored has come.
__device__ void bulk_wait() { LPLB_BULK("cp.async.bulk.wait_group 0;" ::: "memory"); }

// A barrier of the first `threads` threads of a block, a multiple of 32; the others pass it by.
template <int threads>
__device__ void barrier_of_first() {
    asm volatile("bar.sync 1, %0;" :: "n"(threads) : "memory");
}

// The address as it is, made here: the compiler keeps it in a register instead of making it anew.
template <typename T>
__device__ void keep_in_register(T*& address) {
    asm volatile("" : "+l"(address));
}
