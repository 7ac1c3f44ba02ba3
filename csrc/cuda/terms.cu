// From sums of exponentials to logsumexps and terms: what the forward pass leaves, row by row.
//
//     lse = ln 2·(shift + log2 Σ)     term = log(1 + exp(lse − positive)), or lse itself     hit = positive above all
//
// The parts of a sum are added here, in order and in float64, as the logsumexp is kept: at τ = 0.001 float32 would
// round away 6e-5 of every probability. A thread takes a row, and the column of the same number.
//
// No product; reads 8·splits + 4·column_parts bytes a row: at N = 65,536 with 264 parts 70 MB, 21 µs at 3.35 TB/s,
// 2 % of the product before. No GPU has run this yet.

#include "launch.cuh"
#include "rows.cuh"
#include "scalars.cuh"

namespace hdc::cuda {
namespace {

// log2 Σ exp of a row from its parts, and the largest of their cosines; `row` is its place in [groups, padded].
__device__ double merge(const Exponentials& of, int64_t row, int64_t stride, double k, float shift, float& top) {
    top = -INFINITY;
    for (int64_t part = 0; part < of.splits; ++part) top = fmaxf(top, of.highest[part * stride + row]);
    const bool running = shift != shift;
    const double base = top == -INFINITY ? 0.0 : static_cast<double>(top);
    double sum = 0.0;
    for (int64_t part = 0; part < of.splits; ++part) {
        const double total = of.total[part * stride + row];
        sum += running ? total * exp2((of.highest[part * stride + row] - base) * k) : total;
    }
    return (running ? base * k : static_cast<double>(shift)) + log2(sum);
}

__device__ double sum_down(const Terms& terms, int64_t column, int64_t stride) {
    double sum = 0.0;
#pragma unroll 8
    for (int64_t part = 0; part < terms.column_parts; ++part) sum += terms.column_total[part * stride + column];
    return sum;
}

__device__ float term_of(const Terms& terms, double lse, float positive) {
    if (!terms.positive) return static_cast<float>(lse);
    return softplus(static_cast<float>(lse - positive));
}

__global__ void __launch_bounds__(THREADS) terms_kernel(const __grid_constant__ Terms terms) {
    const Batch& batch = terms.batch;
    const int64_t blocks = (batch.rows + THREADS - 1) / THREADS;
    const int64_t group = blockIdx.x / blocks, row = blockIdx.x % blocks * THREADS + threadIdx.x;
    const float weight = batch.pair_of(group).weight;
    float term = 0.0f;
    if (row < batch.rows) {
        const int64_t flat = group * batch.rows + row;
        const int64_t row_padded = padded_rows(batch.rows), column_padded = padded_rows(batch.columns);
        const int64_t longest = batch.rows > batch.columns ? batch.rows : batch.columns;
        const float shift = fixed_shift(terms.temperature, terms.bounded, longest);
        const double k = inverse_temperature(terms.temperature) * LOG2_E;
        const float positive = terms.positive ? terms.positive[flat] : 0.0f;
        float top;
        const double lse =
            LN_2 * merge(terms.of_rows, group * row_padded + row, batch.groups * row_padded, k, shift, top);
        terms.lse[flat] = lse;
        term = term_of(terms, lse, positive);
        if (terms.of_columns.splits) {
            const int64_t column = group * column_padded + row, stride = batch.groups * column_padded;
            const bool down = terms.column_total && shift == shift;  // otherwise the columns had their own pass
            float unused;
            const double column_lse = LN_2 * (down ? shift + log2(sum_down(terms, column, stride))
                                                   : merge(terms.of_columns, column, stride, k, shift, unused));
            terms.column_lse[flat] = column_lse;
            term = 0.5f * (term + term_of(terms, column_lse, positive));
        }
        terms.terms[flat] = term;
        const bool found = terms.diagonal_cosine && terms.diagonal_cosine[group * row_padded + row] > top;
        terms.hits[flat] = found && term == term;
    }
    const float total = over_block(term, [](float a, float b) { return a + b; });
    if (threadIdx.x == 0) terms.total[blockIdx.x] = weight * total;
}

}  // namespace

int64_t terms_parts(const Batch& batch) { return batch.groups * ((batch.rows + THREADS - 1) / THREADS); }

cudaError_t terms(const Terms& terms, cudaStream_t stream) {
    return launch(terms_kernel, terms_parts(terms.batch), THREADS, terms, stream);
}

}  // namespace hdc::cuda
