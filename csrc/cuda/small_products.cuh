// Products of a slab with a chunk of others, by one warp: slices of unit vectors in shared memory, rows STRIDE apart.
#pragma once

#include "fragments.cuh"
#include "small_rows.cuh"

namespace hdc::cuda::small {

template <typename T, int DEPTH>
constexpr int SLICE = DEPTH * int(sizeof(T)) <= 512 ? DEPTH : 512 / int(sizeof(T));  // dimensions

template <typename T, int DEPTH>
constexpr int SLICES = DEPTH / SLICE<T, DEPTH>;

template <typename T, int DEPTH>
constexpr int STRIDE = SLICE<T, DEPTH> + VECTOR<T>;  // eight rows lie in different banks

// c += own [16, SLICE] · others [32, SLICE]ᵀ: four tiles of 16 × 8, laid out as warp.cuh says.
template <typename T, int DEPTH>
__device__ inline void similarity(float (&c)[4][4], const T* own, const T* other, int lane) {
    constexpr int width = SLICE<T, DEPTH>, stride = STRIDE<T, DEPTH>;
    if constexpr (sizeof(T) == 2) {
        const T* a_row = own + lane % 16 * stride + lane / 16 * 8;
        const T* b_row = other + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8;
#pragma unroll 4
        for (int d = 0; d < width; d += 16) {
            uint32_t a[4], b[4];
            load_matrices(a, a_row + d);
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
                load_matrices(b, b_row + n * 8 * stride + d);
                multiply(T(), c[n], a, b[0], b[1]);
                multiply(T(), c[n + 1], a, b[2], b[3]);
            }
        }
    } else {
        const int g = lane / 4, t = lane % 4;
#pragma unroll(DEPTH > 128 ? 1 : 2)  // two at 256 dimensions spill
        for (int d = 0; d < width; d += 4) {
            const Vector<T> up = *reinterpret_cast<const Vector<T>*>(own + g * stride + d);
            const Vector<T> low = *reinterpret_cast<const Vector<T>*>(own + (g + 8) * stride + d);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const T* row = other + (8 * n + 2 * t) * stride + d;
                const Vector<T> left = *reinterpret_cast<const Vector<T>*>(row);
                const Vector<T> right = *reinterpret_cast<const Vector<T>*>(row + stride);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    c[n][0] = fmaf(up.values[e], left.values[e], c[n][0]);
                    c[n][1] = fmaf(up.values[e], right.values[e], c[n][1]);
                    c[n][2] = fmaf(low.values[e], left.values[e], c[n][2]);
                    c[n][3] = fmaf(low.values[e], right.values[e], c[n][3]);
                }
            }
        }
    }
}

// sum [16, SLICE] += c [16, 32] · others [32, SLICE], c rounded to T; `sum` is SLICE / 8 tiles of 16 × 8.
template <typename T, int DEPTH>
__device__ inline void accumulate(float (*sum)[4], const float (&c)[4][4], const T* other, int lane) {
    constexpr int width = SLICE<T, DEPTH>, stride = STRIDE<T, DEPTH>;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // 16 of the others
            const float(&left)[4] = c[2 * half];
            const float(&right)[4] = c[2 * half + 1];
            const uint32_t a[4] = {narrow_pair<T>(left[0], left[1]), narrow_pair<T>(left[2], left[3]),
                                   narrow_pair<T>(right[0], right[1]), narrow_pair<T>(right[2], right[3])};
            const T* row = other + (16 * half + lane % 16) * stride + lane / 16 * 8;
#pragma unroll
            for (int n = 0; n < width / 8; n += 2) {
                uint32_t b[4];
                load_transposed(b, row + 8 * n);
                multiply(T(), sum[n], a, b[0], b[1]);
                multiply(T(), sum[n + 1], a, b[2], b[3]);
            }
        }
    } else {
        const int t = lane % 4;
#pragma unroll
        for (int j = 0; j < CHUNK; ++j) {
            const int source = lane / 4 * 4 + j % 8 / 2;
            const float up = __shfl_sync(~0u, c[j / 8][j % 2], source);
            const float low = __shfl_sync(~0u, c[j / 8][2 + j % 2], source);
#pragma unroll
            for (int n = 0; n < width / 8; ++n) {
                const float2 v = *reinterpret_cast<const float2*>(other + j * stride + 8 * n + 2 * t);
                sum[n][0] = fmaf(up, v.x, sum[n][0]);
                sum[n][1] = fmaf(up, v.y, sum[n][1]);
                sum[n][2] = fmaf(low, v.x, sum[n][2]);
                sum[n][3] = fmaf(low, v.y, sum[n][3]);
            }
        }
    }
}

}  // namespace hdc::cuda::small
