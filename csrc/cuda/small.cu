// Everything in one launch: from raw embeddings to terms, total and all gradients, for problems that fit on the chip.
//
// Both sides of a problem, as unit vectors, stay in shared memory. `blocks` blocks share a problem and exchange
// nothing: each makes all unit vectors and all logsumexps itself, and then the gradients of its own slabs of 16
// vectors, of x or of y. That repeats one product of four, and spares every meeting of blocks but the last one's.
//
//   1. norms, unit vectors rounded to T, positives in float32                     8 lanes a row
//   2. logsumexp of rows (and columns): slab · all others, 32 at a time           2 warps a slab, every other 32 each
//   3. terms, weights
//   4. slab's gradient = coefficients · others, both products as in 2; the two warps' halves are added in order
//   5. through the normalisation, row by row; out
//   6. the last block adds the blocks' parts of total and temperature gradient, in order
//
// exp2((cosine − highest)·k − log2 Σ): the shift is kept in two parts, so that no large logsumexp is rounded.
// The positive is outside of both products. Factors are rounded as in `GradientPass` (packed.h).
// 16-bit factors go through mma.sync; float32 (TF32 allowed or not) is multiplied exactly, by FMA.
//
// On paper, for 17 × 128 × 128 × 128 in bf16 on an H100 at 1.75 GHz: 4 blocks a problem, 68 for 132 SMs. Clocks:
// loading 64 KB from L2 1,800; logsumexps 2,000 (product at mma.sync's 60 % of the peak 1,650, exponentials beside);
// gradients 1,600; halves, normalisation and 32 KB out 1,000; the last block's fence, ticket and sum 1,900. 8,300 clk
// are 4.7 µs; with the launch and the ticket's memset about 8 µs of the 12 aimed at. float32: about 20 µs, by loads
// from shared memory.
//
// Memory of a block: (rows + columns)·(depth·bytes + 16) of unit vectors, 256·(depth + 4) of the teams' sums, 14.5 KB of
// numbers by row: 115 KB for 128 × 128 × 128 in 16 bits. What that leaves to other kernels (`small_fits`): on sm_86 and
// sm_89, with 99 KB, everything from 128 × 128 × 128 on; in float32 128 × 128 × 128 fits sm_90 alone; 256 × 256 × 256
// fits nowhere. Registers: at most 255, none spilled (tests).
//
// No GPU has run this yet; tests/test_cuda_small.py runs this very source on emulated warps.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "fragments.cuh"
#include "packed.h"
#include "warp.cuh"

namespace hdc::cuda {
namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS, TEAMS = WARPS / 2;  // a team is two warps
constexpr int SLAB = 16;    // own vectors of a team
constexpr int CHUNK = 32;   // other vectors that a warp takes at a time
constexpr int LONGEST = THREADS;  // rows or columns: one thread each
constexpr int WIDEST = 256;
constexpr int MOST_BLOCKS = 8;  // that share a problem
constexpr int MOST_PAIRS = 24;  // in the 4 KB that a kernel's arguments may take
constexpr int64_t PARTS = 16;   // bytes before the parts in the workspace: the ticket
constexpr float ZERO_NORM = 1e-12f;  // as in hdc_kernels/reference.py
constexpr float SMALLEST_UNIT = 1e-30f;

struct Matrix {
    void* data;
    int64_t group_stride, row_stride;
};

struct Pair {
    Matrix x, y, dx, dy;
    int64_t first_problem, first_row;  // the latter in [T]
    int rows, columns, width;
    float weight;
    bool aligned;  // whether every row of all four begins at a multiple of 16 bytes
};

struct Arguments {
    Pair pairs[MOST_PAIRS];
    int pair_count, blocks;
    int task;
    bool normalize, symmetric;
    Temperature temperature;
    int64_t T;
    float *total, *terms, *d_temperature;
    uint8_t* hits;
    double* lse;
    const float* upstream;
    unsigned* ticket;
    float* parts;  // [2, problems·blocks]
};
static_assert(sizeof(Arguments) <= 4096, "a kernel's arguments");

__host__ __device__ constexpr int padded(int length) { return (length + CHUNK - 1) / CHUNK * CHUNK; }

template <typename T>
constexpr float GAIN = probability_gain(std::is_same_v<T, __half> ? Type::fp16 : Type::fp32);  // bf16's is fp32's

template <typename T, int DEPTH>
constexpr int STRIDE = DEPTH + 16 / int(sizeof(T));  // of unit vectors: eight rows lie in different banks

template <int DEPTH>
constexpr int SUM_STRIDE = DEPTH + 4;

// Of one side's vectors, for exp2((cosine − highest)·k − log_total); log_total is −∞ where nothing counts.
struct Sums {
    float highest[LONGEST], log_total[LONGEST];
    float weight[LONGEST];  // upstream · (1 − exp(−term)): what pulls the positive
    float share[LONGEST];   // the weight as it enters a rounded coefficient
};

struct Numbers {
    float inverse[2][LONGEST];  // 1/|x|, 1/|y|
    float positive[LONGEST], own[LONGEST];  // cosine of the positive: exact, and of the rounded vectors
    float along[LONGEST];
    Sums sums[2];
    float half_highest[WARPS][SLAB], half_total[WARPS][SLAB];
    float warp_values[WARPS];
    double warp_totals[2][WARPS];
    unsigned ticket;
};

__device__ inline float softplus(float z) {  // log(1 + e^z) to full relative accuracy
    return fmaxf(z, 0.0f) + log1pf(expf(-fabsf(z)));
}

// Sum or maximum over all threads, in the same order every time.
template <typename Operation>
__device__ inline float over_block(float value, float* warp_values, Operation operation) {
    for (int distance = 16; distance; distance /= 2) {
        value = operation(value, __shfl_down_sync(~0u, value, distance));
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) warp_values[threadIdx.x / 32] = value;
    __syncthreads();
    value = warp_values[0];
    for (int warp = 1; warp < WARPS; ++warp) value = operation(value, warp_values[warp]);
    return value;
}

// --- A row, in 8 lanes: lane `part` has elements (8·piece + part)·VECTOR … of every piece ---------------------------

template <typename T>
constexpr int VECTOR = 16 / int(sizeof(T));

template <typename T>
struct alignas(16) Vector {
    T values[VECTOR<T>];
};

template <typename T, int DEPTH>
__device__ inline void load_row(float (&to)[DEPTH / 8], const T* row, int width, bool aligned, int part) {
#pragma unroll
    for (int piece = 0; piece < DEPTH / 8 / VECTOR<T>; ++piece) {
        const int column = (8 * piece + part) * VECTOR<T>;
        if (aligned && column + VECTOR<T> <= width) {
            const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(row + column);
#pragma unroll
            for (int e = 0; e < VECTOR<T>; ++e) to[piece * VECTOR<T> + e] = widen(vector.values[e]);
        } else {
#pragma unroll
            for (int e = 0; e < VECTOR<T>; ++e) {
                to[piece * VECTOR<T> + e] = column + e < width ? widen(row[column + e]) : 0.0f;
            }
        }
    }
}

template <typename T, int DEPTH, typename Out>
__device__ inline void store_row(Out* row, const float (&from)[DEPTH / 8], int width, bool aligned, int part) {
#pragma unroll
    for (int piece = 0; piece < DEPTH / 8 / VECTOR<T>; ++piece) {
        const int column = (8 * piece + part) * VECTOR<T>;
        if (aligned && column + VECTOR<T> <= width) {
#pragma unroll
            for (int begin = 0; begin < VECTOR<T>; begin += VECTOR<Out>) {
                Vector<Out> vector;
#pragma unroll
                for (int e = 0; e < VECTOR<Out>; ++e) {
                    vector.values[e] = narrow<Out>(from[piece * VECTOR<T> + begin + e]);
                }
                *reinterpret_cast<Vector<Out>*>(row + column + begin) = vector;
            }
        } else {
#pragma unroll
            for (int e = 0; e < VECTOR<T>; ++e) {
                if (column + e < width) row[column + e] = narrow<Out>(from[piece * VECTOR<T> + e]);
            }
        }
    }
}

__device__ inline float over_row(float value) {
    for (int distance = 1; distance < 8; distance *= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
}

// 1/|x|, 0 for a zero vector; 1 without `normalize`.
template <int N>
__device__ inline float inverse_norm(const float (&x)[N], bool normalize) {
    float largest = 0.0f;
#pragma unroll
    for (int e = 0; e < N; ++e) largest = fmaxf(largest, fabsf(x[e]));
    for (int distance = 1; distance < 8; distance *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
    }
    // The squares of a vector beyond 1e19 overflow. A power of two shrinks it without rounding.
    const float shrink = largest > 0x1p40f ? 0x1p-70f : 1.0f;
    float squares = 0.0f;
#pragma unroll
    for (int e = 0; e < N; ++e) squares = fmaf(x[e] * shrink, x[e] * shrink, squares);
    const float norm = sqrtf(over_row(squares));
    if (!normalize) return 1.0f;
    return norm <= ZERO_NORM ? 0.0f : shrink / norm;  // NaN stays NaN
}

// --- Products of a slab with a chunk of others ----------------------------------------------------------------------

// c = own [16, DEPTH] · others [32, DEPTH]ᵀ: four tiles of 16 × 8, laid out as warp.cuh says.
template <typename T, int DEPTH>
__device__ inline void similarity(float (&c)[4][4], const T* own, const T* other, int lane) {
    constexpr int stride = STRIDE<T, DEPTH>;
#pragma unroll
    for (int n = 0; n < 4; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
    if constexpr (sizeof(T) == 2) {
        const T* a_row = own + lane % 16 * stride + lane / 16 * 8;
        const T* b_row = other + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8;
#pragma unroll 4
        for (int d = 0; d < DEPTH; d += 16) {
            uint32_t a[4], b[4];
            load_matrices(a, a_row + d);
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
                load_matrices(b, b_row + n * 8 * stride + d);
                multiply(T(), c[n], a, b[0], b[1]);
                multiply(T(), c[n + 1], a, b[2], b[3]);
            }
        }
    } else {
        const int g = lane / 4, t = lane % 4;
#pragma unroll 2
        for (int d = 0; d < DEPTH; d += 4) {
            const Vector<T> up = *reinterpret_cast<const Vector<T>*>(own + g * stride + d);
            const Vector<T> low = *reinterpret_cast<const Vector<T>*>(own + (g + 8) * stride + d);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const T* row = other + (8 * n + 2 * t) * stride + d;
                const Vector<T> left = *reinterpret_cast<const Vector<T>*>(row);
                const Vector<T> right = *reinterpret_cast<const Vector<T>*>(row + stride);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    c[n][0] = fmaf(up.values[e], left.values[e], c[n][0]);
                    c[n][1] = fmaf(up.values[e], right.values[e], c[n][1]);
                    c[n][2] = fmaf(low.values[e], left.values[e], c[n][2]);
                    c[n][3] = fmaf(low.values[e], right.values[e], c[n][3]);
                }
            }
        }
    }
}

// sum [16, DEPTH] += c [16, 32] · others [32, DEPTH], c rounded to T.
template <typename T, int DEPTH>
__device__ inline void accumulate(float (&sum)[DEPTH / 8][4], const float (&c)[4][4], const T* other, int lane) {
    constexpr int stride = STRIDE<T, DEPTH>;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // 16 of the others
            const float(&left)[4] = c[2 * half];
            const float(&right)[4] = c[2 * half + 1];
            const uint32_t a[4] = {narrow_pair<T>(left[0], left[1]), narrow_pair<T>(left[2], left[3]),
                                   narrow_pair<T>(right[0], right[1]), narrow_pair<T>(right[2], right[3])};
            const T* row = other + (16 * half + lane % 16) * stride + lane / 16 * 8;
#pragma unroll
            for (int n = 0; n < DEPTH / 8; n += 2) {
                uint32_t b[4];
                load_transposed(b, row + 8 * n);
                multiply(T(), sum[n], a, b[0], b[1]);
                multiply(T(), sum[n + 1], a, b[2], b[3]);
            }
        }
    } else {
        const int t = lane % 4;
#pragma unroll
        for (int j = 0; j < CHUNK; ++j) {
            const int source = lane / 4 * 4 + j % 8 / 2;
            const float up = __shfl_sync(~0u, c[j / 8][j % 2], source);
            const float low = __shfl_sync(~0u, c[j / 8][2 + j % 2], source);
#pragma unroll
            for (int n = 0; n < DEPTH / 8; ++n) {
                const float2 v = *reinterpret_cast<const float2*>(other + j * stride + 8 * n + 2 * t);
                sum[n][0] = fmaf(up, v.x, sum[n][0]);
                sum[n][1] = fmaf(up, v.y, sum[n][1]);
                sum[n][2] = fmaf(low, v.x, sum[n][2]);
                sum[n][3] = fmaf(low, v.y, sum[n][3]);
            }
        }
    }
}

// --- Logsumexp of every vector of one side over the other -----------------------------------------------------------

template <typename T, int DEPTH>
__device__ inline void logsumexp(Numbers& s, Sums& sums, bool keep_own, const T* own, int own_count, const T* other,
                                 int other_count, float k, int warp, int lane) {
    const int g = lane / 4, t = lane % 4, team = warp / 2;
    for (int slab = team * SLAB; slab < own_count; slab += TEAMS * SLAB) {
        float highest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
        for (int chunk = warp % 2 * CHUNK; chunk < other_count; chunk += 2 * CHUNK) {
            float c[4][4];
            similarity<T, DEPTH>(c, own + slab * STRIDE<T, DEPTH>, other + chunk * STRIDE<T, DEPTH>, lane);
#pragma unroll
            for (int low = 0; low < 2; ++low) {
                const int i = slab + g + 8 * low;
                float top = highest[low];
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    float& cosine = c[e / 2][2 * low + e % 2];
                    const int j = chunk + e / 2 * 8 + 2 * t + e % 2;
                    if (i == j) {
                        if (keep_own && i < own_count) s.own[i] = cosine;
                        cosine = -INFINITY;
                    }
                    if (j >= other_count) cosine = -INFINITY;
                    top = fmaxf(top, cosine);
                }
                const float base = top == -INFINITY ? 0.0f : top;
                total[low] *= power_of_two((highest[low] - base) * k);
#pragma unroll
                for (int e = 0; e < 8; ++e) total[low] += power_of_two((c[e / 2][2 * low + e % 2] - base) * k);
                highest[low] = top;
            }
        }
#pragma unroll
        for (int low = 0; low < 2; ++low) {
            for (int distance = 1; distance < 4; distance *= 2) {
                const float other_highest = __shfl_down_sync(~0u, highest[low], distance);
                const float other_total = __shfl_down_sync(~0u, total[low], distance);
                join(highest[low], total[low], other_highest, other_total, k);
            }
            if (t == 0) {
                s.half_highest[warp][g + 8 * low] = highest[low];
                s.half_total[warp][g + 8 * low] = total[low];
            }
        }
        wait_for(1 + team, 2);
        if (warp % 2 == 0 && lane < SLAB && slab + lane < own_count) {
            float top = s.half_highest[warp][lane], sum = s.half_total[warp][lane];
            join(top, sum, s.half_highest[warp + 1][lane], s.half_total[warp + 1][lane], k);
            sums.highest[slab + lane] = top;
            sums.log_total[slab + lane] = log2f(sum);
        }
        wait_for(1 + team, 2);
    }
}

// A saved logsumexp in the same two parts.
__device__ inline void take_apart(Sums& sums, int i, double lse, float k) {
    const double in_base_2 = lse * 1.4426950408889634;
    const bool empty = lse == -INFINITY;
    const float highest = empty ? -INFINITY : static_cast<float>(in_base_2 / k);
    sums.highest[i] = highest;
    sums.log_total[i] = empty ? -INFINITY : static_cast<float>(in_base_2 - static_cast<double>(highest) * k);
}

__device__ inline float gap(const Sums& sums, int i, float positive, float k) {  // logsumexp − positive's logit
    if (sums.highest[i] == -INFINITY) return sums.log_total[i];  // −∞, or NaN
    return static_cast<float>(((sums.highest[i] - positive) * k + sums.log_total[i]) * LN_2);
}

__device__ inline double whole(const Sums& sums, int i, float k) {
    if (sums.highest[i] == -INFINITY) return sums.log_total[i];
    return (static_cast<double>(sums.highest[i]) * k + sums.log_total[i]) * LN_2;
}

struct Shift {
    float highest, log_total;

    __device__ Shift(const Sums& sums, int i, bool valid) {
        const bool any = valid && sums.log_total[i] != -INFINITY;
        highest = any && sums.highest[i] != -INFINITY ? sums.highest[i] : 0.0f;
        log_total = any ? sums.log_total[i] : INFINITY;  // exponentials of nothing are 0
    }
    __device__ float probability(float cosine, float k) const {
        return power_of_two((cosine - highest) * k - log_total);
    }
};

// --- The kernel -----------------------------------------------------------------------------------------------------

template <typename T, int DEPTH>
__global__ void __launch_bounds__(THREADS, 1) small_kernel(const __grid_constant__ Arguments a) {
    constexpr int stride = STRIDE<T, DEPTH>;
    __shared__ Numbers s;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, part = lane % 8;
    const int64_t problem = blockIdx.x / a.blocks;
    const int rank = blockIdx.x % a.blocks;
    int index = 0;
    while (index + 1 < a.pair_count && problem >= a.pairs[index + 1].first_problem) ++index;
    const Pair& pair = a.pairs[index];
    const int64_t group = problem - pair.first_problem;
    const int M = pair.rows, N = pair.columns, width = pair.width;
    const int64_t flat = pair.first_row + group * M;
    const T* x = static_cast<const T*>(pair.x.data) + group * pair.x.group_stride;
    const T* y = static_cast<const T*>(pair.y.data) + group * pair.y.group_stride;
    T* x_units = reinterpret_cast<T*>(dynamic_memory());
    T* y_units = x_units + padded(M) * stride;
    float* team_sums = reinterpret_cast<float*>(y_units + padded(N) * stride);
    const float scale = inverse_temperature(a.temperature);
    const float k = scale * LOG2_E;

    for (int row = thread / 8; row < padded(N); row += THREADS / 8) {  // N ≥ M
        float u[DEPTH / 8], v[DEPTH / 8];
        load_row<T, DEPTH>(u, x + row * pair.x.row_stride, row < M ? width : 0, pair.aligned, part);
        load_row<T, DEPTH>(v, y + row * pair.y.row_stride, row < N ? width : 0, pair.aligned, part);
        const float x_inverse = inverse_norm(u, a.normalize), y_inverse = inverse_norm(v, a.normalize);
        float positive = 0.0f;
#pragma unroll
        for (int e = 0; e < DEPTH / 8; ++e) {
            u[e] *= x_inverse;
            v[e] *= y_inverse;
            positive = fmaf(u[e], v[e], positive);
        }
        positive = over_row(positive);
        if (row < padded(M)) store_row<T, DEPTH>(x_units + row * stride, u, DEPTH, true, part);
        store_row<T, DEPTH>(y_units + row * stride, v, DEPTH, true, part);
        if (part == 0 && row < N) {
            s.inverse[0][row] = x_inverse;
            s.inverse[1][row] = y_inverse;
            s.positive[row] = positive;
        }
    }
    __syncthreads();

    if (a.task == HDC_CUDA_BACKWARD) {
        if (thread < M) take_apart(s.sums[0], thread, a.lse[flat + thread], k);
        if (thread < M && a.symmetric) take_apart(s.sums[1], thread, a.lse[a.T + flat + thread], k);
    } else {
        logsumexp<T, DEPTH>(s, s.sums[0], true, x_units, M, y_units, N, k, warp, lane);
        if (a.symmetric) logsumexp<T, DEPTH>(s, s.sums[1], false, y_units, N, x_units, M, k, warp, lane);
    }
    __syncthreads();

    float weighted = 0.0f, largest = 0.0f;
    s.along[thread] = 0.0f;
    s.sums[0].weight[thread] = s.sums[1].weight[thread] = 0.0f;
    if (thread < M) {
        const int i = thread;
        const float row_gap = gap(s.sums[0], i, s.positive[i], k);
        const float column_gap = a.symmetric ? gap(s.sums[1], i, s.positive[i], k) : 0.0f;
        const float share = a.symmetric ? 0.5f : 1.0f;
        float u = pair.weight;
        if (a.task == HDC_CUDA_BACKWARD) {
            u = a.upstream[flat + i];
        } else {
            float term = softplus(row_gap);
            if (a.symmetric) term = 0.5f * (term + softplus(column_gap));
            weighted = u * term;
            if (rank == 0) {
                a.terms[flat + i] = term;
                a.hits[flat + i] = s.own[i] > s.sums[0].highest[i] && term == term;
                a.lse[flat + i] = whole(s.sums[0], i, k);
                if (a.symmetric) a.lse[a.T + flat + i] = whole(s.sums[1], i, k);
            }
        }
        s.sums[0].weight[i] = share * u / (1.0f + expf(-row_gap));
        if (a.symmetric) s.sums[1].weight[i] = share * u / (1.0f + expf(-column_gap));
        largest = fmaxf(fabsf(s.sums[0].weight[i]), fabsf(s.sums[1].weight[i]));
    }
    weighted = over_block(weighted, s.warp_values, [](float p, float q) { return p + q; });
    largest = over_block(largest, s.warp_values, [](float p, float q) { return fmaxf(p, q); });
    const float unit = fmaxf(largest, SMALLEST_UNIT);
    s.sums[0].share[thread] = s.sums[0].weight[thread] * (GAIN<T> / unit);
    s.sums[1].share[thread] = s.sums[1].weight[thread] * (GAIN<T> / unit);
    __syncthreads();

    if (a.task != HDC_CUDA_FORWARD) {
        const int team = warp / 2, g = lane / 4, t = lane % 4;
        const int x_slabs = (M + SLAB - 1) / SLAB, y_slabs = pair.dy.data ? (N + SLAB - 1) / SLAB : 0;
        float* team_sum = team_sums + team * SLAB * SUM_STRIDE<DEPTH>;
        for (int slab = rank * TEAMS + team; slab < x_slabs + y_slabs; slab += a.blocks * TEAMS) {
            const bool of_y = slab >= x_slabs;
            const int first = (of_y ? slab - x_slabs : slab) * SLAB;
            const int own_count = of_y ? N : M, other_count = of_y ? M : N;
            const T* own = (of_y ? y_units : x_units) + first * stride;
            const T* other = of_y ? x_units : y_units;
            const Sums& own_sums = s.sums[of_y];
            const Sums& other_sums = s.sums[!of_y];
            const bool own_term = !of_y || a.symmetric, other_term = of_y || a.symmetric;
            Shift own_shift[2] = {Shift(own_sums, first + g, own_term && first + g < own_count),
                                  Shift(own_sums, first + g + 8, own_term && first + g + 8 < own_count)};
            float own_share[2];
            for (int low = 0; low < 2; ++low) {
                own_share[low] = other_term ? own_sums.share[first + g + 8 * low] : GAIN<T>;
            }
            float sum[DEPTH / 8][4] = {};
            for (int chunk = warp % 2 * CHUNK; chunk < other_count; chunk += 2 * CHUNK) {
                float c[4][4];
                similarity<T, DEPTH>(c, own, other + chunk * stride, lane);
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    const int j = chunk + e / 2 * 8 + 2 * t + e % 2;
                    const Shift other_shift(other_sums, j, other_term && j < other_count);
#pragma unroll
                    for (int low = 0; low < 2; ++low) {
                        float& cosine = c[e / 2][2 * low + e % 2];
                        const int i = first + g + 8 * low;
                        float coefficient = 0.0f;
                        if (i != j && i < own_count && j < other_count) {
                            if (own_term) coefficient = own_shift[low].probability(cosine, k) * own_share[low];
                            if (other_term) coefficient += other_shift.probability(cosine, k) * other_sums.share[j];
                        }
                        cosine = coefficient;
                    }
                }
                accumulate<T, DEPTH>(sum, c, other + chunk * stride, lane);
            }
            // The second warp's half is added to the first's.
            for (int half = 0; half < 2; ++half) {
                if (warp % 2 == half) {
#pragma unroll
                    for (int n = 0; n < DEPTH / 8; ++n) {
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            float& to = team_sum[(g + e / 2 * 8) * SUM_STRIDE<DEPTH> + 8 * n + 2 * t + e % 2];
                            to = half ? to + sum[n][e] : sum[n][e];
                        }
                    }
                }
                wait_for(1 + team, 2);
            }
            const Matrix& out = of_y ? pair.dy : pair.dx;
            for (int r = warp % 2 * 4 + lane / 8; r < SLAB; r += 8) {
                const int i = first + r;
                float u[DEPTH / 8], v[DEPTH / 8];  // unit vectors: its own, its positive's
                const int own_width = i < own_count ? width : 0, positive_width = i < M ? width : 0;
                load_row<T, DEPTH>(u, of_y ? y + i * pair.y.row_stride : x + i * pair.x.row_stride, own_width, pair.aligned, part);
                load_row<T, DEPTH>(v, of_y ? x + i * pair.x.row_stride : y + i * pair.y.row_stride, positive_width, pair.aligned, part);
                const float inverse = i < own_count ? s.inverse[of_y][i] : 0.0f;
                const float positive_inverse = i < M ? s.inverse[!of_y][i] : 0.0f;
                const float pull = i < M ? s.sums[0].weight[i] + s.sums[1].weight[i] : 0.0f;
                const float factor = other_term ? unit / GAIN<T> : (i < M ? s.sums[0].weight[i] : 0.0f) / GAIN<T>;
                float along = 0.0f;
#pragma unroll
                for (int e = 0; e < DEPTH / 8; ++e) {
                    const int column = (8 * (e / VECTOR<T>) + part) * VECTOR<T> + e % VECTOR<T>;
                    u[e] *= inverse;
                    const float pulled = team_sum[r * SUM_STRIDE<DEPTH> + column] * factor - v[e] * positive_inverse * pull;
                    v[e] = pulled * scale;
                    along = fmaf(u[e], v[e], along);
                }
                along = over_row(along);
                if (a.normalize) {
#pragma unroll
                    for (int e = 0; e < DEPTH / 8; ++e) v[e] = (v[e] - u[e] * along) * inverse;
                }
                const int64_t offset = group * out.group_stride + i * out.row_stride;
                if (a.task == HDC_CUDA_STEP) {
                    store_row<T, DEPTH>(static_cast<float*>(out.data) + offset, v, own_width, pair.aligned, part);
                } else {
                    store_row<T, DEPTH>(static_cast<T*>(out.data) + offset, v, own_width, pair.aligned, part);
                }
                if (!of_y && part == 0 && i < M) s.along[i] = along;
            }
            wait_for(1 + team, 2);
        }
    }
    __syncthreads();
    const float along = over_block(s.along[thread], s.warp_values, [](float p, float q) { return p + q; });

    if (thread == 0) {
        a.parts[blockIdx.x] = rank == 0 ? weighted : 0.0f;
        a.parts[gridDim.x + blockIdx.x] = -scale * along;
        __threadfence();
        s.ticket = atomicAdd(a.ticket, 1u);
    }
    __syncthreads();
    if (s.ticket + 1 != gridDim.x) return;
    __threadfence();
    for (int which = 0; which < 2; ++which) {
        double total = 0.0;
        for (int64_t i = thread; i < gridDim.x; i += THREADS) total += __ldcg(a.parts + which * int64_t(gridDim.x) + i);
        for (int distance = 16; distance; distance /= 2) total += __shfl_down_sync(~0u, total, distance);
        if (lane == 0) s.warp_totals[which][warp] = total;
    }
    __syncthreads();
    if (thread < 2) {
        double total = 0.0;
        for (int w = 0; w < WARPS; ++w) total += s.warp_totals[thread][w];
        if (thread == 0 && a.task != HDC_CUDA_BACKWARD) *a.total = static_cast<float>(total);
        if (thread == 1 && a.task != HDC_CUDA_FORWARD) *a.d_temperature = static_cast<float>(total);
    }
}

// --- Host -----------------------------------------------------------------------------------------------------------

int64_t problem_count(const HdcCudaCall& call, const HdcCudaProblem* problems) {
    int64_t count = 0;
    for (int64_t k = 0; k < call.problems; ++k) count += problems[k].groups;
    return count;
}

int element_bytes(const HdcCudaCall& call) {
    return call.dtype == HDC_CUDA_FLOAT32 || call.dtype == HDC_CUDA_TF32 ? 4 : 2;
}

int depth_of(const HdcCudaCall& call, const HdcCudaProblem* problems) {
    int64_t widest = 1;
    for (int64_t k = 0; k < call.problems; ++k) widest = problems[k].width > widest ? problems[k].width : widest;
    return padded_width(widest);
}

int64_t shared_bytes(const HdcCudaCall& call, const HdcCudaProblem* problems) {
    const int64_t depth = depth_of(call, problems), bytes = element_bytes(call);
    int64_t most = 0;
    for (int64_t k = 0; k < call.problems; ++k) {
        const int64_t rows = padded(int(problems[k].rows)) + padded(int(problems[k].columns));
        const int64_t units = rows * (depth * bytes + 16);
        most = units > most ? units : most;
    }
    return most + TEAMS * SLAB * (depth + 4) * int64_t(sizeof(float));
}

bool aligned(const HdcCudaMatrix& matrix, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && matrix.group_stride * bytes % 16 == 0 &&
           matrix.row_stride * bytes % 16 == 0;
}

// How many blocks share a problem: so many that a team has one slab, but no more in all than there are processors.
int blocks_of(const HdcCudaCall& call, const HdcCudaProblem* problems, int64_t count, int processors) {
    if (call.task == HDC_CUDA_FORWARD) return 1;
    int64_t slabs = 1;
    for (int64_t k = 0; k < call.problems; ++k) {
        const int64_t both = (problems[k].rows + SLAB - 1) / SLAB + (problems[k].columns + SLAB - 1) / SLAB;
        slabs = both > slabs ? both : slabs;
    }
    int blocks = 1;
    while (blocks < MOST_BLOCKS && blocks * TEAMS < slabs && 2 * blocks * count <= processors) blocks *= 2;
    return blocks;
}

Matrix plain(const HdcCudaMatrix& matrix) { return {matrix.data, matrix.group_stride, matrix.row_stride}; }

template <typename T, int DEPTH>
cudaError_t launch(const Arguments& arguments, int64_t count, int64_t shared, cudaStream_t stream) {
    const cudaError_t error = cudaFuncSetAttribute(small_kernel<T, DEPTH>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return error;
    void* packed[] = {const_cast<Arguments*>(&arguments)};
    return cudaLaunchKernel(small_kernel<T, DEPTH>, dim3(unsigned(count * arguments.blocks)), dim3(THREADS), packed,
                            size_t(shared), stream);
}

template <typename T>
cudaError_t launch(const Arguments& arguments, int depth, int64_t count, int64_t shared, cudaStream_t stream) {
    if (depth == 64) return launch<T, 64>(arguments, count, shared, stream);
    if (depth == 128) return launch<T, 128>(arguments, count, shared, stream);
    return launch<T, 256>(arguments, count, shared, stream);
}

}  // namespace

bool small_fits(const HdcCudaCall& call, const HdcCudaProblem* problems, int capability) {
    if (call.function != HDC_CUDA_INFO_NCE || call.problems < 1 || call.problems > MOST_PAIRS) return false;
    for (int64_t k = 0; k < call.problems; ++k) {
        const HdcCudaProblem& problem = problems[k];
        if (problem.x_ids || problem.rows < 1 || problem.rows > problem.columns || problem.columns > LONGEST ||
            problem.width < 1 || problem.width > WIDEST) {
            return false;
        }
    }
    const int64_t count = problem_count(call, problems);
    // Of shared memory, in bytes, for one block; the kernel's own numbers come first.
    const int64_t room = (capability == 80 || capability == 87 ? 166'912 : capability >= 90 && capability < 120 ? 232'448 : 101'376);
    return count >= 1 && count <= INT32_MAX / MOST_BLOCKS &&
           shared_bytes(call, problems) + int64_t(sizeof(Numbers)) <= room;
}

int64_t small_workspace(const HdcCudaCall& call, const HdcCudaProblem* problems) {
    return PARTS + 2 * MOST_BLOCKS * problem_count(call, problems) * int64_t(sizeof(float));
}

cudaError_t small_contrast(const HdcCudaCall& call, const HdcCudaProblem* problems, cudaStream_t stream) {
    const int64_t count = problem_count(call, problems);
    int processors = 0;
    cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, int(call.device));
    if (error != cudaSuccess) return error;
    Arguments arguments = {};
    arguments.pair_count = int(call.problems);
    arguments.blocks = blocks_of(call, problems, count, processors);
    arguments.task = int(call.task);
    arguments.normalize = call.normalize;
    arguments.symmetric = call.symmetric;
    arguments.temperature = {float(call.temperature), call.device_temperature};
    arguments.total = call.total;
    arguments.terms = call.terms;
    arguments.d_temperature = call.d_temperature;
    arguments.hits = call.hits;
    arguments.lse = call.lse;
    arguments.upstream = call.upstream;
    arguments.ticket = static_cast<unsigned*>(call.workspace);
    arguments.parts = reinterpret_cast<float*>(static_cast<char*>(call.workspace) + PARTS);
    const int64_t bytes = element_bytes(call), out_bytes = call.task == HDC_CUDA_STEP ? 4 : bytes;
    int64_t first = 0;
    for (int64_t k = 0; k < call.problems; ++k) {
        const HdcCudaProblem& problem = problems[k];
        arguments.pairs[k] = {
            plain(problem.x), plain(problem.y), plain(problem.dx), plain(problem.dy), first, arguments.T,
            int(problem.rows), int(problem.columns), int(problem.width), float(problem.weight),
            aligned(problem.x, bytes) && aligned(problem.y, bytes) && aligned(problem.dx, out_bytes) &&
                aligned(problem.dy, out_bytes)};
        first += problem.groups;
        arguments.T += problem.groups * problem.rows;
    }
    error = cudaMemsetAsync(arguments.ticket, 0, sizeof(unsigned), stream);
    if (error != cudaSuccess) return error;
    const int depth = depth_of(call, problems);
    const int64_t shared = shared_bytes(call, problems);
    if (bytes == 4) return launch<float>(arguments, depth, count, shared, stream);
    if (call.dtype == HDC_CUDA_BFLOAT16) return launch<__nv_bfloat16>(arguments, depth, count, shared, stream);
    return launch<__half>(arguments, depth, count, shared, stream);
}

}  // namespace hdc::cuda
