// What the emulator's parts share: the threads of a block as fibres, and the ids of their accesses.
#pragma once

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <ucontext.h>

#include <vector>

constexpr size_t STACK = 64 << 10;
constexpr int WARP = 32;

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
    int cluster;  // blocks of one, which run at the same time
    char *target, *source;
    size_t number;  // bytes, or what is added to the word at the target
};
struct Stream {
    const Operation* operations;
    int num_operations;
};

struct Cell {  // two bytes of memory: which accesses were the last
    unsigned write, read, other_read;
    unsigned write_at, read_at;  // where in the code
};
struct Barrier {  // or a vote or shuffle of a warp
    const char* what = nullptr;
    int waiting = 0;
    unsigned generation = 0;
    bool any[2] = {};
    uint64_t values[2][WARP];  // of this generation and the last
};
struct Block;
struct Cluster {
    Barrier all;
    std::vector<Block*> blocks;   // null: it has ended
};
struct Fiber {
    ucontext_t context;
    jmp_buf at;
    char* stack;
    bool started;
    Block* block;
    int thread;
    bool done;
    Barrier* waits_for;
    unsigned generation, cluster_generation, id;  // id: of its accesses since its last barrier; 0: none yet
    bool has_met_cluster = false;  // since it last came to the barrier of its cluster
    unsigned block_epoch, named_epoch, warp_epoch, vote_epoch;  // barriers and votes that it has passed
};
struct Block {
    const Operation* launch;
    unsigned number;
    Index3 index;
    Cluster* cluster;
    int place;  // in the cluster
    std::vector<Fiber*> fibers;
    int num_alive, named_size;
    Barrier all, named;
    std::vector<Barrier> warps;
    std::vector<Cell> static_cells, dynamic_cells;
    std::vector<char> image;  // its shared memory while another block goes on
    bool spins;               // it looks whether another rank has written
};

// threads.cpp
extern Fiber* self;  // the thread that runs; null: none does
extern bool moved;   // whether a thread has written, ended or passed a barrier; else all only look
[[noreturn]] void fail(const char* at, const char* format, ...);  // `at`: where in the code, or null
void switch_out();       // lets other threads go on
void perhaps_switch();   // in random orders, now and then
long long advance_clock();
bool is_late();  // whether what may come late does so, by the order
char* shared_byte(Block& block, char* at);  // where a byte of its shared memory is now

// memory.cpp
enum How { READ = 1, WRITE = 2, AT_ONCE = 4, IN_PLACE = 8 };  // atomic; volatile
void judge(const void* address, size_t size, int how, const char* pc);
void mark_written(char* at, size_t size);
void forget_accesses();  // those of a run that has ended
void mark_arrived(char* shared, size_t size);  // by a copy that has been waited for
void mark_sent(Block& block, char* shared, size_t size, const char* pc);  // written by a block of the cluster

// copies.cpp
void forget_copies();  // those of a run that has ended
void end_of_messages(Block* block);  // which ends, and gets no more words
