// What the kernels share that do nothing but arithmetic on rows, a thread a row.
#pragma once

#include "packed.h"

namespace hdc::cuda {

constexpr int THREADS = 256;
static_assert(ROW_MULTIPLE % THREADS == 0, "a block has rows of one problem");

// Over all threads, in the same order every time; every thread gets it.
template <typename Number, typename Operation>
__device__ Number over_block(Number value, Operation operation) {
    __shared__ Number values[THREADS];
    const int thread = threadIdx.x;
    values[thread] = value;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (thread < half) values[thread] = operation(values[thread], values[thread + half]);
        __syncthreads();
    }
    return values[0];
}

}  // namespace hdc::cuda
