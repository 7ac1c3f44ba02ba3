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
//   STEP      3 products. Per panel: S of all blocks, into a scratch panel, and the rows' maxima; block by
//             block E = exp(S − max), its row sums and O += E·Ŷ; then, as the sums are known, so is the
//             coefficient of every row, w_i = weight·p_i / Σ_j E_ij with p_i = 1 − exp(−term_i), and
//             dŶ += Eᵀ·(w X̂).  dx̂_i = (w_i O_i − weight·p_i ŷ_i) / τ.  (LOGSUMEXP: p = 1, and no ŷ_i.)
//             2 products where dŶ is not asked for: E is then needed once, and no block of it is kept. Where a
//             row's maximum rises, what is summed so far is scaled down.
//   FORWARD   1 product. Block by block: running maxima and sums of rows and, if symmetric, of columns.
//   BACKWARD  3 products. Block by block: the coefficients of S from the saved logsumexps; O, dŶ as above.
//
// A symmetric STEP is FORWARD then BACKWARD, since no row's gradient is known before all column sums are; one of
// TILTED too, whose two sums share the product, but not the exponentials that O would add up.
// SOFTPLUS needs no sum to know its coefficients, weight·σ(S + bias): every task is one sweep over the blocks.
//
// With PAIRS, an opt-in for float32 and bfloat16 embeddings, the factors of every product are rounded to
// bfloat16 and two of them multiplied at a time (vdpbf16ps). What is not a product stays as it is: norms,
// positives, exponentials and their sums. It pays where the instruction is faster than two multiply-adds.
//
// Memory: Ŷ in the two layouts that the products want, a panel of S and of X̂ for each thread, and a dŶ for each but
// the first, which adds up in the caller's where that is laid out as the products write.
// Limit: the FMA units; at D = 128 the exponentials and maxima are 3 to 5 % of the instructions. STEP is
// 48 flop a byte of cache traffic, so L2 and L3 keep up. Threads own contiguous rows; their dŶ are added
// in a fixed order, so a result depends on the number of threads but not on chance.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "contrast.h"
#include "multiply.h"
#include "numbers.h"
#include "scratch.h"

namespace HDC_ISA {

constexpr double ZERO_NORM = 1e-12;  // as in hdc_kernels/reference.py
constexpr double LOG2E = 1.4426950408889634;
constexpr long double LOG2E_FULL = 1.442695040888963407359924681L, LN2 = 0.693147180559945309417232121L;
constexpr int64_t PANEL_ROWS = 256;
// Above this, panels get fewer rows: 108 of 32,768 float columns. Half as many rows, of 16,384, cost 1.5 % of time.
constexpr int64_t PANEL_BYTES = 16 << 20;
constexpr int64_t BLOCK = 128;

template <typename T>
constexpr int64_t BLOCK_STRIDE = BLOCK + 64 / int64_t(sizeof(T));  // one cache line more: no aliasing in L1

// Below every logit, and finite: (LOWEST − LOWEST) is 0, where −inf would give NaN.
template <typename T>
constexpr T LOWEST = std::numeric_limits<T>::lowest() / 4;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Share {  // of a thread
    int64_t begin, end;
};

inline Share share_of(int64_t count, int thread, int threads, int64_t multiple = 1) {
    const int64_t each = round_up((count + threads - 1) / threads, multiple);
    return {std::min(count, thread * each), std::min(count, (thread + 1) * each)};
}

// One group of one problem: what it reads and writes.
template <typename T>
struct Group {
    HdcMatrix x, y, dx, dy;  // data already at this group
    int64_t rows, columns, width;
    double weight;
    T* terms;
    uint8_t* hits;
    int64_t* ranks;
    double *row_lse, *column_lse, *tilt_lse;
    const T* upstream;
    const int64_t *x_ids, *y_ids, *left_out_starts, *left_out;
    const T* bias;
    T* d_bias;
};

// Rows of D values lie an odd number of cache lines apart: with a power of 2 they would fall into a few sets
// of the L1 cache, and push each other out.
template <typename T>
inline int64_t row_stride(int64_t width) {
    const int64_t line = 64 / int64_t(sizeof(T));
    return (round_up(width, std::max(line, int64_t(LANES<T>))) / line | 1) * line;
}

// What all threads of a group share.
template <typename T>
struct Packed {
    static constexpr int64_t W = TILE_WIDTH<T>;

    int64_t width, stride;                // of a row: D rounded up to whole vectors; see row_stride
    bool is_one;                          // whether everything is compared with itself
    T* y;                                 // [columns, stride]
    T* y_transposed;                      // [columns / W, width, W], or with PAIRS [columns / W, width / 2, W]
    int64_t half_stride;                  // of a row of pairs of neighbours
    T* y_pairs;                           // with PAIRS: [columns / 2, stride]
    double *x_inverse, *y_inverse;        // 1 / |x|, 0 for a zero vector
    double *positive;                     // S_ii τ
    double *row_lse, *column_lse;         // of the negatives
    double *tilt_lse;                     // TILTED: log Σ exp(β S); row_lse is that of (1 + β) S
    double *row_weight, *column_weight;   // the coefficient of −ŷ_i in dx̂_i τ: upstream · p

    void lay_out(Scratch& scratch, const HdcProblem& problem, const HdcCall& call) {
        const bool symmetric = call.symmetric, pairs = call.bfloat16;
        const HdcMatrix &of_x = problem.x, &of_y = problem.y;
        is_one = of_x.data == of_y.data && problem.rows == problem.columns && of_x.group_stride == of_y.group_stride &&
                 of_x.row_stride == of_y.row_stride && of_x.column_stride == of_y.column_stride;
        width = round_up(problem.width, pairs ? 2 * LANES<T> : LANES<T>);
        stride = row_stride<T>(width);
        half_stride = row_stride<T>(width / 2);
        const int64_t columns = round_up(problem.columns, W);
        scratch.take(y, columns * stride);
        scratch.take(y_transposed, columns * width);
        scratch.take(y_pairs, pairs ? columns / 2 * stride : 0);
        scratch.take(x_inverse, problem.rows);
        scratch.take(y_inverse, problem.columns);
        scratch.take(positive, problem.rows);
        scratch.take(row_lse, problem.rows);
        scratch.take(row_weight, problem.rows);
        scratch.take(column_lse, symmetric ? problem.columns : 0);
        scratch.take(tilt_lse, call.function == HDC_TILTED ? problem.rows : 0);
        scratch.take(column_weight, symmetric ? problem.columns : 0);
    }
};

// What each thread has to itself.
template <typename T>
struct Private {
    int64_t panel_rows;
    T* panel;       // STEP with dŶ: [blocks, panel_rows, BLOCK_STRIDE]; otherwise one block
    T* x;           // [panel_rows, stride]: X̂, unless it is Ŷ
    T* x_pairs;     // with PAIRS: [panel_rows, half_stride]
    T* sums;        // [panel_rows, stride]: O
    T* weighted;    // [panel_rows, stride]: STEP: the panel of X̂, times what its rows weigh
    T* pairs;       // with PAIRS: a block's coefficients, or LANES rows of Ŷ, rounded
    T* dy;          // [columns, dy_stride]: scratch; the first thread's is the caller's, where it fits
    int64_t dy_stride;
    T* gradient;    // [width]: one row
    T *row_maximum, *row_sum;  // [panel_rows, LANES]: lanes are reduced once a panel
    T* row_second;             // [panel_rows, LANES]: SOFTPLUS: the sums of σ; TILTED: those of exp(β (S − maximum))
    T* diagonal;               // [panel_rows]: S_ii τ out of the same product as the rest of the row
    T *column_maximum, *column_sum;         // [columns]
    bool has_dy;                            // whether any row of this group was its own
    bool in_place;                          // whether dy is the caller's, which `run` knows
    double total = 0, d_temperature = 0;    // sums over all groups that this thread saw

    void lay_out(Scratch& scratch, const HdcProblem& problem, const HdcCall& call, int threads, bool is_first) {
        const int64_t width = round_up(problem.width, call.bfloat16 ? 2 * LANES<T> : LANES<T>);
        const int64_t stride = row_stride<T>(width), columns = round_up(problem.columns, LANES<T>);
        const bool gradients = call.task != HDC_FORWARD, symmetric = call.symmetric, dys = gradients && problem.dy.data;
        const bool as_computed = call.task == HDC_STEP || call.dtype == HDC_FLOAT64 || call.dtype == HDC_FLOAT32;
        in_place = is_first && dys && as_computed && problem.dy.column_stride == 1 && width == problem.width;
        dy_stride = in_place ? problem.dy.row_stride : width;
        const bool softplus = call.function == HDC_SOFTPLUS, tilted = call.function == HDC_TILTED;
        const bool whole_panel = call.task == HDC_STEP && !symmetric && !softplus && !tilted && dys;
        const int64_t blocks = whole_panel ? round_up(problem.columns, BLOCK) / BLOCK : 1;
        const int64_t affordable = PANEL_BYTES / (blocks * BLOCK_STRIDE<T> * int64_t(sizeof(T)));
        const int64_t most = std::max<int64_t>(64, std::min(PANEL_ROWS, affordable)) / TILE_ROWS * TILE_ROWS;
        // Equal panels: a share of 260 rows is two panels of 130, not one of 252 and one of 8.
        const int64_t share = (problem.rows + threads - 1) / threads, panels = (share + most - 1) / most;
        panel_rows = round_up((share + panels - 1) / panels, TILE_ROWS);
        scratch.take(panel, blocks * panel_rows * BLOCK_STRIDE<T>);
        scratch.take(x, panel_rows * stride);
        scratch.take(x_pairs, call.bfloat16 ? panel_rows * row_stride<T>(width / 2) : 0);
        scratch.take(row_maximum, panel_rows * LANES<T>);
        scratch.take(row_sum, panel_rows * LANES<T>);
        scratch.take(row_second, softplus || tilted ? panel_rows * LANES<T> : 0);
        scratch.take(diagonal, panel_rows);
        scratch.take(sums, gradients ? panel_rows * stride : 0);
        scratch.take(weighted, dys ? panel_rows * stride : 0);
        scratch.take(dy, dys && !in_place ? problem.columns * dy_stride : 0);
        scratch.take(gradient, gradients ? stride : 0);
        scratch.take(pairs, call.bfloat16 ? std::max(panel_rows * BLOCK_STRIDE<T>, LANES<T> * stride) : 0);
        scratch.take(column_maximum, symmetric ? columns : 0);
        scratch.take(column_sum, symmetric ? columns : 0);
    }
};

template <typename T>
struct Threads {  // those that work on a group
    const Private<T>* first;
    int count;

    const Private<T>* begin() const { return first; }
    const Private<T>* end() const { return first + count; }
};

template <typename T, typename Stored, Elements ELEMENTS>
class Contrast {
    static constexpr int64_t V = LANES<T>, W = TILE_WIDTH<T>, STRIDE = BLOCK_STRIDE<T>;

    const Group<T>& group;
    const Packed<T>& packed;
    Private<T>& own;
    const HdcCall& call;
    const bool normalize, symmetric, tilted, full_gradients, positives;  // whether rows have one
    const bool per_row;                         // whether terms, hits and logsumexps are asked for
    const double scale, row_scale, tilt_scale;  // of S τ: 1 / τ; in row_lse; in tilt_lse
    const T scale2, tilt_scale2;                // the last two for exp2
    int64_t first = 0, count = 0;  // the rows of the current panel

    T* block_of_panel(int64_t block) const { return own.panel + block * own.panel_rows * STRIDE; }

    int64_t columns_of(int64_t block) const { return std::min(BLOCK, group.columns - block * BLOCK); }

    int64_t blocks() const { return (group.columns + BLOCK - 1) / BLOCK; }

    // Whether rows of `matrix`, of elements of type Element, can be loaded and stored as whole vectors of T.
    template <typename Element>
    bool is_direct(const HdcMatrix& matrix) const {
        return std::is_same_v<Element, T> && matrix.column_stride == 1 && group.width == packed.width;
    }

    // Row `row` of `matrix` as T, followed by zeros up to a whole vector: where it is, or copied to `out`.
    const T* read(const HdcMatrix& matrix, int64_t row, T* out) const {
        const Stored* from = static_cast<const Stored*>(matrix.data) + row * matrix.row_stride;
        if (is_direct<Stored>(matrix)) return reinterpret_cast<const T*>(from);
        for (int64_t d = 0; d < group.width; d++) out[d] = convert<T>(from[d * matrix.column_stride]);
        std::fill(out + group.width, out + packed.width, T(0));
        return out;
    }

    double inverse_norm(double squares) const {
        if (!normalize) return 1;
        const double norm = std::sqrt(squares);
        return norm > ZERO_NORM ? 1 / norm : norm == norm ? 0 : norm;
    }

    // Steps of a product over the width.
    int64_t steps_of_width() const { return ELEMENTS == PAIRS ? packed.width / 2 : packed.width; }

    void pair_row(const T* row, T* out) const {
        if constexpr (ELEMENTS == PAIRS)
            for (int64_t d = 0; d < packed.width; d += 2 * V) store(out + d / 2, pair_neighbours(load(row + d), load(row + d + V)));
    }

    void scale_row(const T* from, double factor, T* to) const {
        for (int64_t d = 0; d < packed.width; d += V) store(to + d, load(from + d) * T(factor));
    }

    template <typename To>
    void write(const HdcMatrix& matrix, int64_t row, const T* values) const {
        To* to = static_cast<To*>(matrix.data) + row * matrix.row_stride;
        for (int64_t d = 0; d < group.width; d++) to[d * matrix.column_stride] = convert<To>(values[d]);
    }

    // Of the current panel.
    const T* x_row(int64_t row) const { return packed.is_one ? y_row(row) : own.x + (row - first) * packed.stride; }

    const T* y_row(int64_t row) const { return packed.y + row * packed.stride; }

    // S τ of one block of the current panel. Positives, columns past the end and what is masked become −inf.
    void similarities(int64_t block, T* out) {
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
    void add_to_sums(const T* coefficients, int64_t block) {
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

    // dŶ += blockᵀ · rows, beginning with the panel at row `begin`; `rows` are those of X̂ or, as always with
    // PAIRS, what `weigh_rows` made of them.
    void add_to_dy(const T* coefficients, int64_t block, const T* rows, int64_t begin) {
        if (!group.dy.data) return;
        const int64_t columns = columns_of(block);
        Operand<T> left{coefficients, STRIDE};
        if constexpr (ELEMENTS == PAIRS) {
            for (int64_t i = 0; i < count; i += 2)
                for (int64_t j = 0; j < columns; j += V) {
                    const T* row = coefficients + i * STRIDE + j;
                    const Vector<T> next = i + 1 < count ? load(row + STRIDE) : Vector<T>{};
                    store(own.pairs + i / 2 * STRIDE + j, pair_lanes(load(row), next));
                }
            left.data = own.pairs;
        }
        const int64_t steps = ELEMENTS == PAIRS ? (count + 1) / 2 : count;
        for (int64_t d = 0; d < packed.width; d += W)
            multiply<T, BY_STEP, ELEMENTS>(columns, packed.width - d, left, {rows + d, packed.stride}, steps,
                                           own.dy + block * BLOCK * own.dy_stride + d, own.dy_stride, first > begin);
    }

    // The panel of X̂, each row times its factor.
    void weigh_rows(const double* factors) {
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

    // The larger one of the row's running maximum and the maximum over one block, in each lane.
    Vector<T> maximum_of_row(const T* row, int64_t width, Vector<T> highest) const {
        for (int64_t j = 0; j < width; j += V) highest = maximum<T>(highest, load(row + j));
        return highest;
    }

    // Ranks need the positives beforehand, from the same product as all others: ties are exact.
    void find_positives() {
        if (!group.ranks) return;
        for (int64_t block = first / BLOCK; block <= (first + count - 1) / BLOCK; block++) similarities(block, own.panel);
    }

    // Columns of one block that the positive does not beat; NaN beats nothing and is not beaten.
    void count_unbeaten(const T* values, int64_t columns) {
        if (!group.ranks) return;
        for (int64_t i = 0; i < count; i++) {
            const T *row = values + i * STRIDE, positive = own.diagonal[i];
            int64_t unbeaten = 0;
            for (int64_t j = 0; j < columns; j++) unbeaten += !(row[j] < positive);
            group.ranks[first + i] += unbeaten;
        }
    }

    // x̂ of any row, where it is or made in `out`.
    const T* unit_x(int64_t row, T* out) const {
        if (packed.is_one) return y_row(row);
        scale_row(read(group.x, row, out), packed.x_inverse[row], out);
        return out;
    }

    // The panel of X̂ from row `first` on.
    void start_panel(Share rows) {
        count = std::min(own.panel_rows, rows.end - first);
        for (int64_t i = 0; i < count; i++) {
            const T* x = unit_x(first + i, own.x + i * packed.stride);
            pair_row(x, own.x_pairs + i * packed.half_stride);
        }
    }

    void start_rows() {
        if (group.ranks) std::fill_n(group.ranks + first, count, int64_t(0));
        std::fill(own.row_maximum, own.row_maximum + count * V, LOWEST<T>);
        std::fill(own.row_sum, own.row_sum + count * V, T(0));
        if (tilted || call.function == HDC_SOFTPLUS) std::fill(own.row_second, own.row_second + count * V, T(0));
    }

    // log Σ exp(a S) of a sum that was made relative to the highest S.
    static double log_of_sum(T highest, double a, double sum) {
        return sum == 0 ? -std::numeric_limits<double>::infinity() : double(highest) * a + std::log(sum);
    }

    void finish_rank(int64_t row) {
        if (group.ranks) group.ranks[row] = std::min(group.ranks[row], group.columns - 1);  // NaN does not beat itself
    }

    // What is known of row i once Σ exp((S_ij − maximum) / τ) is.
    void finish_row(int64_t i, T highest, double sum) {
        const int64_t row = first + i;
        packed.row_lse[row] = log_of_sum(highest, row_scale, sum);
        if (per_row) group.row_lse[row] = packed.row_lse[row];
        finish_rank(row);
        if (per_row) group.hits[row] = positives && highest < own.diagonal[i] && sum == sum;
    }

    // A row's term, and its derivative by lse.
    struct Term {
        double value, slope;
    };

    // With a positive log(1 + e^z) and 1 / (1 + e^−z), z = lse − S_ii, without overflow.
    Term term(double lse, int64_t row) const {
        if (tilted) return {lse == -std::numeric_limits<double>::infinity() ? lse : lse - packed.tilt_lse[row], 1};
        if (!positives) return {lse, 1};
        const double z = lse - packed.positive[row] * scale, e = std::exp(-std::abs(z));
        return z > 0 ? Term{z + std::log1p(e), 1 / (1 + e)} : Term{std::log1p(e), e / (1 + e)};
    }

    // dx̂_i = (factor·O_i − weight·ŷ_i) / τ, then through the normalisation into the caller's gradient. Without
    // positives there is no ŷ_i.
    void finish_dx(int64_t i, double factor, double weight) {
        const int64_t row = first + i;
        const T of_sum = T(factor * scale), of_y = positives ? T(weight * scale) : T(0);
        const T *sums = own.sums + i * packed.stride, *y = y_row(positives ? row : 0);
        own.d_temperature -= scale * finish_gradient(
            [=](int64_t d) { return of_sum * load(sums + d) - of_y * load(y + d); },
            x_row(row), packed.x_inverse[row], group.dx, row);
    }

    // g -> (g − x̂ (x̂·g)) / |x|, written to row `row` of `matrix`. Returns x̂·g.
    template <typename Gradient>
    double finish_gradient(Gradient g, const T* x, double inverse, const HdcMatrix& matrix, int64_t row) {
        Vector<T> products{};
        for (int64_t d = 0; d < packed.width; d += V) {
            const Vector<T> value = g(d);
            store(own.gradient + d, value);
            products += value * load(x + d);
        }
        const T along = sum_of_lanes<T>(products), factor = T(inverse), pull = normalize ? along : T(0);
        const bool direct = full_gradients ? is_direct<T>(matrix) : is_direct<Stored>(matrix);
        T* to = direct ? static_cast<T*>(matrix.data) + row * matrix.row_stride : own.gradient;
        for (int64_t d = 0; d < packed.width; d += V) store(to + d, (load(own.gradient + d) - pull * load(x + d)) * factor);
        if (!direct && full_gradients) write<T>(matrix, row, own.gradient);
        if (!direct && !full_gradients) write<Stored>(matrix, row, own.gradient);
        return double(along);
    }

  public:
    Contrast(const HdcCall& call, const Group<T>& group, const Packed<T>& packed, Private<T>& own)
        : group(group), packed(packed), own(own), call(call), normalize(call.normalize), symmetric(call.symmetric),
          tilted(call.function == HDC_TILTED), full_gradients(call.task == HDC_STEP), positives(call.function == HDC_INFO_NCE),
          per_row(call.terms), scale(1 / call.temperature), row_scale(tilted ? (1 + call.beta) * scale : scale), tilt_scale(call.beta * scale),
          scale2(T(LOG2E * row_scale)), tilt_scale2(T(LOG2E * tilt_scale)) {}

    // Norms, Ŷ and the positives of the rows and columns of these numbers, of either of which there may be fewer.
    // Squares and products are summed in float64. `numbers` begins at a whole tile.
    void pack(Share numbers) {
        const Share columns{std::min(numbers.begin, group.columns), std::min(numbers.end, group.columns)};
        for (int64_t j = numbers.begin; j < numbers.end; j++) {
            const bool has_x = j < group.rows, has_y = j < group.columns;
            T* unit_y = packed.y + j * packed.stride;
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

    // SOFTPLUS, any task: what becomes of each block depends on nothing but the block.
    void softplus(Share rows) {
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
                similarities(block, own.panel);
                count_unbeaten(own.panel, columns_of(block));
                sigmoids(round_up(columns_of(block), V), saved);
                if (!gradients) continue;
                add_to_sums(own.panel, block);
                add_to_dy(own.panel, block, ELEMENTS == PAIRS ? own.weighted : x_row(first), rows.begin);
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
    void sigmoids(int64_t width, bool saved) {
        for (int64_t i = 0; i < count; i++) {
            T* row = own.panel + i * STRIDE;
            const T bias = group.bias[first + i], weight = saved ? group.upstream[first + i] : T(group.weight);
            Vector<T> sum = load(own.row_sum + i * V), slopes = load(own.row_second + i * V);
            for (int64_t j = 0; j < width; j += V) {
                const Vector<T> z = load(row + j) * T(scale) + bias, zero{};
                // The constant's own rounding would put all of a row off by |z| times as much. NaN is kept.
                const Vector<T> least = broadcast(T(1.01) * Exp2<T>::lowest), falling = z > zero ? -z : z;
                const Vector<T> a = maximum<T>(least, falling), rough = exp2(a * T(LOG2E));
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

    // STEP, one direction: everything about these rows, and their part of dŶ.
    void step(Share rows) {
        own.has_dy = rows.begin < rows.end;
        double factors[PANEL_ROWS];
        for (first = rows.begin; first < rows.end; first += own.panel_rows) {
            start_panel(rows);
            start_rows();
            if (group.dy.data) sum_panel();
            else sum_in_passing();
            for (int64_t i = 0; i < count; i++) {
                const double sum = double(sum_of_lanes<T>(load(own.row_sum + i * V)));
                finish_row(i, own.row_maximum[i * V], sum);
                const Term found = term(packed.row_lse[first + i], first + i);
                finish_term(first + i, found.value);
                packed.row_weight[first + i] = group.weight * found.slope;
                factors[i] = sum == 0 ? 0 : packed.row_weight[first + i] / sum;
            }
            weigh_rows(factors);
            for (int64_t block = 0; block < blocks(); block++) add_to_dy(block_of_panel(block), block, own.weighted, rows.begin);
            for (int64_t i = 0; i < count; i++)
                finish_dx(i, factors[i], packed.row_weight[first + i]);
        }
    }

    // The panel becomes E; its row sums and O.
    void sum_panel() {
        for (int64_t block = 0; block < blocks(); block++) {
            T* values = block_of_panel(block);
            similarities(block, values);
            const int64_t width = round_up(columns_of(block), V);
            for (int64_t i = 0; i < count; i++)
                store(own.row_maximum + i * V, maximum_of_row(values + i * STRIDE, width, load(own.row_maximum + i * V)));
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
    void sum_in_passing() {
        find_positives();
        for (int64_t block = 0; block < blocks(); block++) {
            similarities(block, own.panel);
            count_unbeaten(own.panel, columns_of(block));
            raise_maxima(round_up(columns_of(block), V), block > 0);
            exponentials(block, own.panel);
            add_to_sums(own.panel, block);
        }
    }

    // The rows' maxima over one more block, and sums relative to them; O only if there is any yet.
    void raise_maxima(int64_t width, bool has_sums) {
        for (int64_t i = 0; i < count; i++) {
            const T before = own.row_maximum[i * V];
            const T now = highest_lane<T>(maximum_of_row(own.panel + i * STRIDE, width, broadcast(before)));
            if (!(now > before)) continue;
            const Vector<T> factor = exp2((broadcast(before) - now) * scale2);
            store(own.row_maximum + i * V, broadcast(now));
            store(own.row_sum + i * V, load(own.row_sum + i * V) * factor);
            T* sums = own.sums + i * packed.stride;
            for (int64_t d = 0; d < packed.width && has_sums; d += V) store(sums + d, load(sums + d) * factor);
        }
    }

    // S τ -> exp(S − maximum), and the sums of the rows.
    void exponentials(int64_t block, T* values) {
        const int64_t width = round_up(columns_of(block), V);
        for (int64_t i = 0; i < count; i++) {
            T* row = values + i * STRIDE;
            const Vector<T> highest = load(own.row_maximum + i * V);
            Vector<T> sum{};
            for (int64_t j = 0; j < width; j += V) {
                const Vector<T> e = exp2((load(row + j) - highest) * scale2);
                store(row + j, e);
                sum += e;
            }
            store(own.row_sum + i * V, load(own.row_sum + i * V) + sum);
        }
    }

    // FORWARD: logsumexps and hits of these rows; running maxima and sums of all columns over them.
    void forward(Share rows) {
        if (symmetric) {
            std::fill_n(own.column_maximum, round_up(group.columns, V), LOWEST<T>);
            std::fill_n(own.column_sum, round_up(group.columns, V), T(0));
        }
        for (first = rows.begin; first < rows.end; first += own.panel_rows) {
            start_panel(rows);
            start_rows();
            find_positives();
            for (int64_t block = 0; block < blocks(); block++) {
                similarities(block, own.panel);
                count_unbeaten(own.panel, columns_of(block));
                if (tilted) update_rows<true>(round_up(columns_of(block), V));
                else update_rows<false>(round_up(columns_of(block), V));
                if (symmetric) update_columns(block);
            }
            for (int64_t i = 0; i < count; i++) {
                const Vector<T> maxima = load(own.row_maximum + i * V), sums = load(own.row_sum + i * V);
                const T highest = highest_lane<T>(maxima);
                finish_row(i, highest, sum_of_lanes<T>(sums * exp2((maxima - highest) * scale2)));
                if (!tilted) continue;
                const Vector<T> tilts = load(own.row_second + i * V) * exp2((maxima - highest) * tilt_scale2);
                packed.tilt_lse[first + i] = log_of_sum(highest, tilt_scale, sum_of_lanes<T>(tilts));
                if (per_row) group.tilt_lse[first + i] = packed.tilt_lse[first + i];
            }
        }
    }

    template <bool WITH_TILT>
    void update_rows(int64_t width) {
        for (int64_t i = 0; i < count; i++) {
            const T* row = own.panel + i * STRIDE;
            const Vector<T> before = load(own.row_maximum + i * V), now = maximum_of_row(row, width, before);
            Vector<T> sum = load(own.row_sum + i * V) * exp2((before - now) * scale2), tilt{};
            if constexpr (WITH_TILT) tilt = load(own.row_second + i * V) * exp2((before - now) * tilt_scale2);
            for (int64_t j = 0; j < width; j += V) {
                const Vector<T> below = load(row + j) - now;
                sum += exp2(below * scale2);
                if constexpr (WITH_TILT) tilt += exp2(below * tilt_scale2);
            }
            store(own.row_maximum + i * V, now);
            store(own.row_sum + i * V, sum);
            if constexpr (WITH_TILT) store(own.row_second + i * V, tilt);
        }
    }

    void update_columns(int64_t block) {
        const int64_t width = round_up(columns_of(block), V);
        for (int64_t j = 0; j < width; j += V) {
            T *maxima = own.column_maximum + block * BLOCK + j, *sums = own.column_sum + block * BLOCK + j;
            const Vector<T> before = load(maxima);
            Vector<T> now = before, sum{};
            for (int64_t i = 0; i < count; i++) now = maximum<T>(now, load(own.panel + i * STRIDE + j));
            for (int64_t i = 0; i < count; i++) sum += exp2((load(own.panel + i * STRIDE + j) - now) * scale2);
            store(maxima, now);
            store(sums, load(sums) * exp2((before - now) * scale2) + sum);
        }
    }

    // The columns' logsumexps out of what every thread found about them.
    void merge_columns(Share columns, Threads<T> threads) {
        if (!symmetric) return;
        for (int64_t j = columns.begin; j < columns.end; j++) {
            T highest = LOWEST<T>;
            for (const Private<T>& thread : threads) highest = std::max(highest, thread.column_maximum[j]);
            double sum = 0;
            for (const Private<T>& thread : threads)
                sum += double(thread.column_sum[j]) * std::exp((double(thread.column_maximum[j]) - double(highest)) * scale);
            packed.column_lse[j] = log_of_sum(highest, scale, sum);
            if (per_row) group.column_lse[j] = packed.column_lse[j];
        }
    }

    void finish_term(int64_t row, double loss) {
        if (per_row) group.terms[row] = T(loss);
        own.total += group.weight * loss;
    }

    void finish_terms(Share rows) {
        for (int64_t i = rows.begin; i < rows.end; i++) {
            const double loss = term(packed.row_lse[i], i).value;
            finish_term(i, symmetric ? (loss + term(packed.column_lse[i], i).value) / 2 : loss);
        }
    }

    // BACKWARD: what each row weighs, from its upstream gradient and the logsumexps.
    void weigh(Share rows, bool saved) {
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

    void backward(Share rows) {
        own.has_dy = rows.begin < rows.end;
        if (symmetric) load_columns();
        double ones[PANEL_ROWS];
        std::fill_n(ones, PANEL_ROWS, 1.0);
        for (first = rows.begin; first < rows.end; first += own.panel_rows) {
            start_panel(rows);
            if (ELEMENTS == PAIRS) weigh_rows(ones);
            for (int64_t block = 0; block < blocks(); block++) {
                similarities(block, own.panel);
                if (tilted) tilted_coefficients(block);
                else coefficients(block);
                add_to_sums(own.panel, block);
                add_to_dy(own.panel, block, ELEMENTS == PAIRS ? own.weighted : x_row(first), rows.begin);
            }
            for (int64_t i = 0; i < count; i++) {
                const double weight = packed.row_weight[first + i] + (symmetric ? packed.column_weight[first + i] : 0);
                finish_dx(i, 1, weight);
            }
        }
    }

    // S τ -> row_weight_i exp(S_ij − row_lse_i) + column_weight_j exp(S_ij − column_lse_j)
    void coefficients(int64_t block) {
        const int64_t begin = block * BLOCK, width = round_up(columns_of(block), V);
        for (int64_t i = 0; i < count; i++) {
            T* row = own.panel + i * STRIDE;
            T lse, factor;
            split(packed.row_lse[first + i], packed.row_weight[first + i], row_scale, lse, factor);
            for (int64_t j = 0; j < width; j += V) {
                const Vector<T> s = load(row + j);
                Vector<T> g = factor * exp2((s - lse) * scale2);
                if (symmetric)
                    g += load(own.column_sum + begin + j) * exp2((s - load(own.column_maximum + begin + j)) * scale2);
                store(row + j, g);
            }
        }
    }

    // S τ -> row_weight_i ((1 + β) exp((1 + β) S_ij − row_lse_i) − β exp(β S_ij − tilt_lse_i))
    void tilted_coefficients(int64_t block) {
        const int64_t width = round_up(columns_of(block), V);
        for (int64_t i = 0; i < count; i++) {
            T* row = own.panel + i * STRIDE;
            const double weight = packed.row_weight[first + i];
            T lse, factor, tilt_lse, tilt_factor;
            split(packed.row_lse[first + i], (1 + call.beta) * weight, row_scale, lse, factor);
            split(packed.tilt_lse[first + i], call.beta * weight, tilt_scale, tilt_lse, tilt_factor);
            for (int64_t j = 0; j < width; j += V) {
                const Vector<T> s = load(row + j);
                store(row + j, factor * exp2((s - lse) * scale2) - tilt_factor * exp2((s - tilt_lse) * tilt_scale2));
            }
        }
    }

    // The columns' part of `coefficients`, as vectors of T, where FORWARD keeps maxima and sums.
    void load_columns() {
        std::fill_n(own.column_maximum, round_up(group.columns, V), T(0));
        std::fill_n(own.column_sum, round_up(group.columns, V), T(0));
        for (int64_t j = 0; j < group.columns; j++)
            split(packed.column_lse[j], packed.column_weight[j], scale, own.column_maximum[j], own.column_sum[j]);
    }

    // weight · exp(a S τ − lse) = factor · exp(a (S τ − rounded)): S τ and `rounded` are close where it matters, so
    // that their difference is exact, and the factor makes good what rounding lse / a to T does to a whole row.
    // Without negatives all S are −inf and any lse will do.
    static void split(double lse, double weight, double a, T& rounded, T& factor) {
        const double exact = lse == -std::numeric_limits<double>::infinity() ? 0 : lse / a;
        rounded = T(exact);
        factor = T(weight * std::exp((double(rounded) - exact) * a));
    }

    void finish_dy(Share columns, Threads<T> threads) {
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
                y_row(j), packed.y_inverse[j], group.dy, j);
        }
    }
};

}  // namespace HDC_ISA
