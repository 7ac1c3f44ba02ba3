// small.cu on emulated warps, behind C functions.
#include "warp.h"

#include "small.cu"

extern "C" {
void set_device(int processors, int shared_memory) {
    emulated::processors = processors;
    emulated::shared_memory = shared_memory;
}
bool fits(const HdcCudaCall* call, const HdcCudaProblem* problems) { return hdc::cuda::small_fits(*call, problems); }
int64_t static_bytes() { return sizeof(hdc::cuda::small::Numbers); }
// Writes both windows, whether the sums lie behind them, and the bytes of it all.
void room(int rows, int columns, int depth, int element_bytes, int64_t most, int64_t* to) {
    const auto found = hdc::cuda::small::room_of(rows, columns, depth, element_bytes, most);
    to[0] = found.windows[0];
    to[1] = found.windows[1];
    to[2] = found.apart;
    to[3] = found.bytes;
}
int64_t workspace(const HdcCudaCall* call, const HdcCudaProblem* problems) {
    return hdc::cuda::small_workspace(*call, problems, emulated::processors);
}
int contrast(const HdcCudaCall* call, const HdcCudaProblem* problems) {
    return hdc::cuda::small_contrast(*call, problems, emulated::processors, nullptr);
}
}
