// Limits of ranks that have speeds.
#pragma once

#include "component.cuh"

namespace lplb {

// Finds the least time in which the ranks of `set` together compute `load` whole tokens. Raises the limits of this
// lane's ranks to it, and `own`, the limit of this thread's rank. By whole warps.
template <typename V>
__device__ void raise_limits(const Component<V>& c, typename V::Set set, int load, int (&limit)[V::words], int& own,
                             int rank) {
    typedef long long Long;
    int lane = threadIdx.x % 32, speed[V::words], done[V::words], speeds = 0, short_of = load;
    #pragma unroll
    for (int i = 0; i < V::words; ++i) {
        int r = lane + 32 * i;
        speed[i] = r < c.shape.ranks ? c.speed[c.ranks[r]] : 1;
        if (r < c.shape.ranks && has(set, r)) speeds += speed[i];
    }
    speeds = __reduce_add_sync(~0u, speeds);
    #pragma unroll
    for (int i = 0; i < V::words; ++i) {
        bool inside = lane + 32 * i < c.shape.ranks && has(set, lane + 32 * i);
        done[i] = inside ? int(Long(load) * speed[i] / speeds) : -1;
        short_of -= __reduce_add_sync(~0u, inside ? done[i] : 0);
    }
    // Rounding down loses at most one token a rank. Each lost token goes to the rank that would finish it first.
    Long tokens = load, time = speeds;
    for (; short_of > 0; --short_of) {
        Long next = MAX_TOTAL, pace = 1;
        int who = -1;
        #pragma unroll
        for (int i = 0; i < V::words; ++i)
            if (done[i] >= 0 && (who < 0 || (done[i] + Long(1)) * pace < next * speed[i])) {
                next = done[i] + Long(1);
                pace = speed[i];
                who = lane + 32 * i;
            }
        for (int other = 16; other > 0; other /= 2) {
            Long their = __shfl_xor_sync(~0u, next, other), their_pace = __shfl_xor_sync(~0u, pace, other);
            int they = __shfl_xor_sync(~0u, who, other);
            Long ahead = their * pace - next * their_pace;
            if (they >= 0 && (who < 0 || ahead < 0 || (ahead == 0 && they < who))) {
                next = their;
                pace = their_pace;
                who = they;
            }
        }
        #pragma unroll
        for (int i = 0; i < V::words; ++i)
            if (lane + 32 * i == who) ++done[i];
        tokens = next;
        time = pace;
    }
    #pragma unroll
    for (int i = 0; i < V::words; ++i) limit[i] = int(min(tokens * speed[i] / time, Long(MAX_TOTAL)));
    own = rank < c.shape.ranks ? int(min(tokens * c.speed[c.ranks[rank]] / time, Long(MAX_TOTAL))) : 0;
}

}  // namespace lplb
