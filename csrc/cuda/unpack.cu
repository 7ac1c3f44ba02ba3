// From gradients by unit vectors to gradients by embeddings: the positives' part, 1/τ, the norms.
//
// Of the sum's part dx̂' of every row (its parts over a split are added here, in order) and its positive's weight w,
//
//     dx̂ = (dx̂' − w ŷ_i)/τ        dx = (dx̂ − x̂ (x̂·dx̂))/|x|        ∂/∂τ = −(1/τ) Σ_i x̂_i·dx̂_i
//
// with unit vectors taken anew from the embeddings, in float32: in a converged batch most of dx̂ is along x̂ and goes,
// so what stays must not hold the rounding of half precision.
//
// A warp takes row i of x and row i of y. No product; reads 2·N·D elements and 8·N·D bytes a split, writes 2·N·D
// elements. No GPU has run this yet.

#include "launch.cuh"
#include "unit.cuh"

namespace hdc::cuda {
namespace {

// Gradient by the unit vector of a row, to that by its embedding; returns unit · gradient.
template <typename Gradient, int EACH>
__device__ float store_gradient(
    const float (&unit)[EACH], const float (&other)[EACH], float inverse, float pull, float scale, bool normalize,
    const float* parts, int64_t splits, int64_t part_stride, const HdcCudaMatrix& matrix, int64_t group, int64_t row,
    int64_t width
) {
    const int lane = threadIdx.x % 32;
    float gradient[EACH], along = 0.0f;
#pragma unroll
    for (int e = 0; e < EACH; ++e) gradient[e] = -pull * other[e];
    for (int64_t split = 0; split < splits; ++split) {
#pragma unroll
        for (int e = 0; e < EACH; ++e) gradient[e] += parts[split * part_stride + lane + 32 * e];
    }
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        gradient[e] *= scale;
        along += unit[e] * gradient[e];
    }
    along = warp_sum(along);
    auto* to = static_cast<Gradient*>(matrix.data) + group * matrix.group_stride + row * matrix.row_stride;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        const float value = normalize ? (gradient[e] - unit[e] * along) * inverse : gradient[e];
        if (lane + 32 * e < width) to[lane + 32 * e] = narrow<Gradient>(value);
    }
    return along;
}

template <typename Element, typename Gradient, int EACH>
__global__ void __launch_bounds__(32 * WARPS) unpack_kernel(const __grid_constant__ Unpacking unpacking) {
    const Batch& batch = unpacking.batch;
    const int64_t x_padded = padded_rows(batch.rows), y_padded = padded_rows(batch.columns);
    const int64_t longer = x_padded > y_padded ? x_padded : y_padded;
    const int64_t warp = int64_t{blockIdx.x} * WARPS + threadIdx.x / 32;
    const int64_t group = warp / longer, row = warp % longer;
    const Batch::Pair& pair = batch.pair_of(group);
    const int64_t own_group = group - pair.begin;
    const bool normalize = unpacking.normalize;
    const float scale = inverse_temperature(unpacking.temperature);
    float x[EACH], y[EACH];
    const float x_inverse = load_unit<Element>(x, pair.x, own_group, row, batch.rows, pair.width, normalize);
    const float y_inverse = load_unit<Element>(y, pair.y, own_group, row, batch.columns, pair.width, normalize);
    float pull = 0.0f;
    if (row < batch.rows) {
        if (unpacking.weight) pull += unpacking.weight[group * x_padded + row];
        if (unpacking.column_weight) pull += unpacking.column_weight[group * x_padded + row];
    }
    constexpr int WIDTH = 32 * EACH;
    float along = 0.0f;
    if (row < batch.rows) {
        along = store_gradient<Gradient>(
            x, y, x_inverse, pull, scale, normalize, unpacking.x_gradient + (group * x_padded + row) * WIDTH,
            unpacking.x_splits, batch.groups * x_padded * WIDTH, pair.dx, own_group, row, pair.width
        );
    }
    if (row < batch.columns && pair.dy.data) {
        store_gradient<Gradient>(
            y, x, y_inverse, pull, scale, normalize, unpacking.y_gradient + (group * y_padded + row) * WIDTH,
            unpacking.y_splits, batch.groups * y_padded * WIDTH, pair.dy, own_group, row, pair.width
        );
    }
    __shared__ float of_warps[WARPS];
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = along;
    __syncthreads();
    if (threadIdx.x == 0) {
        float total = 0.0f;
        for (int w = 0; w < WARPS; ++w) total += of_warps[w];
        unpacking.d_temperature[blockIdx.x] = -scale * total;
    }
}

template <typename Element, typename Gradient>
cudaError_t of_width(const Unpacking& unpacking, cudaStream_t stream) {
    const int64_t blocks = unpack_parts(unpacking.batch);
    switch (unpacking.batch.width) {
        case 64: return launch(unpack_kernel<Element, Gradient, 2>, blocks, 32 * WARPS, unpacking, stream);
        case 128: return launch(unpack_kernel<Element, Gradient, 4>, blocks, 32 * WARPS, unpacking, stream);
        case 256: return launch(unpack_kernel<Element, Gradient, 8>, blocks, 32 * WARPS, unpacking, stream);
        default: return launch(unpack_kernel<Element, Gradient, 16>, blocks, 32 * WARPS, unpacking, stream);
    }
}

}  // namespace

int64_t unpack_parts(const Batch& batch) {
    return batch.groups * padded_rows(batch.rows > batch.columns ? batch.rows : batch.columns) / WARPS;
}

cudaError_t unpack(const Unpacking& unpacking, Type type, bool wide, cudaStream_t stream) {
    switch (type) {
        case Type::fp32:
        case Type::tf32: return of_width<float, float>(unpacking, stream);
        case Type::bf16:
            return wide ? of_width<__nv_bfloat16, float>(unpacking, stream)
                        : of_width<__nv_bfloat16, __nv_bfloat16>(unpacking, stream);
        default: return wide ? of_width<__half, float>(unpacking, stream) : of_width<__half, __half>(unpacking, stream);
    }
}

}  // namespace hdc::cuda
