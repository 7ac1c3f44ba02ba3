// What becomes of a row of S: its maximum, rank and logsumexp, its term and the slope of that.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "contrast_kernel.h"
#include "products.h"

namespace HDC_ISA {

template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::start_rows() {
    if (group.ranks) std::fill_n(group.ranks + first, count, int64_t(0));
    std::fill(own.row_maximum, own.row_maximum + count * V, LOWEST<T>);
    std::fill(own.row_sum, own.row_sum + count * V, T(0));
    if (tilted || call.function == HDC_SOFTPLUS) std::fill(own.row_second, own.row_second + count * V, T(0));
}

// Ranks need the positives beforehand, from the same product as all others: ties are exact.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::find_positives() {
    if (!group.ranks) return;
    for (int64_t block = first / BLOCK; block <= (first + count - 1) / BLOCK; block++) similarities(block, made_in(0));
}

// Columns of one block that the positive does not beat; NaN beats nothing and is not beaten.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::count_unbeaten(const T* values, int64_t columns) {
    if (!group.ranks) return;
    for (int64_t i = 0; i < count; i++) {
        const T *row = values + i * STRIDE, positive = own.diagonal[i];
        int64_t unbeaten = 0;
        for (int64_t j = 0; j < columns; j++) unbeaten += !(row[j] < positive);
        group.ranks[first + i] += unbeaten;
    }
}

// The larger one of the row's running maximum and the maximum over one block, in each lane.
template <typename T, typename Stored, Elements ELEMENTS>
inline Vector<T> Contrast<T, Stored, ELEMENTS>::maximum_of_row(const T* row, int64_t width, Vector<T> highest) const {
    for (int64_t j = 0; j < width; j += V) highest = maximum<T>(highest, load(row + j));
    return highest;
}

template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::find_maxima(const T* values, int64_t width) {
    for (int64_t i = 0; i < count; i++)
        store(own.row_maximum + i * V, maximum_of_row(values + i * STRIDE, width, load(own.row_maximum + i * V)));
}

// log Σ exp(a S) of a sum that was made relative to some S, which is the highest or 0.
template <typename T, typename Stored, Elements ELEMENTS>
inline double Contrast<T, Stored, ELEMENTS>::log_of_sum(T shift, double a, double sum) {
    return sum == 0 ? -std::numeric_limits<double>::infinity() : double(shift) * a + std::log(sum);
}

// What is known of row i once Σ exp((S_ij − shift) / τ) is.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::finish_row(int64_t i, T shift, T highest, double sum) {
    const int64_t row = first + i;
    packed.row_lse[row] = log_of_sum(shift, row_scale, sum);
    if (per_row) group.row_lse[row] = packed.row_lse[row];
    finish_rank(row);
    if (per_row) group.hits[row] = positives && highest < own.diagonal[i] && sum == sum;
}

template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::finish_rank(int64_t row) {
    if (group.ranks) group.ranks[row] = std::min(group.ranks[row], group.columns - 1);  // NaN does not beat itself
}

// With a positive log(1 + e^z) and 1 / (1 + e^−z), z = lse − S_ii, without overflow.
template <typename T, typename Stored, Elements ELEMENTS>
inline auto Contrast<T, Stored, ELEMENTS>::term(double lse, int64_t row) const -> Term {
    if (tilted) return {lse == -std::numeric_limits<double>::infinity() ? lse : lse - packed.tilt_lse[row], 1};
    if (!positives) return {lse, 1};
    const double z = lse - packed.positive[row] * scale, e = std::exp(-std::abs(z));
    return z > 0 ? Term{z + std::log1p(e), 1 / (1 + e)} : Term{std::log1p(e), e / (1 + e)};
}

template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::finish_term(int64_t row, double loss) {
    if (per_row) group.terms[row] = T(loss);
    own.total += group.weight * loss;
}

}  // namespace HDC_ISA
