// FORWARD: logsumexps of rows and columns, and the terms.
#pragma once

#include <algorithm>
#include <cmath>

#include "contrast_kernel.h"
#include "pack.h"
#include "products.h"
#include "terms.h"

namespace HDC_ISA {

// FORWARD: logsumexps and hits of these rows; running maxima and sums of all columns over them.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::forward(Share rows) {
    if (symmetric) {
        std::fill_n(own.column_maximum, round_up(group.columns, V), bounded ? T(0) : LOWEST<T>);
        std::fill_n(own.column_sum, round_up(group.columns, V), T(0));
    }
    for (first = rows.begin; first < rows.end; first += own.panel_rows) {
        start_panel(rows);
        start_rows();
        find_positives();
        for (int64_t block = 0; block < blocks(); block++) {
            T* values = block_of_panel(block);
            similarities(block, values);
            count_unbeaten(values, columns_of(block));
            if (bounded) add_exponentials(block, values);
            else if (tilted) update_rows<true>(values, round_up(columns_of(block), V));
            else update_rows<false>(values, round_up(columns_of(block), V));
            if (symmetric && !bounded) update_columns(block, values);
        }
        for (int64_t i = 0; i < count; i++) {
            const Vector<T> maxima = load(own.row_maximum + i * V), sums = load(own.row_sum + i * V);
            const T highest = highest_lane<T>(maxima), shift = bounded ? T(0) : highest;
            finish_row(i, shift, highest, sum_of_lanes<T>(bounded ? sums : sums * exp2(maxima - highest, scale2)));
            if (!tilted) continue;
            const Vector<T> tilts = load(own.row_second + i * V) * exp2(maxima - highest, tilt_scale2);
            packed.tilt_lse[first + i] = log_of_sum(highest, tilt_scale, sum_of_lanes<T>(tilts));
            if (per_row) group.tilt_lse[first + i] = packed.tilt_lse[first + i];
        }
    }
}

// Sums of rows and columns out of the same exponentials, which may be kept in place of S.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::add_exponentials(int64_t block, T* values) {
    const int64_t width = round_up(columns_of(block), V);
    if (per_row) find_maxima(values, width);
    Vector<T> columns[BLOCK / V] = {};
    for (int64_t i = 0; i < count; i++) {
        T* row = values + i * STRIDE;
        Vector<T> sum{};
        for (int64_t j = 0; j < width; j += V) {
            const Vector<T> e = exp2(load(row + j), scale2);
            sum += e;
            columns[j / V] += e;
            if (keeps) store(row + j, e);
        }
        store(own.row_sum + i * V, load(own.row_sum + i * V) + sum);
    }
    for (int64_t j = 0; j < width && symmetric; j += V) {
        T* sums = own.column_sum + block * BLOCK + j;
        store(sums, load(sums) + columns[j / V]);
    }
}

template <typename T, typename Stored, Elements ELEMENTS>
template <bool WITH_TILT>
inline void Contrast<T, Stored, ELEMENTS>::update_rows(const T* values, int64_t width) {
    for (int64_t i = 0; i < count; i++) {
        const T* row = values + i * STRIDE;
        const Vector<T> before = load(own.row_maximum + i * V), now = maximum_of_row(row, width, before);
        Vector<T> sum = load(own.row_sum + i * V) * exp2(before - now, scale2), tilt{};
        if constexpr (WITH_TILT) tilt = load(own.row_second + i * V) * exp2(before - now, tilt_scale2);
        for (int64_t j = 0; j < width; j += V) {
            const Vector<T> below = load(row + j) - now;
            sum += exp2(below, scale2);
            if constexpr (WITH_TILT) tilt += exp2(below, tilt_scale2);
        }
        store(own.row_maximum + i * V, now);
        store(own.row_sum + i * V, sum);
        if constexpr (WITH_TILT) store(own.row_second + i * V, tilt);
    }
}

template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::update_columns(int64_t block, const T* values) {
    const int64_t width = round_up(columns_of(block), V);
    for (int64_t j = 0; j < width; j += V) {
        T *maxima = own.column_maximum + block * BLOCK + j, *sums = own.column_sum + block * BLOCK + j;
        const Vector<T> before = load(maxima);
        Vector<T> now = before, sum{};
        for (int64_t i = 0; i < count; i++) now = maximum<T>(now, load(values + i * STRIDE + j));
        for (int64_t i = 0; i < count; i++) sum += exp2(load(values + i * STRIDE + j) - now, scale2);
        store(maxima, now);
        store(sums, load(sums) * exp2(before - now, scale2) + sum);
    }
}

// The columns' logsumexps out of what every thread found about them.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::merge_columns(Share columns, Threads<T> threads) {
    if (!symmetric) return;
    for (int64_t j = columns.begin; j < columns.end; j++) {
        T highest = bounded ? T(0) : LOWEST<T>;
        for (const Private<T>& thread : threads) highest = std::max(highest, thread.column_maximum[j]);
        double sum = 0;
        for (const Private<T>& thread : threads)
            sum += double(thread.column_sum[j]) * std::exp((double(thread.column_maximum[j]) - double(highest)) * scale);
        packed.column_lse[j] = log_of_sum(highest, scale, sum);
        if (per_row) group.column_lse[j] = packed.column_lse[j];
    }
}

template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::finish_terms(Share rows) {
    for (int64_t i = rows.begin; i < rows.end; i++) {
        const double loss = term(packed.row_lse[i], i).value;
        finish_term(i, symmetric ? (loss + term(packed.column_lse[i], i).value) / 2 : loss);
    }
}

}  // namespace HDC_ISA
