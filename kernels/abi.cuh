// Written by `python -m lplb_ep.planning.structs`. Do not edit: change the declarations there.
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

typedef unsigned long long Word;  // an integer of a row, and the number of its batch

// How a batch ends; where its parts differ, the largest holds.
enum Status {
    OPTIMAL = 0,
    STAYED = 1,
    STALE = 2,
    NOT_CONVERGED = 3,
    INFEASIBLE = 4,
    BAD_COUNTS = 5,
    REFUSED = 6,
    OUT_OF_STEP = 7,
    TIMED_OUT = 8,
    REUSED = 9,
};

constexpr int NUM_STATUSES = 10;  // of a batch

// The integers that an exchanged row begins with; the counts follow.
enum Head {
    HEAD_STATUS = 0,
    HEAD_PLACEMENT = 1,
    HEAD_SLOT = 2,
    HEAD_PLANNER = 3,
    HEAD_BATCH = 4,
};

constexpr int HEAD = 5;  // integers before the counts of an exchanged row

// Flags in the host's memory that a kernel sets; behind those of each `Status`.
enum ErrorFlag {
    FLAG_OUT_OF_RANGE = 10,
    FLAG_REPEATED_PICK = 11,
    FLAG_MISCOUNTED = 12,
};

// Sums over batches whose counts are known: of a status below BAD_COUNTS.
enum Tally {
    TALLY_ROWS = 0,
    TALLY_LOAD = 1,
    TALLY_HOME = 2,
    TALLY_GOT = 3,
    TALLY_BOUND = 4,
    TALLY_BOUND_LOAD = 5,
    TALLY_OWN_HOME = 6,
    TALLY_OWN = 7,
    TALLY_GUESTS = 8,
    TALLY_SENT = 9,
    TALLY_RECEIVED = 10,
    TALLY_RECOMPUTED = 11,
    TALLY_WORST_HOME = 12,
    TALLY_WORST_HOME_LOAD = 13,
    TALLY_WORST = 14,
    TALLY_WORST_LOAD = 15,
    TALLY_WINDOW = 16,
};

constexpr int NUM_TALLIES = 17;  // sums over batches

constexpr int NUM_TOTALS = 27;  // tallies, then batches of each status

constexpr int NUM_WORDS = 55;  // totals, the window, and marked totals

constexpr int NUM_ERROR_FLAGS = 13;  // statuses, then the others

constexpr int GUEST_PARTS = 10000;  // of 1, in which a tolerance is counted

// The quantities beside tokens whose largest value over ranks a plan minimises.
enum Aim {
    AIM_EXPERTS = 0,
    AIM_COST = 1,
};

constexpr int MAX_COST_STEPS = 128;  // of a cost model

constexpr int CHAIN = 4;  // moves of a chain, at most

constexpr int SEARCH_ROUNDS = 64;  // rounds of a search, at most

constexpr int NUM_AIMS = 4;  // aims of the largest rank in a round

constexpr int NUM_OTHERS = 12;  // other ranks that pass on rows in a round, at most

constexpr int FINEST = 9;  // 2 to the minus this of a bound is its last step

constexpr int SHRINK = 2;  // a step without a chain becomes 2 to the minus this of it

constexpr int COUNT_BITS = 15;  // to which what ranks count is compared

constexpr int MAX_EXPERTS = 512;  // of a component

constexpr int MAX_PLACES = 544;  // slots of a rank that has guest slots

constexpr int NUM_ROUNDS = 3;  // of fills, at most

constexpr int NUM_TARGETS = 8;  // limits of fills in a later round

constexpr int CLOSE = 9;  // levels within 2 to the minus this are equal

constexpr int FILLS = 16;  // of a round

// How fill i decides: a `Rule`.
__device__ inline int rule_of(int i) {
    constexpr int table[] = {16637, 248, 16636, 65784, 65544, 131321, 2, 131322, 131072, 8, 252, 131320, 65788, 65544, 17, 32784};
    return table[i];
}

constexpr int NUM_CHOICES = 8;  // of guests, for a plan by cost

// Of choice i + 1: its tolerance << 1 | whether a guest is worth its push.
__device__ inline int choice_rule_of(int i) {
    constexpr int table[] = {1, 1001, 2001, 0, 2000, 4000, 10000};
    return table[i];
}

constexpr unsigned MAX_TOTAL = 2147483647;  // tokens of a batch; and its number

// The status and sums of a component of the replica graph.
struct __align__(16) Ending {
    int status;  // a Status
    int total;   // tokens of its experts, and base loads
    int home;    // where `least_gain` is asked for: the most tokens of a rank, if it stays
    int bound;   // and a lower bound of every plan
};
LPLB_SIZE(Ending, 16);
LPLB_PLACE(Ending, status, 0);
LPLB_PLACE(Ending, total, 4);
LPLB_PLACE(Ending, home, 8);
LPLB_PLACE(Ending, bound, 12);

// Counts of each rank for each expert, in rows; several batches of them lie one after another.
struct Counts {
    const int* rows;   // [num_rows] of head + E integers
    int num_rows;      // ranks, or 1 where the counts are added up already
    int stride;        // integers from one row to the next
    int batch_stride;  // integers from one batch to the next
    int head;          // HEAD, or 0 where rows are counts alone
    int rank;          // this rank, which is its row's number
};
LPLB_SIZE(Counts, 32);
LPLB_PLACE(Counts, rows, 0);
LPLB_PLACE(Counts, num_rows, 8);
LPLB_PLACE(Counts, stride, 12);
LPLB_PLACE(Counts, batch_stride, 16);
LPLB_PLACE(Counts, head, 20);
LPLB_PLACE(Counts, rank, 24);

// A rank's picks in row-major order, cut into chunks. Each kernel leaves more for the next.
struct Picks {
    short* experts;   // [num_picks] logical experts, -1: none
    int* positions;   // [num_picks] how many earlier picks are of the same expert
    int* histograms;  // [num_chunks, E] picks of each expert in each chunk
    int num_picks;    // T times K
    int num_chunks;   // blocks that share the picks
    int chunk;        // picks of a chunk
    int num_experts;  // E
};
LPLB_SIZE(Picks, 40);
LPLB_PLACE(Picks, experts, 0);
LPLB_PLACE(Picks, positions, 8);
LPLB_PLACE(Picks, histograms, 16);
LPLB_PLACE(Picks, num_picks, 24);
LPLB_PLACE(Picks, num_chunks, 28);
LPLB_PLACE(Picks, chunk, 32);
LPLB_PLACE(Picks, num_experts, 36);

// State of the exchange between one batch and the next; all 0 before the first.
struct Exchange {
    int num_done;     // blocks of `count` that have counted
    int unread;       // 1 where the rows of the last batch were not waited for
    long long start;  // when this rank sent its row, in ns
};
LPLB_SIZE(Exchange, 16);
LPLB_PLACE(Exchange, num_done, 0);
LPLB_PLACE(Exchange, unread, 4);
LPLB_PLACE(Exchange, start, 8);

// Where ranks write each other's rows.
struct Window {
    Word* const* peers;     // [R] each rank's [2, R, size] words, null on other nodes; or null
    Exchange* state;        // of this rank
    int* rows;              // [R, size] what was received
    volatile int* missing;  // [R] in the host's memory: 1 where a row did not come in time
    long long limit_ns;     // how long to wait
    int num_ranks;          // R
    int rank;               // this rank
    int waits;              // 1: waits for the rows of all ranks
    int every;              // batches from one that is exchanged to the next, where `turn` is given
    int* turn;              // [1] batches since the last that was exchanged; or null: all are
    int size;               // integers of a row: HEAD + E, and R more where `least_gain` is asked for
};
LPLB_SIZE(Window, 72);
LPLB_PLACE(Window, peers, 0);
LPLB_PLACE(Window, state, 8);
LPLB_PLACE(Window, rows, 16);
LPLB_PLACE(Window, missing, 24);
LPLB_PLACE(Window, limit_ns, 32);
LPLB_PLACE(Window, num_ranks, 40);
LPLB_PLACE(Window, rank, 44);
LPLB_PLACE(Window, waits, 48);
LPLB_PLACE(Window, every, 52);
LPLB_PLACE(Window, turn, 56);
LPLB_PLACE(Window, size, 64);

// Memory of the first rank of a node for rows to and from other nodes, by NVSHMEM.
struct Relay {
    Word* sent;            // [2, node_size, size] the node's rows, for even and odd batches
    const Word* received;  // [nodes, 2, node_size, size] those of each node
    const Word* signals;   // [nodes] how many batches each node has sent
    int node;              // this one
    int node_size;         // ranks of a node
};
LPLB_SIZE(Relay, 32);
LPLB_PLACE(Relay, sent, 0);
LPLB_PLACE(Relay, received, 8);
LPLB_PLACE(Relay, signals, 16);
LPLB_PLACE(Relay, node, 24);
LPLB_PLACE(Relay, node_size, 28);

// A copy of an expert that has several.
struct __align__(16) Arc {
    unsigned long long ranks;  // local ranks with a copy, as bits; of sizes above 64: copies, lower ones << 32
    int quota;                 // its place in [E, C]
    short place;               // where the expert's arcs begin in `copies`; the expert's number, too
    short rank;                // its own local rank
};
LPLB_SIZE(Arc, 16);
LPLB_PLACE(Arc, ranks, 0);
LPLB_PLACE(Arc, quota, 8);
LPLB_PLACE(Arc, place, 12);
LPLB_PLACE(Arc, rank, 14);

// From one copy of an expert to another, along which tokens may move.
struct __align__(8) Edge {
    short arc;             // the copy that tokens leave; -1: no edge
    short to;              // the copy that they reach
    unsigned char target;  // the local rank of the second
    unsigned char nth;     // edges of the same copy that come before
    unsigned char number;  // edges of the same copy in all
};
LPLB_SIZE(Edge, 8);
LPLB_PLACE(Edge, arc, 0);
LPLB_PLACE(Edge, to, 2);
LPLB_PLACE(Edge, target, 4);
LPLB_PLACE(Edge, nth, 5);
LPLB_PLACE(Edge, number, 6);

// How large a component is.
struct __align__(16) Shape {
    int ranks;       // 0: there is none, behind the last
    int arcs;        // copies of its experts with several
    int most_edges;  // of a rank
    int most_nth;    // the largest `nth` of an edge
};
LPLB_SIZE(Shape, 16);
LPLB_PLACE(Shape, ranks, 0);
LPLB_PLACE(Shape, arcs, 4);
LPLB_PLACE(Shape, most_edges, 8);
LPLB_PLACE(Shape, most_nth, 12);

// Tables of each component, at fixed strides so that all are read at once.
struct Network {
    const Shape* shape;      // [G] of each
    const Arc* arcs;         // [G, max_arcs] by local rank, then expert
    const short* copies;     // [G, max_arcs] arcs by expert, then local rank
    const short* first_arc;  // [G, SIZE + 1] of each local rank
    const Edge* edges;       // [G, SIZE, max_edges] of each local rank
    const int* experts;      // [G, max_experts] see `Tables.experts`
    const int* ranks;        // [G, SIZE] local rank to rank
    int max_arcs;            // of a component
    int max_edges;           // of a rank
    int max_experts;         // of a component
};
LPLB_SIZE(Network, 72);
LPLB_PLACE(Network, shape, 0);
LPLB_PLACE(Network, arcs, 8);
LPLB_PLACE(Network, copies, 16);
LPLB_PLACE(Network, first_arc, 24);
LPLB_PLACE(Network, edges, 32);
LPLB_PLACE(Network, experts, 40);
LPLB_PLACE(Network, ranks, 48);
LPLB_PLACE(Network, max_arcs, 56);
LPLB_PLACE(Network, max_edges, 60);
LPLB_PLACE(Network, max_experts, 64);

// The input and the output of a solver's kernel.
struct Problem {
    Counts counts;              // the load
    Network net;                // the placement
    Picks picks;                // that further blocks number meanwhile
    int* quota;                 // [B, E, C] tokens of each copy
    int* rank_load;             // [B, R] tokens of each rank, base loads not included
    Ending* endings;            // [B, G] of each component
    int* counted;               // [R, E] a copy of the counts, or null
    volatile int* error_flags;  // [NUM_ERROR_FLAGS] in the host's memory
    const int* base;            // [R] load that stays on each rank, or null: none
    const int* speed;           // [R] of each rank, or null: all the same
    const int* cap;             // [E, C] the most tokens of each copy, or null: no limit
    int num_components;         // G
    int num_ranks;              // R
    int num_experts;            // E
    int max_replicas;           // C
    int max_rounds;             // of the flow
    int status;                 // of the batch, as known without the counts
    int least_gain;             // tokens off the fullest rank for which a batch leaves home; 0: any
    const int* turn;            // as the struct Window has it: not 0, and nothing is solved; or null
    int* given_load;            // [R] by given slots, which rows have behind their counts; or null
};
LPLB_SIZE(Problem, 256);
LPLB_PLACE(Problem, counts, 0);
LPLB_PLACE(Problem, net, 32);
LPLB_PLACE(Problem, picks, 104);
LPLB_PLACE(Problem, quota, 144);
LPLB_PLACE(Problem, rank_load, 152);
LPLB_PLACE(Problem, endings, 160);
LPLB_PLACE(Problem, counted, 168);
LPLB_PLACE(Problem, error_flags, 176);
LPLB_PLACE(Problem, base, 184);
LPLB_PLACE(Problem, speed, 192);
LPLB_PLACE(Problem, cap, 200);
LPLB_PLACE(Problem, num_components, 208);
LPLB_PLACE(Problem, num_ranks, 212);
LPLB_PLACE(Problem, num_experts, 216);
LPLB_PLACE(Problem, max_replicas, 220);
LPLB_PLACE(Problem, max_rounds, 224);
LPLB_PLACE(Problem, status, 228);
LPLB_PLACE(Problem, least_gain, 232);
LPLB_PLACE(Problem, turn, 240);
LPLB_PLACE(Problem, given_load, 248);

// A copy of an expert that has several, for rewriting.
struct __align__(16) Copy {
    short rank;  // where it is
    short node;  // of that rank
    int slot;    // its physical id
    int expert;  // its logical id
    int quota;   // its place in [E, C]
};
LPLB_SIZE(Copy, 16);
LPLB_PLACE(Copy, rank, 0);
LPLB_PLACE(Copy, node, 2);
LPLB_PLACE(Copy, slot, 4);
LPLB_PLACE(Copy, expert, 8);
LPLB_PLACE(Copy, quota, 12);

// The placement, for rewriting. Copies that can get no tokens are left out.
struct Table {
    const int* lookup;       // [E] the slot of an only copy, or ~m for the m-th expert with several
    const int* experts;      // [M] which that is
    const int* first;        // [M + 1] where its copies begin, home first
    const Copy* copies;      // [N] of those experts
    const int* home_rank;    // [E] the rank of each home
    int num_several;         // M
    int num_copies;          // N
    int num_ranks;           // R
    int num_ranks_per_node;  // a divisor of R
    int num_experts;         // E
    int max_replicas;        // C
};
LPLB_SIZE(Table, 64);
LPLB_PLACE(Table, lookup, 0);
LPLB_PLACE(Table, experts, 8);
LPLB_PLACE(Table, first, 16);
LPLB_PLACE(Table, copies, 24);
LPLB_PLACE(Table, home_rank, 32);
LPLB_PLACE(Table, num_several, 40);
LPLB_PLACE(Table, num_copies, 44);
LPLB_PLACE(Table, num_ranks, 48);
LPLB_PLACE(Table, num_ranks_per_node, 52);
LPLB_PLACE(Table, num_experts, 56);
LPLB_PLACE(Table, max_replicas, 60);

// Memory of a planner's statistics.
struct Statistics {
    long long* totals;  // [NUM_WORDS] totals; the window, which the host sets; marked totals
    int* samples;       // [num_samples, E] loads of sampled batches
    int* sampled;       // [num_samples] how many batches came before each; -1: none is there
    const int* base;    // [R] load that stays on each rank, or null: none
    const int* speed;   // [R] of each rank, or null: all the same
    int num_samples;    // kept at once; 0: none are taken
    int every;          // batches from one sample to the next
    int by_tokens;      // 1: a planned batch has the least largest load
    int mark_every;     // batches from one whose totals are marked to the next; 0: none are
};
LPLB_SIZE(Statistics, 56);
LPLB_PLACE(Statistics, totals, 0);
LPLB_PLACE(Statistics, samples, 8);
LPLB_PLACE(Statistics, sampled, 16);
LPLB_PLACE(Statistics, base, 24);
LPLB_PLACE(Statistics, speed, 32);
LPLB_PLACE(Statistics, num_samples, 40);
LPLB_PLACE(Statistics, every, 44);
LPLB_PLACE(Statistics, by_tokens, 48);
LPLB_PLACE(Statistics, mark_every, 52);

// The solution of a batch, and where its status is written.
struct Batch {
    int* counts;                // [R, E] of all ranks
    int* quota;                 // [E, C] tokens of each copy
    int* rank_load;             // [R] tokens of each rank
    const Ending* endings;      // [G] of each component
    int* status;                // [1] how the batch ends
    int* guests;                // [num_guests] the expert in each guest slot, -1: none
    Statistics statistics;      // which one more block of the grid keeps
    volatile int* error_flags;  // [NUM_ERROR_FLAGS] in the host's memory
    int* row;                   // [HEAD + E] (and R) to be zeroed for the next count, or null
    int num_components;         // G
    int rank;                   // this rank
    int num_guests;             // guest slots of all ranks
    int least_gain;             // as the struct Problem has it
    const int* turn;            // as the struct Window has it: not 0, and quotas are reused; or null
    const int* own;             // [E] this rank's counts, where `turn` is given
    int again;                  // 1: a backward pass plans a batch again
    const int* given_load;      // as the struct Problem has it; picks may keep their slots
};
LPLB_SIZE(Batch, 168);
LPLB_PLACE(Batch, counts, 0);
LPLB_PLACE(Batch, quota, 8);
LPLB_PLACE(Batch, rank_load, 16);
LPLB_PLACE(Batch, endings, 24);
LPLB_PLACE(Batch, status, 32);
LPLB_PLACE(Batch, guests, 40);
LPLB_PLACE(Batch, statistics, 48);
LPLB_PLACE(Batch, error_flags, 104);
LPLB_PLACE(Batch, row, 112);
LPLB_PLACE(Batch, num_components, 120);
LPLB_PLACE(Batch, rank, 124);
LPLB_PLACE(Batch, num_guests, 128);
LPLB_PLACE(Batch, least_gain, 132);
LPLB_PLACE(Batch, turn, 136);
LPLB_PLACE(Batch, own, 144);
LPLB_PLACE(Batch, again, 152);
LPLB_PLACE(Batch, given_load, 160);

// An expert, and its resident copies: those that it has in every batch.
struct __align__(16) Resident {
    unsigned long long ranks;  // local ranks that hold one, as bits
    int slot;                  // the physical id of its home
    short expert;              // its logical id; -1: none, behind the last
    unsigned char home;        // the local rank of its home
    unsigned char columns;     // the column of its first guest
};
LPLB_SIZE(Resident, 16);
LPLB_PLACE(Resident, ranks, 0);
LPLB_PLACE(Resident, slot, 8);
LPLB_PLACE(Resident, expert, 12);
LPLB_PLACE(Resident, home, 14);
LPLB_PLACE(Resident, columns, 15);

// A resident copy that is no home.
struct __align__(4) Replica {
    int slot;              // its physical id
    short expert;          // the number of its expert in the component; -1: none, behind the last
    unsigned char rank;    // its local rank
    unsigned char column;  // in [0, C)
    unsigned char nth;     // copies of its expert that come before and may get tokens
};
LPLB_SIZE(Replica, 12);
LPLB_PLACE(Replica, slot, 0);
LPLB_PLACE(Replica, expert, 4);
LPLB_PLACE(Replica, rank, 6);
LPLB_PLACE(Replica, column, 7);
LPLB_PLACE(Replica, nth, 8);

// Residents and guest slots of each component, and where guests are written.
struct Guests {
    const Resident* residents;  // [G, max_experts] of each component
    const Replica* replicas;    // [G, max_replicas] of each component
    const int* num_experts;     // [G] of each component
    const short* places;        // [G, SIZE, residents of a rank] numbers of experts, or -1
    int* chosen;                // [B, R, num_slots] the expert in each guest slot, -1: none
    int* lookup;                // [E] as the struct Table has them; or null, and so the next three
    int* experts;               // [M]
    int* first;                 // [M + 1]
    Copy* copies;               // [N]
    int num_slots;              // guest slots of a rank: its last ones
    int num_local_slots;        // slots of a rank
    int num_ranks_per_node;     // a guest comes from its own node
    int max_replicas;           // replicas of a component that are no guests
    int max_several;            // of a component: M is G times as many
    int max_copies;             // of a component: N is G times as many
    int tolerance;              // above the mean, in GUEST_PARTS of it, that needs no guests
    int min_tokens;             // the least tokens that a guest is chosen for
};
LPLB_SIZE(Guests, 104);
LPLB_PLACE(Guests, residents, 0);
LPLB_PLACE(Guests, replicas, 8);
LPLB_PLACE(Guests, num_experts, 16);
LPLB_PLACE(Guests, places, 24);
LPLB_PLACE(Guests, chosen, 32);
LPLB_PLACE(Guests, lookup, 40);
LPLB_PLACE(Guests, experts, 48);
LPLB_PLACE(Guests, first, 56);
LPLB_PLACE(Guests, copies, 64);
LPLB_PLACE(Guests, num_slots, 72);
LPLB_PLACE(Guests, num_local_slots, 76);
LPLB_PLACE(Guests, num_ranks_per_node, 80);
LPLB_PLACE(Guests, max_replicas, 84);
LPLB_PLACE(Guests, max_several, 88);
LPLB_PLACE(Guests, max_copies, 92);
LPLB_PLACE(Guests, tolerance, 96);
LPLB_PLACE(Guests, min_tokens, 100);

// The objective of a plan, and the costs of rows.
struct Objective {
    const int* costs;  // [2, MAX_COST_STEPS + 1] by tiles: of a slot, and the least of an expert over any copies
    int kind;          // an Aim
    int num_steps;     // of the table
    int tile;          // rows of a step
    int slope;         // of each tile beyond the last step
    int least_cost;    // of an expert beyond the table, for `least_tiles`
    int least_tiles;   // tiles that cost that
    int free_rows;     // of a slot, that cost no more than one
    int most_rows;     // of an expert with tokens in the mean, up to which a plan is searched for
    int least_gap;     // above the bound from which it is, for each rank; 0: any, and home first
};
LPLB_SIZE(Objective, 48);
LPLB_PLACE(Objective, costs, 0);
LPLB_PLACE(Objective, kind, 8);
LPLB_PLACE(Objective, num_steps, 12);
LPLB_PLACE(Objective, tile, 16);
LPLB_PLACE(Objective, slope, 20);
LPLB_PLACE(Objective, least_cost, 24);
LPLB_PLACE(Objective, least_tiles, 28);
LPLB_PLACE(Objective, free_rows, 32);
LPLB_PLACE(Objective, most_rows, 36);
LPLB_PLACE(Objective, least_gap, 40);

// The choices of guests for a plan by cost, and memory for their plans.
struct Choices {
    int* plans;     // [B, G, NUM_CHOICES, 4 + SIZE * (num_slots + num_local_slots)]
    int* num_done;  // [B, G] choices that are planned; all 0 before and after a launch
    int push;       // nanoseconds that a rank waits for one guest
    int worth;      // rows that cost as much, but no fewer than `min_tokens`
};
LPLB_SIZE(Choices, 24);
LPLB_PLACE(Choices, plans, 0);
LPLB_PLACE(Choices, num_done, 8);
LPLB_PLACE(Choices, push, 16);
LPLB_PLACE(Choices, worth, 20);

#undef LPLB_SIZE
#undef LPLB_PLACE
