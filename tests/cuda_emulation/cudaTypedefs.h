// The type of the driver's function that makes tensor maps, and where it comes from.
#pragma once

#include <cuda.h>

using PFN_cuTensorMapEncodeTiled_v12000 = decltype(&encode_tiled);
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };

inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* found) {
    *entry = reinterpret_cast<void*>(&encode_tiled);
    *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
