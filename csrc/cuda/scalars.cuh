// Functions of single numbers that kernels of every size need.
#pragma once

namespace hdc::cuda {

constexpr float ZERO_NORM = 1e-12f;  // of hdc_kernels/reference.py: a vector no longer than this is the zero vector

// What to multiply a vector by before it is squared, given its largest element: the squares of those beyond 1e19
// overflow. A power of two, which rounds nothing.
__device__ inline float shrink_for(float largest) { return largest > 0x1p40f ? 0x1p-70f : 1.0f; }

// 1/|x| of the squares of shrunk elements; 0 for a zero vector. NaN stays NaN.
__device__ inline float inverse_length(float squares, float shrink) {
    const float norm = sqrtf(squares);
    return norm <= ZERO_NORM ? 0.0f : shrink / norm;
}

// log(1 + exp(z)) to full relative accuracy.
__device__ inline float softplus(float z) { return fmaxf(z, 0.0f) + log1pf(expf(-fabsf(z))); }

}  // namespace hdc::cuda
