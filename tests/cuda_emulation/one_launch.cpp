// A stand-in for small.cu: the test decides whether one launch takes a call, and sees by the total that it was asked to.
#include "packed.h"

namespace hdc::cuda {

bool takes_it = false;

bool small_fits(const HdcCudaCall&, const HdcCudaProblem*) { return takes_it; }
int64_t small_workspace(const HdcCudaCall&, const HdcCudaProblem*) { return 7; }
cudaError_t small_contrast(const HdcCudaCall& call, const HdcCudaProblem*, cudaStream_t) {
    *call.total = 77;
    return cudaSuccess;
}

}  // namespace hdc::cuda

extern "C" void take_in_one_launch(int takes) { hdc::cuda::takes_it = takes; }
