// The one matrix product of the CPU kernels: out[rows, vectors] (+)= Σ_k a[rows, k] · b[k, vectors].
//
// A tile's accumulators stay in registers; each step loads the vectors of b and broadcasts the scalars of
// a. Of the tiles tried at AVX-512 (4×4, 5×4, 6×4, 7×4, 8×2, 8×3, 12×1, 12×2, 14×2), 8×2, 8×3 and 6×4 come
// within 5 % of the FMA peak on a quiet machine; 6×4 needs the fewest loads of them (10 for 24 products) and
// keeps more of it beside a busy neighbour. With 16 registers there is room for 6×2.
//
// Accumulators start at 0 and are added to `out` once: that keeps the error of a long sum at that of a
// sum of block sums, for the same number of loads.
#pragma once

#include "vector.h"

namespace HDC_ISA {

constexpr int TILE_ROWS = 6;
constexpr int TILE_VECTORS = HDC_VECTOR_BYTES == 64 ? 4 : 2;

template <typename T>
constexpr int TILE_WIDTH = TILE_VECTORS * LANES<T>;

// Whether the k of one row lie together (a[r·stride + k]) or the rows of one k (a[k·stride + r]).
enum Order { BY_ROW, BY_STEP };

template <typename T, int R, int VECTORS, Order ORDER, bool ADD>
inline void multiply_tile(const T* __restrict a, int64_t a_stride, const T* __restrict b, int64_t steps,
                          T* __restrict out, int64_t out_stride) {
    constexpr int V = LANES<T>;
    Vector<T> sum[R][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sum[r][v] = Vector<T>{};
#pragma GCC unroll 4
    for (int64_t k = 0; k < steps; k++) {
        Vector<T> right[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) right[v] = load(b + k * TILE_WIDTH<T> + v * V);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const Vector<T> left = broadcast(ORDER == BY_ROW ? a[r * a_stride + k] : a[k * a_stride + r]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sum[r][v] += left * right[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            T* to = out + r * out_stride + v * V;
            store(to, ADD ? load(to) + sum[r][v] : sum[r][v]);
        }
}

// Fewer rows than a tile has.
template <typename T, int R, int VECTORS, Order ORDER, bool ADD>
inline void multiply_rest(int64_t rows, const T* a, int64_t a_stride, const T* b, int64_t steps, T* out,
                          int64_t out_stride) {
    if constexpr (R > 0) {
        if (rows == R) return multiply_tile<T, R, VECTORS, ORDER, ADD>(a, a_stride, b, steps, out, out_stride);
        multiply_rest<T, R - 1, VECTORS, ORDER, ADD>(rows, a, a_stride, b, steps, out, out_stride);
    }
}

template <typename T, int VECTORS, Order ORDER, bool ADD>
__attribute__((noinline)) void multiply_rows(int64_t rows, const T* a, int64_t a_stride, const T* b, int64_t steps,
                                             T* out, int64_t out_stride) {
    const int64_t next = ORDER == BY_ROW ? a_stride : 1;  // from one row of a to the next
    int64_t r = 0;
    for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
        multiply_tile<T, TILE_ROWS, VECTORS, ORDER, ADD>(a + r * next, a_stride, b, steps, out + r * out_stride,
                                                         out_stride);
    multiply_rest<T, TILE_ROWS - 1, VECTORS, ORDER, ADD>(rows - r, a + r * next, a_stride, b, steps,
                                                         out + r * out_stride, out_stride);
}

// out[rows, width] (+)= a[rows, steps] · b[steps, width], up to TILE_WIDTH wide. The rows of b lie TILE_WIDTH
// apart; `width` is rounded up to whole vectors.
template <typename T, Order ORDER, bool ADD, int VECTORS = TILE_VECTORS>
inline void multiply(int64_t rows, int64_t width, const T* a, int64_t a_stride, const T* b, int64_t steps, T* out,
                     int64_t out_stride) {
    if constexpr (VECTORS > 1)
        if (width <= (VECTORS - 1) * LANES<T>)
            return multiply<T, ORDER, ADD, VECTORS - 1>(rows, width, a, a_stride, b, steps, out, out_stride);
    multiply_rows<T, VECTORS, ORDER, ADD>(rows, a, a_stride, b, steps, out, out_stride);
}

}  // namespace HDC_ISA
