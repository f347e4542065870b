// Written by `python -m lplb_ep.weights.structs`. Do not edit: change the declarations there.
#pragma once

#define LPLB_SIZE(type, bytes) \
    static_assert(sizeof(type) == bytes, #type " has another size than the host gives it")
#if __has_builtin(__builtin_offsetof)
#define LPLB_PLACE(type, field, bytes) \
    static_assert(__builtin_offsetof(type, field) == bytes, \
                  #type "::" #field " is not where the host puts it")
#else  // in NVRTC 13.0; newer ones and host compilers check the places
#define LPLB_PLACE(type, field, bytes)
#endif

constexpr int MAX_GUESTS = 512;  // guest slots of the ranks of a node

// How a guest's gradient is added to its home's: the types of the home's and the guest's.
enum Sum {
    SUM_FLOATS = 0,
    SUM_BFLOATS = 1,
    SUM_BFLOATS_TO_FLOATS = 2,
};

// Why a rank's guests are missing, in the host's memory; 0: they are not.
enum Missing {
    MISSING_LATE = 1,
    MISSING_REFUSES = 2,
};

// A parameter of experts that is copied to guest slots, or its gradient.
struct Parameter {
    const Word* homes;  // [num_local_slots] where those of this rank lie; or of its guests
    long long offset;   // where guest slot 0 has it in a rank's guest memory, in bytes
    long long bytes;    // of a home; the guest slots' follow one another
    int first_chunk;    // its first among the chunks of an expert
    int sum;            // a Sum; of weights FLOATS
};
LPLB_SIZE(Parameter, 32);
LPLB_PLACE(Parameter, homes, 0);
LPLB_PLACE(Parameter, offset, 8);
LPLB_PLACE(Parameter, bytes, 16);
LPLB_PLACE(Parameter, first_chunk, 24);
LPLB_PLACE(Parameter, sum, 28);

// A batch's guests, and the memory of the ranks that they travel between.
struct Travel {
    const int* guests;            // [R, num_guests] the expert of each guest slot, -1: none; or null
    const int* status;            // [1] how the batch ends, or null: OPTIMAL
    const Word* batch;            // [1] a number that no other batch has, or null: `num_used` counts
    Word* num_used;               // [1] tables with guests that travelled without a number
    int* met;                     // [1] whether the last meeting was complete
    const int* homes;             // [E] the slot of each home
    const Parameter* parameters;  // [num_parameters]
    char* const* memory;          // [R] each rank's guest memory, null on other nodes
    Word* const* arrived;         // [R] each rank's [R]: the ticket of the last push from each rank
    Word* const* present;         // [R] each rank's [2, R]: where each came last, and what it left
    Word* last;                   // [R] the last meeting, if that rank came to it, or 0
    Word* refused;                // [1] the number of the last batch that a rank refused
    int* num_done;                // [1] blocks that have pushed, 0 between launches
    volatile int* missing;        // [R] in the host's memory: a Missing, or 0
    long long limit_ns;           // how long to wait for it
    int use;                      // uses of the batch's number that came before
    int has_met;                  // 1: the ranks met instead of exchanging rows
    int refuses;                  // 1: this rank meets to refuse the batch
    int num_parameters;           // of an expert
    int num_chunks;               // of an expert's parameters
    int num_guests;               // guest slots of a rank
    int num_local_slots;          // of a rank, guest slots included
    int num_ranks;                // R
    int first_rank;               // of this rank's node
    int node_size;                // ranks of a node
    int rank;                     // this rank
};
LPLB_SIZE(Travel, 168);
LPLB_PLACE(Travel, guests, 0);
LPLB_PLACE(Travel, status, 8);
LPLB_PLACE(Travel, batch, 16);
LPLB_PLACE(Travel, num_used, 24);
LPLB_PLACE(Travel, met, 32);
LPLB_PLACE(Travel, homes, 40);
LPLB_PLACE(Travel, parameters, 48);
LPLB_PLACE(Travel, memory, 56);
LPLB_PLACE(Travel, arrived, 64);
LPLB_PLACE(Travel, present, 72);
LPLB_PLACE(Travel, last, 80);
LPLB_PLACE(Travel, refused, 88);
LPLB_PLACE(Travel, num_done, 96);
LPLB_PLACE(Travel, missing, 104);
LPLB_PLACE(Travel, limit_ns, 112);
LPLB_PLACE(Travel, use, 120);
LPLB_PLACE(Travel, has_met, 124);
LPLB_PLACE(Travel, refuses, 128);
LPLB_PLACE(Travel, num_parameters, 132);
LPLB_PLACE(Travel, num_chunks, 136);
LPLB_PLACE(Travel, num_guests, 140);
LPLB_PLACE(Travel, num_local_slots, 144);
LPLB_PLACE(Travel, num_ranks, 148);
LPLB_PLACE(Travel, first_rank, 152);
LPLB_PLACE(Travel, node_size, 156);
LPLB_PLACE(Travel, rank, 160);

#undef LPLB_SIZE
#undef LPLB_PLACE
