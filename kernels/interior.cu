// The exact linear program of a batch as in flow.cu, by an interior-point method: its fractional
// optimum, rounded, is where the flow starts. The flow makes any start exact, so nothing depends on
// how close the method came to the optimum.
//
// With x the tokens of each copy, w an expert's, b a rank's from experts with one copy, and s >= 0:
//
//   minimise T: `sum of x over an expert's copies = w`, `sum of x over a rank's copies + b + s = T`.
//   Maximise sum of w y + b p: `z = p - y >= 0` at each copy, p >= 0, sum of p over the ranks = 1.
//
// Mehrotra's predictor-corrector (1992) on x z = mu and s p = mu, from a start within both. Steps
// of one length for both stay there, so mu is known from the lengths alone, and the gap is
// (copies + ranks) mu. With dx, ds and dy eliminated, a step is
//
//   M dp + dT 1 = g, sum of dp = 0,   M = diag(s / p) + the replica graph's Laplacian,
//
// where ranks r and q are joined by d_r d_q / sum of d for each expert on both, d = x / z. M is one
// dense SPD matrix of the component's ranks. No result depends on the order of atomics.

#include "flow.cuh"

typedef lplb::Variant<SIZE, PARTS, TURNS, MORE, THREADS> V;
typedef V::Set Set;
typedef lplb::Component<V> Component;

extern "C" __device__ void potrf(double* A, int* info);
extern "C" __device__ void potrs(double* A, double* B);

constexpr int MAX_STEPS = 30;           // 5 to 8 are usual
constexpr double ENOUGH = 2;            // a gap in tokens; a smaller one saves hardly any round of the flow
constexpr int PER_ROW = V::threads / V::size;  // threads to a row of M
static_assert(PER_ROW * V::size == V::threads, "each thread assembles a part of one row of M");

struct Interior {                       // in shared memory
    double* matrix;                     // [size, size] M, lower triangle
    double* side;                       // [2, size] g and 1, then M⁻¹ of both
    double *x, *z, *d;                  // [arcs] x is 0 where the expert has no tokens
    double* share;                      // [arcs] d / sum of d over the expert
    double *dx, *dz;                    // [arcs]
    unsigned* inverse_length;           // 1 / the longest step, as bits
    int* info;
    const short* first_arc;             // [size + 1] of each rank; not in shared memory
};

__device__ double warp_sum(double value) {
    #pragma unroll
    for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(~0u, value, other);
    return value;
}

// M, from x, z, and s / p of the rank that this thread has.
__device__ void assemble(const Component& c, const Interior& in, double ratio) {
    for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads)
        if (in.x[a] > 0) in.d[a] = in.x[a] / in.z[a];
    __syncthreads();  // d of every copy is written before other copies of its expert read it
    for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) {
        if (!(in.x[a] > 0)) continue;
        double others = 0;              // not by difference, which is noise beside a large d
        int first = c.arcs[a].place, last = first + __popcll(c.arcs[a].ranks);
        for (int i = first; i < last; ++i)
            if (c.copies[i] != a) others += in.d[c.copies[i]];
        in.share[a] = in.d[a] / (in.d[a] + others);
        in.dz[a] = in.share[a] * others;  // its part of the diagonal
    }
    __syncthreads();  // shares and parts of the diagonal are written before rows of M are summed
    int row = threadIdx.x / PER_ROW;
    Set mine = 0;
    for (int column = threadIdx.x % PER_ROW; column < row; column += PER_ROW) {
        in.matrix[row + column * V::size] = 0;
        mine |= Set(1) << column;
    }
    for (int a = in.first_arc[row]; a < in.first_arc[row + 1]; ++a) {
        Set ranks = c.arcs[a].ranks;
        for (Set left = ranks & mine; left != 0; left &= left - 1) {
            int column = __ffsll(left) - 1;
            int other = c.copies[c.arcs[a].place + __popcll(ranks & ((Set(1) << column) - 1))];
            in.matrix[row + column * V::size] -= in.share[a] * in.d[other];
        }
    }
    if (threadIdx.x < V::size) {
        for (int a = in.first_arc[threadIdx.x]; a < in.first_arc[threadIdx.x + 1]; ++a)
            ratio += in.dz[a];
        in.matrix[threadIdx.x * (V::size + 1)] = ratio;
    }
    __syncthreads();  // M is complete before it is factorised
}

// Leaves a fractional optimum in `x`, or the last iterate within the bounds.
__device__ void improve(const Component& c, const Interior& in, int largest, int total) {
    // Thread r has rank r. Ranks that pad the component are rows of the identity. The start: an even
    // split, equal p, and x z = mu.
    bool mine = threadIdx.x < c.shape.ranks;
    double limit = 1.1 * largest, mu = (limit - double(total) / c.shape.ranks) / c.shape.ranks;
    double s = mine ? limit - c.staying()[threadIdx.x] - c.movable()[threadIdx.x] : 1, p = mine ? 1.0 / c.shape.ranks : 1;
    double ds = 0, dp = 0;
    for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) {
        int first = c.arcs[a].place, number = __popcll(c.arcs[a].ranks), tokens = 0;
        for (int i = 0; i < number; ++i) tokens += c.tokens[c.copies[first + i]];
        in.x[a] = double(tokens) / number;
        in.z[a] = tokens ? mu / in.x[a] : 1;
        in.d[a] = in.share[a] = in.dx[a] = in.dz[a] = 0;
    }
    for (int step = 0; step < MAX_STEPS && (c.shape.arcs + c.shape.ranks) * mu > ENOUGH; ++step) {
        assemble(c, in, s / p);
        potrf(in.matrix, in.info);
        double target = 0, length = 0;
        for (int corrects = 0; corrects < 2; ++corrects) {
            for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads)
                if (in.x[a] > 0)        // dx, were dp and dy 0
                    in.dx[a] = (target - corrects * in.dx[a] * in.dz[a]) / in.z[a] - in.x[a];
            __syncthreads();  // dx is written before it is summed, and `info` before it is read
            if (*in.info != 0) return;
            for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) {
                double sum = 0;
                int first = c.arcs[a].place, last = first + __popcll(c.arcs[a].ranks);
                for (int i = first; i < last; ++i) sum += in.dx[c.copies[i]];
                in.dz[a] = in.dx[a] - in.share[a] * sum;  // dx, were dp 0
            }
            __syncthreads();  // dz is written before a rank sums its own, and every thread has read `info`
            double slack = (target - corrects * ds * dp) / p - s;  // ds, were dp 0
            if (threadIdx.x < V::size) {
                double g = mine ? slack : 0;
                for (int a = in.first_arc[threadIdx.x]; a < in.first_arc[threadIdx.x + 1]; ++a)
                    g += in.dz[a];
                in.side[threadIdx.x] = g;
                in.side[V::size + threadIdx.x] = mine;
            }
            if (threadIdx.x == 0) *in.inverse_length = 0;
            __syncthreads();  // both right-hand sides are written before they are solved for
            potrs(in.matrix, in.side);
            __syncthreads();  // the solutions are written before any thread reads them
            double dT = 0, ones = 0;
            for (int r = threadIdx.x % 32; r < V::size; r += 32) {
                dT += in.side[r];
                ones += in.side[V::size + r];
            }
            dT = warp_sum(dT) / warp_sum(ones);
            if (!isfinite(dT)) return;
            double lost = 0;            // the largest fraction of any value that a whole step would take away
            if (mine) {
                dp = in.side[threadIdx.x] - dT * in.side[V::size + threadIdx.x];
                ds = slack - s / p * dp;
                lost = fmax(-dp / p, -ds / s);
            }
            for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) {
                if (!(in.x[a] > 0)) continue;
                Arc arc = c.arcs[a];
                double mean = 0, here = 0, rest = in.dx[a] - in.dz[a];
                for (Set left = arc.ranks; left != 0; left &= left - 1) {
                    int rank = __ffsll(left) - 1, other = c.copies[arc.place++];
                    double price = in.side[rank] - dT * in.side[V::size + rank];
                    mean += in.share[other] * price;
                    if (other == a) here = price;
                }
                in.dx[a] = in.dz[a] + in.d[a] * (mean - here);
                in.dz[a] = here - mean + rest / in.d[a];
                lost = fmax(lost, fmax(-in.dx[a] / in.x[a], -in.dz[a] / in.z[a]));
            }
            unsigned most = __reduce_max_sync(~0u, __float_as_uint(fmaxf(0, float(lost))));
            if (threadIdx.x % 32 == 0) atomicMax(in.inverse_length, most);
            __syncthreads();  // the length allows for all copies and ranks before any thread steps
            length = fmin(1.0, 0.99 / __uint_as_float(*in.inverse_length));
            double left = 1 - length;
            if (!corrects) target = left * left * left * mu;
        }
        s += length * ds;
        p += length * dp;
        for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) {
            in.x[a] += length * in.dx[a];
            in.z[a] += length * in.dz[a];
        }
        mu -= length * (mu - target);
    }
}

// Improves the split of `c`.
__device__ void start(const Component& c, const Interior& in) {
    int total = 0, largest = 0;
    for (int r = threadIdx.x % 32; r < c.shape.ranks; r += 32) {
        total += c.staying()[r] + c.movable()[r];
        largest = max(largest, c.staying()[r] + c.movable()[r]);
    }
    total = __reduce_add_sync(~0u, total);
    largest = __reduce_max_sync(~0u, largest);
    __syncthreads();  // all threads have read the loads, so all decide alike, before rounding changes them
    if (largest > total / c.shape.ranks + (total % c.shape.ranks != 0)) {  // else the start is optimal
        improve(c, in, largest, total);
        __syncthreads();  // x is final before copies of the same expert are rounded
        // Running sums are rounded, so that an expert's tokens stay whole and complete.
        for (int a = threadIdx.x; a < c.shape.arcs; a += V::threads) {
            Arc arc = c.arcs[a];
            if (c.copies[arc.place] != a) continue;
            int number = __popcll(arc.ranks), before = 0, tokens = 0;
            for (int i = 0; i < number; ++i) tokens += c.tokens[c.copies[arc.place + i]];
            double sum = 0;
            for (int i = 0; i < number; ++i) {
                int copy = c.copies[arc.place + i];
                sum += in.x[copy];
                int until = i + 1 < number ? min(max(__double2int_rn(sum), before), tokens) : tokens;
                atomicAdd(&c.movable()[c.arcs[copy].rank], until - before - c.tokens[copy]);
                c.tokens[copy] = until - before;
                before = until;
            }
        }
        __syncthreads();  // tokens and sums are final before the flow reads them
    }
}

extern "C" __global__ void __launch_bounds__(V::threads, 1) solve(const Problem problem) {
    extern __shared__ __align__(16) char shared[];
    double* matrix = reinterpret_cast<double*>(shared);
    double* side = matrix + V::size * V::size;
    unsigned* words = reinterpret_cast<unsigned*>(side + 2 * V::size);
    double* x = side + 2 * V::size + 2;  // 2 doubles for `words`, so that the tables stay aligned
    int n = problem.net.max_arcs;
    Interior in{matrix, side, x, x + n, x + 2 * n, x + 3 * n, x + 4 * n, x + 5 * n,
                words, reinterpret_cast<int*>(words + 1),
                problem.net.first_arc + blockIdx.x * (V::size + 1)};
    lplb::solve_component<V, false>(problem, reinterpret_cast<char*>(x + 6 * n),
                                    lplb::by_tokens<V, false>([&](const Component& c) { start(c, in); }));
}

// With speeds or capacities: the flow alone.
extern "C" __global__ void __launch_bounds__(V::threads, 1) solve_general(const Problem problem) {
    extern __shared__ __align__(16) char shared[];
    lplb::solve_component<V, true>(problem, shared, lplb::by_tokens<V, true>([](const Component&) {}));
}
