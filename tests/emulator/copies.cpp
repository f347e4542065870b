// Bulk copies, as late as they may be. A load arrives when it is waited for; until then its shared memory holds
// anything. A store reads its shared memory when that is waited for, and comes when all stores are waited for.
// Words between the blocks of a cluster come at once, or when they are waited for, by the order of threads.

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
    int arrived;        // bytes of words that have come
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
struct Message {  // words for another block
    Block* block;
    uint64_t* arrivals;
    char* to;
    size_t size;
    bool raises;
    char value[16];
};
std::vector<Message> messages;
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

Phase& phase_of(Block* block, uint64_t* arrivals, const char* at) {
    for (Phase& phase : phases)
        if (phase.block == block && phase.arrivals == arrivals) return phase;
    fail(at, "synccheck: loads arrive in a word that was not initialised");
}

void come(const Message& one, const char* at) {
    Phase& phase = phase_of(one.block, one.arrivals, at);
    mark_sent(*one.block, one.to, one.size, at);
    char* to = shared_byte(*one.block, one.to);
    unsigned before = 0, value;
    memcpy(&value, one.value, sizeof value);
    if (one.raises) memcpy(&before, to, sizeof before);
    if (!one.raises || before < value) memcpy(to, one.value, one.size);
    phase.arrived += int(one.size);
    moved = true;
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
    messages.clear();
    phases.clear();
    loads.clear();
    stores.clear();
    num_groups.clear();
}

void end_of_messages(Block* block) {
    for (const Message& one : messages)
        if (one.block == block) fail(nullptr, "memcheck: a block ends, and words for it are on their way");
    auto same = [&](const Phase& phase) { return phase.block == block; };
    phases.erase(std::remove_if(phases.begin(), phases.end(), same), phases.end());
}

extern "C" {

void emulated_arrivals_init(uint64_t* arrivals) {
    auto same = [&](const Phase& phase) { return phase.block == self->block && phase.arrivals == arrivals; };
    phases.erase(std::remove_if(phases.begin(), phases.end(), same), phases.end());
    phases.push_back({self->block, arrivals, false, 0, 0, 0});
}

void emulated_arrivals_expect(uint64_t* arrivals, int bytes) {
    Phase& phase = phase_of(self->block, arrivals, HERE);
    if (phase.expects) fail(HERE, "synccheck: a phase begins before the last was waited for");
    phase.expects = true;
    phase.bytes = bytes;
}

void emulated_bulk_load(void* shared, const void* from, int bytes, uint64_t* arrivals) {
    check(shared, from, bytes, HERE);
    Phase& phase = phase_of(self->block, arrivals, HERE);
    if (!phase.expects) fail(HERE, "synccheck: a load that was not announced");
    judge(from, bytes, READ, HERE);
    judge(shared, bytes, WRITE, HERE);  // what threads read there they have read
    memset(shared, 0xA5, bytes);
    loads.push_back({self->block, arrivals, static_cast<char*>(shared), static_cast<const char*>(from), bytes});
}

void emulated_send(int block, void* to, const void* value, size_t size, int raises, uint64_t* arrivals) {
    auto& blocks = self->block->cluster->blocks;
    if (block < 0 || block >= int(blocks.size())) fail(HERE, "memcheck: a cluster has no block %d", block);
    if (blocks[block] == nullptr) fail(HERE, "memcheck: words are sent to block %d, which has ended", block);
    // Whether they have begun in this run or not.
    if (!self->has_met_cluster) fail(HERE, "synccheck: words are sent before all blocks have begun");
    perhaps_switch();
    Message one{blocks[block], arrivals, static_cast<char*>(to), size, raises != 0, {}};
    memcpy(one.value, value, size);
    if (is_late()) messages.push_back(one);
    else come(one, HERE);
}

void emulated_arrivals_wait(uint64_t* arrivals, int parity) {
    int bytes = 0;
    for (;;) {
        Phase& phase = phase_of(self->block, arrivals, HERE);
        if (phase.number % 2 != parity) return;
        if (!phase.expects) fail(HERE, "synccheck: a wait for a phase that has not begun");
        for (size_t i = 0; i < messages.size();) {
            Message one = messages[i];
            if (one.block != self->block || one.arrivals != arrivals) {
                ++i;
                continue;
            }
            messages.erase(messages.begin() + i);
            come(one, HERE);
        }
        if (self->block->cluster->blocks.size() == 1 || phase.arrived >= phase.bytes) break;
        self->block->spins = true;  // other blocks have not sent all yet
        switch_out();
    }
    Phase& phase = phase_of(self->block, arrivals, HERE);
    bytes = phase.arrived;
    phase.arrived = 0;
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
