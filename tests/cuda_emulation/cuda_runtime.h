// Just enough of CUDA for g++ to run the kernels of csrc/cuda on one CPU core: every thread of a block is a fiber.
//
// Blocks run one after the other. A fiber runs until it meets others: at a barrier, or in what a warp does together.
// HDC_EMULATION_ORDER=reverse lets the last block and the last thread run first: a race between barriers then shows as
// other results, and so does a sum in the order in which blocks end.
// Asynchronous copies are made as late as the program allows, when they are waited for, or with
// HDC_EMULATION_COPIES=early when they are asked for: what reads too soon or overwrites too soon shows the same way.
#pragma once

#include <setjmp.h>
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
enum { cudaSuccess, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101, cudaErrorNotSupported = 801 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor,
};

struct dim3 {
    unsigned x, y = 1, z = 1;
    dim3(unsigned x, unsigned y = 1) : x(x), y(y) {}
};
struct float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct uint2 {
    uint32_t x, y;
};

namespace emulated {

struct Barrier {
    int waiting = 0;
    int64_t round = 0;
};

struct Copy {
    void* to;
    const void* from;
};

struct Fiber {
    jmp_buf context;
    std::vector<char> stack = std::vector<char>(1 << 17);
    bool begun, done;
    int meetings;                           // of its warp so far
    std::vector<std::vector<Copy>> copies;  // groups not yet waited for, the last one open
};

struct Block {
    std::vector<Fiber> fibers;
    Barrier all, named[16], warps[32];
    int votes = 0;
    unsigned char exchanged[2][32][32][64];
    jmp_buf scheduler;
    std::function<void()> body;
};

inline Block block;
inline int processors = 132, shared_memory = 166'912;  // of the one device, an 8.0
inline dim3 grid{1}, threads{1}, block_index{0}, thread_index{0};
inline std::vector<uint32_t> dynamic;

inline Fiber& me() { return block.fibers[thread_index.x]; }

// Makes and jumps into contexts with _setjmp, as swapcontext would ask the kernel about signals every time.
inline void yield() {
    if (!_setjmp(me().context)) _longjmp(block.scheduler, 1);
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
    me().done = true;
    for (;;) yield();
}

inline void resume(Fiber& fiber) {
    if (_setjmp(block.scheduler)) return;
    if (fiber.begun) _longjmp(fiber.context, 1);
    fiber.begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.data();
    context.uc_stack.ss_size = fiber.stack.size();
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    setcontext(&context);
}

inline bool is_set(const char* name, const char* value) {
    const char* found = std::getenv(name);
    return found && !std::strcmp(found, value);
}

inline bool reversed() { return is_set("HDC_EMULATION_ORDER", "reverse"); }
inline bool early_copies = false;

inline void run_block() {
    const int count = int(threads.x);
    block.fibers.resize(count);
    for (Fiber& fiber : block.fibers) {
        fiber.begun = fiber.done = false;
        fiber.meetings = 0;
        fiber.copies.assign(1, {});
    }
    const bool reverse = reversed();
    early_copies = is_set("HDC_EMULATION_COPIES", "early");
    for (bool running = true; running;) {
        running = false;
        for (int n = 0; n < count; ++n) {
            const int i = reverse ? count - 1 - n : n;
            if (block.fibers[i].done) continue;
            running = true;
            thread_index.x = unsigned(i);
            resume(block.fibers[i]);
        }
    }
}

// Every lane's value, seen by every lane of the warp. Two buffers: a lane is at most one meeting ahead of another.
template <typename T>
struct Together {
    T of[32];
    explicit Together(const T& mine) {
        static_assert(sizeof(T) <= 64);
        const unsigned warp = thread_index.x / 32, lane = thread_index.x % 32;
        auto& exchanged = block.exchanged[me().meetings++ % 2][warp];
        std::memcpy(exchanged[lane], &mine, sizeof(T));
        wait(block.warps[warp], 32);
        for (int i = 0; i < 32; ++i) std::memcpy(&of[i], exchanged[i], sizeof(T));
    }
};

}  // namespace emulated

inline dim3 &threadIdx = emulated::thread_index, &blockIdx = emulated::block_index, &gridDim = emulated::grid;

inline void __syncthreads() { emulated::wait(emulated::block.all, int(emulated::threads.x)); }
inline int __syncthreads_count(int vote) {
    int& votes = emulated::block.votes;
    votes += vote != 0;
    __syncthreads();
    const int count = votes;
    __syncthreads();
    votes -= vote != 0;  // before whoever is ahead can meet the others again
    return count;
}
inline void __threadfence() {}
inline unsigned atomicMax(unsigned* to, unsigned value) { return std::exchange(*to, std::max(*to, value)); }
inline unsigned atomicInc(unsigned* to, unsigned most) { return std::exchange(*to, *to >= most ? 0 : *to + 1); }
template <typename T>
T __ldcg(const T* from) { return *from; }
inline float __int_as_float(int bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float __uint_as_float(uint32_t bits) { return __int_as_float(int(bits)); }
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
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
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device != 0) return cudaErrorInvalidDevice;
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = emulated::processors; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulated::shared_memory; break;
        case cudaDevAttrComputeCapabilityMajor: *value = 8; break;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    }
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "no error";
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
    const unsigned blocks = grid.x * grid.y;
    for (unsigned n = 0; n < blocks; ++n) {
        const unsigned b = emulated::reversed() ? blocks - 1 - n : n;
        emulated::block_index = {b % grid.x, b / grid.x};
        emulated::dynamic.assign(shared / 4 + 8, 0x7fffffffu);  // NaN
        emulated::run_block();
    }
    return 0;
}
