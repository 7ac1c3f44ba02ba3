// small.cu on emulated warps, behind C functions.
#include "warp.h"

#include "small.cu"

extern "C" {
int fits(const HdcCudaCall* call, const HdcCudaProblem* problems, int capability) {
    return hdc::cuda::small_fits(*call, problems, capability);
}
int64_t workspace(const HdcCudaCall* call, const HdcCudaProblem* problems) {
    return hdc::cuda::small_workspace(*call, problems);
}
int contrast(const HdcCudaCall* call, const HdcCudaProblem* problems) {
    return hdc::cuda::small_contrast(*call, problems, nullptr);
}
}
