// The gradient of a tile of embeddings of either side: coefficients · others, and then through the normalisation.
#pragma once

#include "small_windows.cuh"

namespace hdc::cuda::small {

template <int DEPTH>
constexpr int SUM_STRIDE = DEPTH + 4;

struct Shift {
    float highest, log_total;

    __device__ Shift(const Sums& sums, int i, bool valid) {
        const bool any = valid && sums.log_total[i] != -INFINITY;
        highest = any && sums.highest[i] != -INFINITY ? sums.highest[i] : 0.0f;
        log_total = any ? sums.log_total[i] : INFINITY;  // exponentials of nothing are 0
    }
    __device__ float probability(float cosine, float k) const {
        return power_of_two((cosine - highest) * k - log_total);
    }
};

// `unit` is the largest weight of the problem, `scale` 1/τ. The whole block calls it.
template <typename T, int DEPTH>
__device__ inline void gradient(
    const Problem<T>& problem, Windows<T, DEPTH>& windows, int side, int tile, float unit, float scale, int warp,
    int lane
) {
    const Arguments& a = problem.arguments;
    const Pair& pair = problem.pair;
    Numbers& s = problem.numbers;
    const int team = warp / 2, g = lane / 4, t = lane % 4, part = lane % 8;
    const int first = tile + team * SLAB;
    const int own_count = pair.counts[side], other_count = pair.counts[!side], M = pair.counts[0];
    const float k = scale * LOG2_E;
    const Sums& own_sums = s.sums[side];
    const Sums& other_sums = s.sums[!side];
    const bool own_term = side == 0 || a.symmetric, other_term = side == 1 || a.symmetric;
    Shift own_shift[2] = {Shift(own_sums, first + g, own_term && first + g < own_count),
                          Shift(own_sums, first + g + 8, own_term && first + g + 8 < own_count)};
    float own_share[2];
    for (int low = 0; low < 2; ++low) own_share[low] = other_term ? own_sums.share[first + g + 8 * low] : GAIN<T>;
    float sum[DEPTH / 8][4] = {};
    for (int chunk = warp % 2 * CHUNK; chunk / TILE * TILE < other_count; chunk += TILE) {
        const bool idle = first >= own_count || chunk >= other_count;
        float c[4][4];
        cosines(c, windows, side, first, chunk, idle, lane);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int j = chunk + e / 2 * 8 + 2 * t + e % 2;
            const Shift other_shift(other_sums, j, other_term && j < other_count);
#pragma unroll
            for (int low = 0; low < 2; ++low) {
                float& cosine = c[e / 2][2 * low + e % 2];
                const int i = first + g + 8 * low;
                float coefficient = 0.0f;
                if (i != j && i < own_count && j < other_count) {
                    if (own_term) coefficient = own_shift[low].probability(cosine, k) * own_share[low];
                    if (other_term) coefficient += other_shift.probability(cosine, k) * other_sums.share[j];
                }
                cosine = coefficient;
            }
        }
        if constexpr (SLICES<T, DEPTH> == 2) {  // the second one is there already
            if (!idle) accumulate<T, DEPTH>(sum + DEPTH / 16, c, windows.unit(!side, chunk, 1), lane);
            windows.slide(side, first, chunk, 0);
        }
        if (!idle) accumulate<T, DEPTH>(sum, c, windows.unit(!side, chunk, 0), lane);
    }
    if (!pair.apart) {
        __syncthreads();  // nobody reads unit vectors any longer
        windows.forget();
    }
    if (first >= own_count) return;
    float* team_sum = windows.sums() + team * SLAB * SUM_STRIDE<DEPTH>;
    // The second warp's half is added to the first's.
    for (int half = 0; half < 2; ++half) {
        if (warp % 2 == half) {
#pragma unroll
            for (int n = 0; n < DEPTH / 8; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float& to = team_sum[(g + e / 2 * 8) * SUM_STRIDE<DEPTH> + 8 * n + 2 * t + e % 2];
                    to = half ? to + sum[n][e] : sum[n][e];
                }
            }
        }
        wait_for(1 + team, 2);
    }
    const HdcCudaMatrix& out = pair.gradients[side];
    for (int r = warp % 2 * 4 + lane / 8; r < SLAB; r += 8) {
        const int i = first + r;
        float u[DEPTH / 8], v[DEPTH / 8];  // unit vectors: its own, its positive's
        const int own_width = i < own_count ? pair.width : 0, positive_width = i < M ? pair.width : 0;
        load_row<T, DEPTH>(u, problem.embedding(side, i), own_width, pair.aligned, part);
        load_row<T, DEPTH>(v, problem.embedding(!side, i), positive_width, pair.aligned, part);
        const float inverse = i < own_count ? s.inverse[side][i] : 0.0f;
        const float positive_inverse = i < M ? s.inverse[!side][i] : 0.0f;
        const float pull = i < M ? s.sums[0].weight[i] + s.sums[1].weight[i] : 0.0f;
        const float factor = other_term ? unit / GAIN<T> : (i < M ? s.sums[0].weight[i] : 0.0f) / GAIN<T>;
        float along = 0.0f;
#pragma unroll
        for (int e = 0; e < DEPTH / 8; ++e) {
            const int column = (8 * (e / VECTOR<T>) + part) * VECTOR<T> + e % VECTOR<T>;
            u[e] *= inverse;
            const float pulled = team_sum[r * SUM_STRIDE<DEPTH> + column] * factor - v[e] * positive_inverse * pull;
            v[e] = pulled * scale;
            along = fmaf(u[e], v[e], along);
        }
        along = over_row(along);
        if (a.normalize) {
#pragma unroll
            for (int e = 0; e < DEPTH / 8; ++e) v[e] = (v[e] - u[e] * along) * inverse;
        }
        const int64_t offset = problem.group * out.group_stride + i * out.row_stride;
        if (a.task == HDC_CUDA_STEP) {
            store_row<T, DEPTH>(static_cast<float*>(out.data) + offset, v, own_width, pair.aligned, part);
        } else {
            store_row<T, DEPTH>(static_cast<T*>(out.data) + offset, v, own_width, pair.aligned, part);
        }
        if (side == 0 && part == 0 && i < M) s.along[i] = along;
    }
    wait_for(1 + team, 2);
}

}  // namespace hdc::cuda::small
