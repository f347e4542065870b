// How each copy's quota is shared out to the source ranks; the CPU's `split` is the definition. Copies are few, and loops
// over them are not unrolled, as in `block_stride`.
#pragma once

namespace lplb {

// How many numbers lie in both [a, b) and [c, d).
__device__ int overlap(int a, int b, int c, int d) { return max(0, min(b, d) - max(a, c)); }

// One expert's copies in a batch, in shared memory. Its tokens are served in three stages: by copies on their
// own rank, then by the others of their node, then by the rest. At each stage the tokens in rank order are matched with
// what the copies still take, in column order.
struct Expert {
    int num_copies;
    const int* rank;    // [num_copies]
    const int* node;    // of that rank
    const int* local;   // tokens of its own rank that a copy takes
    const int* remote;  // and of others
    const int* supply;  // [num_nodes] tokens on the ranks of each
    int num_nodes;

    // A node's tokens without those that copies take of their own ranks. `demand`: how many more its copies can take.
    __device__ int left(int n, int& demand) const {
        int tokens = supply[n];
        demand = 0;
        #pragma unroll 1
        for (int c = 0; c < num_copies; ++c)
            if (node[c] == n) {
                tokens -= local[c];
                demand += remote[c];
            }
        return tokens;
    }

    // The shares of a source rank with `mine` tokens, and `before` on earlier ranks of its node.
    __device__ void share_out(int source, int home, int mine, int before, int* shares) const {
        int begin = before, end = before + mine, at = 0;
        #pragma unroll 1
        for (int c = 0; c < num_copies; ++c) {
            shares[c] = rank[c] == source ? local[c] : 0;
            if (node[c] != home) continue;
            if (rank[c] < source) begin -= local[c];
            if (rank[c] <= source) end -= local[c];
        }
        #pragma unroll 1
        for (int c = 0; c < num_copies; ++c) {
            if (node[c] != home) continue;
            shares[c] += overlap(begin, end, at, at + remote[c]);
            at += remote[c];
        }
        begin = max(begin, at) - at;
        end = max(end, at) - at;
        if (num_nodes == 1 || begin == end) return;
        int demand, first = at = 0;
        #pragma unroll 1
        for (int n = 0; n < home; ++n) {
            int tokens = left(n, demand);
            first += max(0, tokens - demand);
        }
        #pragma unroll 1
        for (int c = 0; c < num_copies; ++c) {
            int tokens = left(node[c], demand), filled = 0;
            #pragma unroll 1
            for (int k = 0; k < c; ++k)
                if (node[k] == node[c]) filled += remote[k];
            int open = remote[c] - overlap(filled, filled + remote[c], 0, tokens);
            shares[c] += overlap(first + begin, first + end, at, at + open);
            at += open;
        }
    }
};

}  // namespace lplb
