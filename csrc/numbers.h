// bfloat16 and float16 to and from the types they are computed in, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace HDC_ISA {

struct BFloat16 {
    uint16_t bits;
};

using Float16 = _Float16;

template <typename To, typename From>
inline To convert(From value) {
    return To(value);
}

template <>
inline float convert<float, BFloat16>(BFloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

template <>
inline BFloat16 convert<BFloat16, float>(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return {uint16_t(bits >> 16 | 0x40)};  // a NaN must not round to infinity
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

}  // namespace HDC_ISA
