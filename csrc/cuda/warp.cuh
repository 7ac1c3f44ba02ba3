// What a warp does together: tensor-core products, and how their factors come into shared memory and out of it
// (sm_80 on).
//
// Of lane 4g + t, a 16 × 16 product by 16 × 8 of 16 bits holds
//     a[0..3]   (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with its right neighbour
//     b[0..1]   (2t, g), (2t + 8, g), each with the neighbour below
//     c[0..3]   (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// and a 16 × 8 product by 8 × 8 of TF32
//     a[0..3]   (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//     b[0..1]   (t, g), (t + 4, g)
//     c[0..3]   the same
#ifndef HDC_CUDA_WARP  // not a pragma: the emulation in tests/ brings its own
#define HDC_CUDA_WARP

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace hdc::cuda {

// Four 8 × 8 matrices of 16 bits; lane 8m + r gives the address of row r of matrix m. A lane gets (g, 2t), (g, 2t + 1).
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}

// The same of the transposed matrices: (2t, g), (2t + 1, g).
__device__ inline void load_transposed(uint32_t (&to)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}

__device__ inline void multiply(__nv_bfloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void multiply(__half, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

struct Tf32 {};  // float32 rounded by `round_to_tf32`

__device__ inline void multiply(Tf32, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline float round_to_tf32(float x) {  // 11 bits, ties away from 0
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
}

__device__ inline float power_of_two(float x) {  // 2^x, to 2 units in the last place
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Begins to copy 16 bytes to shared memory; both addresses are multiples of 16.
__device__ inline void copy_async(void* to, const void* from) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(__cvta_generic_to_global(from))
                 : "memory");
}

// Ends a group of this thread's copies, perhaps of none.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the last `GROUPS` groups of this thread's copies.
template <int GROUPS>
__device__ inline void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory"); }

// Waits for the 32·warps threads that use the barrier `id`.
__device__ inline void wait_for(int id, int warps) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(32 * warps) : "memory"); }

template <typename T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

__device__ inline unsigned char* dynamic_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

}  // namespace hdc::cuda

#endif
