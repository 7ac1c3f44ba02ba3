// What the kernel reads and writes of one group, and the memory it works in: that of all threads, and that of each.
#pragma once

#include <algorithm>
#include <limits>

#include "contrast.h"
#include "multiply.h"
#include "scratch.h"

namespace HDC_ISA {

constexpr int64_t PANEL_ROWS = 256;
// Above this, panels get fewer rows: 108 of 32,768 float columns. Half as many rows, of 16,384, cost 1.5 % of time.
constexpr int64_t PANEL_BYTES = 16 << 20;
// All E of a symmetric STEP are kept between its sweeps up to here, 2,048 rows and columns of float: reading them again
// is faster than a product.
constexpr int64_t KEPT_BYTES = 20 << 20;
constexpr int64_t BLOCK = 128;

template <typename T>
constexpr int64_t BLOCK_STRIDE = BLOCK + 64 / int64_t(sizeof(T));  // one cache line more: no aliasing in L1

// Below every logit, and finite: (LOWEST − LOWEST) is 0, where −inf would give NaN.
template <typename T>
constexpr T LOWEST = std::numeric_limits<T>::lowest() / 4;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// exp S of cosines can do without a maximum up to this scale (τ from 0.025 on): a sum of e^40 over 2^40 rows, or one over
// it, is far from the ends of float32.
constexpr double HIGHEST_BOUND = 40;

inline bool is_bounded(const HdcCall& call) {
    const bool one_sum = call.function == HDC_INFO_NCE || call.function == HDC_LOGSUMEXP;
    return one_sum && call.normalize && 1 / call.temperature <= HIGHEST_BOUND;
}

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
    T* panel;       // [panels, blocks, panel_rows, BLOCK_STRIDE], but only one panel unless there are kept rows, and only
                    // one block unless there are or this is a STEP with dŶ
    int64_t block_step;  // from one block to the next: 0 if there is only one
    T* block;            // where the panel holds pairs of rows, which takes half the room: one block of S; otherwise null
    int64_t kept_rows;   // of which a symmetric STEP keeps all E between its two sweeps, or 0
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
        const int64_t share = (problem.rows + threads - 1) / threads;
        const int64_t all_blocks = std::max<int64_t>(1, round_up(problem.columns, BLOCK) / BLOCK);
        const bool keeps = call.task == HDC_STEP && symmetric && is_bounded(call) &&
                           problem.rows * all_blocks * BLOCK_STRIDE<T> * int64_t(sizeof(T)) <= KEPT_BYTES;
        const bool whole_panel = keeps || (call.task == HDC_STEP && !symmetric && !softplus && !tilted && dys);
        const int64_t blocks = whole_panel ? all_blocks : 1;
        const int64_t affordable = PANEL_BYTES / (blocks * BLOCK_STRIDE<T> * int64_t(sizeof(T)));
        const int64_t most = std::max<int64_t>(64, std::min(PANEL_ROWS, affordable)) / TILE_ROWS * TILE_ROWS;
        // Equal panels: a share of 260 rows is two panels of 130, not one of 252 and one of 8.
        const int64_t panels = (share + most - 1) / most;
        panel_rows = round_up((share + panels - 1) / panels, TILE_ROWS);
        const bool holds_pairs = call.bfloat16 && whole_panel && !keeps && is_bounded(call);
        const int64_t block_size = panel_rows * BLOCK_STRIDE<T> / (holds_pairs ? 2 : 1);
        block_step = whole_panel ? block_size : 0;
        kept_rows = keeps ? panels * panel_rows : 0;
        scratch.take(panel, (keeps ? panels : 1) * blocks * block_size);
        scratch.take(block, holds_pairs ? panel_rows * BLOCK_STRIDE<T> : 0);
        if (!holds_pairs) block = nullptr;
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

}  // namespace HDC_ISA
