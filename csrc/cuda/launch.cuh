// How kernels of one argument are launched: through a function, so that the emulation in tests/ can take its place.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hdc::cuda {

// A grid of blocks × splits, each with so many bytes of dynamic shared memory. Nothing to do is no error.
template <typename Argument>
cudaError_t launch(
    void (*kernel)(Argument), int64_t blocks, int threads, const Argument& argument, cudaStream_t stream,
    int64_t splits = 1, int shared = 0
) {
    if (blocks == 0) return cudaSuccess;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
    void* arguments[] = {const_cast<Argument*>(&argument)};
    return cudaLaunchKernel(
        kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(splits)),
        dim3(static_cast<unsigned>(threads)), arguments, static_cast<size_t>(shared), stream
    );
}

}  // namespace hdc::cuda
