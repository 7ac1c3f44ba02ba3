// From dx̂ and dŷ to what the caller reads: through the normalisation, and into their layout and dtype.
#pragma once

#include <algorithm>

#include "contrast_kernel.h"
#include "numbers.h"
#include "pack.h"

namespace HDC_ISA {

// dx̂_i = (factor·O_i − weight·ŷ_i) / τ, then through the normalisation into the caller's gradient. Without
// positives there is no ŷ_i.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::finish_dx(int64_t i, double factor, double weight) {
    const int64_t row = first + i;
    const T of_sum = T(factor * scale), of_y = positives ? T(weight * scale) : T(0);
    T* sums = own.sums + i * packed.stride;
    if (!group.columns) std::fill_n(sums, packed.width, T(0));  // no block has begun them
    const T* y = positives ? y_row(row) : x_row(row);           // any row, times 0
    own.d_temperature -= scale * finish_gradient(
        [=](int64_t d) { return of_sum * load(sums + d) - of_y * load(y + d); },
        x_row(row), packed.x_inverse[row], group.dx, row, group.rows);
}

template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::finish_dy(Share columns, Threads<T> threads) {
    if (!group.dy.data) return;
    for (int64_t j = columns.begin; j < columns.end; j++) {
        const bool has_positive = positives && j < group.rows;
        const T weight = !has_positive ? T(0) : T(packed.row_weight[j] + (symmetric ? packed.column_weight[j] : 0));
        const T* x = has_positive ? unit_x(j, own.x) : y_row(j);  // any row, times 0
        finish_gradient(
            [=](int64_t d) {
                Vector<T> sum = -weight * load(x + d);
                for (const Private<T>& thread : threads)
                    if (thread.has_dy) sum += load(thread.dy + j * thread.dy_stride + d);
                return sum * T(scale);
            },
            y_row(j), packed.y_inverse[j], group.dy, j, columns.end);
    }
}

// g -> (g − x̂ (x̂·g)) / |x|, written to row `row` of `matrix`. Returns x̂·g.
template <typename T, typename Stored, Elements ELEMENTS>
template <typename Gradient>
inline double Contrast<T, Stored, ELEMENTS>::finish_gradient(Gradient g, const T* x, double inverse,
                                                             const HdcMatrix& matrix, int64_t row, int64_t rows) {
    Vector<T> products{};
    for (int64_t d = 0; d < packed.width; d += V) {
        const Vector<T> value = g(d);
        store(own.gradient + d, value);
        products += value * load(x + d);
    }
    const T along = sum_of_lanes<T>(products), factor = T(inverse), pull = normalize ? along : T(0);
    const bool direct = full_gradients ? is_direct<T>(matrix) : is_direct<Stored>(matrix);
    if (direct) prefetch_row<T>(matrix, row + ROWS_AHEAD, rows);
    T* to = direct ? static_cast<T*>(matrix.data) + row * matrix.row_stride : own.gradient;
    for (int64_t d = 0; d < packed.width; d += V) store(to + d, (load(own.gradient + d) - pull * load(x + d)) * factor);
    if (!direct && full_gradients) write<T>(matrix, row, own.gradient);
    if (!direct && !full_gradients) write<Stored>(matrix, row, own.gradient);
    return double(along);
}

template <typename T, typename Stored, Elements ELEMENTS>
template <typename To>
inline void Contrast<T, Stored, ELEMENTS>::write(const HdcMatrix& matrix, int64_t row, const T* values) const {
    To* to = static_cast<To*>(matrix.data) + row * matrix.row_stride;
    for (int64_t d = 0; d < group.width; d++) to[d * matrix.column_stride] = convert<To>(values[d]);
}

}  // namespace HDC_ISA
