// What the kernels share: packed embeddings, and the two passes over all pairs of them.
//
//     forward:   pack → logsumexp (→ logsumexp of the columns) → terms
//     backward:  pack → weights → gradient of x → gradient of y → unpack
//
// `pack` makes unit vectors of raw embeddings, in padded contiguous memory. The two passes in the middle are all
// the quadratic work: each is one product (a gradient two) and one exponential (two, where both terms are given)
// of every pair of an "own" and an "other" vector. They know neither losses nor positives: they sum over every
// column that is not left out. `portable_*` run on anything from sm_80 on, `hopper_*` on sm_90a for the types and
// widths that `hopper_fits` names; both read and write the same memory, so `contrast.cu` chooses freely.
//
// Nothing is added atomically. What several blocks add up is kept in parts, [parts, ...], that the next kernel adds
// in order: results are the same bit by bit from run to run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "contrast.h"

namespace hdc::cuda {

// How unit vectors are stored and multiplied. fp32 and tf32 are stored in float32, tf32 already rounded.
enum class Type { fp32 = HDC_CUDA_FLOAT32, tf32 = HDC_CUDA_TF32, bf16 = HDC_CUDA_BFLOAT16, fp16 = HDC_CUDA_FLOAT16 };

constexpr int64_t ROW_MULTIPLE = 256;  // rows of packed vectors: no kernel's tile of them has a tail

constexpr float LOG2_E = 1.4426950408889634f;
constexpr double LN_2 = 0.69314718055994531;

// The width of packed vectors: 64, 128, 256 or 512 dimensions, the last ones 0.
constexpr int padded_width(int64_t width) {
    return width <= 64 ? 64 : width <= 128 ? 128 : width <= 256 ? 256 : 512;
}

__host__ __device__ constexpr int64_t padded_rows(int64_t rows) {
    return (rows + ROW_MULTIPLE - 1) / ROW_MULTIPLE * ROW_MULTIPLE;
}

struct Temperature {  // a number, or in device memory where that is not null: the host never reads it
    float value;
    const float* device;
};

#ifdef __CUDACC__
__device__ inline float inverse_temperature(Temperature temperature) {
    return 1.0f / (temperature.device ? *temperature.device : temperature.value);
}
#endif

// One side of `groups` problems. Rows from `count` on are 0, and so are dimensions beyond the embeddings'.
struct Side {
    const void* units;   // [groups, padded, width] of the pass's type; aligned to 256 bytes
    int64_t count;       // vectors of a problem, without padding
    int64_t padded;      // padded_rows(count)
    const int64_t* ids;  // [groups, count], or null in both sides
};

// Pairs of embeddings of the same rows, columns and padded width: to every kernel one problem, of the groups of the
// first pair, then of the second, …
struct Batch {
    struct Pair {
        HdcCudaMatrix x, y, dx, dy;
        int64_t begin;  // of its groups among those of the batch
        int width;
        float weight;
    };
    static constexpr int MOST_PAIRS = 24;  // in the 4 KB that a kernel's arguments may take

    int64_t groups, rows, columns;
    int width;                     // padded_width of every pair's
    const int64_t *x_ids, *y_ids;  // null where there are several pairs
    int pairs;
    Pair of[MOST_PAIRS];

#ifdef __CUDACC__
    __device__ const Pair& pair_of(int64_t group) const {
        int pair = 0;
        while (pair + 1 < pairs && group >= of[pair + 1].begin) ++pair;
        return of[pair];
    }
#endif
};

struct Pass {  // what the two passes have in common
    Type type;
    int width;  // padded_width
    int64_t groups;
    Side own, other;
    Temperature temperature;
    bool diagonal;  // whether the pair (i, i) counts; where it does not, it is left out of every sum
    bool same;      // with ids: whether pairs of equal ids count, rather than all others. See `counts`.
};

// --- Packing --------------------------------------------------------------------------------------------------------

struct Packing {
    Batch batch;  // x and y are read
    Temperature temperature;
    bool normalize;
    void *x_units, *y_units;  // [groups, padded_rows, padded_width], as in `Side`
    float* positive;          // [groups, rows]: logits (i, i) in float32, or null
};

cudaError_t pack(const Packing& packing, Type type, cudaStream_t stream);

// --- Forward ------------------------------------------------------------------------------------------------------

// Cosines are bounded, so one shift c serves every row *and column* in Σ exp(logit − c), which neither overflows nor
// vanishes: logits lie within ±1/τ, and c is as small as the overflow of a sum over `columns` allows. In base 2 (a
// logit is cosine·k with k = log2(e)/τ): Σ exp2(cosine·k − c). Where that cannot be (τ < 0.0122, or embeddings that
// are not normalised) it is NaN, and a running maximum takes its place. The device decides, as only it knows τ;
// every kernel must call this very function. `longest` is the larger count of the two sides.
#ifdef __CUDACC__
__device__ inline float fixed_shift(Temperature temperature, bool bounded, int64_t longest) {
    constexpr float LARGEST = 87.0f;  // exp(88.7) overflows in float32, exp(−87.3) is its smallest normal number
    // Rounded to 8 bits, a unit vector is up to 0.4 % longer.
    const float scale = 1.01f * inverse_temperature(temperature);
    const float shift = fmaxf(0.0f, scale + logf(static_cast<float>(longest)) - LARGEST);
    return bounded && scale + shift < LARGEST ? shift * LOG2_E : __int_as_float(0x7fffffff);
}
#endif

// Row sums of exponentials. A block owns some rows of `own` and walks over one of `splits` parts of `other`.
// With padding of `own` nothing is summed down the columns (a shift of +∞ sees to it); what is stored for padded
// rows does not matter. With a running maximum, a row of which nothing counts has highest −∞ and total 0.
struct LogsumexpPass : Pass {
    bool bounded;  // whether |logit| ≤ 1/τ, see `fixed_shift`
    // True for a pass for the columns, after one that had `column_total`: nothing is left to do, and the kernel
    // returns at once, if `fixed_shift` is a number.
    bool only_running;
    int64_t splits;        // from the plan
    int64_t column_parts;  // from the plan
    float* highest;   // [splits, groups, own.padded]: the largest cosine that counts, −∞ if none does
    float* total;     // [splits, groups, own.padded]: Σ exp2(cosine·k − shift), or Σ exp2((cosine − highest)·k)
    float* diagonal_cosine;  // [groups, own.padded]: cosine (i, i) of the same product, for every i < other.count; or null
    // [column_parts, groups, other.padded]: Σ exp2(cosine·k − shift) down the columns, or null. Not written where
    // fixed_shift is NaN.
    float* column_total;
};

struct Plan {
    int64_t splits;        // 1 where there are blocks enough to fill the device
    int64_t column_parts;  // of a logsumexp; 0 if the columns' sums do not come out of this pass
};

// `pass` has everything but what comes from the plan, and pointers. `processors` is the number of SMs.
Plan portable_logsumexp_plan(const LogsumexpPass& pass, bool columns, int processors);
cudaError_t portable_logsumexp(const LogsumexpPass& pass, cudaStream_t stream);

// Σ exp of the rows, or columns, as a `LogsumexpPass` leaves them.
struct Exponentials {
    const float *highest, *total;  // [splits, groups, padded]
    int64_t splits;
};

// From these to logsumexps and terms; see HdcCudaCall.
struct Terms {
    Batch batch;  // its sizes and weights are read
    Temperature temperature;
    bool bounded;
    Exponentials of_rows, of_columns;  // the latter of 0 splits if a term has no part of its column's
    const float* column_total;         // of the rows' pass, or null
    int64_t column_parts;
    const float *positive, *diagonal_cosine;  // as `pack` and the rows' pass left them; null but for "info_nce"
    float* terms;                             // these four [groups, rows]
    uint8_t* hits;
    double *lse, *column_lse;
    float* total;  // [terms_parts]: what adds up to Σ weight·term
};

int64_t terms_parts(const Batch& batch);
cudaError_t terms(const Terms& terms, cudaStream_t stream);

// --- Backward -----------------------------------------------------------------------------------------------------

// The term of a row i of a side: coefficient share_i · exp2(cosine_ij·k − shift_i) for every j that counts.
struct Term {
    const float* share;  // [groups, padded]; null if the side has no term. 0 in padding
    const float* shift;  // [groups, padded]; +∞ in padding and where nothing counts: exponentials are then 0
};

// What upstream gradients make of logsumexps. The shares of "info_nce" are its positives' weights as well.
struct Weights {
    Batch batch;                          // its sizes are read, and its weights where the next is null
    const float* upstream;                // [groups, rows], or null
    const float* positive;                // as `pack` left it; null but for "info_nce"
    const double *lse, *column_lse;       // [groups, rows]; the latter null if columns have no terms
    float *share, *shift;                 // [groups, padded_rows(rows)]: the rows' `Term`
    float *column_share, *column_shift;   // the columns', which are as many
    float* largest;                       // [groups], see `GradientPass`
};

cudaError_t weights(const Weights& weights, cudaStream_t stream);

// gradient_i = Σ_j (own.share_i·exp2(cosine_ij·k − own.shift_i) + other.share_j·exp2(cosine_ij·k − other.shift_j))
// · other_j for every own vector i, over every j that counts; without 1/τ, which `unpack` brings. At least one of
// the two terms is given.
//
// What is rounded to the pass's type before the second product is
//     own term only:   gain·exp2(…)                                  and the sum is multiplied by own.share_i/gain
//     otherwise:       gain·(own.share_i·exp2(…) + …)/unit            and the sum by unit/gain
// with unit = max(largest[group], 1e-30) and gain = probability_gain(type), so that probabilities do not vanish in
// 16 bits.
struct GradientPass : Pass {
    Term own_term, other_term;
    const float* largest;  // [groups]: the largest |share| of a problem, of both terms
    int64_t splits;        // from the plan
    float* gradient;       // [splits, groups, own.padded, width]; padding of `own` need not be written
};

Plan portable_gradient_plan(const GradientPass& pass, int processors);
cudaError_t portable_gradient(const GradientPass& pass, cudaStream_t stream);

// float16 has no normal number below 6e-5, where most of a softmax over 65,536 columns lies; 2**14 lifts it by 14
// bits and leaves a factor of 4 to the largest number. The others have enough range.
constexpr float probability_gain(Type type) { return type == Type::fp16 ? 16384.0f : 1.0f; }

#ifdef __CUDACC__
// Whether the pair counts, of ids that are not null; the diagonal apart.
__device__ inline bool counts(int64_t own_id, int64_t other_id, bool same) { return (own_id == other_id) == same; }
#endif

// --- Unpacking ------------------------------------------------------------------------------------------------------

struct Unpacking {
    Batch batch;  // x and y are read, dx and dy written
    Temperature temperature;
    bool normalize;
    const float *x_gradient, *y_gradient;  // [splits, groups, padded_rows, padded_width] of each pass
    int64_t x_splits, y_splits;
    const float *weight, *column_weight;  // [groups, padded_rows(rows)]: of the positives, or null
    float* d_temperature;  // [unpack_parts]: what adds up to the temperature's gradient
};

int64_t unpack_parts(const Batch& batch);
// `type` is that of the embeddings; gradients are float32 where `wide`.
cudaError_t unpack(const Unpacking& unpacking, Type type, bool wide, cudaStream_t stream);

// --- Hopper: hopper_*.cu, compiled for sm_90a alone -----------------------------------------------------------------

// Whether hopper_* take the pass, on a device of compute capability 9.0.
bool hopper_fits(const Pass& pass);
Plan hopper_logsumexp_plan(const LogsumexpPass& pass, bool columns, int processors);
cudaError_t hopper_logsumexp(const LogsumexpPass& pass, cudaStream_t stream);
Plan hopper_gradient_plan(const GradientPass& pass, int processors);
cudaError_t hopper_gradient(const GradientPass& pass, cudaStream_t stream);

// --- Small: small.cu, everything from raw embeddings to results in one launch ---------------------------------------

// Whether one launch takes the whole call, on any device.
bool small_fits(const HdcCudaCall& call, const HdcCudaProblem* problems);
// Bytes of `call.workspace` that it uses on a device of so many processors.
int64_t small_workspace(const HdcCudaCall& call, const HdcCudaProblem* problems, int processors);
// The whole call: see contrast.h.
cudaError_t small_contrast(
    const HdcCudaCall& call, const HdcCudaProblem* problems, int processors, cudaStream_t stream
);

}  // namespace hdc::cuda
