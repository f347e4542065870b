// Words that GPUs write to one another, and the clock that they share.
#pragma once

typedef unsigned long long Word;

__device__ long long nanoseconds() {
    long long time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}
