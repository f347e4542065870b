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

// --- What GPUs have from sm_90 on; older ones never come here.

#if __CUDA_ARCH__ >= 900
#define LPLB_SM_90(...) asm volatile(__VA_ARGS__)
#else
#define LPLB_SM_90(...) __trap()
#endif

// --- Bulk copies: one thread starts them, and they go on beside it. Addresses and sizes are multiples of 16 bytes.

__device__ unsigned shared_address(const void* shared) { return unsigned(__cvta_generic_to_shared(shared)); }

// A word of shared memory in which loads arrive; a phase ends when those that were announced have come.
__device__ void arrivals_init(unsigned long long* arrivals) {
    LPLB_SM_90("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared_address(arrivals)) : "memory");
}

// What this thread wrote to shared memory is seen by the copies that follow.
__device__ void arrivals_are_ready() {
    LPLB_SM_90("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}

// What this thread has seen happen in global memory is before the copies that follow.
__device__ void fence_bulk() { LPLB_SM_90("fence.proxy.async.global;" ::: "memory"); }

// Begins a phase of `bytes`, loaded by the calls of `bulk_load` that follow.
__device__ void arrivals_expect(unsigned long long* arrivals, int bytes) {
    LPLB_SM_90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
              :: "r"(shared_address(arrivals)), "r"(bytes) : "memory");
}

// Waits for the end of a phase; phases have the parities 0, 1, 0, ...
__device__ void arrivals_wait(unsigned long long* arrivals, int parity) {
    unsigned done = 1;
    do
        LPLB_SM_90("{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
                  : "=r"(done) : "r"(shared_address(arrivals)), "r"(parity) : "memory");
    while (done == 0);
}

__device__ void bulk_load(void* shared, const void* from, int bytes, unsigned long long* arrivals) {
    LPLB_SM_90("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
              :: "r"(shared_address(shared)), "l"(from), "r"(bytes), "r"(shared_address(arrivals)) : "memory");
}

__device__ void bulk_store(void* to, const void* shared, int bytes) {
    LPLB_SM_90("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
              :: "l"(to), "r"(shared_address(shared)), "r"(bytes) : "memory");
}

// The stores since the last group are one, perhaps of none.
__device__ void bulk_end_group() { LPLB_SM_90("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all groups but the last `number` have read their shared memory.
template <int number>
__device__ void bulk_wait_read() {
    LPLB_SM_90("cp.async.bulk.wait_group.read %0;" :: "n"(number) : "memory");
}

// Waits until all that this thread stored has come.
__device__ void bulk_wait() { LPLB_SM_90("cp.async.bulk.wait_group 0;" ::: "memory"); }

// --- Clusters: blocks that run at the same time, and send each other words. A word comes into the other block's shared
// memory, and then it counts there as arrived. Who has waited for all of a phase sees them, without a fence.

// A barrier of all threads of a cluster, in two parts. It orders no memory: a fence of the whole memory, as it would
// need, takes as long as a load. Words of arrivals that were made ready before the first part are so behind the second.
__device__ void arrivals_are_ready_for_cluster() { LPLB_SM_90("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ void cluster_arrive() { LPLB_SM_90("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ void cluster_wait() { LPLB_SM_90("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Where a block of the cluster has a variable of shared memory. `shared`: where this block has its own.
__device__ unsigned address_in(int block, const void* shared) {
    unsigned address = shared_address(shared);
    LPLB_SM_90("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(block));
    return address;
}

__device__ void send(int block, int* to, int value, unsigned long long* arrivals) {
    LPLB_SM_90("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
               :: "r"(address_in(block, to)), "r"(value), "r"(address_in(block, arrivals)) : "memory");
}

__device__ void send(int block, int4* to, int4 value, unsigned long long* arrivals) {
    LPLB_SM_90("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
               :: "r"(address_in(block, to)), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w),
                  "r"(address_in(block, arrivals)) : "memory");
}

// Raises a word to a value, if it is less.
__device__ void send_at_least(int block, unsigned* to, unsigned value, unsigned long long* arrivals) {
    LPLB_SM_90("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.max.u32 [%0], %1, [%2];"
               :: "r"(address_in(block, to)), "r"(value), "r"(address_in(block, arrivals)) : "memory");
}

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
