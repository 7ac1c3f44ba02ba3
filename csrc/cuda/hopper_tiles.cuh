// What the two Hopper kernels share: where a tile lies in shared memory and in registers, the ring of its stages,
// the order in which two warpgroups use the tensor cores, and how a pass is divided among blocks.
//
// A tile of R vectors lies in shared memory as chunks of 64 dimensions, each [R, 64] of 16 bits: rows of 128 bytes,
// whose eight pieces of 16 bytes are swizzled, piece p of row r at p ^ (r % 8). The TMA writes so, wgmma reads so.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include "hopper_ptx.cuh"
#include "packed.h"
#include "splits.h"

namespace hdc::cuda::hopper {

constexpr int WARPGROUP = 128;
constexpr int THREADS = 3 * WARPGROUP;  // a producer and two consumers
constexpr int CHUNK = 64;               // dimensions
constexpr int ROW_BYTES = CHUNK * 2;
constexpr int EIGHT_ROWS = 8 * ROW_BYTES;  // after which the swizzle repeats
constexpr int STEP = 16;                   // dimensions of one wgmma
constexpr int MAX_SHARED = 232448;         // bytes that a block may have
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;  // 128·(24 + 2·240) ≤ 65,536

// A matrix in shared memory for wgmma. `leading` is the stride between chunks, used only where the other matrix's
// dimensions are contiguous, `stride` that between groups of eight rows; 1 << 62 is the swizzle of 128 bytes.
__device__ inline uint64_t descriptor(uint32_t address, uint32_t leading) {
    return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
           static_cast<uint64_t>(EIGHT_ROWS >> 4) << 32 | uint64_t{1} << 62;
}

// An accumulator [64, N]: thread t of the warpgroup has in register 4·n + 2·h + b the element of row
// `fragment_row(t)` + 8·h and column 8·n + `fragment_column(t)` + b.
__device__ inline int fragment_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }
__device__ inline int fragment_column(int thread) { return thread % 4 * 2; }

// Stages of shared memory in turn, and the parity of the phase that a consumer waits for.
template <int STAGES>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;

    __device__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// The consumers hand their products to the tensor cores in turn, so that the exponentials of one are taken while
// the other's product runs. Consumer 0 begins; as many waits as arrivals, or the barrier would be left open.
struct Turns {
    int consumer;
    bool begun = false;

    __device__ void wait() {
        if (consumer == 1 || begun) named_wait(1 + consumer, 2 * WARPGROUP);
        begun = true;
    }
    __device__ void pass() { named_arrive(2 - consumer, 2 * WARPGROUP); }
    __device__ void end() {
        if (consumer == 0) named_wait(1, 2 * WARPGROUP);
    }
};

// Once a warp is done with a stage. Other lanes' reads come before the arrival of the first.
__device__ inline void release(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// What a block does first. `shared` has the barriers of its stages and of its own rows.
template <typename Shared>
__device__ void create_barriers(Shared& shared, const CUtensorMap* own, const CUtensorMap* other) {
    constexpr int CONSUMER_WARPS = 2 * WARPGROUP / 32;
    if (threadIdx.x == 0) {
        prefetch_map(own);
        prefetch_map(other);
        for (uint64_t& full : shared.full) barrier_create(&full, 1);
        for (uint64_t& empty : shared.empty) barrier_create(&empty, CONSUMER_WARPS);
        barrier_create(&shared.own_full, 1);
        barrier_create(&shared.own_empty, CONSUMER_WARPS);
        barrier_publish();
    }
    __syncthreads();
}

// --- Host ---------------------------------------------------------------------------------------------------------

// Boxes [1, rows, CHUNK] of packed vectors. The driver's function is asked for at run time: nothing links to it.
inline cudaError_t make_map(CUtensorMap* map, const Pass& pass, const Side& side, int rows) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess) return error;
    if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    const auto encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(pass.width), static_cast<cuuint64_t>(side.padded),
                                static_cast<cuuint64_t>(pass.groups)};
    const cuuint64_t strides[] = {sizes[0] * 2, sizes[0] * sizes[1] * 2};
    const cuuint32_t box[] = {CHUNK, static_cast<cuuint32_t>(rows), 1};
    const cuuint32_t steps[] = {1, 1, 1};
    const auto type = pass.type == Type::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const CUresult result = encode(map, type, 3, const_cast<void*>(side.units), sizes, strides, box, steps,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Launches a block for each item of work, but no more than there are processors. Boxes have `own_rows` and
// `other_rows`. What kernels ask of `work` they find in constant memory, not in registers.
template <typename Shared, typename Some, typename Work>
cudaError_t launch(void (*kernel)(CUtensorMap, CUtensorMap, Some, Work), const Some& pass, const Work& work,
                   int own_rows, int other_rows, cudaStream_t stream) {
    static_assert(sizeof(Shared) <= MAX_SHARED, "more shared memory than a block may have");
    CUtensorMap own, other;
    cudaError_t error = make_map(&own, pass, pass.own, own_rows);
    if (error == cudaSuccess) error = make_map(&other, pass, pass.other, other_rows);
    int device = 0, processors = 1;
    if (error == cudaSuccess) error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    constexpr int BYTES = sizeof(Shared);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (error != cudaSuccess) return error;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(work.items < processors ? work.items : processors));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = BYTES;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, own, other, pass, work);
}

template <Type TYPE_, int WIDTH_>
struct Vectors {
    static constexpr Type TYPE = TYPE_;
    static constexpr int WIDTH = WIDTH_;
};

template <Type TYPE, typename Call>
cudaError_t with_width(int width, Call call) {
    if (width == 64) return call(Vectors<TYPE, 64>());
    if (width == 128) return call(Vectors<TYPE, 128>());
    return call(Vectors<TYPE, 256>());
}

// What `call` returns for the pass's type and width.
template <typename Call>
cudaError_t with_vectors(const Pass& pass, Call call) {
    if (pass.type == Type::bf16) return with_width<Type::bf16>(pass.width, call);
    return with_width<Type::fp16>(pass.width, call);
}

}  // namespace hdc::cuda::hopper
