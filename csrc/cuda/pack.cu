// Normalises once: raw embeddings of any row strides become unit vectors in padded, contiguous memory.
//
// Every later kernel reads them many times, without a mask, in whole vectors. Where there are positives, their logits
// are taken here too, in float32 from embeddings that were not rounded.
//
// A warp takes row i of x and row i of y; a lane holds width/32 elements of each in registers, so memory is read once.
// No product; reads 2·G·N·D elements and writes as many: at N = 65,536, D = 128 in bf16 67 MB, 20 µs at 3.35 TB/s,
// 2 % of the product that follows. No GPU has run this yet.

#include "launch.cuh"
#include "unit.cuh"

namespace hdc::cuda {
namespace {

template <typename Element, bool TF32, int EACH>
__device__ void store_packed(const float (&unit)[EACH], void* units, int64_t row) {
    auto* to = static_cast<Element*>(units) + row * (32 * EACH) + threadIdx.x % 32;
#pragma unroll
    for (int e = 0; e < EACH; ++e) to[32 * e] = narrow<Element>(TF32 ? round_to_tf32(unit[e]) : unit[e]);
}

template <typename Element, bool TF32, int EACH>
__global__ void __launch_bounds__(32 * WARPS) pack_kernel(const __grid_constant__ Packing packing) {
    const Batch& batch = packing.batch;
    const int64_t x_padded = padded_rows(batch.rows), y_padded = padded_rows(batch.columns);
    const int64_t longer = x_padded > y_padded ? x_padded : y_padded;
    const int64_t warp = int64_t{blockIdx.x} * WARPS + threadIdx.x / 32;
    const int64_t group = warp / longer, row = warp % longer;  // longer is a multiple of WARPS: no warp is too many
    const Batch::Pair& pair = batch.pair_of(group);
    float x[EACH], y[EACH];
    load_unit<Element>(x, pair.x, group - pair.begin, row, batch.rows, pair.width, packing.normalize);
    load_unit<Element>(y, pair.y, group - pair.begin, row, batch.columns, pair.width, packing.normalize);
    if (row < x_padded) store_packed<Element, TF32>(x, packing.x_units, group * x_padded + row);
    if (row < y_padded) store_packed<Element, TF32>(y, packing.y_units, group * y_padded + row);
    if (packing.positive && row < batch.rows) {
        float product = 0.0f;
#pragma unroll
        for (int e = 0; e < EACH; ++e) product += x[e] * y[e];
        product = warp_sum(product);
        if (threadIdx.x % 32 == 0)
            packing.positive[group * batch.rows + row] = product * inverse_temperature(packing.temperature);
    }
}

template <typename Element, bool TF32>
cudaError_t of_width(const Packing& packing, cudaStream_t stream) {
    const Batch& batch = packing.batch;
    const int64_t longer = padded_rows(batch.rows > batch.columns ? batch.rows : batch.columns);
    const int64_t blocks = batch.groups * longer / WARPS;
    switch (batch.width) {
        case 64: return launch(pack_kernel<Element, TF32, 2>, blocks, 32 * WARPS, packing, stream);
        case 128: return launch(pack_kernel<Element, TF32, 4>, blocks, 32 * WARPS, packing, stream);
        case 256: return launch(pack_kernel<Element, TF32, 8>, blocks, 32 * WARPS, packing, stream);
        default: return launch(pack_kernel<Element, TF32, 16>, blocks, 32 * WARPS, packing, stream);
    }
}

}  // namespace

cudaError_t pack(const Packing& packing, Type type, cudaStream_t stream) {
    switch (type) {
        case Type::fp32: return of_width<float, false>(packing, stream);
        case Type::tf32: return of_width<float, true>(packing, stream);
        case Type::bf16: return of_width<__nv_bfloat16, false>(packing, stream);
        default: return of_width<__half, false>(packing, stream);
    }
}

}  // namespace hdc::cuda
