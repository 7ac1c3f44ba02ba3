// What csrc/cuda/hopper_tiles.cuh takes from the driver: tensor maps, and the function that makes them.
#pragma once

#include <cuda_runtime.h>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct CUtensorMap {  // of three dimensions and 16-bit elements
    const char* data;
    uint64_t sizes[3], strides[3];  // elements, bytes
    uint32_t box[3];
};

inline CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType, uint32_t rank, void* data, const uint64_t* sizes,
                             const uint64_t* strides, const uint32_t* box, const uint32_t*, CUtensorMapInterleave,
                             CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    // What the driver refuses: unaligned addresses and strides, boxes of more than 256, rows beyond the swizzle.
    const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[0] % 16 == 0 && strides[1] % 16 == 0;
    if (rank != 3 || !aligned || box[0] * 2 > 128 || box[1] > 256 || box[2] > 256) return CUDA_ERROR_INVALID_VALUE;
    *map = {static_cast<const char*>(data),
            {sizes[0], sizes[1], sizes[2]},
            {2, strides[0], strides[1]},
            {box[0], box[1], box[2]}};
    return CUDA_SUCCESS;
}
