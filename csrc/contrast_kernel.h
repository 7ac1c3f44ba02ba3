// The contrastive primitive on CPUs, one independent problem ("group") at a time.
//
//   S = X̂ Ŷᵀ / τ, and of every row
//   INFO_NCE    term_i = log(1 + exp(lse_i − S_ii)),  lse_i = log Σ_{j≠i} exp S_ij
//   LOGSUMEXP   term_i = lse_i = log Σ_j exp S_ij
//   SOFTPLUS    term_i = Σ_j log(1 + exp(S_ij + bias_i))
//   TILTED      term_i = log Σ_j exp((1 + β) S_ij) − log Σ_j exp(β S_ij)
//
// over the columns j that the mask lets through: all others become −inf before anything else is done.
// INFO_NCE's positives never enter a product of matrices: near convergence the gradient is a small
// difference of large terms, and Σ_{j≠i} − (the rest) has no such difference. S_ii is summed in float64.
//
// The rows of X are cut into panels of at most PANEL_ROWS, the columns (rows of Y) into blocks of BLOCK.
//
//   STEP      3 products. Per panel, block by block: S, E = exp S, its row sums and O += E·Ŷ, all into a scratch
//             panel (unless `bounded`, S of the whole panel comes first); then, as the sums are known, so is the
//             coefficient of every row, w_i = weight·p_i / Σ_j E_ij with p_i = 1 − exp(−term_i), and
//             dŶ += Eᵀ·(w X̂).  dx̂_i = (w_i O_i − weight·p_i ŷ_i) / τ.  (LOGSUMEXP: p = 1, and no ŷ_i.)
//             2 products where dŶ is not asked for: E is then needed once, and no block of it is kept. Where a
//             row's maximum rises, what is summed so far is scaled down.
//   FORWARD   1 product. Block by block: running maxima and sums of rows and, if symmetric, of columns.
//   BACKWARD  3 products. Block by block: the coefficients of S from the saved logsumexps; O, dŶ as above.
//
// A symmetric STEP is FORWARD then BACKWARD, since no row's gradient is known before all column sums are; one of
// TILTED too, whose two sums share the product, but not the exponentials that O would add up. Of a small symmetric and
// `bounded` one, all E stay in between, which saves a product.
// Where S has bounds that allow it, E is exp S as it is (`bounded`): cosines do, but at very low temperatures. Rows and
// columns then share their exponentials. Elsewhere E is exp(S − maximum), of the row or the column.
// SOFTPLUS needs no sum to know its coefficients, weight·σ(S + bias): every task is one sweep over the blocks.
//
// With PAIRS, an opt-in for float32 and bfloat16 embeddings, the factors of every product are rounded to
// bfloat16 and two of them multiplied at a time (vdpbf16ps). What is not a product stays as it is: norms,
// positives, exponentials and their sums. It pays where the instruction is faster than two multiply-adds.
//
// Memory: Ŷ in the two layouts that the products want, a panel of S and of X̂ for each thread, and a dŶ for each but
// the first, which adds up in the caller's where that is laid out as the products write; at most KEPT_BYTES of E.
// Limit: the FMA units; at D = 128 the exponentials take 2 to 3 % of the time, cache misses up to 10 %. STEP is
// 48 flop a byte of cache traffic, so L2 and L3 keep up. Threads own contiguous rows; their dŶ are added
// in a fixed order, so a result depends on the number of threads but not on chance.
#pragma once

#include <algorithm>
#include <type_traits>

#include "contrast.h"
#include "multiply.h"
#include "workspace.h"

namespace HDC_ISA {

constexpr double LOG2E = 1.4426950408889634;
constexpr int64_t ROWS_AHEAD = 8;  // of the one at work

// What one thread does to its part of one group. Members are defined, inline, in the headers that they are listed under.
template <typename T, typename Stored, Elements ELEMENTS>
class Contrast {
    static constexpr int64_t V = LANES<T>, W = TILE_WIDTH<T>, STRIDE = BLOCK_STRIDE<T>;

    const Group<T>& group;
    const Packed<T>& packed;
    Private<T>& own;
    const HdcCall& call;
    const bool normalize, symmetric, tilted, full_gradients, positives;  // whether rows have one
    const bool per_row;                         // whether terms, hits and logsumexps are asked for
    const bool bounded;                         // whether exponentials and their sums are those of S itself
    const double scale, row_scale, tilt_scale;  // of S τ: 1 / τ; in row_lse; in tilt_lse
    const T scale2, tilt_scale2;                // the last two for exp2
    int64_t first = 0, count = 0;  // the rows of the current panel
    T* panel = nullptr;            // its blocks
    bool keeps = false;            // whether those of all panels stay

    T* block_of_panel(int64_t block) const { return panel + block * own.block_step; }

    // Where S of a block is made: not in the panel if that holds pairs.
    T* made_in(int64_t block) const { return own.block ? own.block : block_of_panel(block); }

    int64_t columns_of(int64_t block) const { return std::min(BLOCK, group.columns - block * BLOCK); }

    int64_t blocks() const { return (group.columns + BLOCK - 1) / BLOCK; }

    // Whether rows of `matrix`, of elements of type Element, can be loaded and stored as whole vectors of T.
    template <typename Element>
    bool is_direct(const HdcMatrix& matrix) const {
        return std::is_same_v<Element, T> && matrix.column_stride == 1 && group.width == packed.width;
    }

    // Steps of a product over the width.
    int64_t steps_of_width() const { return ELEMENTS == PAIRS ? packed.width / 2 : packed.width; }

    // Rows of several timesteps lie pages apart, where the hardware's own prefetching stops.
    template <typename Element>
    void prefetch_row(const HdcMatrix& matrix, int64_t row, int64_t rows) const {
        if (row >= rows || matrix.column_stride != 1) return;
        const Element* from = static_cast<const Element*>(matrix.data) + row * matrix.row_stride;
        for (int64_t d = 0; d < group.width; d += 64 / int64_t(sizeof(Element))) __builtin_prefetch(from + d);
    }

    // Of the current panel.
    const T* x_row(int64_t row) const { return packed.is_one ? y_row(row) : own.x + (row - first) * packed.stride; }

    const T* y_row(int64_t row) const { return packed.y + row * packed.stride; }

    // A row's term, and its derivative by lse.
    struct Term {
        double value, slope;
    };

    // pack.h
    double inverse_norm(double squares) const;
    const T* read(const HdcMatrix& matrix, int64_t row, T* out) const;
    void scale_row(const T* from, double factor, T* to) const;
    void pair_row(const T* row, T* out) const;
    const T* unit_x(int64_t row, T* out) const;
    void start_panel(Share rows);

    // products.h
    void similarities(int64_t block, T* out);
    void add_to_sums(const T* coefficients, int64_t block);
    void weigh_rows(const double* factors);
    void add_to_dy(const T* paired, int64_t block, const T* rows, int64_t begin);
    const T* pair_rows(const T* coefficients, int64_t block, T* out) const;

    // terms.h
    void start_rows();
    void find_positives();
    void count_unbeaten(const T* values, int64_t columns);
    Vector<T> maximum_of_row(const T* row, int64_t width, Vector<T> highest) const;
    void find_maxima(const T* values, int64_t width);
    static double log_of_sum(T shift, double a, double sum);
    void finish_row(int64_t i, T shift, T highest, double sum);
    void finish_rank(int64_t row);
    Term term(double lse, int64_t row) const;
    void finish_term(int64_t row, double loss);

    // gradients.h
    void finish_dx(int64_t i, double factor, double weight);
    template <typename Gradient>
    double finish_gradient(Gradient g, const T* x, double inverse, const HdcMatrix& matrix, int64_t row, int64_t rows);
    template <typename To> void write(const HdcMatrix& matrix, int64_t row, const T* values) const;

    // step.h
    void sum_bounded();
    void sum_panel();
    void sum_in_passing();
    void raise_maxima(int64_t width, bool has_sums);
    void exponentials(int64_t block, T* values);

    // forward.h
    template <bool WITH_TILT> void update_rows(const T* values, int64_t width);
    void add_exponentials(int64_t block, T* values);
    void update_columns(int64_t block, const T* values);

    // backward.h
    void coefficients(int64_t block, T* values);
    void tilted_coefficients(int64_t block, T* values);
    void load_columns();
    void split(double lse, double weight, double a, T& rounded, T& factor) const;

    // softplus.h
    void sigmoids(int64_t width, bool saved);

  public:
    Contrast(const HdcCall& call, const Group<T>& group, const Packed<T>& packed, Private<T>& own)
        : group(group), packed(packed), own(own), call(call), normalize(call.normalize), symmetric(call.symmetric),
          tilted(call.function == HDC_TILTED), full_gradients(call.task == HDC_STEP), positives(call.function == HDC_INFO_NCE),
          per_row(call.terms), bounded(is_bounded(call)), scale(1 / call.temperature),
          row_scale(tilted ? (1 + call.beta) * scale : scale), tilt_scale(call.beta * scale),
          scale2(T(LOG2E * row_scale)), tilt_scale2(T(LOG2E * tilt_scale)) {}

    // One thread's part each; contrast_isa.cpp says in which order, and where all threads wait for each other.
    void pack(Share numbers);  // pack.h
    void step(Share rows);     // step.h
    void forward(Share rows);  // forward.h
    void merge_columns(Share columns, Threads<T> threads);
    void finish_terms(Share rows);
    void weigh(Share rows, bool saved);  // backward.h
    void backward(Share rows);
    void softplus(Share rows);                          // softplus.h
    void finish_dy(Share columns, Threads<T> threads);  // gradients.h
};

}  // namespace HDC_ISA
