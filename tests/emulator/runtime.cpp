// CUDA's execution model on the host: threads are fibres of one host thread, in an order that is chosen.
//
// Ranks have a stream each. The blocks of their kernels take turns, and a block's threads take turns at each
// barrier, vote or shuffle; in random orders also at any access to memory. Shared memory is what the kernels
// declare `thread_local`: it is swapped when another block goes on.
//
// Every access of a kernel to memory comes here (-fsanitize=thread) and is judged, as compute-sanitizer does:
//   memcheck   it lies in an array that was registered, or in the shared memory that the launch has;
//   initcheck  what it reads was written;
//   racecheck  threads of a block whose accesses meet have a barrier between, or both are atomic. A vote or
//              a shuffle of a warp is one for accesses that are volatile or atomic: a warp's accesses reach
//              shared memory in its order, and the compiler leaves these where they are;
//   synccheck  all threads of a warp do the same vote or shuffle, and no barrier waits for ever.
// Accesses of different blocks are not compared, and memory is seen in the order of execution.

#include <link.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <vector>

struct Index3 {
    unsigned x, y, z;
};

// What Python hands over; emulator.py declares the same.
struct Module {
    char *tls, *image, *image_end;  // of the library; its thread-local memory is shared memory
    size_t tls_size;
    char* dynamic[2];  // where its kernels have dynamic shared memory, by address; null: none
    size_t dynamic_size;
};
struct Operation {  // of a stream: a launch; or, without an entry, a copy; or without a source an addition
    void (*entry)(void** arguments);
    Module* module;
    void** arguments;
    int grid_x, grid_y, num_threads, num_shared_bytes;
    char *target, *source;
    size_t number;  // bytes, or what is added to the word at the target
};
struct Stream {
    const Operation* operations;
    int num_operations;
};

namespace {

constexpr size_t STACK = 64 << 10;
constexpr int WARP = 32, MAX_RESIDENT = 3;  // blocks of a launch at once
constexpr int MAX_IDLE_TURNS = 20000;
enum How { READ = 1, WRITE = 2, AT_ONCE = 4, IN_PLACE = 8 };  // atomic; volatile
constexpr unsigned HOST = 1, ATOMIC = 1u << 31, FIXED = 1u << 30;  // ids of accesses, and bits of them
enum Kind { BARRIER = 1, BARRIER_OR, NAMED, SYNC_WARP, BALLOT, MATCH, SHUFFLE, SUM, MAX, MAX_UNSIGNED };
const char* const NAMES[] = {"", "__syncthreads", "__syncthreads_or", "a barrier of the first threads",
                             "__syncwarp", "__ballot_sync", "__match_any_sync", "__shfl_sync",
                             "__reduce_add_sync", "__reduce_max_sync", "__reduce_max_sync"};

struct Cell {  // two bytes of memory: which accesses were the last
    unsigned write, read, other_read;
    unsigned write_at, read_at;  // where in the code
};
struct Region {
    char* begin;
    size_t size;
    bool initialised;
    std::vector<Cell> cells;
};
struct Barrier {
    int waiting = 0, kind = 0;
    unsigned generation = 0;
    bool any[2] = {};
    uint64_t values[2][WARP];
};
struct Block;
struct Fiber {
    ucontext_t context;
    jmp_buf at;
    char* stack;
    bool started;
    Block* block;
    int thread;
    bool done;
    Barrier* waits_for;
    unsigned generation, id;  // id: of its accesses since its last barrier; 0: none yet
    unsigned block_epoch, named_epoch, warp_epoch, vote_epoch;  // barriers and votes that it has passed
};
struct Access {
    unsigned block, block_epoch, named_epoch, warp_epoch, vote_epoch;
    int thread;
};
struct Block {
    const Operation* launch;
    unsigned number;
    Index3 index;
    std::vector<Fiber*> fibers;
    int num_alive, named_size;
    Barrier all, named;
    std::vector<Barrier> warps;
    std::vector<Cell> static_cells, dynamic_cells;
    std::vector<char> image;  // its shared memory while another block goes on
    bool spins;
};
struct Running {  // a launch
    const Operation* launch;
    std::vector<int> order;
    size_t next;
    std::vector<Block*> resident;
};

std::vector<std::unique_ptr<Region>> regions;
Region* recent;
std::vector<Fiber*> idle_fibers;
std::vector<Access> accesses;
std::vector<std::pair<Module*, Block*>> occupants;
Fiber* self;
jmp_buf scheduler;
unsigned first_id = HOST + 1, num_blocks, random_state;
int order, until_switch;
bool moved;  // whether a thread has written, ended or passed a barrier; else it only looks
long long now;
char message[1024];
const char* fault_at;

unsigned random_below(unsigned limit) {
    random_state = random_state * 1664525u + 1013904223u;
    return (random_state >> 8) % limit;
}

[[noreturn]] void fail(const char* at, const char* format, ...) {
    va_list values;
    va_start(values, format);
    int length = vsnprintf(message, sizeof message, format, values);
    va_end(values);
    if (self != nullptr)
        snprintf(message + length, sizeof message - length, "; block (%u, %u), thread %d",
                 self->block->index.x, self->block->index.y, self->thread);
    fault_at = at;
    if (self == nullptr) throw 0;
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

void wait_at(Barrier& barrier, int size, Kind kind, const char* at) {
    if (barrier.waiting == 0) barrier.kind = kind;
    else if (barrier.kind != kind)
        fail(at, "synccheck: a thread comes to %s, and others to %s", NAMES[kind], NAMES[barrier.kind]);
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
const uint64_t* values_of_warp(unsigned mask, uint64_t value, Kind kind, const char* at) {
    if (mask != ~0u) fail(at, "synccheck: %s with the mask %08x", NAMES[kind], mask);
    Barrier& barrier = warp();
    uint64_t* values = barrier.values[barrier.generation & 1];
    values[self->thread % WARP] = value;
    wait_at(barrier, WARP, kind, at);
    ++self->vote_epoch;
    self->id = 0;
    return values;
}

// --- judging accesses -----------------------------------------------------------------------------

unsigned my_id() {
    if (self->id == 0) {
        self->id = first_id + unsigned(accesses.size());
        accesses.push_back({self->block->number, self->block_epoch, self->named_epoch, self->warp_epoch,
                            self->vote_epoch, self->thread});
    }
    return self->id;
}

// Whether an access happened before what this thread does now, or was of another block.
bool is_before(unsigned id, int how) {
    bool stays = (id & (ATOMIC | FIXED)) && (how & (AT_ONCE | IN_PLACE));
    id &= ~(ATOMIC | FIXED);
    if (id < first_id) return true;
    const Access& a = accesses[id - first_id];
    if (a.block != self->block->number || a.thread == self->thread) return true;
    if (a.block_epoch != self->block_epoch) return true;
    int named = self->block->named_size;
    if (a.thread < named && self->thread < named && a.named_epoch != self->named_epoch) return true;
    if (a.thread / WARP != self->thread / WARP) return false;
    return a.warp_epoch != self->warp_epoch || (stays && a.vote_epoch != self->vote_epoch);
}

Region* region_of(const char* at) {
    if (recent != nullptr && at >= recent->begin && at < recent->begin + recent->size) return recent;
    auto found = std::upper_bound(regions.begin(), regions.end(), at,
                                  [](const char* a, const auto& region) { return a < region->begin; });
    if (found == regions.begin()) return nullptr;
    Region* region = std::prev(found)->get();
    if (at >= region->begin + region->size) return nullptr;
    return recent = region;
}

// The cells of an access, and whether its memory is written before any kernel runs.
Cell* cells_of(const char* at, size_t size, int how, bool& initialised, const char* pc) {
    Block& block = *self->block;
    const Module& module = *block.launch->module;
    initialised = false;
    if (at >= module.tls && at < module.tls + module.tls_size) {
        size_t before = 0;
        for (char* dynamic : module.dynamic) {
            if (dynamic == nullptr || at < dynamic) continue;
            size_t offset = at - dynamic;
            if (offset >= module.dynamic_size) {
                before += module.dynamic_size;
                continue;
            }
            if (offset + size > size_t(block.launch->num_shared_bytes))
                fail(pc, "memcheck: %zu bytes at %zu of %d of shared memory", size, offset,
                     block.launch->num_shared_bytes);
            return &block.dynamic_cells[offset / 2];
        }
        return &block.static_cells[(at - module.tls - before) / 2];
    }
    Region* region = region_of(at);
    if (region == nullptr) {
        if (!(how & WRITE) && at >= module.image && at < module.image_end) return nullptr;  // constants
        fail(pc, "memcheck: %zu bytes at %p, which is in no array", size, at);
    }
    size_t offset = at - region->begin;
    if (offset + size > region->size)
        fail(pc, "memcheck: %zu bytes at %zu of an array of %zu", size, offset, region->size);
    initialised = region->initialised;
    return &region->cells[offset / 2];
}

void race(const char* pc, const char* what, unsigned id, unsigned other_at) {
    const Access& other = accesses[(id & ~(ATOMIC | FIXED)) - first_id];
    fail(pc, "racecheck: %s thread %d without a barrier between, at +0x%x", what, other.thread, other_at);
}

void judge(const void* address, size_t size, int how, const char* pc) {
    const char* at = static_cast<const char*>(address);
    if (at >= self->stack && at < self->stack + STACK) return;
    perhaps_switch();
    bool initialised;
    Cell* cell = cells_of(at, size, how, initialised, pc);
    if (cell == nullptr) return;
    unsigned id = my_id() | (how & AT_ONCE ? ATOMIC : how & IN_PLACE ? FIXED : 0);
    unsigned place = unsigned(pc - self->block->launch->module->image);
    for (Cell* end = cell + (size + 1) / 2; cell < end; ++cell) {
        if ((how & READ) && cell->write == 0 && !initialised)
            fail(pc, "initcheck: reads %zu bytes that nothing has written", size);
        bool both_atomic = (how & AT_ONCE) && (cell->write & ATOMIC);
        if (!both_atomic && !is_before(cell->write, how))
            race(pc, how & WRITE ? "writes what was written by" : "reads what was written by", cell->write,
                 cell->write_at);
        if (how & WRITE) {
            moved = true;
            for (unsigned read : {cell->read, cell->other_read})
                if (!is_before(read, how)) race(pc, "writes what was read by", read, cell->read_at);
            *cell = {id, 0, 0, place, 0};
        } else if (!(how & AT_ONCE)) {
            if (!is_before(cell->read, how)) cell->other_read = cell->read;
            cell->read = id;
            cell->read_at = place;
        }
    }
}

// --- blocks and fibres ----------------------------------------------------------------------------

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

Block* new_block(const Operation& launch, int number) {
    Block* block = new Block{};
    block->launch = &launch;
    block->number = ++num_blocks;
    block->index = {unsigned(number % launch.grid_x), unsigned(number / launch.grid_x), 0};
    block->num_alive = launch.num_threads;
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
    for (auto& [module, occupant] : occupants)
        if (occupant == block) occupant = nullptr;
    for (Fiber* fiber : block->fibers) idle_fibers.push_back(fiber);
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
        if (came == 2) throw 0;
    }
    self = nullptr;
    return any;
}

void report_deadlock(Block& block) {
    int length = snprintf(message, sizeof message, "synccheck: block (%u, %u) waits for ever:",
                          block.index.x, block.index.y);
    std::vector<int> at(MAX_UNSIGNED + 1);
    for (Fiber* fiber : block.fibers)
        if (!fiber->done) ++at[fiber->waits_for->kind];
    for (int kind = 0; kind <= MAX_UNSIGNED; ++kind)
        if (at[kind] != 0)
            length += snprintf(message + length, sizeof message - length, " %d threads at %s,", at[kind],
                               NAMES[kind]);
    snprintf(message + length, sizeof message - length, " %d have ended",
             int(block.fibers.size()) - block.num_alive);
    throw 0;
}

void mark_written(char* at, size_t size) {
    Region* region = region_of(at);
    if (region == nullptr || at + size > region->begin + region->size)
        fail(nullptr, "memcheck: a copy of %zu bytes to or from %p, which is not in one array", size, at);
    for (size_t i = (at - region->begin) / 2; i < (at - region->begin + size + 1) / 2; ++i)
        region->cells[i] = {HOST, 0, 0, 0, 0};
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
        Running* running = new Running{&operation, {}, 0, {}};
        for (int i = 0; i < operation.grid_x * operation.grid_y; ++i) running->order.push_back(i);
        if (order == 1) std::reverse(running->order.begin(), running->order.end());
        for (size_t i = running->order.size(); order > 1 && i > 1; --i)
            std::swap(running->order[i - 1], running->order[random_below(unsigned(i))]);
        return running;
    }
    return nullptr;
}

void run(const Stream* streams, int num_streams) {
    std::vector<Running*> running(num_streams);
    std::vector<int> next(num_streams);
    int idle = 0;
    for (int s = 0; s < num_streams; ++s) running[s] = advance(streams[s], next[s]);
    for (unsigned turn = 0;; ++turn) {
        int alive = 0;
        for (Running* one : running) alive += one != nullptr;
        if (alive == 0) return;
        unsigned s = (order > 1 ? random_below(num_streams) : order == 0 ? turn : num_streams - 1 - turn % num_streams) % num_streams;
        if (running[s] == nullptr) continue;
        Running& one = *running[s];
        while (one.resident.size() < MAX_RESIDENT && one.next < one.order.size())
            one.resident.push_back(new_block(*one.launch, one.order[one.next++]));
        // In order a block goes on until it ends or looks whether another rank has written.
        size_t which = order > 1 ? random_below(unsigned(one.resident.size())) : 0;
        Block* block = one.resident[which];
        do {
            block->spins = moved = false;
            if (!take_turn(*block)) report_deadlock(*block);
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

// --- for Python -----------------------------------------------------------------------------------

extern "C" {

void emulator_register(char* begin, size_t size, int initialised) {
    auto region = std::unique_ptr<Region>(new Region{begin, size, initialised != 0, {}});
    region->cells.resize((size + 1) / 2);
    regions.insert(std::upper_bound(regions.begin(), regions.end(), begin,
                                    [](const char* a, const auto& r) { return a < r->begin; }),
                   std::move(region));
    recent = nullptr;
}

void emulator_forget_all() {
    first_id = HOST + 1;
    regions.clear();
    recent = nullptr;
}

// Null, or what went wrong; `at`: where in the code, or null.
const char* emulator_run(const Stream* streams, int num_streams, int how, const char** at) {
    order = how;
    random_state = unsigned(how) * 2654435761u + 1;
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
    } catch (int) {
        // The fibres that were on their way are left as they are.
    }
    self = nullptr;
    first_id += unsigned(accesses.size());
    accesses.clear();
    *at = fault_at;
    return message[0] == 0 ? nullptr : message;
}

// --- for the kernels; cuda.h declares these -------------------------------------------------------

#define HERE static_cast<const char*>(__builtin_return_address(0))

Index3 emulated_thread() { return {unsigned(self->thread), 0, 0}; }
Index3 emulated_block() { return self->block->index; }
Index3 emulated_block_size() { return {unsigned(self->block->fibers.size()), 1, 1}; }
Index3 emulated_grid_size() {
    return {unsigned(self->block->launch->grid_x), unsigned(self->block->launch->grid_y), 1};
}

void __syncthreads() {
    wait_at(self->block->all, int(self->block->fibers.size()), BARRIER, HERE);
    ++self->block_epoch;
    self->id = 0;
}

int __syncthreads_or(int condition) {
    Barrier& all = self->block->all;
    bool& any = all.any[(all.generation + 1) & 1];
    any |= condition != 0;
    bool* result = &any;
    wait_at(all, int(self->block->fibers.size()), BARRIER_OR, HERE);
    ++self->block_epoch;
    self->id = 0;
    return *result;
}

void emulated_barrier_of_first(int num_threads) {
    if (self->thread >= num_threads) fail(HERE, "synccheck: a barrier of the first %d threads", num_threads);
    self->block->named_size = num_threads;
    wait_at(self->block->named, num_threads, NAMED, HERE);
    ++self->named_epoch;
    self->id = 0;
}

void __syncwarp() {
    wait_at(warp(), WARP, SYNC_WARP, HERE);
    ++self->warp_epoch;
    self->id = 0;
}

unsigned __ballot_sync(unsigned mask, int condition) {
    const uint64_t* values = values_of_warp(mask, condition != 0, BALLOT, HERE);
    unsigned votes = 0;
    for (int lane = 0; lane < WARP; ++lane) votes |= unsigned(values[lane]) << lane;
    return votes;
}

unsigned emulated_match(unsigned mask, uint64_t value) {
    const uint64_t* values = values_of_warp(mask, value, MATCH, HERE);
    unsigned same = 0;
    for (int lane = 0; lane < WARP; ++lane) same |= unsigned(values[lane] == value) << lane;
    return same;
}

uint64_t emulated_shuffle(unsigned mask, uint64_t value, int source, int width, int how) {
    const uint64_t* values = values_of_warp(mask, value, SHUFFLE, HERE);
    int lane = self->thread % WARP, from = lane;
    if (how == 0) from = lane / width * width + source % width;
    if (how == 1 && lane % width >= source) from = lane - source;
    if (how == 2) from = lane ^ source;
    return values[from];
}

unsigned emulated_sum(unsigned mask, unsigned value) {
    const uint64_t* values = values_of_warp(mask, value, SUM, HERE);
    unsigned sum = 0;
    for (int lane = 0; lane < WARP; ++lane) sum += unsigned(values[lane]);
    return sum;
}

int emulated_max(unsigned mask, int value) {
    const uint64_t* values = values_of_warp(mask, unsigned(value), MAX, HERE);
    int most = value;
    for (int lane = 0; lane < WARP; ++lane) most = std::max(most, int(unsigned(values[lane])));
    return most;
}

unsigned emulated_max_unsigned(unsigned mask, unsigned value) {
    const uint64_t* values = values_of_warp(mask, value, MAX_UNSIGNED, HERE);
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
    return now += 1000;
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

// --- what -fsanitize=thread calls -----------------------------------------------------------------

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define ACCESS(size)                                                                        \
    void __tsan_read##size(void* at) { judge(at, size, READ, HERE); }                        \
    void __tsan_write##size(void* at) { judge(at, size, WRITE, HERE); }                      \
    void __tsan_unaligned_read##size(void* at) { judge(at, size, READ, HERE); }              \
    void __tsan_unaligned_write##size(void* at) { judge(at, size, WRITE, HERE); }            \
    void __tsan_volatile_read##size(void* at) { judge(at, size, READ | IN_PLACE, HERE); }    \
    void __tsan_volatile_write##size(void* at) { judge(at, size, WRITE | AT_ONCE, HERE); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* at, size_t size) { judge(at, size, READ, HERE); }
void __tsan_write_range(void* at, size_t size) { judge(at, size, WRITE, HERE); }

}  // extern "C"
