// PTX instructions without an equivalent in CUDA C++, each in a function of its own. No other source has PTX. So a
// host compiler needs another version of this header only.
#pragma once

// The clock that all GPUs of a host share.
__device__ long long nanoseconds() {
    long long time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

// Loads a word that another GPU may write at the same time: the old value or the new one, never a mixture.
__device__ unsigned long long load_relaxed(const unsigned long long* from) {
    unsigned long long word;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    return word;
}

__device__ void store_relaxed(unsigned long long* to, unsigned long long word) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" :: "l"(to), "l"(word) : "memory");
}

// All that the writer of the word wrote before its release is visible behind this load.
__device__ unsigned long long load_acquire(const unsigned long long* from) {
    unsigned long long word;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    return word;
}

__device__ void store_release(unsigned long long* to, unsigned long long word) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" :: "l"(to), "l"(word) : "memory");
}

__device__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// --- Instructions of sm_90 and later; no kernel runs them on older GPUs.

#if __CUDA_ARCH__ >= 900
#define LPLB_SM_90(...) asm volatile(__VA_ARGS__)
#else
#define LPLB_SM_90(...) __trap()
#endif

// --- Bulk copies: one thread starts them, and they run asynchronously. Addresses and sizes are multiples of 16 bytes.

__device__ unsigned shared_address(const void* shared) { return unsigned(__cvta_generic_to_shared(shared)); }

// An mbarrier: a word of shared memory that counts arriving bytes. A phase ends when all expected bytes have arrived.
__device__ void arrivals_init(unsigned long long* arrivals) {
    LPLB_SM_90("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared_address(arrivals)) : "memory");
}

// Makes this thread's writes to shared memory visible to the copies that follow.
__device__ void arrivals_are_ready() {
    LPLB_SM_90("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}

// Orders the copies that follow behind all accesses to global memory that this thread has seen.
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

// Makes one group of the stores since the last group, which may be empty.
__device__ void bulk_end_group() { LPLB_SM_90("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all groups but the last `number` have read their shared memory.
template <int number>
__device__ void bulk_wait_read() {
    LPLB_SM_90("cp.async.bulk.wait_group.read %0;" :: "n"(number) : "memory");
}

// Waits until all stores of this thread are written.
__device__ void bulk_wait() { LPLB_SM_90("cp.async.bulk.wait_group 0;" ::: "memory"); }

// --- Clusters: blocks that run at the same time and send each other words. A word is written to the other block's shared
// memory and counted by an mbarrier there. A thread that has waited for a phase sees all its words, without a fence.

// A barrier of all threads of a cluster, in two parts. It orders no memory, since a fence would take as long as a load.
// Only mbarriers that were initialised before the first part are visible as such behind the second.
__device__ void arrivals_are_ready_for_cluster() { LPLB_SM_90("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ void cluster_arrive() { LPLB_SM_90("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ void cluster_wait() { LPLB_SM_90("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The address of a shared variable in another block of the cluster. `shared`: its address in this block.
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

// Raises a word to a value, if the word is less.
__device__ void send_at_least(int block, unsigned* to, unsigned value, unsigned long long* arrivals) {
    LPLB_SM_90("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.max.u32 [%0], %1, [%2];"
               :: "r"(address_in(block, to)), "r"(value), "r"(address_in(block, arrivals)) : "memory");
}

// A barrier of the first `threads` threads of a block, a multiple of 32; the others pass it by.
template <int threads>
__device__ void barrier_of_first() {
    asm volatile("bar.sync 1, %0;" :: "n"(threads) : "memory");
}

// Returns the address unchanged. The compiler keeps it in a register instead of computing it again.
template <typename T>
__device__ void keep_in_register(T*& address) {
    asm volatile("" : "+l"(address));
}
