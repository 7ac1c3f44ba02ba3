// The plain C interface of the CUDA kernels: pointers, sizes, strides and a stream. No torch, no Python.
//
// What is computed is defined in hdc_kernels/backends/__init__.py; how, in packed.h; contrast.cu is where to begin.
// Nothing here allocates, synchronises or reads device memory on the host, so a CUDA graph may capture every call.
#pragma once

#include <cstdint>

extern "C" {

enum HdcCudaTask : int64_t { HDC_CUDA_FORWARD = 0, HDC_CUDA_BACKWARD = 1, HDC_CUDA_STEP = 2 };

// What a row becomes: `Function` in hdc_kernels/backends/__init__.py.
enum HdcCudaFunction : int64_t { HDC_CUDA_INFO_NCE = 0, HDC_CUDA_LOGSUMEXP = 1 };

// What the embeddings are stored in, and how they are multiplied. Sums are float32 in every case.
enum HdcCudaDtype : int64_t {
    HDC_CUDA_FLOAT32 = 0,   // products exact to float32
    HDC_CUDA_TF32 = 1,      // stored in float32, factors of products rounded to TF32
    HDC_CUDA_BFLOAT16 = 2,  // 16-bit factors
    HDC_CUDA_FLOAT16 = 3,
};

struct HdcCudaMatrix {  // [groups, rows, width]; strides in elements, that of the width is 1
    void* data;
    int64_t group_stride, row_stride;
};

struct HdcCudaProblem {  // one pair of embeddings
    // dx and dy are written by BACKWARD in the dtype of x and y, by STEP in float32.
    HdcCudaMatrix x, y, dx, dy;
    int64_t groups, rows, columns, width;  // x is [groups, rows, width], y [groups, columns, width]
    double weight;                         // of every term of this pair in the total
    const int64_t *x_ids, *y_ids;          // [groups, rows] and [groups, columns], or both null
};

struct HdcCudaCall {  // T = Σ groups·rows
    int64_t task, dtype, function, normalize, symmetric, problems;
    int64_t diagonal, same;  // `Mask`: whether (i, i) counts; whether equal ids do, rather than others
    int64_t device;
    double temperature;                // read where the next is null
    const float* device_temperature;  // [1]
    float* total;                      // [1]: Σ weight·term                     written by FORWARD, STEP
    float* means;                      // [2, problems]: of terms, share of hits; or null. Only in one launch, as above
    float* terms;                      // [T]                                    written by FORWARD, STEP
    uint8_t* hits;                     // [T]: the positive beats all negatives  written by FORWARD, STEP
    double* lse;                       // [T], symmetric [2, T]: of negatives    written by FORWARD, STEP; read by BACKWARD
    const float* upstream;             // [T]                                    read by BACKWARD
    float* d_temperature;              // [1]                                    written by BACKWARD, STEP
    unsigned* ticket;                  // [1]: 0, as one launch leaves it; no two at the same time share it
    void* workspace;                   // of hdc_cuda_needs' bytes, aligned to 256
    void* stream;                      // a cudaStream_t
};

struct HdcCudaNeeds {
    int64_t workspace;  // bytes of device memory beside the call's arguments
    // Whether one launch takes the call. It alone uses means and ticket, and what FORWARD and STEP write by row, terms,
    // hits and lse, may then be null.
    int64_t one_launch;
};

// What the call needs. Its pointers to data are not read; which dy and ids are null counts.
HdcCudaNeeds hdc_cuda_needs(const HdcCudaCall* call, const HdcCudaProblem* problems);

// Launches; 0, or the cudaError_t that kept it from doing so. Leaves `device` the current one of its thread.
int hdc_cuda_contrast(const HdcCudaCall* call, const HdcCudaProblem* problems);

// What an error means.
const char* hdc_cuda_error(int error);

// Whether the library holds code that the device of this compute capability (90 is 9.0) runs.
int hdc_cuda_runs_on(int capability);

// sizeof(HdcCudaCall) + sizeof(HdcCudaProblem): whoever packs other sizes was written for another version.
int64_t hdc_cuda_interface_size();

}  // extern "C"
