// BACKWARD: gradients from logsumexps that are known.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "contrast_kernel.h"
#include "gradients.h"
#include "pack.h"
#include "products.h"
#include "terms.h"

namespace HDC_ISA {

// BACKWARD: what each row weighs, from its upstream gradient and the logsumexps.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::weigh(Share rows, bool saved) {
    for (int64_t i = rows.begin; i < rows.end; i++) {
        if (saved) {
            packed.row_lse[i] = group.row_lse[i];
            if (symmetric) packed.column_lse[i] = group.column_lse[i];
            if (tilted) packed.tilt_lse[i] = group.tilt_lse[i];
        }
        const double upstream = (saved ? double(group.upstream[i]) : group.weight) / (symmetric ? 2 : 1);
        packed.row_weight[i] = upstream * term(packed.row_lse[i], i).slope;
        if (symmetric) packed.column_weight[i] = upstream * term(packed.column_lse[i], i).slope;
    }
}

template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::backward(Share rows) {
    own.has_dy = rows.begin < rows.end;
    if (symmetric) load_columns();
    double ones[PANEL_ROWS];
    std::fill_n(ones, PANEL_ROWS, 1.0);
    for (first = rows.begin; first < rows.end; first += own.panel_rows) {
        start_panel(rows);
        if (ELEMENTS == PAIRS) weigh_rows(ones);
        for (int64_t block = 0; block < blocks(); block++) {
            T* values = block_of_panel(block);
            if (!keeps) similarities(block, values);
            if (tilted) tilted_coefficients(block, values);
            else coefficients(block, values);
            add_to_sums(values, block);
            add_to_dy(pair_rows(values, block, own.pairs), block, ELEMENTS == PAIRS ? own.weighted : x_row(first), rows.begin);
        }
        for (int64_t i = 0; i < count; i++) {
            const double weight = packed.row_weight[first + i] + (symmetric ? packed.column_weight[first + i] : 0);
            finish_dx(i, 1, weight);
        }
    }
}

// S τ -> row_weight_i exp(S_ij − row_lse_i) + column_weight_j exp(S_ij − column_lse_j)
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::coefficients(int64_t block, T* values) {
    const int64_t begin = block * BLOCK, width = round_up(columns_of(block), V);
    for (int64_t i = 0; i < count; i++) {
        T* row = values + i * STRIDE;
        T lse, factor;
        split(packed.row_lse[first + i], packed.row_weight[first + i], row_scale, lse, factor);
        if (bounded) {
            for (int64_t j = 0; j < width; j += V) {
                Vector<T> weight = broadcast(factor);
                if (symmetric) weight += load(own.column_sum + begin + j);
                const Vector<T> value = load(row + j);
                store(row + j, weight * (keeps ? value : exp2(value, scale2)));
            }
            continue;
        }
        for (int64_t j = 0; j < width; j += V) {
            const Vector<T> s = load(row + j);
            Vector<T> g = factor * exp2(s - lse, scale2);
            if (symmetric)
                g += load(own.column_sum + begin + j) * exp2(s - load(own.column_maximum + begin + j), scale2);
            store(row + j, g);
        }
    }
}

// S τ -> row_weight_i ((1 + β) exp((1 + β) S_ij − row_lse_i) − β exp(β S_ij − tilt_lse_i))
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::tilted_coefficients(int64_t block, T* values) {
    const int64_t width = round_up(columns_of(block), V);
    for (int64_t i = 0; i < count; i++) {
        T* row = values + i * STRIDE;
        const double weight = packed.row_weight[first + i];
        T lse, factor, tilt_lse, tilt_factor;
        split(packed.row_lse[first + i], (1 + call.beta) * weight, row_scale, lse, factor);
        split(packed.tilt_lse[first + i], call.beta * weight, tilt_scale, tilt_lse, tilt_factor);
        for (int64_t j = 0; j < width; j += V) {
            const Vector<T> s = load(row + j);
            store(row + j, factor * exp2(s - lse, scale2) - tilt_factor * exp2(s - tilt_lse, tilt_scale2));
        }
    }
}

// The columns' part of `coefficients`, as vectors of T, where FORWARD keeps maxima and sums.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::load_columns() {
    std::fill_n(own.column_maximum, round_up(group.columns, V), T(0));
    std::fill_n(own.column_sum, round_up(group.columns, V), T(0));
    for (int64_t j = 0; j < group.columns; j++)
        split(packed.column_lse[j], packed.column_weight[j], scale, own.column_maximum[j], own.column_sum[j]);
}

// weight · exp(a S τ − lse) = factor · exp(a (S τ − rounded)): S τ and `rounded` are close where it matters, so
// that their difference is exact, and the factor makes good what rounding lse / a to T does to a whole row.
// Without negatives all S are −inf and any lse will do.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::split(double lse, double weight, double a, T& rounded, T& factor) const {
    const double exact = lse == -std::numeric_limits<double>::infinity() ? 0 : lse / a;
    rounded = bounded ? T(0) : T(exact);
    factor = T(weight * std::exp((double(rounded) - exact) * a));
}

}  // namespace HDC_ISA
