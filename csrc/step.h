// STEP, one direction: everything about some rows, and their part of dŶ.
#pragma once

#include "contrast_kernel.h"
#include "gradients.h"
#include "pack.h"
#include "products.h"
#include "terms.h"

namespace HDC_ISA {

template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::step(Share rows) {
    own.has_dy = rows.begin < rows.end;
    double factors[PANEL_ROWS];
    for (first = rows.begin; first < rows.end; first += own.panel_rows) {
        start_panel(rows);
        start_rows();
        if (bounded) sum_bounded();
        else if (group.dy.data) sum_panel();
        else sum_in_passing();
        for (int64_t i = 0; i < count; i++) {
            const double sum = double(sum_of_lanes<T>(load(own.row_sum + i * V)));
            const T highest = highest_lane<T>(load(own.row_maximum + i * V));
            finish_row(i, bounded ? T(0) : highest, highest, sum);
            const Term found = term(packed.row_lse[first + i], first + i);
            finish_term(first + i, found.value);
            packed.row_weight[first + i] = group.weight * found.slope;
            factors[i] = sum == 0 ? 0 : packed.row_weight[first + i] / sum;
        }
        weigh_rows(factors);
        for (int64_t block = 0; block < blocks(); block++) {
            const T* values = block_of_panel(block);
            add_to_dy(own.block ? values : pair_rows(values, block, own.pairs), block, own.weighted, rows.begin);
        }
        for (int64_t i = 0; i < count; i++)
            finish_dx(i, factors[i], packed.row_weight[first + i]);
    }
}

// The panel becomes E, with PAIRS as `add_to_dy` wants it; its row sums and O. All while a block is in the L2 cache.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::sum_bounded() {
    find_positives();
    for (int64_t block = 0; block < blocks(); block++) {
        T* values = made_in(block);
        similarities(block, values);
        count_unbeaten(values, columns_of(block));
        if (per_row) find_maxima(values, round_up(columns_of(block), V));
        exponentials(block, values);
        add_to_sums(values, block);
        if (own.block) pair_rows(values, block, block_of_panel(block));
    }
}

// The same relative to the rows' maxima, for which S of the whole panel comes first.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::sum_panel() {
    for (int64_t block = 0; block < blocks(); block++) {
        T* values = block_of_panel(block);
        similarities(block, values);
        find_maxima(values, round_up(columns_of(block), V));
    }
    for (int64_t i = 0; i < count; i++) {
        const T highest = highest_lane<T>(load(own.row_maximum + i * V));
        store(own.row_maximum + i * V, broadcast(highest));
    }
    for (int64_t block = 0; block < blocks(); block++) {
        count_unbeaten(block_of_panel(block), columns_of(block));
        exponentials(block, block_of_panel(block));
        add_to_sums(block_of_panel(block), block);
    }
}

// The same sums, a block at a time.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::sum_in_passing() {
    find_positives();
    for (int64_t block = 0; block < blocks(); block++) {
        similarities(block, panel);
        count_unbeaten(panel, columns_of(block));
        raise_maxima(round_up(columns_of(block), V), block > 0);
        exponentials(block, panel);
        add_to_sums(panel, block);
    }
}

// The rows' maxima over one more block, and sums relative to them; O only if there is any yet.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::raise_maxima(int64_t width, bool has_sums) {
    for (int64_t i = 0; i < count; i++) {
        const T before = own.row_maximum[i * V];
        const T now = highest_lane<T>(maximum_of_row(panel + i * STRIDE, width, broadcast(before)));
        if (!(now > before)) continue;
        const Vector<T> factor = exp2(broadcast(before) - now, scale2);
        store(own.row_maximum + i * V, broadcast(now));
        store(own.row_sum + i * V, load(own.row_sum + i * V) * factor);
        T* sums = own.sums + i * packed.stride;
        for (int64_t d = 0; d < packed.width && has_sums; d += V) store(sums + d, load(sums + d) * factor);
    }
}

// S τ -> exp(S − maximum), or if bounded exp S, and the sums of the rows.
template <typename T, typename Stored, Elements ELEMENTS>
inline void Contrast<T, Stored, ELEMENTS>::exponentials(int64_t block, T* values) {
    const int64_t width = round_up(columns_of(block), V);
    for (int64_t i = 0; i < count; i++) {
        T* row = values + i * STRIDE;
        const Vector<T> shift = bounded ? Vector<T>{} : load(own.row_maximum + i * V);
        Vector<T> sum{};
        for (int64_t j = 0; j < width; j += V) {
            const Vector<T> e = exp2(load(row + j) - shift, scale2);
            store(row + j, e);
            sum += e;
        }
        store(own.row_sum + i * V, load(own.row_sum + i * V) + sum);
    }
}

}  // namespace HDC_ISA
