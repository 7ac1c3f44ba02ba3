// Logsumexps of the vectors of one side over those of the other, in two parts, so that no large one is rounded.
#pragma once

#include "small_windows.cuh"

namespace hdc::cuda::small {

// Of every `step`-th tile of the side from `begin` on. The whole block calls it.
template <typename T, int DEPTH>
__device__ inline void logsumexps(
    const Problem<T>& problem, Windows<T, DEPTH>& windows, int side, int begin, int step, float k, int warp, int lane
) {
    Numbers& s = problem.numbers;
    Sums& sums = s.sums[side];
    const int g = lane / 4, t = lane % 4, team = warp / 2;
    const int own_count = problem.pair.counts[side], other_count = problem.pair.counts[!side];
    for (int tile = begin; tile < own_count; tile += step) {
        const int slab = tile + team * SLAB;
        float highest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
        for (int chunk = warp % 2 * CHUNK; chunk / TILE * TILE < other_count; chunk += TILE) {
            const bool idle = slab >= own_count || chunk >= other_count;
            float c[4][4];
            cosines(c, windows, side, slab, chunk, idle, lane);
            if (idle) continue;
#pragma unroll
            for (int low = 0; low < 2; ++low) {
                const int i = slab + g + 8 * low;
                float top = highest[low];
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    float& cosine = c[e / 2][2 * low + e % 2];
                    const int j = chunk + e / 2 * 8 + 2 * t + e % 2;
                    if (i == j) {
                        if (side == 0 && i < own_count) s.own[i] = cosine;
                        cosine = -INFINITY;
                    }
                    if (j >= other_count) cosine = -INFINITY;
                    top = fmaxf(top, cosine);
                }
                const float base = top == -INFINITY ? 0.0f : top;
                total[low] *= power_of_two((highest[low] - base) * k);
#pragma unroll
                for (int e = 0; e < 8; ++e) total[low] += power_of_two((c[e / 2][2 * low + e % 2] - base) * k);
                highest[low] = top;
            }
        }
        if (slab >= own_count) continue;
#pragma unroll
        for (int low = 0; low < 2; ++low) {
            for (int distance = 1; distance < 4; distance *= 2) {
                const float other_highest = __shfl_down_sync(~0u, highest[low], distance);
                const float other_total = __shfl_down_sync(~0u, total[low], distance);
                join(highest[low], total[low], other_highest, other_total, k);
            }
            if (t == 0) {
                s.half_highest[warp][g + 8 * low] = highest[low];
                s.half_total[warp][g + 8 * low] = total[low];
            }
        }
        wait_for(1 + team, 2);
        if (warp % 2 == 0 && lane < SLAB && slab + lane < own_count) {
            float top = s.half_highest[warp][lane], sum = s.half_total[warp][lane];
            join(top, sum, s.half_highest[warp + 1][lane], s.half_total[warp + 1][lane], k);
            sums.highest[slab + lane] = top;
            sums.log_total[slab + lane] = log2f(sum);
        }
        wait_for(1 + team, 2);
    }
}

// A saved logsumexp in the same two parts.
__device__ inline void take_apart(Sums& sums, int i, double lse, float k) {
    const double in_base_2 = lse * 1.4426950408889634;
    const bool empty = lse == -INFINITY;
    const float highest = empty ? -INFINITY : static_cast<float>(in_base_2 / k);
    sums.highest[i] = highest;
    sums.log_total[i] = empty ? -INFINITY : static_cast<float>(in_base_2 - static_cast<double>(highest) * k);
}

__device__ inline double whole(const Sums& sums, int i, float k) {
    if (sums.highest[i] == -INFINITY) return sums.log_total[i];
    return (static_cast<double>(sums.highest[i]) * k + sums.log_total[i]) * LN_2;
}

__device__ inline float gap(const Sums& sums, int i, float positive, float k) {  // logsumexp − positive's logit
    if (sums.highest[i] == -INFINITY) return sums.log_total[i];  // −∞, or NaN
    return static_cast<float>(((sums.highest[i] - positive) * k + sums.log_total[i]) * LN_2);
}

}  // namespace hdc::cuda::small
