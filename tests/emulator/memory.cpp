// Judges every access of a kernel to memory, as compute-sanitizer does:
//   memcheck   it lies in an array that was registered, or in the shared memory that the launch has;
//   initcheck  what it reads was written;
//   racecheck  threads of a block whose accesses meet have a barrier between, or both are atomic. A vote or
//              a shuffle of a warp is one for accesses that are volatile or atomic: a warp's accesses reach
//              shared memory in its order, and the compiler leaves these where they are.
// Accesses of different blocks are not compared, and memory is seen in the order of execution.

#include "runtime.h"

#include <algorithm>
#include <memory>

namespace {

constexpr unsigned HOST = 1, ATOMIC = 1u << 31, FIXED = 1u << 30;  // ids of accesses, and bits of them

struct Region {
    char* begin;
    size_t size;
    bool initialised;
    std::vector<Cell> cells;
};
struct Access {
    unsigned block, block_epoch, named_epoch, warp_epoch, vote_epoch;
    int thread;
};
std::vector<std::unique_ptr<Region>> regions;  // by address
Region* recent;
std::vector<Access> accesses;  // from `first_id` on
unsigned first_id = HOST + 1;

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

// The cells of an access to a block's shared memory; null: it is elsewhere.
Cell* shared_cells(Block& block, const char* at, size_t size, const char* pc) {
    const Module& module = *block.launch->module;
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
    return nullptr;
}

// The cells of an access, and whether its memory is written before any kernel runs.
Cell* cells_of(const char* at, size_t size, int how, bool& initialised, const char* pc) {
    const Module& module = *self->block->launch->module;
    initialised = false;
    if (Cell* cell = shared_cells(*self->block, at, size, pc)) return cell;
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

}  // namespace

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

void mark_written(char* at, size_t size) {
    Region* region = region_of(at);
    if (region == nullptr || at + size > region->begin + region->size)
        fail(nullptr, "memcheck: a copy of %zu bytes to or from %p, which is not in one array", size, at);
    for (size_t i = (at - region->begin) / 2; i < (at - region->begin + size + 1) / 2; ++i)
        region->cells[i] = {HOST, 0, 0, 0, 0};
}

void mark_arrived(char* shared, size_t size) {
    bool initialised;
    Cell* cell = cells_of(shared, size, WRITE, initialised, nullptr);
    for (Cell* end = cell + (size + 1) / 2; cell < end; ++cell) *cell = {HOST, 0, 0, 0, 0};
}

void mark_sent(Block& block, char* shared, size_t size, const char* pc) {
    Cell* cell = shared_cells(block, shared, size, pc);
    if (cell == nullptr) fail(pc, "memcheck: words are sent to what is no shared memory");
    for (Cell* end = cell + (size + 1) / 2; cell < end; ++cell) *cell = {HOST | ATOMIC, 0, 0, 0, 0};
}

void forget_accesses() {
    first_id += unsigned(accesses.size());
    accesses.clear();
}

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

// What -fsanitize=thread calls.
#define HERE static_cast<const char*>(__builtin_return_address(0))

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
