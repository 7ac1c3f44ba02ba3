// The plain C interface of the CPU kernels: pointers, sizes and strides. No torch, no Python.
//
// What is computed is defined in hdc_kernels/backends/__init__.py; how, in contrast_kernel.h.
#pragma once

#include <cstdint>

extern "C" {

enum HdcTask : int64_t { HDC_FORWARD = 0, HDC_BACKWARD = 1, HDC_STEP = 2 };

// What a row becomes: `Function` in hdc_kernels/backends/__init__.py.
enum HdcFunction : int64_t { HDC_INFO_NCE = 0, HDC_LOGSUMEXP = 1, HDC_SOFTPLUS = 2, HDC_TILTED = 3 };

// What the embeddings are stored in. float64 is computed in float64, everything else in float32.
enum HdcDtype : int64_t { HDC_FLOAT64 = 0, HDC_FLOAT32 = 1, HDC_BFLOAT16 = 2, HDC_FLOAT16 = 3 };

struct HdcMatrix {  // [groups, rows, width]; strides in elements
    void* data;
    int64_t group_stride, row_stride, column_stride;
};

struct HdcProblem {  // one pair of embeddings
    // dx and dy are written by HDC_BACKWARD in the dtype of x and y, by HDC_STEP in what it computes in. Where
    // dy.data is null it is not computed.
    HdcMatrix x, y, dx, dy;
    int64_t groups, rows, columns, width;  // x is [groups, rows, width], y [groups, columns, width]
    double weight;                         // of every term of this pair in the total
    const int64_t *x_ids, *y_ids;          // [groups, rows] and [groups, columns], or both null
    // Single entries that do not count, or null; for one group only. Those of row i are the columns, in ascending
    // order, from left_out[left_out_starts[i]] up to left_out[left_out_starts[i + 1]].
    const int64_t *left_out_starts, *left_out;
};

// T = Σ groups·rows; void* points to the type that the embeddings are computed in. Terms, hits and lse are all null
// where FORWARD or STEP is called for the total alone.
struct HdcCall {
    int64_t task, dtype, normalize, symmetric, threads, problems;
    int64_t bfloat16;  // whether products may round to it; only for float32 and bfloat16, see hdc_has_bfloat16
    int64_t function, diagonal, same;  // `Mask`: whether (i, i) counts; whether equal ids do, rather than others
    double temperature;
    double beta;           // TILTED only
    void* total;           // [1]: Σ weight·term                     written by FORWARD, STEP
    void* means;           // [2, problems] or null: of terms, and share of hits, both of which it then needs; as total
    void* terms;           // [T]                                    written by FORWARD, STEP
    uint8_t* hits;         // [T]: the positive beats all negatives  written by FORWARD, STEP
    int64_t* ranks;        // [T] or null: how many columns the diagonal does not beat, as hits; not where it is one
    double* lse;           // [T], symmetric and TILTED [2, T]       written by FORWARD, STEP; read by BACKWARD
    const void* upstream;  // [T]                                    read by BACKWARD
    void* d_temperature;   // [1]                                    written by BACKWARD, STEP
    const void* bias;      // [T], SOFTPLUS only
    void* d_bias;          // [T], SOFTPLUS only                     written by BACKWARD, STEP
};

// 0, or 1 if there is not enough memory for the scratch; nothing is then written.
int hdc_contrast(const HdcCall* call, const HdcProblem* problems);

// sizeof(HdcCall) + sizeof(HdcProblem): whoever packs other sizes was written for another version.
int64_t hdc_interface_size();

// The instruction set that hdc_contrast runs on: "avx512", "avx2" or "portable".
const char* hdc_instruction_set();

// Whether the CPU multiplies bfloat16; HdcCall::bfloat16 must be 0 where it does not.
int hdc_has_bfloat16();

}  // extern "C"
