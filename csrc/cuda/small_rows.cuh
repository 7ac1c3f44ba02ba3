// A row in 8 lanes of a warp: lane `part` has elements (8·piece + part)·VECTOR … of every piece.
#pragma once

#include "scalars.cuh"
#include "small_problem.cuh"

namespace hdc::cuda::small {

template <typename T>
constexpr int VECTOR = 16 / int(sizeof(T));

template <typename T>
struct alignas(16) Vector {
    T values[VECTOR<T>];
};

// WIDTH elements, of which those from `width` on are 0.
template <typename T, int WIDTH>
__device__ inline void load_row(float (&to)[WIDTH / 8], const T* row, int width, bool aligned, int part) {
#pragma unroll
    for (int piece = 0; piece < WIDTH / 8 / VECTOR<T>; ++piece) {
        const int column = (8 * piece + part) * VECTOR<T>;
        if (aligned && column + VECTOR<T> <= width) {
            const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(row + column);
#pragma unroll
            for (int e = 0; e < VECTOR<T>; ++e) to[piece * VECTOR<T> + e] = widen(vector.values[e]);
        } else {
#pragma unroll
            for (int e = 0; e < VECTOR<T>; ++e) {
                to[piece * VECTOR<T> + e] = column + e < width ? widen(row[column + e]) : 0.0f;
            }
        }
    }
}

// The first WIDTH elements of a row that was loaded as T.
template <typename T, int WIDTH, typename Out>
__device__ inline void store_row(Out* row, const float* from, int width, bool aligned, int part) {
#pragma unroll
    for (int piece = 0; piece < WIDTH / 8 / VECTOR<T>; ++piece) {
        const int column = (8 * piece + part) * VECTOR<T>;
        if (aligned && column + VECTOR<T> <= width) {
#pragma unroll
            for (int begin = 0; begin < VECTOR<T>; begin += VECTOR<Out>) {
                Vector<Out> vector;
#pragma unroll
                for (int e = 0; e < VECTOR<Out>; ++e) {
                    vector.values[e] = narrow<Out>(from[piece * VECTOR<T> + begin + e]);
                }
                *reinterpret_cast<Vector<Out>*>(row + column + begin) = vector;
            }
        } else {
#pragma unroll
            for (int e = 0; e < VECTOR<T>; ++e) {
                if (column + e < width) row[column + e] = narrow<Out>(from[piece * VECTOR<T> + e]);
            }
        }
    }
}

__device__ inline float over_row(float value) {
    for (int distance = 1; distance < 8; distance *= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
}

// 1/|x|, 0 for a zero vector; 1 without `normalize`.
template <int N>
__device__ inline float inverse_norm(const float (&x)[N], bool normalize) {
    float largest = 0.0f;
#pragma unroll
    for (int e = 0; e < N; ++e) largest = fmaxf(largest, fabsf(x[e]));
    for (int distance = 1; distance < 8; distance *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
    }
    const float shrink = shrink_for(largest);
    float squares = 0.0f;
#pragma unroll
    for (int e = 0; e < N; ++e) squares = fmaf(x[e] * shrink, x[e] * shrink, squares);
    const float inverse = inverse_length(over_row(squares), shrink);
    return normalize ? inverse : 1.0f;
}

}  // namespace hdc::cuda::small
