// What the kernels call: barriers, votes, shuffles, atomics, and words of other ranks. cuda.h declares it.

#include "runtime.h"

#include <algorithm>

namespace {

void wait_at(Barrier& barrier, int size, const char* what, const char* at) {
    if (barrier.waiting == 0) barrier.what = what;
    else if (barrier.what != what)
        fail(at, "synccheck: a thread comes to %s, and others to %s", what, barrier.what);
    if (++barrier.waiting == size) {
        barrier.waiting = 0;
        moved = true;
        ++barrier.generation;
        barrier.any[(barrier.generation + 1) & 1] = false;  // of the next time; all have read the last
        return;
    }
    self->waits_for = &barrier;
    self->generation = barrier.generation;
    switch_out();
}

Barrier& warp() { return self->block->warps[self->thread / WARP]; }

// Of all lanes: this and what follows may come from the next round before all have read this one.
const uint64_t* values_of_warp(unsigned mask, uint64_t value, const char* what, const char* at) {
    if (mask != ~0u) fail(at, "synccheck: %s with the mask %08x", what, mask);
    Barrier& barrier = warp();
    uint64_t* values = barrier.values[barrier.generation & 1];
    values[self->thread % WARP] = value;
    wait_at(barrier, WARP, what, at);
    ++self->vote_epoch;
    self->id = 0;
    return values;
}

}  // namespace

extern "C" {

#define HERE static_cast<const char*>(__builtin_return_address(0))

Index3 emulated_thread() { return {unsigned(self->thread), 0, 0}; }
Index3 emulated_block() { return self->block->index; }
Index3 emulated_block_size() { return {unsigned(self->block->fibers.size()), 1, 1}; }
Index3 emulated_grid_size() {
    return {unsigned(self->block->launch->grid_x), unsigned(self->block->launch->grid_y), 1};
}

void __syncthreads() {
    wait_at(self->block->all, int(self->block->fibers.size()), "__syncthreads", HERE);
    ++self->block_epoch;
    self->id = 0;
}

int __syncthreads_or(int condition) {
    Barrier& all = self->block->all;
    bool& any = all.any[(all.generation + 1) & 1];
    any |= condition != 0;
    bool* result = &any;
    wait_at(all, int(self->block->fibers.size()), "__syncthreads_or", HERE);
    ++self->block_epoch;
    self->id = 0;
    return *result;
}

void emulated_barrier_of_first(int num_threads) {
    if (self->thread >= num_threads) fail(HERE, "synccheck: a barrier of the first %d threads", num_threads);
    self->block->named_size = num_threads;
    wait_at(self->block->named, num_threads, "the barrier of the first threads", HERE);
    ++self->named_epoch;
    self->id = 0;
}

void emulated_cluster_arrive() {
    Barrier& all = self->block->cluster->all;
    self->cluster_generation = all.generation;
    self->has_met_cluster = false;
    if (++all.waiting < int(self->block->cluster->blocks.size() * self->block->fibers.size())) return;
    all.waiting = 0;
    moved = true;
    ++all.generation;
}

// Orders no memory between threads of a block, since not all of them may publish theirs.
void emulated_cluster_wait() {
    Barrier& all = self->block->cluster->all;
    all.what = "the barrier of a cluster";
    self->has_met_cluster = true;  // as soon as this returns
    if (all.generation != self->cluster_generation) return;
    self->waits_for = &all;
    self->generation = all.generation;
    switch_out();
}

void __syncwarp() {
    wait_at(warp(), WARP, "__syncwarp", HERE);
    ++self->warp_epoch;
    self->id = 0;
}

unsigned __ballot_sync(unsigned mask, int condition) {
    const uint64_t* values = values_of_warp(mask, condition != 0, "__ballot_sync", HERE);
    unsigned votes = 0;
    for (int lane = 0; lane < WARP; ++lane) votes |= unsigned(values[lane]) << lane;
    return votes;
}

unsigned emulated_match(unsigned mask, uint64_t value) {
    const uint64_t* values = values_of_warp(mask, value, "__match_any_sync", HERE);
    unsigned same = 0;
    for (int lane = 0; lane < WARP; ++lane) same |= unsigned(values[lane] == value) << lane;
    return same;
}

uint64_t emulated_shuffle(unsigned mask, uint64_t value, int source, int width, int how) {
    const uint64_t* values = values_of_warp(mask, value, "__shfl_sync", HERE);
    int lane = self->thread % WARP, from = lane;
    if (how == 0) from = lane / width * width + source % width;
    if (how == 1 && lane % width >= source) from = lane - source;
    if (how == 2) from = lane ^ source;
    return values[from];
}

unsigned emulated_sum(unsigned mask, unsigned value) {
    const uint64_t* values = values_of_warp(mask, value, "__reduce_add_sync", HERE);
    unsigned sum = 0;
    for (int lane = 0; lane < WARP; ++lane) sum += unsigned(values[lane]);
    return sum;
}

int emulated_max(unsigned mask, int value) {
    const uint64_t* values = values_of_warp(mask, unsigned(value), "__reduce_max_sync", HERE);
    int most = value;
    for (int lane = 0; lane < WARP; ++lane) most = std::max(most, int(unsigned(values[lane])));
    return most;
}

unsigned emulated_max_unsigned(unsigned mask, unsigned value) {
    const uint64_t* values = values_of_warp(mask, value, "__reduce_max_sync of unsigned", HERE);
    unsigned most = value;
    for (int lane = 0; lane < WARP; ++lane) most = std::max(most, unsigned(values[lane]));
    return most;
}

int emulated_add(int* to, int value) {
    judge(to, 4, READ | WRITE | AT_ONCE, HERE);
    int before = *to;
    *to = int(unsigned(before) + unsigned(value));
    return before;
}

unsigned long long emulated_add_long(unsigned long long* to, unsigned long long value) {
    judge(to, 8, READ | WRITE | AT_ONCE, HERE);
    unsigned long long before = *to;
    *to = before + value;
    return before;
}

int emulated_min_at(int* to, int value) {
    judge(to, 4, READ | WRITE | AT_ONCE, HERE);
    int before = *to;
    *to = std::min(before, value);
    return before;
}

unsigned emulated_min_at_unsigned(unsigned* to, unsigned value) {
    judge(to, 4, READ | WRITE | AT_ONCE, HERE);
    unsigned before = *to;
    *to = std::min(before, value);
    return before;
}

unsigned emulated_or(unsigned* to, unsigned value) {
    judge(to, 4, READ | WRITE | AT_ONCE, HERE);
    unsigned before = *to;
    *to = before | value;
    return before;
}

int emulated_max_at(int* to, int value) {
    judge(to, 4, READ | WRITE | AT_ONCE, HERE);
    int before = *to;
    *to = std::max(before, value);
    return before;
}

unsigned emulated_max_at_unsigned(unsigned* to, unsigned value) {
    judge(to, 4, READ | WRITE | AT_ONCE, HERE);
    unsigned before = *to;
    *to = std::max(before, value);
    return before;
}

long long emulated_clock() {
    self->block->spins = true;
    switch_out();
    return advance_clock();
}

unsigned long long emulated_load(const unsigned long long* from) {
    self->block->spins = true;
    switch_out();
    judge(from, 8, READ | AT_ONCE, HERE);
    return *from;
}

void emulated_store(unsigned long long* to, unsigned long long word) {
    judge(to, 8, WRITE | AT_ONCE, HERE);
    *to = word;
}

}  // extern "C"
