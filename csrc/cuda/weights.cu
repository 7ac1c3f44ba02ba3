// From upstream gradients to what the gradient passes multiply exponentials by: u·∂term/∂lse of every row and column.
//
//     info_nce     share = u/(1 + exp(positive − lse)), halved where columns have their part      shift = lse·log2(e)
//     logsumexp    share = u
//
// The difference is taken in float64, so that a large logsumexp (a small τ) rounds nothing away. A thread takes a row
// and the column of the same number. The largest share of a problem is the same in whatever order it is found.
//
// No product; 44 bytes a row at most, 3 MB at N = 65,536: a launch. No GPU has run this yet.

#include "launch.cuh"
#include "rows.cuh"

namespace hdc::cuda {
namespace {

__device__ float shift_of(double lse) {
    return lse == -INFINITY ? INFINITY : static_cast<float>(lse / LN_2);  // exponentials of nothing are 0
}

__device__ float slope(const Weights& weights, double lse, int64_t row) {
    if (!weights.positive) return 1.0f;
    return 1.0f / (1.0f + expf(static_cast<float>(weights.positive[row] - lse)));
}

__global__ void __launch_bounds__(THREADS) weights_kernel(const __grid_constant__ Weights weights) {
    const int64_t padded = padded_rows(weights.batch.rows);
    const int64_t place = int64_t{blockIdx.x} * THREADS + threadIdx.x;  // in [groups, padded]
    const int64_t group = place / padded, row = place % padded, flat = group * weights.batch.rows + row;
    const bool columns = weights.column_lse;
    float share = 0.0f, shift = INFINITY, column_share = 0.0f, column_shift = INFINITY;
    if (row < weights.batch.rows) {
        const float whole = weights.upstream ? weights.upstream[flat] : weights.batch.pair_of(group).weight;
        const float upstream = columns ? 0.5f * whole : whole;
        share = upstream * slope(weights, weights.lse[flat], flat);
        shift = shift_of(weights.lse[flat]);
        if (columns) {
            column_share = upstream * slope(weights, weights.column_lse[flat], flat);
            column_shift = shift_of(weights.column_lse[flat]);
        }
    }
    weights.share[place] = share;
    weights.shift[place] = shift;
    if (columns) {
        weights.column_share[place] = column_share;
        weights.column_shift[place] = column_shift;
    }
    // fmaxf passes over NaN. Numbers that are not negative are in the order of their bits.
    const float largest = over_block(fmaxf(fmaxf(0.0f, fabsf(share)), fabsf(column_share)),
                                     [](float a, float b) { return fmaxf(a, b); });
    if (threadIdx.x == 0) {
        atomicMax(reinterpret_cast<unsigned*>(weights.largest + group), __float_as_uint(largest));
    }
}

}  // namespace

cudaError_t weights(const Weights& weights, cudaStream_t stream) {
    const Batch& batch = weights.batch;
    const cudaError_t error = cudaMemsetAsync(weights.largest, 0, batch.groups * sizeof(float), stream);
    if (error != cudaSuccess) return error;
    return launch(weights_kernel, batch.groups * padded_rows(batch.rows) / THREADS, THREADS, weights, stream);
}

}  // namespace hdc::cuda
