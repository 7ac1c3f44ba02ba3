// Hopper's instructions that CUDA C++ has no words for, one function each: PTX ISA 8.0 for sm_90a.
//
// Three engines work beside the threads, and each has its rule for when memory and registers may be touched.
//
// - TMA fills shared memory and counts its bytes off a transaction barrier (mbarrier). A phase of the barrier ends
//   when all arrivals have come and all announced bytes as well; waiting is for the end of the phase of a parity,
//   and a fresh barrier counts as having ended one of parity 1. Memory written by the TMA is visible to whoever
//   waited; memory that threads or the tensor cores have finished reading may be overwritten by whoever waited.
// - wgmma multiplies for a warpgroup (four warps, the first a multiple of four) and returns before it is done.
//   `wgmma_fence` comes between other accesses to its registers and the instruction, `wgmma_commit` closes a group,
//   `wgmma_wait<n>` waits for all but the last n groups of this warp. Until then its accumulators and its operand in
//   registers must not be touched, nor the shared memory that it reads be overwritten.
// - `setmaxnreg` moves registers between warpgroups.
#ifndef HDC_HOPPER_PTX_CUH
#define HDC_HOPPER_PTX_CUH

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "packed.h"

namespace hdc::cuda::hopper {

// --- Shared memory ------------------------------------------------------------------------------------------------

// All of the block's: the swizzle of 128 bytes is a function of the address, so tiles begin at multiples of 1,024.
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(1024) unsigned char hopper_shared_memory[];
    return hopper_shared_memory;
}

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- Transaction barriers -----------------------------------------------------------------------------------------

__device__ inline void barrier_create(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes barriers just created known to the TMA; followed by a barrier of the threads.
__device__ inline void barrier_publish() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and announces bytes that the TMA will bring.
__device__ inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t ended;
    do {
        asm volatile(
            "{\n.reg .pred ended;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
            "selp.u32 %0, 1, 0, ended;\n}\n"
            : "=r"(ended)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (!ended);
}

// --- TMA ----------------------------------------------------------------------------------------------------------

__device__ inline void prefetch_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of a tensor of three dimensions, from the element at (x, y, z) on, x the fastest.
__device__ inline void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// Consecutive bytes, a multiple of 16 and aligned to 16 at both ends.
__device__ inline void load_bytes(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// --- Threads and registers ----------------------------------------------------------------------------------------

// Hardware barriers by number (0 is that of __syncthreads): wait for `threads` to come, or come without waiting.
__device__ inline void named_wait(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ inline void named_arrive(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

template <int REGISTERS>
__device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// --- Arithmetic ---------------------------------------------------------------------------------------------------

// Two numbers rounded to the nearest, the first in the lower half.
template <Type TYPE>
__device__ inline uint32_t round_pair(float low, float high) {
    uint32_t pair;
    if constexpr (TYPE == Type::bf16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    }
    return pair;
}

// --- wgmma --------------------------------------------------------------------------------------------------------

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int GROUPS>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

// Keeps the compiler, which sees no connection, from moving accesses to registers across a wait or a fence.
template <int COUNT>
__device__ inline void hold(float (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int COUNT>
__device__ inline void hold(uint32_t (&registers)[COUNT][4]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(registers[i][j])::"memory");
    }
}

// Keeps the compiler from knowing what a number is.
__device__ inline void hide(int& number) { asm volatile("" : "+r"(number)); }

#define HDC_32_REGISTERS                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HDC_64_REGISTERS                                                               \
    HDC_32_REGISTERS ", "                                                              \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HDC_8_OPERANDS(d, i)                                                                                     \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define HDC_32_OPERANDS(d, i) \
    HDC_8_OPERANDS(d, i), HDC_8_OPERANDS(d, i + 8), HDC_8_OPERANDS(d, i + 16), HDC_8_OPERANDS(d, i + 24)
#define HDC_64_OPERANDS(d) HDC_32_OPERANDS(d, 0), HDC_32_OPERANDS(d, 32)

// A, B and the flag are the operands after the accumulators. The ones leave signs, the zeros orders as they are.
#define HDC_MULTIPLY(N, TYPE, REGISTERS, A, B, ACCUMULATE, OPERANDS)                                            \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " ACCUMULATE                               \
                 ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " A    \
                 ", " B ", accumulate, 1, 1, 0, 0;\n}\n"                                                        \
                 : OPERANDS                                                                                     \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

// The same with A in registers, four operands, and the N dimensions of B contiguous (the last 1).
#define HDC_MULTIPLY_REGISTERS(N, TYPE, REGISTERS, A, B, ACCUMULATE, OPERANDS)                                  \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " ACCUMULATE                               \
                 ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " A    \
                 ", " B ", accumulate, 1, 1, 1;\n}\n"                                                           \
                 : OPERANDS                                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))

// d [64, N] (+)= A [64, 16] · B [16, N]ᵀ, by descriptors of A and B with the 16 dimensions contiguous in both.
template <Type TYPE, int N>
__device__ inline void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(N == 64 || N == 128, "a product of another width has no instruction here");
    if constexpr (TYPE == Type::bf16 && N == 64) {
        HDC_MULTIPLY("64", "bf16", HDC_32_REGISTERS, "%32", "%33", "%34", HDC_32_OPERANDS(d, 0));
    } else if constexpr (TYPE == Type::bf16) {
        HDC_MULTIPLY("128", "bf16", HDC_64_REGISTERS, "%64", "%65", "%66", HDC_64_OPERANDS(d));
    } else if constexpr (N == 64) {
        HDC_MULTIPLY("64", "f16", HDC_32_REGISTERS, "%32", "%33", "%34", HDC_32_OPERANDS(d, 0));
    } else {
        HDC_MULTIPLY("128", "f16", HDC_64_REGISTERS, "%64", "%65", "%66", HDC_64_OPERANDS(d));
    }
}

// d [64, N] (+)= A [64, 16] · B [16, N], A in registers and B by a descriptor with the N dimensions contiguous.
template <Type TYPE, int N>
__device__ inline void multiply_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(N == 64 || N == 128, "a product of another width has no instruction here");
    if constexpr (TYPE == Type::bf16 && N == 64) {
        HDC_MULTIPLY_REGISTERS("64", "bf16", HDC_32_REGISTERS, "{%32, %33, %34, %35}", "%36", "%37",
                               HDC_32_OPERANDS(d, 0));
    } else if constexpr (TYPE == Type::bf16) {
        HDC_MULTIPLY_REGISTERS("128", "bf16", HDC_64_REGISTERS, "{%64, %65, %66, %67}", "%68", "%69",
                               HDC_64_OPERANDS(d));
    } else if constexpr (N == 64) {
        HDC_MULTIPLY_REGISTERS("64", "f16", HDC_32_REGISTERS, "{%32, %33, %34, %35}", "%36", "%37",
                               HDC_32_OPERANDS(d, 0));
    } else {
        HDC_MULTIPLY_REGISTERS("128", "f16", HDC_64_REGISTERS, "{%64, %65, %66, %67}", "%68", "%69",
                               HDC_64_OPERANDS(d));
    }
}

#undef HDC_MULTIPLY
#undef HDC_MULTIPLY_REGISTERS
#undef HDC_64_OPERANDS
#undef HDC_32_OPERANDS
#undef HDC_8_OPERANDS
#undef HDC_64_REGISTERS
#undef HDC_32_REGISTERS

}  // namespace hdc::cuda::hopper

#endif  // HDC_HOPPER_PTX_CUH
