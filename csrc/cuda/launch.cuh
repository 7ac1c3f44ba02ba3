// How kernels of one argument are launched: through a function, so that the emulation in tests/ can take its place.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hdc::cuda {

// Nothing to do is no error.
template <typename Argument>
cudaError_t launch(
    void (*kernel)(Argument), int64_t blocks, int threads, const Argument& argument, cudaStream_t stream
) {
    if (blocks == 0) return cudaSuccess;
    void* arguments[] = {const_cast<Argument*>(&argument)};
    return cudaLaunchKernel(
        kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), arguments, 0, stream
    );
}

}  // namespace hdc::cuda
