// Bulk copies, as late as they may be. A load arrives when it is waited for; until then its shared memory holds
// anything. A store reads its shared memory when that is waited for, and comes when all stores are waited for.

#include "runtime.h"

#include <string.h>

#include <algorithm>
#include <utility>

namespace {

constexpr int MULTIPLE = 16;  // of addresses and sizes

struct Phase {  // of a word in which loads arrive
    Block* block;
    uint64_t* arrivals;
    bool expects;
    int bytes, number;  // bytes that are expected, and phases that have ended
};
struct Load {
    Block* block;
    uint64_t* arrivals;
    char* shared;
    const char* from;
    int bytes;
};
struct Store {
    unsigned block;  // its number, and the thread
    int thread;
    char* to;
    const char* shared;
    int bytes;
    int group;  // of the thread's; -1: not ended yet
    std::vector<char> read;
};
std::vector<Phase> phases;
std::vector<Load> loads;
std::vector<Store> stores;
struct Groups {
    unsigned block;
    int thread, number;
};
std::vector<Groups> num_groups;

#define HERE static_cast<const char*>(__builtin_return_address(0))

void check(const void* to, const void* from, int bytes, const char* at) {
    if ((size_t(to) | size_t(from) | size_t(bytes)) % MULTIPLE != 0 || bytes <= 0)
        fail(at, "memcheck: a bulk copy of %d bytes from %p to %p", bytes, from, to);
}

Phase& phase_of(uint64_t* arrivals, const char* at) {
    for (Phase& phase : phases)
        if (phase.block == self->block && phase.arrivals == arrivals) return phase;
    fail(at, "synccheck: loads arrive in a word that was not initialised");
}

int& groups_of_thread() {
    for (Groups& groups : num_groups)
        if (groups.block == self->block->number && groups.thread == self->thread) return groups.number;
    num_groups.push_back({self->block->number, self->thread, 0});
    return num_groups.back().number;
}

bool is_mine(const Store& store) { return store.block == self->block->number && store.thread == self->thread; }

}  // namespace

void forget_copies() {
    phases.clear();
    loads.clear();
    stores.clear();
    num_groups.clear();
}

extern "C" {

void emulated_arrivals_init(uint64_t* arrivals) {
    auto same = [&](const Phase& phase) { return phase.block == self->block && phase.arrivals == arrivals; };
    phases.erase(std::remove_if(phases.begin(), phases.end(), same), phases.end());
    phases.push_back({self->block, arrivals, false, 0, 0});
}

void emulated_arrivals_expect(uint64_t* arrivals, int bytes) {
    Phase& phase = phase_of(arrivals, HERE);
    if (phase.expects) fail(HERE, "synccheck: a phase begins before the last was waited for");
    phase.expects = true;
    phase.bytes = bytes;
}

void emulated_bulk_load(void* shared, const void* from, int bytes, uint64_t* arrivals) {
    check(shared, from, bytes, HERE);
    Phase& phase = phase_of(arrivals, HERE);
    if (!phase.expects) fail(HERE, "synccheck: a load that was not announced");
    judge(from, bytes, READ, HERE);
    judge(shared, bytes, WRITE, HERE);  // what threads read there they have read
    memset(shared, 0xA5, bytes);
    loads.push_back({self->block, arrivals, static_cast<char*>(shared), static_cast<const char*>(from), bytes});
}

void emulated_arrivals_wait(uint64_t* arrivals, int parity) {
    Phase& phase = phase_of(arrivals, HERE);
    int bytes = 0;
    bool mine = phase.number % 2 == parity;
    if (mine && !phase.expects) fail(HERE, "synccheck: a wait for a phase that has not begun");
    if (!mine) return;
    for (size_t i = 0; i < loads.size();) {
        Load load = loads[i];
        if (load.block != self->block || load.arrivals != arrivals) {
            ++i;
            continue;
        }
        memcpy(load.shared, load.from, load.bytes);
        mark_arrived(load.shared, load.bytes);
        bytes += load.bytes;
        loads.erase(loads.begin() + i);
    }
    if (bytes != phase.bytes) fail(HERE, "synccheck: %d bytes of %d arrive", bytes, phase.bytes);
    phase.expects = false;
    ++phase.number;
    moved = true;
}

void emulated_bulk_store(void* to, const void* shared, int bytes) {
    check(to, shared, bytes, HERE);
    judge(shared, bytes, READ, HERE);
    stores.push_back({self->block->number, self->thread, static_cast<char*>(to), static_cast<const char*>(shared), bytes, -1, {}});
}

void emulated_bulk_end_group() {
    int number = groups_of_thread()++;
    for (Store& store : stores)
        if (is_mine(store) && store.group < 0) store.group = number;
}

void emulated_bulk_wait(int number, int comes) {
    int last = groups_of_thread() - number;
    for (size_t i = 0; i < stores.size();) {
        Store& store = stores[i];
        if (!is_mine(store) || store.group < 0 || store.group >= last) {
            ++i;
            continue;
        }
        if (store.read.empty()) store.read.assign(store.shared, store.shared + store.bytes);
        if (!comes) {
            ++i;
            continue;
        }
        Store done = std::move(store);
        stores.erase(stores.begin() + i);
        judge(done.to, done.bytes, WRITE, HERE);
        memcpy(done.to, done.read.data(), done.bytes);
        i = 0;  // other threads may have run within `judge`, and have changed `stores`
    }
}

}  // extern "C"
