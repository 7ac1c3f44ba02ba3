// hopper_logsumexp.cu on emulated threads, behind C functions.
#include "hopper_ptx.h"

#include "hopper_logsumexp.cu"

extern "C" {
// `plan` is [2]: splits and column parts.
void logsumexp_plan(hdc::cuda::LogsumexpPass* pass, bool columns, int processors) {
    const hdc::cuda::Plan plan = hdc::cuda::hopper_logsumexp_plan(*pass, columns, processors);
    pass->splits = plan.splits;
    pass->column_parts = plan.column_parts;
}
int logsumexp(const hdc::cuda::LogsumexpPass* pass, int processors) {
    emulated::processors = processors;
    return hdc::cuda::hopper_logsumexp(*pass, nullptr);
}
}
