// Rows as the products want them: norms, Ŷ in its layouts and the positives, then X̂ a panel at a time.
#pragma once

#include <algorithm>
#include <cmath>

#include "contrast_kernel.h"
#include "numbers.h"

namespace HDC_ISA {

constexpr double ZERO_NORM = 1e-12;  // as in hdc_kernels/reference.py

// Norms, Ŷ and the positives of the rows and columns of these numbers, of either of which there may be fewer.
// Squares and products are summed in float64. `numbers` begins at a whole tile.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::pack(Share numbers) {
    const Share columns{std::min(numbers.begin, group.columns), std::min(numbers.end, group.columns)};
    for (int64_t j = numbers.begin; j < numbers.end; j++) {
        const bool has_x = j < group.rows, has_y = j < group.columns;
        T* unit_y = packed.y + j * packed.stride;
        prefetch_row<Stored>(group.x, j + ROWS_AHEAD, group.rows);
        prefetch_row<Stored>(group.y, j + ROWS_AHEAD, group.columns);
        if (has_x && has_y) {
            const T *x = read(group.x, j, own.x), *y = read(group.y, j, unit_y);
            Vector<double> xx{}, xy{}, yy{};
            for (int64_t d = 0; d < packed.width; d += LANES<double>) {
                const Vector<double> a = load_wide(x + d), b = load_wide(y + d);
                xx += a * a, xy += a * b, yy += b * b;
            }
            packed.x_inverse[j] = inverse_norm(sum_of_lanes<double>(xx));
            packed.y_inverse[j] = inverse_norm(sum_of_lanes<double>(yy));
            packed.positive[j] = sum_of_lanes<double>(xy) * packed.x_inverse[j] * packed.y_inverse[j];
            scale_row(y, packed.y_inverse[j], unit_y);
        } else {
            const T* row = has_x ? read(group.x, j, own.x) : read(group.y, j, unit_y);
            double& inverse = has_x ? packed.x_inverse[j] : packed.y_inverse[j];
            Vector<double> squares{};
            for (int64_t d = 0; d < packed.width; d += LANES<double>) squares += load_wide(row + d) * load_wide(row + d);
            inverse = inverse_norm(sum_of_lanes<double>(squares));
            if (has_y) scale_row(row, inverse, unit_y);
        }
    }
    for (int64_t j = columns.end; j % W; j++) std::fill_n(packed.y + j * packed.stride, packed.width, T(0));
    for (int64_t j = columns.begin; j < columns.end; j += V) {
        T* tile = packed.y_transposed + j / W * W * steps_of_width() + j % W;
        const T* rows = y_row(j);
        int64_t stride = packed.stride;
        if constexpr (ELEMENTS == PAIRS) {
            for (int64_t i = 0; i < V; i++) pair_row(y_row(j + i), own.pairs + i * packed.half_stride);
            for (int64_t i = 0; i < V; i += 2)
                for (int64_t d = 0; d < packed.width; d += V)
                    store(packed.y_pairs + (j + i) / 2 * packed.stride + d, pair_lanes(load(y_row(j + i) + d), load(y_row(j + i + 1) + d)));
            rows = own.pairs;
            stride = packed.half_stride;
        }
        for (int64_t d = 0; d < steps_of_width(); d += V) transpose(rows + d, stride, tile + d * W, W);
    }
}

template <typename T, typename Stored, Elements ELEMENTS>
inline double Contrast<T, Stored, ELEMENTS>::inverse_norm(double squares) const {
    if (!normalize) return 1;
    const double norm = std::sqrt(squares);
    return norm > ZERO_NORM ? 1 / norm : norm == norm ? 0 : norm;
}

// Row `row` of `matrix` as T, followed by zeros up to a whole vector: where it is, or copied to `out`.
template <typename T, typename Stored, Elements ELEMENTS>
inline const T* Contrast<T, Stored, ELEMENTS>::read(const HdcMatrix& matrix, int64_t row, T* out) const {
    const Stored* from = static_cast<const Stored*>(matrix.data) + row * matrix.row_stride;
    if (is_direct<Stored>(matrix)) return reinterpret_cast<const T*>(from);
    for (int64_t d = 0; d < group.width; d++) out[d] = convert<T>(from[d * matrix.column_stride]);
    std::fill(out + group.width, out + packed.width, T(0));
    return out;
}

template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::scale_row(const T* from, double factor, T* to) const {
    for (int64_t d = 0; d < packed.width; d += V) store(to + d, load(from + d) * T(factor));
}

template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::pair_row(const T* row, T* out) const {
    if constexpr (ELEMENTS == PAIRS)
        for (int64_t d = 0; d < packed.width; d += 2 * V) store(out + d / 2, pair_neighbours(load(row + d), load(row + d + V)));
}

// x̂ of any row, where it is or made in `out`.
template <typename T, typename Stored, Elements ELEMENTS>
inline const T* Contrast<T, Stored, ELEMENTS>::unit_x(int64_t row, T* out) const {
    if (packed.is_one) return y_row(row);
    scale_row(read(group.x, row, out), packed.x_inverse[row], out);
    return out;
}

// The panel of X̂ from row `first` on.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::start_panel(Share rows) {
    count = std::min(own.panel_rows, rows.end - first);
    keeps = rows.end - rows.begin <= own.kept_rows;
    panel = own.panel + (keeps ? (first - rows.begin) / own.panel_rows * blocks() * own.block_step : 0);
    for (int64_t i = 0; i < count; i++) {
        const T* x = unit_x(first + i, own.x + i * packed.stride);
        pair_row(x, own.x_pairs + i * packed.half_stride);
    }
}

}  // namespace HDC_ISA
