// csrc/cuda/warp.cuh on emulated lanes: the fragments of mma.sync and ldmatrix as the PTX manual lays them out.
#pragma once
#define HDC_CUDA_WARP

#include <cuda_runtime.h>

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    _Float16 value;
};

namespace hdc::cuda {

inline float widen(float x) { return x; }
inline float widen(__nv_bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float widen(__half x) { return float(x.value); }

template <typename T>
T narrow(float x);
template <>
inline float narrow<float>(float x) { return x; }
template <>
inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline __half narrow<__half>(float x) { return {_Float16(x)}; }

inline float power_of_two(float x) { return std::exp2(x); }
inline float round_to_tf32(float x) {  // to nearest, ties away from 0
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x1000) & 0xffffe000;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline void wait_for(int id, int warps) { emulated::wait(emulated::block.named[id], 32 * warps); }
inline unsigned char* dynamic_memory() {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(emulated::dynamic.data()) + 15) / 16 * 16);
}

inline uint16_t element(const void* row, int column) {
    uint16_t bits;
    std::memcpy(&bits, static_cast<const char*>(row) + 2 * column, 2);
    return bits;
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
    const emulated::Together<const void*> rows(row);
    const int lane = int(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    for (int m = 0; m < 4; ++m) {
        const void* from = rows.of[8 * m + g];
        to[m] = element(from, 2 * t) | uint32_t(element(from, 2 * t + 1)) << 16;
    }
}

inline void load_transposed(uint32_t (&to)[4], const void* row) {
    const emulated::Together<const void*> rows(row);
    const int lane = int(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    for (int m = 0; m < 4; ++m) {
        to[m] = element(rows.of[8 * m + 2 * t], g) | uint32_t(element(rows.of[8 * m + 2 * t + 1], g)) << 16;
    }
}

template <typename T>
float half_of(uint32_t bits, int which) {
    const uint16_t one = uint16_t(bits >> 16 * which);
    T value;
    std::memcpy(&value, &one, 2);
    return widen(value);
}

template <typename T>
void multiply(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Factors {
        uint32_t a[4], b[2];
    } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const emulated::Together<Factors> all(mine);
    const int lane = int(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    for (int e = 0; e < 4; ++e) {
        const int row = g + e / 2 * 8, column = 2 * t + e % 2;
        float sum = c[e];
        for (int k = 0; k < 16; ++k) {
            // (row, k) of a is with lane 4·(row % 8) + k % 8 / 2, in register row / 8 + k / 8 · 2
            const uint32_t left = all.of[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
            const uint32_t right = all.of[column * 4 + k % 8 / 2].b[k / 8];
            sum += half_of<T>(left, k % 2) * half_of<T>(right, k % 2);
        }
        c[e] = sum;
    }
}

}  // namespace hdc::cuda
