// Vectors of T as wide as the instruction set that this is compiled for, and exp2 and log1p over them.
//
// GCC's and Clang's vector extension: +, *, ?: and comparisons work lane by lane, for any T and width.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if HDC_VECTOR_BYTES >= 32
#include <immintrin.h>
#endif

namespace HDC_ISA {

template <typename T>
struct VectorOf;

template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(HDC_VECTOR_BYTES)));
    typedef float unaligned __attribute__((vector_size(HDC_VECTOR_BYTES), aligned(4), may_alias));
    typedef int32_t bits __attribute__((vector_size(HDC_VECTOR_BYTES)));
};

template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(HDC_VECTOR_BYTES)));
    typedef double unaligned __attribute__((vector_size(HDC_VECTOR_BYTES), aligned(8), may_alias));
    typedef int64_t bits __attribute__((vector_size(HDC_VECTOR_BYTES)));
};

template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
constexpr int LANES = HDC_VECTOR_BYTES / int(sizeof(T));

template <typename T>
inline Vector<T> load(const T* from) {
    return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(from);
}

template <typename T>
inline void store(T* to, Vector<T> value) {
    *reinterpret_cast<typename VectorOf<T>::unaligned*>(to) = value;
}

template <typename T>
inline Vector<T> broadcast(T value) {
    return value - Vector<T>{};
}

// As many values as a vector of float64 has, widened to float64.
inline Vector<double> load_wide(const double* from) { return load(from); }

inline Vector<double> load_wide(const float* from) {
    typedef float half __attribute__((vector_size(HDC_VECTOR_BYTES / 2), aligned(4), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const half*>(from), Vector<double>);
}

// NaN in `a` is passed over: NaN reaches the result through the sums, not through the maxima.
template <typename T>
inline Vector<T> maximum(Vector<T> a, Vector<T> b) {
    return a > b ? a : b;
}

// Lane i of the result is lane (i + BY) of `v`, round and round.
template <typename T, int BY, int... LANE>
inline Vector<T> rotate(Vector<T> v, std::integer_sequence<int, LANE...>) {
    return __builtin_shufflevector(v, v, (LANE + BY) % int(sizeof...(LANE))...);
}

template <typename T, int BY = LANES<T> / 2>
inline T highest_lane(Vector<T> v) {
    if constexpr (BY == 0) return v[0];
    else return highest_lane<T, BY / 2>(maximum<T>(v, rotate<T, BY>(v, std::make_integer_sequence<int, LANES<T>>())));
}

template <typename T, int BY = LANES<T> / 2>
inline T sum_of_lanes(Vector<T> v) {
    if constexpr (BY == 0) return v[0];
    else return sum_of_lanes<T, BY / 2>(v + rotate<T, BY>(v, std::make_integer_sequence<int, LANES<T>>()));
}

// The first (or, with HIGH, second) halves of a and b, lane by lane in turn.
template <typename T, bool HIGH, int... LANE>
inline Vector<T> interleave(Vector<T> a, Vector<T> b, std::integer_sequence<int, LANE...>) {
    constexpr int count = sizeof...(LANE), start = HIGH ? count / 2 : 0;
    return __builtin_shufflevector(a, b, (LANE % 2 * count + start + LANE / 2)...);
}

// out[column][row] = in[row][column] for LANES × LANES values: interleaving the first half of the rows with
// the second rotates the bits of (row, column) by one; after log2 LANES rounds they have changed places.
template <typename T>
inline void transpose(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
    constexpr int V = LANES<T>;
    constexpr auto lanes = std::make_integer_sequence<int, V>();
    Vector<T> rows[V], mixed[V];
#pragma GCC unroll 16
    for (int i = 0; i < V; i++) rows[i] = load(in + i * in_stride);
#pragma GCC unroll 4
    for (int round = 1; round < V; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < V / 2; i++) {
            mixed[2 * i] = interleave<T, false>(rows[i], rows[i + V / 2], lanes);
            mixed[2 * i + 1] = interleave<T, true>(rows[i], rows[i + V / 2], lanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < V; i++) rows[i] = mixed[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < V; i++) store(out + i * out_stride, rows[i]);
}

#ifdef __AVX512BF16__
// Two vectors rounded to bfloat16: neighbours in memory share 32 bits, `first` coming first.
inline Vector<float> pair_neighbours(Vector<float> first, Vector<float> second) {
    return (Vector<float>)_mm512_cvtne2ps_pbh(second, first);
}

// Lane by lane, `low` in the lower 16 bits.
inline Vector<float> pair_lanes(Vector<float> low, Vector<float> high) {
    const auto widen = [](__m256bh v) { return _mm512_cvtepu16_epi32((__m256i)v); };
    const __m512i upper = _mm512_slli_epi32(widen(_mm512_cvtneps_pbh(high)), 16);
    return (Vector<float>)_mm512_or_si512(widen(_mm512_cvtneps_pbh(low)), upper);
}
#endif

// 2^f on [-1/2, 1/2]: minimax polynomials for the relative error (2e-9 and 3e-18), lowest power first.
template <typename T>
struct Exp2;

template <>
struct Exp2<float> {
    static constexpr float coefficients[] = {
        1.0000000005541648f,   0.693147205737195751f,  0.240226468906455207f,   0.055503287771053248f,
        0.00961848895633118f,  0.00133999311772397f,   0.000153458121613116298f};
    static constexpr float round = 12582912.0f;  // 1.5·2^23: adding it leaves no bit for a fraction
    static constexpr float lowest = -126.0f;     // results below the smallest normal number become 0
    static constexpr int bias = 127, mantissa = 23;
};

template <>
struct Exp2<double> {
    static constexpr double coefficients[] = {
        0.999999999999999997,    0.69314718055994533,    0.240226506959101562,    0.0555041086648199216,
        0.00961812910758833524,  0.00133335581467899217, 0.000154035304625144321, 0.0000152527334899885256,
        1.32154330896763992e-6,  1.01781980216719308e-7, 7.0741056135081428e-9,   4.43528270695727715e-10};
    static constexpr double round = 6755399441055744.0;  // 1.5·2^52
    static constexpr double lowest = -1022.0;
    static constexpr int bias = 1023, mantissa = 52;
};

// 2^f by its polynomial.
template <typename T>
inline Vector<T> exp2_of_fraction(Vector<T> fraction) {
    constexpr int degree = sizeof(Exp2<T>::coefficients) / sizeof(T) - 1;
    Vector<T> power = broadcast(Exp2<T>::coefficients[degree]);
#pragma GCC unroll 16
    for (int k = degree - 1; k >= 0; k--) power = power * fraction + Exp2<T>::coefficients[k];
    return power;
}

// 2^(a·factor) below 2^126. −inf gives 0, NaN gives NaN. However large the product is, its fraction has the rounding
// of a small number only, as it is made of the exact product (but for portable code).
#if HDC_VECTOR_BYTES == 64
// AVX-512 has rounding and scaling by a power of 2 as one instruction each. Results below the smallest
// normal number become 0 here too: arithmetic on subnormal ones is slow. NaN is not less than anything.
inline Vector<float> exp2(Vector<float> a, float factor) {
    const Vector<float> x = a * factor, whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __mmask16 normal = _mm512_cmp_ps_mask(x, broadcast(Exp2<float>::lowest), _CMP_NLT_UQ);
    const Vector<float> fraction = _mm512_fmsub_ps(a, broadcast(factor), whole);
    return _mm512_maskz_scalef_ps(normal, exp2_of_fraction<float>(fraction), whole);
}

inline Vector<double> exp2(Vector<double> a, double factor) {
    const Vector<double> x = a * factor, whole = _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __mmask8 normal = _mm512_cmp_pd_mask(x, broadcast(Exp2<double>::lowest), _CMP_NLT_UQ);
    const Vector<double> fraction = _mm512_fmsub_pd(a, broadcast(factor), whole);
    return _mm512_maskz_scalef_pd(normal, exp2_of_fraction<double>(fraction), whole);
}
#else
#ifdef __FMA__
inline Vector<float> multiply_subtract(Vector<float> a, float b, Vector<float> c) {
    return _mm256_fmsub_ps(a, broadcast(b), c);
}

inline Vector<double> multiply_subtract(Vector<double> a, double b, Vector<double> c) {
    return _mm256_fmsub_pd(a, broadcast(b), c);
}
#else
template <typename V, typename T>
inline V multiply_subtract(V a, T b, V c) {
    return a * b - c;
}
#endif

template <typename V, typename T>
inline V exp2(V a, T factor) {
    using E = Exp2<T>;
    using Bits = typename VectorOf<T>::bits;
    const V x = a * factor, low = broadcast(E::lowest), bounded = x < low ? low : x;  // keeps NaN
    const V shifted = bounded + E::round, round = broadcast(E::round);
    const Bits exponent = ((Bits)shifted - (Bits)round + E::bias) << E::mantissa;
    return x < low ? V{} : exp2_of_fraction<T>(multiply_subtract(a, factor, shifted - round)) * (V)exponent;
}
#endif

// 2 atanh(√u) / √u on [0, 1/9]: Chebyshev fits with a relative error of 4e-9 and 1e-18, lowest power first.
template <typename T>
struct Log1p;

template <>
struct Log1p<float> {
    static constexpr float coefficients[] = {
        2.000000007681758881f, 0.6666632164137777316f, 0.4002459523070374791f, 0.2796515774519726889f,
        0.2815777836310908065f};
};

template <>
struct Log1p<double> {
    static constexpr double coefficients[] = {
        2.000000000000000002,   0.6666666666666614959, 0.4000000000018574747, 0.2857142854545411453,
        0.2222222408074767317,  0.1818174083250480451, 0.1538661404230400776, 0.1330037403267462434,
        0.1211016872806921765,  0.08324506511860820576, 0.1704416356278139813};
};

// log(1 + e) for e in [0, 1], exact to rounding however small e is: log((1 + w) / (1 − w)) with w = e / (2 + e).
template <typename T>
inline Vector<T> log1p(Vector<T> e) {
    constexpr int degree = sizeof(Log1p<T>::coefficients) / sizeof(T) - 1;
    const Vector<T> w = e / (e + T(2)), square = w * w;
    Vector<T> sum = broadcast(Log1p<T>::coefficients[degree]);
#pragma GCC unroll 16
    for (int k = degree - 1; k >= 0; k--) sum = sum * square + Log1p<T>::coefficients[k];
    return w * sum;
}

}  // namespace HDC_ISA
