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

// How a step multiplies: element by element, or PAIRS, where 32 bits hold two bfloat16 of consecutive k and
// both products are added in float32. A matrix of pairs has half the steps and is otherwise the same. It pays
// where vdpbf16ps starts once a cycle (Zen 4); on an Emerald Rapids it reached half the FMA units' rate.
enum Elements { SINGLE, PAIRS };

template <typename T, Elements ELEMENTS>
inline Vector<T> multiply_add(Vector<T> a, Vector<T> b, Vector<T> sum) {
#ifdef __AVX512BF16__
    if constexpr (ELEMENTS == PAIRS) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    else
#endif
        return sum + a * b;
}

template <typename T>
struct Operand {
    const T* data;
    int64_t stride;
};

// Whether the k of one row lie together (a[r·stride + k]) or the rows of one k (a[k·stride + r]).
enum Order { BY_ROW, BY_STEP };

template <typename T, int R, int VECTORS, Order ORDER, Elements ELEMENTS>
inline void multiply_tile(Operand<T> a, Operand<T> b, int64_t steps, T* __restrict out, int64_t out_stride, bool add) {
    constexpr int V = LANES<T>;
    Vector<T> sum[R][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sum[r][v] = Vector<T>{};
    // By the time the sums are there, so is what they are added to or written over: it may come from the L3 cache.
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) __builtin_prefetch(out + r * out_stride + v * V, 1);
#pragma GCC unroll 4
    for (int64_t k = 0; k < steps; k++) {
        // A column of a panel is a new cache line in every step, too far apart for the hardware to foresee.
        if (ORDER == BY_STEP) __builtin_prefetch(a.data + k * a.stride + 128 / sizeof(T));
        Vector<T> right[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) right[v] = load(b.data + k * b.stride + v * V);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const Vector<T> left = broadcast(a.data[ORDER == BY_ROW ? r * a.stride + k : k * a.stride + r]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sum[r][v] = multiply_add<T, ELEMENTS>(left, right[v], sum[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            T* to = out + r * out_stride + v * V;
            store(to, add ? load(to) + sum[r][v] : sum[r][v]);
        }
}

// Fewer rows than a tile has.
template <typename T, int R, int VECTORS, Order ORDER, Elements ELEMENTS>
inline void multiply_rest(int64_t rows, Operand<T> a, Operand<T> b, int64_t steps, T* out, int64_t out_stride, bool add) {
    if constexpr (R > 0) {
        if (rows == R) return multiply_tile<T, R, VECTORS, ORDER, ELEMENTS>(a, b, steps, out, out_stride, add);
        multiply_rest<T, R - 1, VECTORS, ORDER, ELEMENTS>(rows, a, b, steps, out, out_stride, add);
    }
}

template <typename T, int VECTORS, Order ORDER, Elements ELEMENTS>
__attribute__((noinline)) void multiply_rows(int64_t rows, Operand<T> a, Operand<T> b, int64_t steps, T* out,
                                             int64_t out_stride, bool add) {
    const int64_t next = ORDER == BY_ROW ? a.stride : 1;  // from one row of a to the next
    for (; rows >= TILE_ROWS; rows -= TILE_ROWS) {
        multiply_tile<T, TILE_ROWS, VECTORS, ORDER, ELEMENTS>(a, b, steps, out, out_stride, add);
        a.data += TILE_ROWS * next;
        out += TILE_ROWS * out_stride;
    }
    multiply_rest<T, TILE_ROWS - 1, VECTORS, ORDER, ELEMENTS>(rows, a, b, steps, out, out_stride, add);
}

// out[rows, width] (+)= a[rows, steps] · b[steps, width] for at most TILE_WIDTH columns, rounded up to vectors.
template <typename T, Order ORDER, Elements ELEMENTS, int VECTORS = TILE_VECTORS>
inline void multiply(int64_t rows, int64_t width, Operand<T> a, Operand<T> b, int64_t steps, T* out,
                     int64_t out_stride, bool add) {
    if constexpr (VECTORS > 1)
        if (width <= (VECTORS - 1) * LANES<T>)
            return multiply<T, ORDER, ELEMENTS, VECTORS - 1>(rows, width, a, b, steps, out, out_stride, add);
    multiply_rows<T, VECTORS, ORDER, ELEMENTS>(rows, a, b, steps, out, out_stride, add);
}

}  // namespace HDC_ISA
