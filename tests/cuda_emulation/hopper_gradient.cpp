// hopper_gradient.cu on emulated threads, behind C functions.
#include "hopper_ptx.h"

#include "hopper_gradient.cu"

extern "C" {
void gradient_plan(hdc::cuda::GradientPass* pass, int processors) {
    pass->splits = hdc::cuda::hopper_gradient_plan(*pass, processors).splits;
}
int gradient(const hdc::cuda::GradientPass* pass, int processors) {
    emulated::processors = processors;
    return hdc::cuda::hopper_gradient(*pass, nullptr);
}
}
