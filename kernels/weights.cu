// Moves weights of experts to the ranks where they are guests for a batch, and gradients of guests back home.
//
// A push needs nothing from the CPU. The plan on the device says which expert each guest slot gets, and the home
// writes it there. The rows that ranks send before they plan say that guest slots are free. Where no rows are
// exchanged, the ranks meet at a barrier instead (`meet`). When all bytes of a push have been written, the home writes
// a ticket to each rank that it visits. That rank waits for exactly this ticket. A ticket is made of a batch's number
// and of how often it was used before, so no other push has it. A late push is not mistaken for a later one. A rank
// that missed a batch is in step again at the next.
//
// Homes fetch the gradients, since they know how many they get, and so need no memory for them. Ranks meet
// before, so that all gradients are complete.
//
// The parameters of an expert are cut into chunks, and the chunks of all visits are shared evenly between the blocks.
// An item is a chunk of one visit. Items are ordered by expert, then chunk, then rank and slot. So the same chunk of
// all visits of an expert is copied in a row. In shared memory chunks begin at multiples of 128 bytes: bulk copies that
// begin elsewhere are a third slower.

#include "abi.cuh"
#include "travel.cuh"
#include "ptx.cuh"

namespace lplb {

constexpr int ROUNDS = MAX_GUESTS / 32;
constexpr int AHEAD = 2;           // chunks that are loaded while others are stored
constexpr int VECTORS = CHUNK / 16, TURNS = VECTORS / THREADS;
static_assert(CHUNK % (16 * THREADS) == 0, "a chunk has whole vectors for each thread");
static_assert(STAGES > AHEAD, "a chunk is stored, and two are known behind the one that is added");

struct Visit {             // an expert whose home is here, in a guest slot of another rank
    short home;            // its local slot here
    short rank, slot;      // where it is a guest
    short first, number;   // of the visits of the same expert
};

struct Span {              // an item: the addresses of its chunk at the home and in the guest slot
    char *home, *guest;
    int bytes, sum;        // at the home; how gradients are added, a Sum
};

struct Part {              // of a chunk: the bytes that bulk copies can move
    int begin, bytes;
};

// Finds the visits of this rank's experts, by expert, then rank and slot. Returns their number to all threads.
__device__ int find_visits(const Travel& t, Visit* visits) {
    __shared__ Visit found[MAX_GUESTS];
    __shared__ int number;
    if (threadIdx.x < 32) {
        int lane = threadIdx.x, entries = t.node_size * t.num_guests, count = 0;
        const int* guests = t.guests + t.first_rank * t.num_guests;
        int homes[ROUNDS];  // first the experts; all loads are issued before one is used
        #pragma unroll
        for (int j = 0; j < ROUNDS; ++j) homes[j] = 32 * j + lane < entries ? guests[32 * j + lane] : -1;
        #pragma unroll
        for (int j = 0; j < ROUNDS; ++j)
            if (homes[j] >= 0) homes[j] = t.homes[homes[j]];
        #pragma unroll
        for (int j = 0; j < ROUNDS; ++j) {
            int entry = 32 * j + lane;
            bool here = homes[j] >= 0 && homes[j] / t.num_local_slots == t.rank;
            unsigned votes = __ballot_sync(~0u, here);
            if (here)
                found[count + __popc(votes & ((1u << lane) - 1))] = {
                    short(homes[j] % t.num_local_slots), short(t.first_rank + entry / t.num_guests),
                    short(entry % t.num_guests), 0, 0};
            count += __popc(votes);
        }
        if (lane == 0) number = count;
    }
    __syncthreads();  // all are found before they are sorted
    int count = number;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        Visit visit = found[i];
        int smaller = 0, before = 0, same = 0;
        for (int j = 0; j < count; ++j) {
            smaller += found[j].home < visit.home;
            same += found[j].home == visit.home;
            before += found[j].home == visit.home && j < i;
        }
        visit.first = short(smaller);
        visit.number = short(same);
        visits[smaller + before] = visit;
    }
    __syncthreads();  // they are sorted before any thread reads them
    return count;
}

// Finds this rank's guests, where `Parameter.homes` has addresses of their gradients. Returns their number to all threads.
__device__ int find_guests(const Travel& t, Visit* visits) {
    __shared__ int number;
    if (threadIdx.x < 32) {
        int count = 0;
        for (int begin = 0; begin < t.num_guests; begin += 32) {
            int slot = begin + threadIdx.x;
            bool here = slot < t.num_guests && t.guests[t.rank * t.num_guests + slot] >= 0;
            unsigned votes = __ballot_sync(~0u, here);
            int place = count + __popc(votes & ((1u << threadIdx.x) - 1));
            if (here) visits[place] = {short(slot), short(t.rank), short(slot), short(place), 1};
            count += __popc(votes);
        }
        if (threadIdx.x == 0) number = count;
    }
    __syncthreads();  // all are found before any thread reads them
    return number;
}

__device__ bool is_planned(const Travel& t) { return t.status == nullptr || *t.status == OPTIMAL; }

// Whether the ranks have met, if they had to. If they have not, nothing of theirs can be used.
__device__ bool has_met(const Travel& t) { return !t.has_met || *t.met != 0; }

// A word that is the same on all ranks, and different for every push and meeting.
__device__ Word ticket_of(const Travel& t) {
    if (t.batch == nullptr) return 1ull << 63 | (*t.num_used + 1);
    return *t.batch ^ Word(t.use) << 24;
}

// Whether any rank has a guest. Tables without guests are not counted, since some ranks may not know of them. One block.
__device__ bool has_guests(const Travel& t) {
    bool any = false;
    for (int i = threadIdx.x; i < t.node_size * t.num_guests; i += THREADS)
        any |= t.guests[t.first_rank * t.num_guests + i] >= 0;
    return __syncthreads_or(any);  // all threads have looked before any of them decides
}

// Waits for a ticket until the deadline. Returns whether it came.
__device__ bool await(const Word* from, Word ticket, long long deadline) {
    while (load_acquire(from) != ticket)
        if (nanoseconds() > deadline) return load_acquire(from) == ticket;
    return true;
}

__device__ Span span_of(const Travel& t, const Visit* visits, int item) {
    int first = visits[item / t.num_chunks].first, number = visits[first].number;
    int place = item - first * t.num_chunks, chunk = place / number, p = 0;
    Visit visit = visits[first + place % number];
    while (p + 1 < t.num_parameters && t.parameters[p + 1].first_chunk <= chunk) ++p;
    const Parameter& one = t.parameters[p];
    long long begin = (long long)(chunk - one.first_chunk) * CHUNK;
    int narrower = one.sum == SUM_BFLOATS_TO_FLOATS;  // the guest's values have half the size
    char* home = reinterpret_cast<char*>(one.homes[visit.home]);
    return {home == nullptr ? nullptr : home + begin,
            t.memory[visit.rank] + one.offset + ((visit.slot * one.bytes + begin) >> narrower),
            int(min(one.bytes - begin, (long long)CHUNK)), one.sum};
}

// The first item of a block. For the number behind the last block: the number of items.
__device__ int begin_of(int block, int number) { return int((long long)number * block / gridDim.x); }

// Bulk copies need addresses and sizes that are multiples of 16 bytes.
__device__ Part bulk_part(const Span& span) {
    int begin = -int(size_t(span.home)) & 15;
    if (span.home == nullptr) return {0, 0};
    if (((size_t(span.home) ^ size_t(span.guest)) & 15) != 0 || begin >= span.bytes) return {0, 0};
    return {begin, (span.bytes - begin) & ~15};
}

// One thread copies chunks through shared memory: some are loaded while others are stored. The next chunk's address is
// computed while this chunk is loaded.
__device__ void copy_in_bulk(const Travel& t, const Visit* visits, int begin, int number, int4* stages, Span* spans,
                             unsigned long long* arrivals) {
    Span next = {};
    if (number > 0) next = span_of(t, visits, begin);
    for (int i = 0; i < number + AHEAD; ++i) {
        if (i < number) {
            int stage = i % STAGES;
            if (i >= STAGES) bulk_wait_read<STAGES - AHEAD - 1>();  // the store that last read this stage is done
            Part part = bulk_part(next);
            arrivals_expect(arrivals + stage, part.bytes);
            if (part.bytes > 0)
                bulk_load(stages + stage * VECTORS, next.home + part.begin, part.bytes, arrivals + stage);
            spans[stage] = next;
            if (i + 1 < number) next = span_of(t, visits, begin + i + 1);
        }
        if (i >= AHEAD) {
            int stage = (i - AHEAD) % STAGES;
            Span span = spans[stage];
            Part part = bulk_part(span);
            arrivals_wait(arrivals + stage, (i - AHEAD) / STAGES % 2);
            if (part.bytes > 0) bulk_store(span.guest + part.begin, stages + stage * VECTORS, part.bytes);
            bulk_end_group();
        }
    }
    bulk_wait();
}

// Some threads copy whole words, if both ends are at multiples of their size. Returns the bytes copied.
template <typename T>
__device__ int copy_words(char* to, const char* from, int bytes, int thread, int threads) {
    constexpr int size = sizeof(T);
    if (((size_t(to) | size_t(from)) & (size - 1)) != 0) return 0;
    for (int i = thread; i < bytes / size; i += threads)
        reinterpret_cast<T*>(to)[i] = reinterpret_cast<const T*>(from)[i];
    return bytes / size * size;
}

// Copies the bytes that bulk copies leave: few, unless the two addresses differ modulo 16 bytes.
__device__ void copy_plainly(char* to, const char* from, int bytes, int thread, int threads) {
    int done = copy_words<int>(to, from, bytes, thread, threads);
    if (done == 0) done = copy_words<short>(to, from, bytes, thread, threads);
    if (thread == 0)
        for (int i = done; i < bytes; ++i) to[i] = from[i];
}

// Some threads write zeros where there is no source, such as a missing gradient.
__device__ void zero_plainly(char* to, int bytes, int thread, int threads) {
    int words = (size_t(to) & 3) == 0 ? bytes / 4 : 0;
    for (int i = thread; i < words; i += threads) reinterpret_cast<int*>(to)[i] = 0;
    if (thread == 0)
        for (int i = 4 * words; i < bytes; ++i) to[i] = 0;
}

// Copies this block's part of all items from homes to guest slots, and waits until it is written.
__device__ void copy_items(const Travel& t, const Visit* visits, int number, int4* stages) {
    __shared__ Span spans[STAGES];
    __shared__ unsigned long long arrivals[STAGES];
    int begin = begin_of(blockIdx.x, number), end = begin_of(blockIdx.x + 1, number);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) arrivals_init(arrivals + stage);
        arrivals_are_ready();
        fence_system();  // the other ranks' reads of their slots come before these writes
        fence_bulk();
        copy_in_bulk(t, visits, begin, end - begin, stages, spans, arrivals);
    } else if (threadIdx.x >= 32) {
        fence_system();
        for (int item = begin; item < end; ++item) {
            Span span = span_of(t, visits, item);
            Part part = bulk_part(span);
            int behind = part.begin + part.bytes, thread = threadIdx.x - 32;
            if (span.home == nullptr) {
                zero_plainly(span.guest, span.bytes, thread, THREADS - 32);
                continue;
            }
            copy_plainly(span.guest, span.home, part.begin, thread, THREADS - 32);
            copy_plainly(span.guest + behind, span.home + behind, span.bytes - behind, thread, THREADS - 32);
        }
    }
    __syncthreads();  // all copies of the block are written before it is counted as done
}

// All threads of the block fill memory with ones, a NaN of every type of 8, 16, 32 or 64 bits.
__device__ void fill_with_nan(char* to, long long bytes) {
    long long begin = min(bytes, (long long)(-int(size_t(to)) & 15)), number = (bytes - begin) / 16;
    int4* vectors = reinterpret_cast<int4*>(to + begin);
    for (long long i = threadIdx.x; i < number; i += THREADS) vectors[i] = {-1, -1, -1, -1};
    if (threadIdx.x != 0) return;
    for (long long i = 0; i < begin; ++i) to[i] = char(-1);
    for (long long i = begin + 16 * number; i < bytes; ++i) to[i] = char(-1);
}

// --- Sums of gradients

typedef unsigned short Bfloat;  // the upper half of a float

template <typename T, int number>
struct __align__(sizeof(T) * number) Pack {
    T values[number];
};

__device__ float value_of(float x) { return x; }
__device__ float value_of(Bfloat x) { return __uint_as_float(unsigned(x) << 16); }

__device__ void put(float& to, float x) { to = x; }
__device__ void put(Bfloat& to, float x) {  // rounded to the nearest, or the even one of two
    unsigned bits = __float_as_uint(x);
    to = x != x ? Bfloat(0x7fff) : Bfloat((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The bytes of a guest's gradient chunk that bulk copies bring.
__device__ int staged_bytes(const Span& span) {
    if (((size_t(span.home) | size_t(span.guest)) & 15) != 0) return 0;
    return (span.bytes >> (span.sum == SUM_BFLOATS_TO_FLOATS)) & ~15;
}

// The number of whole vectors of a home's chunk to which bulk copies bring the guest's values.
__device__ int full_vectors(const Span& span) {
    return staged_bytes(span) / (span.sum == SUM_BFLOATS_TO_FLOATS ? 8 : 16);
}

// Reads the vectors of the home to which this thread adds.
__device__ void read_home(const Span& span, int4 (&vectors)[TURNS]) {
    const int4* home = reinterpret_cast<const int4*>(span.home);
    int full = full_vectors(span);
    #pragma unroll
    for (int j = 0; j < TURNS; ++j)
        if (int(threadIdx.x) + j * THREADS < full) vectors[j] = home[threadIdx.x + j * THREADS];
}

// Adds a guest's chunk to its home's. The thread has read its own vectors of the home before.
template <typename Home, typename Guest>
__device__ void add_chunk(const Span& span, int4 (&vectors)[TURNS], const int4* stage) {
    constexpr int number = 16 / sizeof(Home);
    typedef Pack<Home, number> HomePack;
    typedef Pack<Guest, number> GuestPack;
    HomePack* home = reinterpret_cast<HomePack*>(span.home);
    const GuestPack* staged = reinterpret_cast<const GuestPack*>(stage);
    int full = full_vectors(span);
    #pragma unroll
    for (int j = 0; j < TURNS; ++j) {
        int at = threadIdx.x + j * THREADS;
        if (at >= full) continue;
        HomePack sum = *reinterpret_cast<const HomePack*>(&vectors[j]);
        GuestPack guest = staged[at];
        #pragma unroll
        for (int i = 0; i < number; ++i) put(sum.values[i], value_of(sum.values[i]) + value_of(guest.values[i]));
        home[at] = sum;
    }
    // The rest is no whole vector, and is read from its place in memory.
    Home* rest = reinterpret_cast<Home*>(span.home);
    const Guest* theirs = reinterpret_cast<const Guest*>(span.guest);
    for (int i = full * number + threadIdx.x; i < span.bytes / int(sizeof(Home)); i += THREADS)
        put(rest[i], value_of(rest[i]) + value_of(theirs[i]));
}

// The first item of a block that adds gradients: one block adds all visits of a chunk.
__device__ int begin_of_sums(const Travel& t, const Visit* visits, int block, int number) {
    int item = begin_of(block, number);
    if (item == number) return item;
    int first = visits[item / t.num_chunks].first, same = visits[first].number;
    int place = (item - first * t.num_chunks) % same;
    return place == 0 ? item : item + same - place;
}

}  // namespace lplb

using namespace lplb;

// Writes this rank's experts into the slots where they are guests, then the ticket to those ranks.
extern "C" __global__ void __launch_bounds__(THREADS) push_guests(const Travel travel) {
    extern __shared__ __align__(128) int4 stages[];  // [STAGES, CHUNK / 16]
    __shared__ Visit visits[MAX_GUESTS];
    if (!is_planned(travel) || !has_met(travel)) return;
    int num_visits = find_visits(travel, visits);
    if (num_visits == 0) return;
    copy_items(travel, visits, num_visits * travel.num_chunks, stages);
    if (threadIdx.x != 0) return;
    fence_system();
    if (atomicAdd(travel.num_done, 1) != int(gridDim.x) - 1) return;
    *travel.num_done = 0;
    Word ticket = ticket_of(travel);
    fence_system();  // what all blocks wrote is visible before the tickets
    for (int i = 0; i < num_visits; ++i) store_relaxed(travel.arrived[visits[i].rank] + travel.rank, ticket);
}

// One block. Waits until this rank's guests have arrived. A slot whose guest is late is filled with NaN.
// So are all slots where other ranks may plan with guests and this rank does not.
extern "C" __global__ void __launch_bounds__(THREADS) await_guests(const Travel travel) {
    __shared__ int is_void[MAX_GUESTS];
    bool planned = is_planned(travel), alone = !planned && *travel.status == TIMED_OUT;
    if (!planned && !alone) return;  // all other ranks do the same
    bool counts = travel.batch == nullptr && (alone || has_guests(travel)), any_void = false;
    Word ticket = ticket_of(travel);
    long long deadline = nanoseconds() + travel.limit_ns;
    for (int slot = threadIdx.x; slot < travel.num_guests; slot += THREADS) {
        int expert = planned ? travel.guests[travel.rank * travel.num_guests + slot] : -1;
        is_void[slot] = alone || (expert >= 0 && !has_met(travel));
        if (expert >= 0 && !is_void[slot]) {
            int source = travel.homes[expert] / travel.num_local_slots;
            is_void[slot] = !await(travel.arrived[travel.rank] + source, ticket, deadline);
            if (is_void[slot]) travel.missing[source] = MISSING_LATE;
        }
        any_void |= is_void[slot];
    }
    any_void = __syncthreads_or(any_void);  // all have read the ticket, and judged the slots
    // A rank that may have missed a table is out of step, and no ticket of the others' is its own.
    if (threadIdx.x == 0 && counts) *travel.num_used += alone ? 1ull << 32 : 1;
    if (!any_void) return;
    for (int p = 0; p < travel.num_parameters; ++p) {
        const Parameter& one = travel.parameters[p];
        for (int slot = 0; slot < travel.num_guests; ++slot)
            if (is_void[slot])
                fill_with_nan(travel.memory[travel.rank] + one.offset + slot * one.bytes, one.bytes);
    }
}

// Waits until the deadline for a ticket, or for its complement, by which a rank refuses. Returns the last word read.
__device__ Word await_word(const Word* from, Word ticket, long long deadline) {
    Word word;
    do word = load_acquire(from);
    while (word != ticket && word != ~ticket && nanoseconds() <= deadline);
    return word;
}

// One block. A barrier between the ranks, if the batch has guests. All ranks see what the streams of the others did
// before it. A rank may refuse the batch at this barrier. Then all ranks know, and skip the batch's later meetings.
extern "C" __global__ void __launch_bounds__(THREADS) meet(const Travel travel) {
    if (!is_planned(travel) || !has_guests(travel)) return;
    if (travel.batch != nullptr && *travel.refused == *travel.batch) {
        if (threadIdx.x == 0) *travel.met = 0;
        return;
    }
    Word ticket = ticket_of(travel), *here = travel.present[travel.rank];
    long long deadline = nanoseconds() + travel.limit_ns;
    for (int i = threadIdx.x; i < travel.node_size; i += THREADS) {
        int other = travel.first_rank + i;
        // That rank has read the last ticket, which this one overwrites.
        if (travel.last[other] != 0) await(here + travel.num_ranks + other, travel.last[other], deadline);
        fence_system();
        store_release(travel.present[other] + travel.rank, travel.refuses ? ~ticket : ticket);
    }
    bool late = false, refused = false;
    for (int i = threadIdx.x; i < travel.node_size; i += THREADS) {
        int other = travel.first_rank + i;
        Word word = await_word(here + other, ticket, deadline);
        bool refuses = word == ~ticket, came = refuses || word == ticket;
        store_release(travel.present[other] + travel.num_ranks + travel.rank, ticket);
        travel.last[other] = came ? ticket : 0;
        if (!came) travel.missing[other] = MISSING_LATE;
        if (refuses && other != travel.rank) travel.missing[other] = MISSING_REFUSES;
        late |= !came;
        refused |= refuses;
    }
    late = __syncthreads_or(late);  // all have read the ticket before it changes
    refused = __syncthreads_or(refused);  // the words of all ranks are judged before one thread writes the result
    if (threadIdx.x != 0) return;
    *travel.met = !late && !refused;
    if (refused && travel.batch != nullptr) *travel.refused = *travel.batch;
    if (travel.batch == nullptr) ++*travel.num_used;
}

// Copies gradients of this rank's guests to the memory from which their homes fetch them. A missing gradient is zero.
extern "C" __global__ void __launch_bounds__(THREADS) lay_gradients(const Travel travel) {
    extern __shared__ __align__(128) int4 stages[];  // [STAGES, CHUNK / 16]
    __shared__ Visit visits[MAX_GUESTS];
    int number = find_guests(travel, visits) * travel.num_chunks;
    if (number > 0) copy_items(travel, visits, number, stages);
}

// Adds the gradients of guests to those of their homes on this rank, rank by rank and slot by slot. Where the ranks did
// not meet, the homes' gradients become NaN.
extern "C" __global__ void __launch_bounds__(THREADS) add_gradients(const Travel travel) {
    extern __shared__ __align__(128) int4 stages[];  // [STAGES, CHUNK / 16]
    __shared__ Visit visits[MAX_GUESTS];
    __shared__ Span spans[STAGES];
    __shared__ unsigned long long arrivals[STAGES];
    if (!is_planned(travel)) return;
    int num_visits = find_visits(travel, visits), number = num_visits * travel.num_chunks;
    if (num_visits == 0) return;
    if (!has_met(travel)) {
        for (int i = blockIdx.x; i < num_visits; i += gridDim.x)
            for (int p = 0; p < travel.num_parameters && visits[i].first == i; ++p)
                fill_with_nan(reinterpret_cast<char*>(travel.parameters[p].homes[visits[i].home]),
                              travel.parameters[p].bytes);
        return;
    }
    int begin = begin_of_sums(travel, visits, blockIdx.x, number);
    int count = begin_of_sums(travel, visits, blockIdx.x + 1, number) - begin;
    auto load = [&](int i) {
        int stage = i % STAGES;
        Span span = span_of(travel, visits, begin + i);
        spans[stage] = span;
        int bytes = staged_bytes(span);
        arrivals_expect(arrivals + stage, bytes);
        if (bytes > 0) bulk_load(stages + stage * VECTORS, span.guest, bytes, arrivals + stage);
    };
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) arrivals_init(arrivals + stage);
        arrivals_are_ready();
        fence_bulk();
        for (int i = 0; i < min(STAGES, count); ++i) load(i);
    }
    __syncthreads();  // the first spans are written, and barriers initialised, before any thread uses them
    int4 vectors[TURNS], ahead[TURNS];
    if (count > 0) read_home(spans[0], vectors);
    for (int i = 0; i < count; ++i) {
        int stage = i % STAGES;
        Span span = spans[stage], next = spans[i + 1 < count ? (i + 1) % STAGES : stage];
        bool is_same = next.home == span.home;  // the next item adds to this item's sums, or there is none
        if (!is_same) read_home(next, ahead);
        arrivals_wait(arrivals + stage, i / STAGES % 2);
        const int4* staged = stages + stage * VECTORS;
        if (span.sum == SUM_FLOATS) add_chunk<float, float>(span, vectors, staged);
        else if (span.sum == SUM_BFLOATS) add_chunk<Bfloat, Bfloat>(span, vectors, staged);
        else add_chunk<float, Bfloat>(span, vectors, staged);
        __syncthreads();  // all have read the stage before another chunk overwrites it
        if (threadIdx.x == 0 && i + STAGES < count) load(i + STAGES);
        if (is_same) read_home(next, vectors);
        #pragma unroll
        for (int j = 0; j < TURNS; ++j)
            if (!is_same) vectors[j] = ahead[j];
    }
}
