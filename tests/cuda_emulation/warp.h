// csrc/cuda/warp.cuh on emulated lanes: the fragments of mma.sync and ldmatrix as the PTX manual lays them out.
//
// Tensor cores are taken to add exactly and then to cut off, towards 0, what float32 does not hold.
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

inline float cut_off(double x) {
    const float nearest = float(x);
    return std::fabs(nearest) > std::fabs(x) && std::isfinite(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

// c += a [16, DEPTH] · b [DEPTH, 8]; `left(lanes, row, k)` and `right(lanes, k, column)` find their elements.
template <int DEPTH, typename Left, typename Right>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Left left, Right right) {
    struct Factors {
        uint32_t a[4], b[2];
    } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const emulated::Together<Factors> all(mine);
    const int lane = int(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    for (int e = 0; e < 4; ++e) {
        double sum = c[e];
        for (int k = 0; k < DEPTH; ++k) sum += double(left(all.of, g + e / 2 * 8, k)) * right(all.of, k, 2 * t + e % 2);
        c[e] = cut_off(sum);
    }
}

template <typename T>
void multiply(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    // (row, k) is with lane 4·(row % 8) + k % 8 / 2, in register row / 8 + k / 8 · 2.
    const auto left = [](auto& lanes, int row, int k) {
        return half_of<T>(lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2);
    };
    const auto right = [](auto& lanes, int k, int column) {
        return half_of<T>(lanes[column * 4 + k % 8 / 2].b[k / 8], k % 2);
    };
    multiply<16>(c, a, b0, b1, left, right);
}

struct Tf32 {};

inline float tf32_of(uint32_t bits) {  // the instruction ignores the lowest 13 bits
    bits &= 0xffffe000u;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void multiply(Tf32, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto left = [](auto& lanes, int row, int k) {
        return tf32_of(lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]);
    };
    const auto right = [](auto& lanes, int k, int column) { return tf32_of(lanes[column * 4 + k % 4].b[k / 4]); };
    multiply<8>(c, a, b0, b1, left, right);
}

inline float round_to_tf32(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return tf32_of(bits + 0x1000);  // carries into the exponent as it should
}

inline void copy_async(void* to, const void* from) {
    if (emulated::early_copies) {
        std::memcpy(to, from, 16);
    } else {
        emulated::me().copies.back().push_back({to, from});
    }
}
inline void copy_commit() { emulated::me().copies.emplace_back(); }

template <int GROUPS>
void copy_wait() {
    auto& groups = emulated::me().copies;
    while (groups.size() > GROUPS + 1) {
        for (const emulated::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
        groups.erase(groups.begin());
    }
}

}  // namespace hdc::cuda
