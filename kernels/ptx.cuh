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
