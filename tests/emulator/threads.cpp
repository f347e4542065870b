// CUDA's execution model on the host: threads are fibres of one host thread, in an order that is chosen.
//
// Ranks have a stream each. The blocks of their kernels take turns, and a block's threads take turns at each
// barrier, vote or shuffle; in random orders also at any access to memory. Shared memory is what the kernels
// declare `thread_local`: it is swapped when another block goes on.

#include "runtime.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <numeric>

Fiber* self;
bool moved;

namespace {

constexpr int MAX_RESIDENT = 3;  // blocks of a launch at once
constexpr int MAX_IDLE_TURNS = 20000;

struct Failed {};
struct Running {  // a launch
    const Operation* launch;
    std::vector<int> order;  // the first blocks of clusters
    size_t next;
    std::vector<Block*> resident;
};

std::vector<Fiber*> idle_fibers;
std::vector<std::pair<Module*, Block*>> occupants;  // whose shared memory is in place
jmp_buf scheduler;
unsigned num_blocks;
uint64_t random_state;
int order, until_switch;
long long now;  // ns
char message[1024];
const char* fault_at;

unsigned random_below(unsigned limit) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return unsigned(random_state >> 33) % limit;
}

}  // namespace

void fail(const char* at, const char* format, ...) {
    va_list values;
    va_start(values, format);
    int length = vsnprintf(message, sizeof message, format, values);
    va_end(values);
    if (self != nullptr)
        snprintf(message + length, sizeof message - length, "; block (%u, %u), thread %d",
                 self->block->index.x, self->block->index.y, self->thread);
    fault_at = at;
    if (self == nullptr) throw Failed{};
    _longjmp(scheduler, 2);
}

void switch_out() {
    Fiber* me = self;
    if (_setjmp(me->at) == 0) _longjmp(scheduler, 1);
}

// Lets other threads go on, in random orders and now and then.
void perhaps_switch() {
    if (order < 2 || --until_switch > 0) return;
    until_switch = 1 + random_below(120);
    switch_out();
}

long long advance_clock() { return now += 1000; }

bool is_late() { return order == 1 || (order > 1 && random_below(2) == 1); }

namespace {

void run_fibers() {
    for (;;) {
        self->block->launch->entry(self->block->launch->arguments);
        self->done = moved = true;
        --self->block->num_alive;
        switch_out();
    }
}

Fiber* new_fiber() {
    if (!idle_fibers.empty()) {
        Fiber* fiber = idle_fibers.back();
        idle_fibers.pop_back();
        return fiber;
    }
    Fiber* fiber = new Fiber{};
    void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail(nullptr, "no memory for the stacks of threads");
    fiber->stack = static_cast<char*>(stack);
    return fiber;
}

// Calls `take` with each piece of the shared memory that a block has.
template <typename Take>
void each_piece(const Block& block, Take take) {
    const Module& module = *block.launch->module;
    char* at = module.tls;
    for (char* dynamic : module.dynamic) {
        if (dynamic == nullptr) continue;
        take(at, size_t(dynamic - at));
        take(dynamic, size_t(block.launch->num_shared_bytes));
        at = dynamic + module.dynamic_size;
    }
    take(at, size_t(module.tls + module.tls_size - at));
}

}  // namespace

char* shared_byte(Block& block, char* at) {
    for (auto& [module, occupant] : occupants)
        if (module == block.launch->module && occupant == &block) return at;
    char* found = nullptr;
    size_t before = 0;
    each_piece(block, [&](char* piece, size_t size) {
        if (at >= piece && at < piece + size) found = block.image.data() + before + (at - piece);
        before += size;
    });
    return found;
}

namespace {

void move_in(Block& block) {
    for (auto& [module, occupant] : occupants) {
        if (module != block.launch->module || occupant == &block) continue;
        if (occupant != nullptr) {
            occupant->image.clear();
            each_piece(*occupant, [&](char* from, size_t size) {
                occupant->image.insert(occupant->image.end(), from, from + size);
            });
        }
        const char* from = block.image.data();
        each_piece(block, [&](char* to, size_t size) {
            memcpy(to, from, size);
            from += size;
        });
        occupant = &block;
    }
}

Block* new_block(const Operation& launch, int number, Cluster* cluster) {
    Block* block = new Block{};
    block->launch = &launch;
    block->number = ++num_blocks;
    block->index = {unsigned(number % launch.grid_x), unsigned(number / launch.grid_x), 0};
    block->num_alive = launch.num_threads;
    block->cluster = cluster;
    block->place = int(cluster->blocks.size());
    cluster->blocks.push_back(block);
    block->warps.resize(launch.num_threads / WARP);
    size_t static_size = launch.module->tls_size, size = 0;
    for (char* dynamic : launch.module->dynamic)
        if (dynamic != nullptr) static_size -= launch.module->dynamic_size;
    block->static_cells.resize(static_size / 2 + 1);
    block->dynamic_cells.resize((launch.num_shared_bytes + 1) / 2);
    each_piece(*block, [&](char*, size_t piece) { size += piece; });
    block->image.resize(size);
    for (char& byte : block->image) byte = char(random_below(256));  // as a block before may leave it
    for (int t = 0; t < launch.num_threads; ++t) {
        Fiber* fiber = new_fiber();
        char* stack = fiber->stack;
        if (fiber->started) {  // it goes on in `run_fibers`
            fiber->block = block;
            fiber->thread = t;
            fiber->done = false;
            fiber->waits_for = nullptr;
            fiber->cluster_generation = 0;
            fiber->has_met_cluster = false;
            fiber->id = fiber->block_epoch = fiber->named_epoch = fiber->warp_epoch = fiber->vote_epoch = 0;
        } else {
            *fiber = Fiber{};
            fiber->stack = stack;
            fiber->block = block;
            fiber->thread = t;
            getcontext(&fiber->context);
            fiber->context.uc_stack.ss_sp = stack;
            fiber->context.uc_stack.ss_size = STACK;
            makecontext(&fiber->context, run_fibers, 0);
        }
        block->fibers.push_back(fiber);
    }
    return block;
}

void forget(Block* block) {
    end_of_messages(block);
    for (auto& [module, occupant] : occupants)
        if (occupant == block) occupant = nullptr;
    for (Fiber* fiber : block->fibers) idle_fibers.push_back(fiber);
    auto& blocks = block->cluster->blocks;
    blocks[block->place] = nullptr;
    if (std::all_of(blocks.begin(), blocks.end(), [](Block* one) { return one == nullptr; })) delete block->cluster;
    delete block;
}

// Each thread of the block that can goes on until it waits. Whether one could.
bool take_turn(Block& block) {
    move_in(block);
    int size = int(block.fibers.size()), begin = 0, step = 1;
    if (order == 1) {
        begin = size - 1;
        step = size - 1;  // backwards
    } else if (order > 1) {
        begin = random_below(size);
        step = 2 * random_below(size / 2) + 1;
        while (std::__gcd(step, size) != 1) step += 2;
    }
    bool any = false;
    for (int i = 0, t = begin; i < size; ++i, t = (t + step) % size) {
        Fiber* fiber = block.fibers[t];
        if (fiber->done) continue;
        if (fiber->waits_for != nullptr && fiber->waits_for->generation == fiber->generation) continue;
        fiber->waits_for = nullptr;
        any = true;
        self = fiber;
        int came = _setjmp(scheduler);
        if (came == 0) {
            if (fiber->started) _longjmp(fiber->at, 1);
            fiber->started = true;
            setcontext(&fiber->context);
        }
        if (came == 2) throw Failed{};
    }
    self = nullptr;
    return any;
}

// Whether threads of the block wait for other blocks.
bool waits_for_cluster(const Block& block) {
    return std::any_of(block.fibers.begin(), block.fibers.end(), [&](const Fiber* fiber) {
        return !fiber->done && fiber->waits_for == &block.cluster->all;
    });
}

void report_deadlock(Block& block) {
    int length = snprintf(message, sizeof message, "synccheck: block (%u, %u) waits for ever:",
                          block.index.x, block.index.y);
    std::map<const char*, int> number;
    for (Fiber* fiber : block.fibers)
        if (!fiber->done) ++number[fiber->waits_for->what];
    for (auto& [what, waiting] : number)
        length += snprintf(message + length, sizeof message - length, " %d threads at %s,", waiting, what);
    snprintf(message + length, sizeof message - length, " %d have ended",
             int(block.fibers.size()) - block.num_alive);
    throw Failed{};
}

template <typename T>
void shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[random_below(unsigned(i))]);
}

// Begins what the stream has next; null if there is nothing left to run.
Running* advance(const Stream& stream, int& next) {
    while (next < stream.num_operations) {
        const Operation& operation = stream.operations[next++];
        if (operation.entry == nullptr) {
            if (operation.source != nullptr) {
                memcpy(operation.target, operation.source, operation.number);
                mark_written(operation.target, operation.number);
            } else {
                *reinterpret_cast<uint64_t*>(operation.target) += operation.number;
                mark_written(operation.target, 8);
            }
            continue;
        }
        if (operation.grid_x % operation.cluster != 0)
            fail(nullptr, "a grid of %d blocks in clusters of %d", operation.grid_x, operation.cluster);
        Running* running = new Running{&operation, {}, 0, {}};
        for (int i = 0; i < operation.grid_x * operation.grid_y; i += operation.cluster) running->order.push_back(i);
        if (order == 1) std::reverse(running->order.begin(), running->order.end());
        if (order > 1) shuffle(running->order);
        return running;
    }
    return nullptr;
}

void run(const Stream* streams, int num_streams) {
    std::vector<Running*> running(num_streams);
    std::vector<int> next(num_streams);
    int idle = 0, burst = 0;  // idle: turns since a thread has moved
    unsigned s = 0;
    std::vector<unsigned> ranking(num_streams);
    std::iota(ranking.begin(), ranking.end(), 0);
    shuffle(ranking);
    for (int s = 0; s < num_streams; ++s) running[s] = advance(streams[s], next[s]);
    for (unsigned turn = 0;; ++turn) {
        int alive = 0;
        for (Running* one : running) alive += one != nullptr;
        if (alive == 0) return;
        if (order < 2) {
            s = order == 0 ? turn % num_streams : num_streams - 1 - turn % num_streams;
        } else if (order % 2 == 0) {  // one goes on while the others stand still, for any length of time
            if (--burst <= 0 || idle > 0) s = random_below(num_streams);
            if (burst <= 0) burst = 1 << random_below(12);
        } else {  // the first goes on that can: to see what others wrote takes it a few turns
            s = ranking[idle / 8 % num_streams];
        }
        if (running[s] == nullptr) {
            burst = 0;
            ++idle;
            continue;
        }
        Running& one = *running[s];
        int cluster = one.launch->cluster, most = std::max(MAX_RESIDENT, cluster);
        while (int(one.resident.size()) + cluster <= most && one.next < one.order.size()) {
            auto* blocks = new Cluster{};
            for (int i = 0; i < cluster; ++i)
                one.resident.push_back(new_block(*one.launch, one.order[one.next] + i, blocks));
            if (order == 1) std::reverse(one.resident.end() - cluster, one.resident.end());
            ++one.next;
        }
        // In order a block goes on until it ends or looks whether another rank has written.
        size_t which = order > 1 ? random_below(unsigned(one.resident.size())) : 0;
        Block* block = one.resident[which];
        do {
            block->spins = moved = false;
            if (!take_turn(*block)) {
                if (!waits_for_cluster(*block)) report_deadlock(*block);
                block->spins = true;
            }
            idle = moved ? 0 : idle + 1;
            if (idle > MAX_IDLE_TURNS) fail(nullptr, "synccheck: ranks wait for each other for ever");
        } while (order < 2 && block->num_alive != 0 && !block->spins);
        if (block->num_alive != 0) {
            if (order < 2) std::rotate(one.resident.begin(), one.resident.begin() + 1, one.resident.end());
            continue;
        }
        one.resident.erase(std::find(one.resident.begin(), one.resident.end(), block));
        forget(block);
        if (one.resident.empty() && one.next == one.order.size()) {
            delete running[s];
            running[s] = advance(streams[s], next[s]);
        }
    }
}

}  // namespace

// Null, or what went wrong; `at`: where in the code, or null.
extern "C" const char* emulator_run(const Stream* streams, int num_streams, int how, const char** at) {
    order = how;
    random_state = how * 0x9e3779b97f4a7c15u;
    until_switch = 1;
    now = 0;
    message[0] = 0;
    fault_at = nullptr;
    occupants.clear();
    for (int s = 0; s < num_streams; ++s)
        for (int i = 0; i < streams[s].num_operations; ++i) {
            Module* module = streams[s].operations[i].module;
            auto known = [&](const auto& one) { return one.first == module; };
            if (module != nullptr && std::none_of(occupants.begin(), occupants.end(), known))
                occupants.push_back({module, nullptr});
        }
    try {
        run(streams, num_streams);
    } catch (Failed) {
        // The fibres that were on their way are left as they are.
    }
    self = nullptr;
    forget_accesses();
    forget_copies();
    *at = fault_at;
    return message[0] == 0 ? nullptr : message;
}
