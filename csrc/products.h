// The three products of matrices: S of a block, with its mask, and what a block adds to O and to dŶ.
#pragma once

#include <algorithm>
#include <limits>

#include "contrast_kernel.h"

namespace HDC_ISA {

// S τ of one block of the current panel. Positives, columns past the end and what is masked become −inf.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::similarities(int64_t block, T* out) {
    const int64_t begin = block * BLOCK, end = begin + columns_of(block);
    for (int64_t column = begin; column < end; column += W)
        if constexpr (ELEMENTS == PAIRS)
            multiply<T, BY_ROW, PAIRS>(count, end - column,
                                       {own.x_pairs, packed.half_stride},
                                       {packed.y_transposed + column * packed.width / 2, W}, packed.width / 2,
                                       out + (column - begin), STRIDE, false);
        else
            multiply<T, BY_ROW, SINGLE>(count, end - column, {x_row(first), packed.stride},
                                        {packed.y_transposed + column * packed.width, W}, group.width,
                                        out + (column - begin), STRIDE, false);
    constexpr T nothing = -std::numeric_limits<T>::infinity();
    if (positives || !call.diagonal)
        for (int64_t i = std::max(first, begin); i < std::min(first + count, end); i++) {
            T& positive = out[(i - first) * STRIDE + (i - begin)];
            own.diagonal[i - first] = positive;
            positive = nothing;
        }
    if (group.x_ids) {
        const bool same = call.same;
        for (int64_t i = 0; i < count; i++) {
            const int64_t id = group.x_ids[first + i], *ids = group.y_ids + begin;
            T* row = out + i * STRIDE;
            for (int64_t j = 0; j < end - begin; j++) row[j] = (ids[j] == id) == same ? row[j] : nothing;
        }
    }
    if (group.left_out)
        for (int64_t i = 0; i < count; i++) {
            const int64_t* last = group.left_out + group.left_out_starts[first + i + 1];
            const int64_t* at = std::lower_bound(group.left_out + group.left_out_starts[first + i], last, begin);
            for (; at < last && *at < end; at++) out[i * STRIDE + (*at - begin)] = nothing;
        }
    const int64_t padded = round_up(end - begin, V);
    if (end - begin < padded)
        for (int64_t i = 0; i < count; i++)
            std::fill(out + i * STRIDE + (end - begin), out + i * STRIDE + padded, nothing);
}

// O += block · Ŷ, beginning with block 0.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::add_to_sums(const T* coefficients, int64_t block) {
    const int64_t columns = columns_of(block), half = BLOCK / 2 + BLOCK_STRIDE<T> - BLOCK;
    Operand<T> left{coefficients, STRIDE}, right{y_row(block * BLOCK), packed.stride};
    if constexpr (ELEMENTS == PAIRS) {
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < columns; j += 2 * V) {
                const T* row = coefficients + i * STRIDE + j;
                store(own.pairs + i * half + j / 2, pair_neighbours(load(row), load(row + V)));
            }
        left = {own.pairs, half};
        right.data = packed.y_pairs + block * BLOCK / 2 * packed.stride;
    }
    const int64_t steps = ELEMENTS == PAIRS ? (columns + 1) / 2 : columns;
    for (int64_t d = 0; d < packed.width; d += W)
        multiply<T, BY_ROW, ELEMENTS>(count, packed.width - d, left, {right.data + d, right.stride}, steps,
                                      own.sums + d, packed.stride, block > 0);
}

// The panel of X̂, each row times its factor.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::weigh_rows(const double* factors) {
    if (!group.dy.data) return;
    if constexpr (ELEMENTS == PAIRS) {
        for (int64_t i = 0; i < count; i += 2) {
            const bool both = i + 1 < count;
            const T low = T(factors[i]), high = both ? T(factors[i + 1]) : T(0);
            const T *x = x_row(first + i), *next = both ? x_row(first + i + 1) : x;
            for (int64_t d = 0; d < packed.width; d += V)
                store(own.weighted + i / 2 * packed.stride + d, pair_lanes(low * load(x + d), high * load(next + d)));
        }
    } else {
        for (int64_t i = 0; i < count; i++)
            for (int64_t d = 0; d < packed.width; d += V)
                store(own.weighted + i * packed.stride + d, T(factors[i]) * load(x_row(first + i) + d));
    }
}

// dŶ += blockᵀ · rows, beginning with the panel at row `begin`; the block is that of `pair_rows`, the rows are those of
// X̂ or, as always with PAIRS, what `weigh_rows` made of them.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::add_to_dy(const T* paired, int64_t block, const T* rows, int64_t begin) {
    if (!group.dy.data) return;
    const int64_t steps = ELEMENTS == PAIRS ? (count + 1) / 2 : count;
    for (int64_t d = 0; d < packed.width; d += W)
        multiply<T, BY_STEP, ELEMENTS>(columns_of(block), packed.width - d, {paired, STRIDE}, {rows + d, packed.stride}, steps,
                                       own.dy + block * BLOCK * own.dy_stride + d, own.dy_stride, first > begin);
}

// A block as `add_to_dy` wants it: as it is, or with PAIRS two rows in one, written to `out`.
template <typename T, typename Stored, Elements ELEMENTS>
inline const T* Contrast<T, Stored, ELEMENTS>::pair_rows(const T* coefficients, int64_t block, T* out) const {
    if constexpr (ELEMENTS == SINGLE) return coefficients;
    else {
        for (int64_t i = 0; i < count && group.dy.data; i += 2)
            for (int64_t j = 0; j < columns_of(block); j += V) {
                const T* row = coefficients + i * STRIDE + j;
                const Vector<T> next = i + 1 < count ? load(row + STRIDE) : Vector<T>{};
                store(out + i / 2 * STRIDE + j, pair_lanes(load(row), next));
            }
        return out;
    }
}

}  // namespace HDC_ISA
