// The one matrix product of the CPU kernels: out[R, 2 vectors] (+)= Σ_k a[r, k] · b[k, 2 vectors].
//
// The R × 2 accumulators stay in registers; each step loads two vectors of b and broadcasts R scalars of
// a. Of the tiles tried at AVX-512 (4×4, 5×4, 6×4, 7×4, 8×2, 8×3, 12×1, 12×2, 14×2), 8×2, 8×3 and 6×4
// came within 5 % of the FMA peak from L2; 8×2 wastes least on widths that are no multiple of 48 or 64.
//
// Accumulators start at 0 and are added to `out` once: that keeps the error of a long sum at that of a
// sum of block sums, for the same number of loads.
#pragma once

#include "vector.h"

namespace HDC_ISA {

constexpr int TILE_ROWS = HDC_VECTOR_BYTES == 64 ? 8 : 6;  // 32 registers, or 16

template <typename T>
constexpr int TILE_WIDTH = 2 * LANES<T>;

// Whether the k of one row lie together (a[r·stride + k]) or the rows of one k (a[k·stride + r]).
enum Order { BY_ROW, BY_STEP };

template <typename T, int R, Order ORDER, bool ADD>
inline void multiply_tile(const T* __restrict a, int64_t a_stride, const T* __restrict b, int64_t steps,
                          T* __restrict out, int64_t out_stride) {
    constexpr int V = LANES<T>;
    Vector<T> sum[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = Vector<T>{};
#pragma GCC unroll 4
    for (int64_t k = 0; k < steps; k++) {
        const Vector<T> left = load(b + k * 2 * V), right = load(b + k * 2 * V + V);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const T scalar = ORDER == BY_ROW ? a[r * a_stride + k] : a[k * a_stride + r];
            sum[r][0] += broadcast(scalar) * left;
            sum[r][1] += broadcast(scalar) * right;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        T* row = out + r * out_stride;
        store(row, ADD ? load(row) + sum[r][0] : sum[r][0]);
        store(row + V, ADD ? load(row + V) + sum[r][1] : sum[r][1]);
    }
}

template <typename T, int R, Order ORDER, bool ADD>
inline void multiply_rest(int64_t rows, const T* a, int64_t a_stride, const T* b, int64_t steps, T* out,
                          int64_t out_stride) {
    if constexpr (R > 0) {
        if (rows == R) return multiply_tile<T, R, ORDER, ADD>(a, a_stride, b, steps, out, out_stride);
        multiply_rest<T, R - 1, ORDER, ADD>(rows, a, a_stride, b, steps, out, out_stride);
    }
}

// out[rows, TILE_WIDTH] (+)= a[rows, steps] · b[steps, TILE_WIDTH], the rows of b lying together.
template <typename T, Order ORDER, bool ADD>
__attribute__((noinline)) void multiply(int64_t rows, const T* a, int64_t a_stride, const T* b, int64_t steps,
                                        T* out, int64_t out_stride) {
    const int64_t next = ORDER == BY_ROW ? a_stride : 1;  // from one row of a to the next
    int64_t r = 0;
    for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
        multiply_tile<T, TILE_ROWS, ORDER, ADD>(a + r * next, a_stride, b, steps, out + r * out_stride, out_stride);
    multiply_rest<T, TILE_ROWS - 1, ORDER, ADD>(rows - r, a + r * next, a_stride, b, steps, out + r * out_stride,
                                                out_stride);
}

}  // namespace HDC_ISA
