// What the lanes of a warp hold of an accumulator, [16, 8] a fragment (warp.cuh), and what they make of it together.
#pragma once

#include <cstdint>
#include <cstring>

#include "warp.cuh"

namespace hdc::cuda {

// Two numbers rounded to the nearest T of 16 bits, the first in the lower half.
template <typename T>
__device__ inline uint32_t narrow_pair(float first, float second) {
    struct alignas(4) Two {
        T values[2];
    } two = {{narrow<T>(first), narrow<T>(second)}};
    uint32_t bits;
    memcpy(&bits, &two, 4);
    return bits;
}

// Two parts of (highest, Σ exp2((cosine − highest)·k)) become one.
__device__ inline void join(float& highest, float& total, float other_highest, float other_total, float k) {
    const float higher = fmaxf(highest, other_highest);
    const float base = higher == -INFINITY ? 0.0f : higher;
    total = total * power_of_two((highest - base) * k) + other_total * power_of_two((other_highest - base) * k);
    highest = higher;
}

// Of eight sums the one of index lane / 4, over the eight lanes that have the same columns.
__device__ inline float over_rows(float (&sums)[8], int lane) {
#pragma unroll
    for (int width = 4; width > 0; width /= 2) {
        const bool upper = lane & (width * 4);
#pragma unroll
        for (int i = 0; i < width; ++i) {
            const float sent = upper ? sums[i] : sums[i + width];
            const float kept = upper ? sums[i + width] : sums[i];
            sums[i] = kept + __shfl_xor_sync(0xffffffff, sent, width * 4);
        }
    }
    return sums[0];
}

}  // namespace hdc::cuda
