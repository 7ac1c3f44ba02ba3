// What the two portable passes share: tiles of packed rows in shared memory, their products by mma.sync, and masks.
//
// Rows lie in shared memory in pieces of 16 bytes, piece p of row r at p ^ (r % 8): the same piece of eight rows, as
// ldmatrix reads it, is in different banks. A step of a product over dimensions takes 32 bytes of a row, 16
// dimensions of 16 bits or 8 of 32, so that the loads of a factor do not depend on its type.
//
// fp32 is multiplied as three products of TF32: x = big + small, big rounded to 11 bits, and small·big + big·small +
// big·big leaves out at most 2⁻²² of a product. Of small, which has 12 bits, mma.sync ignores the last. Tensor cores
// cut off what they add, towards 0, which over thousands of steps is a drift; so a few steps at a time begin at 0,
// and are added in float32 (Ootomo and Yokota, 2022).
#pragma once

#include <type_traits>

#include "fragments.cuh"
#include "launch.cuh"
#include "packed.h"
#include "splits.h"

namespace hdc::cuda::portable {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int STAGES = 2;  // of shared memory, one to fill and one to multiply, which takes 1,000 clocks and more
constexpr int PIECE = 16, STEP = 32;  // bytes of a row

template <Type TYPE>
constexpr int BYTES = TYPE == Type::bf16 || TYPE == Type::fp16 ? 2 : 4;

// How `multiply` in warp.cuh calls the type.
template <Type TYPE>
using Multiplied =
    std::conditional_t<TYPE == Type::bf16, __nv_bfloat16, std::conditional_t<TYPE == Type::fp16, __half, Tf32>>;

// --- Loads --------------------------------------------------------------------------------------------------------

template <int ROW_BYTES>
__device__ inline int place(int row, int byte) {
    return row * ROW_BYTES + (byte ^ row % 8 * PIECE);
}

// Begins to copy the first ROW_BYTES of ROWS rows that lie `stride` bytes apart.
template <int ROWS, int ROW_BYTES>
__device__ inline void copy_rows(unsigned char* to, const unsigned char* from, int stride) {
    constexpr int PIECES = ROW_BYTES / PIECE;
    static_assert(ROWS * PIECES % THREADS == 0, "threads without a piece");
    constexpr int AT_A_TIME = THREADS / PIECES;  // rows
    const int row = threadIdx.x / PIECES, byte = threadIdx.x % PIECES * PIECE;
    from += row * stride + byte;
#pragma unroll
    for (int n = 0; n < ROWS; n += AT_A_TIME) {
        copy_async(to + place<ROW_BYTES>(row + n, byte), from + n * stride);
    }
}

// The step at `byte` of 16 rows, as the left factor of a product over dimensions,
template <int ROW_BYTES>
__device__ inline void load_left(uint32_t (&to)[4], const unsigned char* tile, int row, int byte) {
    const int lane = threadIdx.x % 32;
    load_matrices(to, tile + place<ROW_BYTES>(row + lane % 16, byte + lane / 16 * PIECE));
}

// and as two right factors, of 8 rows each.
template <int ROW_BYTES>
__device__ inline void load_right(uint32_t (&to)[4], const unsigned char* tile, int row, int byte) {
    const int lane = threadIdx.x % 32;
    load_matrices(to, tile + place<ROW_BYTES>(row + lane % 8 + lane / 16 * 8, byte + lane / 8 % 2 * PIECE));
}

// --- Products -----------------------------------------------------------------------------------------------------

// Registers of factors, for fp32 the big and the small parts.
template <Type TYPE>
struct Factor {
    static constexpr int PARTS = TYPE == Type::fp32 ? 2 : 1;
    uint32_t parts[PARTS][4];

    Factor() = default;
    __device__ explicit Factor(const uint32_t (&x)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            parts[0][i] = x[i];
            if constexpr (TYPE == Type::fp32) {
                parts[0][i] = (x[i] + 0x1000) & 0xffffe000;  // cvt.rna takes three times as long
                parts[1][i] = __float_as_uint(__uint_as_float(x[i]) - __uint_as_float(parts[0][i]));
            }
        }
    }
};

// Adds `product`, a function of accumulators, to COUNT fragments [16, 8]. For fp32 they begin at 0, and there are COUNT
// more, for the products with small factors: what is cut off of those is less.
template <Type TYPE, int COUNT, typename Product>
__device__ inline void accumulate(float (*c)[4], Product product) {
    if constexpr (TYPE == Type::fp32) {
        float sum[2 * COUNT][4] = {};
        product(sum);
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) c[n][e] += sum[n][e] + sum[COUNT + n][e];
        }
    } else {
        product(c);
    }
}

// In it, two fragments of COUNT: c += left · right, each with one of the right factors.
template <Type TYPE, int COUNT>
__device__ inline void multiply_pair(float (*c)[4], const Factor<TYPE>& left, const Factor<TYPE>& right) {
    const Multiplied<TYPE> type{};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const int b = 2 * n;
        multiply(type, c[n], left.parts[0], right.parts[0][b], right.parts[0][b + 1]);
        if constexpr (TYPE == Type::fp32) {
            multiply(type, c[COUNT + n], left.parts[1], right.parts[0][b], right.parts[0][b + 1]);
            multiply(type, c[COUNT + n], left.parts[0], right.parts[1][b], right.parts[1][b + 1]);
        }
    }
}

// --- Masks --------------------------------------------------------------------------------------------------------

// −∞ for every pair of fragments [16, 8·COUNT] that does not count. The lane's first element is at (row, column).
template <int COUNT>
__device__ inline void mask(float (&c)[COUNT][4], const Pass& pass, int group, int row, int column) {
    static_assert(COUNT <= 8, "a bit for every element");
    const bool by_ids = pass.own.ids != nullptr;
    uint32_t in = 0;
#pragma unroll 1  // or the ids of all columns would be in registers at once
    for (int n = 0; n < COUNT; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int i = row + e / 2 * 8, j = column + n * 8 + e % 2;
            bool one = i < pass.own.count && j < pass.other.count && (pass.diagonal || i != j);
            if (by_ids && one) {
                one = counts(pass.own.ids[group * pass.own.count + i], pass.other.ids[group * pass.other.count + j],
                             pass.same);
            }
            in |= uint32_t{one} << (n * 4 + e);
        }
    }
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c[n][e] = in >> (n * 4 + e) & 1 ? c[n][e] : -INFINITY;
    }
}

}  // namespace hdc::cuda::portable
