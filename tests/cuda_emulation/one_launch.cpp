// A stand-in for small.cu: the test decides whether one launch takes a call, and sees by results what it was given.
#include <algorithm>

#include "packed.h"

namespace hdc::cuda {

bool takes_it = false;
constexpr int64_t ROOM = 700;  // bytes

bool small_fits(const HdcCudaCall&, const HdcCudaProblem*) { return takes_it; }
int64_t small_workspace(const HdcCudaCall&, const HdcCudaProblem*, int) { return ROOM; }

// Fills everything that it finds, the workspace first.
cudaError_t small_contrast(const HdcCudaCall& call, const HdcCudaProblem* problems, int, cudaStream_t) {
    if (*call.ticket != 0) return cudaErrorInvalidValue;
    std::fill_n(static_cast<unsigned char*>(call.workspace), ROOM, 255);
    int64_t rows = 0;
    for (int64_t k = 0; k < call.problems; ++k) rows += problems[k].groups * problems[k].rows;
    if (call.task != HDC_CUDA_BACKWARD) {
        *call.total = 77;
        if (call.means) std::fill_n(call.means, 2 * call.problems, 78.0f);
        if (call.terms) std::fill_n(call.terms, rows, 79.0f);
        if (call.hits) std::fill_n(call.hits, rows, 1);
        if (call.lse) std::fill_n(call.lse, (1 + call.symmetric) * rows, 80.0);
    }
    if (call.task != HDC_CUDA_FORWARD) *call.d_temperature = 81;
    return cudaSuccess;
}

}  // namespace hdc::cuda

extern "C" void take_in_one_launch(int takes) { hdc::cuda::takes_it = takes; }
