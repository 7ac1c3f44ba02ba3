// SOFTPLUS, any task: what becomes of each block depends on nothing but the block.
#pragma once

#include <algorithm>

#include "contrast_kernel.h"
#include "gradients.h"
#include "pack.h"
#include "products.h"
#include "terms.h"

namespace HDC_ISA {

constexpr long double LOG2E_FULL = 1.442695040888963407359924681L, LN2 = 0.693147180559945309417232121L;

template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::softplus(Share rows) {
    own.has_dy = rows.begin < rows.end;
    double ones[PANEL_ROWS];
    std::fill_n(ones, PANEL_ROWS, 1.0);
    const bool gradients = call.task != HDC_FORWARD, saved = call.task == HDC_BACKWARD;
    for (first = rows.begin; first < rows.end; first += own.panel_rows) {
        start_panel(rows);
        start_rows();
        if (gradients && ELEMENTS == PAIRS) weigh_rows(ones);
        find_positives();
        for (int64_t block = 0; block < blocks(); block++) {
            similarities(block, panel);
            count_unbeaten(panel, columns_of(block));
            sigmoids(round_up(columns_of(block), V), saved);
            if (!gradients) continue;
            add_to_sums(panel, block);
            add_to_dy(pair_rows(panel, block, own.pairs), block, ELEMENTS == PAIRS ? own.weighted : x_row(first), rows.begin);
        }
        for (int64_t i = 0; i < count; i++) {
            if (!saved) finish_term(first + i, double(sum_of_lanes<T>(load(own.row_sum + i * V))));
            if (!saved && per_row) group.hits[first + i] = false, group.row_lse[first + i] = 0;  // without a meaning
            finish_rank(first + i);
            if (!gradients) continue;
            group.d_bias[first + i] = sum_of_lanes<T>(load(own.row_second + i * V));
            finish_dx(i, 1, 0);
        }
    }
}

// S τ -> weight_i σ(S_ij + bias_i), their sums, and those of log(1 + exp(S_ij + bias_i)).
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::sigmoids(int64_t width, bool saved) {
    for (int64_t i = 0; i < count; i++) {
        T* row = panel + i * STRIDE;
        const T bias = group.bias[first + i], weight = saved ? group.upstream[first + i] : T(group.weight);
        Vector<T> sum = load(own.row_sum + i * V), slopes = load(own.row_second + i * V);
        for (int64_t j = 0; j < width; j += V) {
            const Vector<T> z = load(row + j) * T(scale) + bias, zero{};
            // The constant's own rounding would put all of a row off by |z| times as much. NaN is kept.
            const Vector<T> least = broadcast(T(1.01) * Exp2<T>::lowest), falling = z > zero ? -z : z;
            const Vector<T> a = maximum<T>(least, falling), rough = exp2(a, T(LOG2E));
            const Vector<T> e = rough + rough * (a * T((LOG2E_FULL - (long double)(T(LOG2E))) * LN2));
            const Vector<T> slope = weight * (z > zero ? broadcast(T(1)) : e) / (e + T(1));
            sum += (z > zero ? z : zero) + log1p<T>(e);
            slopes += slope;
            store(row + j, slope);
        }
        store(own.row_sum + i * V, sum);
        store(own.row_second + i * V, slopes);
    }
}

}  // namespace HDC_ISA
