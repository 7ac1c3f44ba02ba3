// Unit vectors of raw embeddings, a warp a row: what packing and unpacking do alike.
#pragma once

#include "packed.h"
#include "scalars.cuh"
#include "warp.cuh"

namespace hdc::cuda {

constexpr int WARPS = 8;

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffff, x, lanes);
    return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, lanes));
    return x;
}

// A row of `matrix` over its length, or 0 where it is a zero vector or past `count`; lane l has elements l + 32·e.
// Returns what it was multiplied by.
template <typename Element, int EACH>
__device__ float load_unit(
    float (&unit)[EACH], const HdcCudaMatrix& matrix, int64_t group, int64_t row, int64_t count, int64_t width,
    bool normalize
) {
    const int lane = threadIdx.x % 32;
    if (row >= count) {
#pragma unroll
        for (int e = 0; e < EACH; ++e) unit[e] = 0.0f;
        return 0.0f;
    }
    const auto* from = static_cast<const Element*>(matrix.data) + group * matrix.group_stride + row * matrix.row_stride;
    float largest = 0.0f;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        unit[e] = lane + 32 * e < width ? widen(from[lane + 32 * e]) : 0.0f;
        largest = fmaxf(largest, fabsf(unit[e]));
    }
    if (!normalize) return 1.0f;
    const float shrink = shrink_for(warp_max(largest));
    float squares = 0.0f;
#pragma unroll
    for (int e = 0; e < EACH; ++e) squares += (unit[e] * shrink) * (unit[e] * shrink);
    const float inverse = inverse_length(warp_sum(squares), shrink);
#pragma unroll
    for (int e = 0; e < EACH; ++e) unit[e] *= inverse;
    return inverse;
}

}  // namespace hdc::cuda
