// Just enough of CUDA for g++ to run the kernels of csrc/cuda on one CPU core: every thread of a block is a fiber.
//
// Blocks run one after the other. A fiber runs until it meets others: at a barrier, or in what a warp does together.
// HDC_EMULATION_ORDER=reverse lets the last thread run first: a race between barriers then shows as other results.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0;
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor,
};

struct dim3 {
    unsigned x, y = 1, z = 1;
    dim3(unsigned x) : x(x) {}
};
struct float2 {
    float x, y;
};

namespace emulated {

struct Barrier {
    int waiting = 0;
    int64_t round = 0;
};

struct Block {
    std::vector<ucontext_t> fibers;
    std::vector<char> stacks;
    std::vector<bool> done;
    Barrier all, named[16], warps[32];
    unsigned char exchanged[32][32][64];
    ucontext_t scheduler;
    std::function<void()> body;
};

inline Block block;
inline dim3 grid{1}, threads{1}, block_index{0}, thread_index{0};
inline std::vector<uint32_t> dynamic;

inline void yield() {
    const unsigned me = thread_index.x;
    swapcontext(&block.fibers[me], &block.scheduler);
}

inline void wait(Barrier& barrier, int count) {
    const int64_t round = barrier.round;
    if (++barrier.waiting == count) {
        barrier.waiting = 0;
        ++barrier.round;
    }
    while (barrier.round == round) yield();
}

inline void enter() {
    block.body();
    block.done[thread_index.x] = true;
    for (;;) yield();
}

inline void run_block() {
    constexpr size_t STACK = 1 << 17;
    const int count = int(threads.x);
    block.fibers.resize(count);
    block.stacks.resize(STACK * count);
    block.done.assign(count, false);
    for (int i = 0; i < count; ++i) {
        getcontext(&block.fibers[i]);
        block.fibers[i].uc_stack.ss_sp = block.stacks.data() + STACK * i;
        block.fibers[i].uc_stack.ss_size = STACK;
        block.fibers[i].uc_link = nullptr;
        makecontext(&block.fibers[i], enter, 0);
    }
    const char* order = std::getenv("HDC_EMULATION_ORDER");
    const bool reverse = order && !std::strcmp(order, "reverse");
    for (bool running = true; running;) {
        running = false;
        for (int n = 0; n < count; ++n) {
            const int i = reverse ? count - 1 - n : n;
            if (block.done[i]) continue;
            running = true;
            thread_index.x = unsigned(i);
            swapcontext(&block.scheduler, &block.fibers[i]);
        }
    }
}

// Every lane's value, seen by every lane of the warp.
template <typename T>
struct Together {
    T of[32];
    explicit Together(const T& mine) {
        static_assert(sizeof(T) <= 64);
        const unsigned warp = thread_index.x / 32, lane = thread_index.x % 32;
        std::memcpy(block.exchanged[warp][lane], &mine, sizeof(T));
        wait(block.warps[warp], 32);
        for (int i = 0; i < 32; ++i) std::memcpy(&of[i], block.exchanged[warp][i], sizeof(T));
        wait(block.warps[warp], 32);
    }
};

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define gridDim emulated::grid

inline void __syncthreads() { emulated::wait(emulated::block.all, int(emulated::threads.x)); }
inline void __threadfence() {}
inline unsigned atomicMax(unsigned* to, unsigned value) { return std::exchange(*to, std::max(*to, value)); }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return (*to += value) - value; }
template <typename T>
T __ldcg(const T* from) { return *from; }
inline float __int_as_float(int bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) { return emulated::Together<T>(value).of[source]; }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    const int lane = int(threadIdx.x % 32);
    return emulated::Together<T>(value).of[lane ^ mask];
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int distance) {
    const int lane = int(threadIdx.x % 32);
    const emulated::Together<T> all(value);
    return all.of[lane + distance < 32 ? lane + distance : lane];
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) { return 0; }
// One device, an 8.0 with 132 processors.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device != 0) return 101;  // cudaErrorInvalidDevice
    *value = attribute == cudaDevAttrMultiProcessorCount      ? 132
             : attribute == cudaDevAttrComputeCapabilityMajor ? 8
                                                              : 0;
    return 0;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? 0 : 101; }
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == 101 ? "invalid device ordinal" : "no error";
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
    std::memset(to, value, bytes);
    return 0;
}
template <typename Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 threads, void** packed, size_t shared, cudaStream_t) {
    emulated::grid = grid;
    emulated::threads = threads;
    const Arguments arguments = *static_cast<Arguments*>(packed[0]);
    emulated::block.body = [&] { kernel(arguments); };
    for (unsigned b = 0; b < grid.x; ++b) {
        emulated::block_index.x = b;
        emulated::dynamic.assign(shared / 4 + 8, 0x7fffffffu);  // NaN
        emulated::run_block();
    }
    return 0;
}
