// Everything in one launch: from raw embeddings to total, means by pair, all gradients and, where they are asked for,
// terms and hits by row; up to 256 rows, columns and dimensions.
//
// `blocks` blocks share a problem and exchange nothing: each makes all norms and all logsumexps itself, and then the
// gradients of its own tiles of 64 vectors, of x or of y. That repeats one product of four, and spares every meeting
// of blocks but the last one's. Without gradients each makes the logsumexps of its own tiles alone.
//
//   1. norms, unit vectors rounded to T, positives in float32                     8 lanes a row    small_rows.cuh
//   2. logsumexp of rows (and columns): slab · all others, 32 at a time           2 warps a slab   small_logsumexp.cuh
//   3. terms, hits, weights
//   4. slab's gradient = coefficients · others, both products as in 2; the two warps' halves are added in order;
//      through the normalisation, row by row; out                                                  small_gradient.cuh
//   5. the last block adds what the blocks of each pair have left, a warp a pair, in order and in float64: sums of
//      terms, numbers of hits and temperature gradients become total, means and temperature gradient
//
// Which block is the last one, a counter tells, the ticket, which it leaves at 0 as it was. So nothing is cleared
// before a launch, and launches that may run at the same time need a ticket each (hdc_kernels/backends/tickets.py).
//
// A tile is a slab of 16 for each of four teams of two warps. exp2((cosine − highest)·k − log2 Σ): the shift is kept in
// two parts, so that no large logsumexp is rounded. The positive is outside of both products. Factors are rounded as
// in `GradientPass` (packed.h). 16-bit factors go through mma.sync; float32 (TF32 allowed or not) is multiplied
// exactly, by FMA.
//
// Memory of a block: 14.5 KB of numbers by row, 256·(depth + 4) bytes of the teams' sums, and of each side a window of
// unit vectors, of depth·bytes + 16, at most 528 (small_windows.cuh). `room_of` looks at what the device has; from much
// to little:
//     both sides whole, the sums behind them          118 KB for 128 × 128 × 128 in 16 bits
//     both sides whole, the sums over them at last    84 KB; a block's next tile loads them again
//     windows that slide, the sums over them          82 KB and up, for any rows, columns and depth
// So 128 × 128 × 128 in 16 bits is loaded once on every device that has a block for each of its tiles; 256 × 256 × 256
// slides on all. Registers: at most 255, none spilled (tests).
//
// On paper, for 17 × 128 × 128 × 128 in bf16 on an H100 at 1.75 GHz: 4 blocks a problem, 68 for 132 SMs. Clocks:
// loading 64 KB from L2 1,800; logsumexps 2,000 (product at mma.sync's 60 % of the peak 1,650, exponentials beside);
// gradients 1,600; halves, normalisation and 32 KB out 1,000; the last block's fence, ticket and sum 1,900. 8,300 clk
// are 4.7 µs; with the launch about 7 µs of the 12 aimed at, and 8 µs in a CUDA graph, which clears its ticket.
// In float32 about 20 µs, by loads from shared memory. One problem of 256 × 256 × 256, in 8 blocks: 33,000 clk in bf16,
// 20,000 of them for products, 5,000 for windows that slide; in float32 340,000, or 0.2 ms, two thirds of it logsumexps
// that all blocks repeat. Whether the eight launches of the portable way, which repeat nothing, take less there is to
// be measured.
//
// Decided on paper: while a window slides nobody multiplies, 1,000 clk for 64 rows of 512 bytes beside 800 to 1,700 of
// products with them in 16 bits. At 256 dimensions no registers are left to hold the next rows meanwhile, and cp.async
// cannot normalise what it copies. float32 of 256 dimensions comes in slices on every device, rather than in tiles of
// 16 rows where memory is short: loads are about a sixth of the time there.
//
// No GPU has run this yet; tests/test_cuda_small.py runs this very source on emulated warps.
#include <algorithm>

#include "launch.cuh"
#include "scalars.cuh"
#include "small_gradient.cuh"
#include "small_logsumexp.cuh"

namespace hdc::cuda {
namespace small {
namespace {

constexpr float SMALLEST_UNIT = 1e-30f;

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

// Norms, positives, and what the windows begin with.
template <typename T, int DEPTH>
__device__ inline void load(const Problem<T>& problem, const Windows<T, DEPTH>& windows, int thread) {
    const Pair& pair = problem.pair;
    Numbers& s = problem.numbers;
    const int M = pair.counts[0], N = pair.counts[1], part = thread % 8;
    for (int row = thread / 8; row < padded(N); row += THREADS / 8) {  // N ≥ M
        float u[DEPTH / 8], v[DEPTH / 8];
        load_row<T, DEPTH>(u, problem.embedding(0, row), row < M ? pair.width : 0, pair.aligned, part);
        load_row<T, DEPTH>(v, problem.embedding(1, row), row < N ? pair.width : 0, pair.aligned, part);
        const float x_inverse = inverse_norm(u, problem.arguments.normalize);
        const float y_inverse = inverse_norm(v, problem.arguments.normalize);
        float positive = 0.0f;
#pragma unroll
        for (int e = 0; e < DEPTH / 8; ++e) {
            u[e] *= x_inverse;
            v[e] *= y_inverse;
            positive = fmaf(u[e], v[e], positive);
        }
        positive = over_row(positive);
        windows.begin(0, row, u, part);
        windows.begin(1, row, v, part);
        if (part == 0 && row < N) {
            s.inverse[0][row] = x_inverse;
            s.inverse[1][row] = y_inverse;
            s.positive[row] = positive;
        }
    }
    __syncthreads();
}

// --- The kernel -----------------------------------------------------------------------------------------------------

template <typename T, int DEPTH>
__global__ void __launch_bounds__(THREADS, 1) small_kernel(const __grid_constant__ Arguments a) {
    __shared__ Numbers s;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int64_t number = blockIdx.x / a.blocks;
    const int rank = blockIdx.x % a.blocks;
    int index = 0;
    while (index + 1 < a.pair_count && number >= a.pairs[index + 1].first_problem) ++index;
    const Pair& pair = a.pairs[index];
    const Problem<T> problem = {a, pair, s, number - pair.first_problem};
    const int M = pair.counts[0];
    const int64_t flat = pair.first_row + problem.group * M;
    const float scale = inverse_temperature(a.temperature);
    const float k = scale * LOG2_E;
    const bool forward = a.task == HDC_CUDA_FORWARD;

    Windows<T, DEPTH> windows(problem);
    load(problem, windows, thread);
    if (a.task == HDC_CUDA_BACKWARD) {
        if (thread < M) take_apart(s.sums[0], thread, a.lse[flat + thread], k);
        if (thread < M && a.symmetric) take_apart(s.sums[1], thread, a.lse[a.T + flat + thread], k);
    } else {
#pragma unroll 1
        for (int side = 0; side <= int(a.symmetric); ++side) {
            const int begin = forward ? rank * TILE : 0, step = forward ? a.blocks * TILE : TILE;
            logsumexps(problem, windows, side, begin, step, k, warp, lane);
        }
    }
    __syncthreads();

    float term = 0.0f, largest = 0.0f;
    bool hit = false;
    s.along[thread] = 0.0f;
    s.sums[0].weight[thread] = s.sums[1].weight[thread] = 0.0f;
    const bool mine = thread / TILE % a.blocks == rank;  // one block of a problem writes the term
    if (thread < M && (mine || !forward)) {
        const int i = thread;
        const float row_gap = gap(s.sums[0], i, s.positive[i], k);
        const float column_gap = a.symmetric ? gap(s.sums[1], i, s.positive[i], k) : 0.0f;
        const float share = a.symmetric ? 0.5f : 1.0f;
        float u = pair.weight;
        if (a.task == HDC_CUDA_BACKWARD) {
            u = a.upstream[flat + i];
        } else if (mine) {
            term = softplus(row_gap);
            if (a.symmetric) term = 0.5f * (term + softplus(column_gap));
            hit = s.own[i] > s.sums[0].highest[i] && term == term;
            if (a.terms) {
                a.terms[flat + i] = term;
                a.hits[flat + i] = hit;
                a.lse[flat + i] = whole(s.sums[0], i, k);
                if (a.symmetric) a.lse[a.T + flat + i] = whole(s.sums[1], i, k);
            }
        }
        s.sums[0].weight[i] = share * u / (1.0f + expf(-row_gap));
        if (a.symmetric) s.sums[1].weight[i] = share * u / (1.0f + expf(-column_gap));
        largest = fmaxf(fabsf(s.sums[0].weight[i]), fabsf(s.sums[1].weight[i]));
    }
    term = over_block(term, s.warp_values, [](float p, float q) { return p + q; });
    largest = over_block(largest, s.warp_values, [](float p, float q) { return fmaxf(p, q); });
    const float unit = fmaxf(largest, SMALLEST_UNIT);
    s.sums[0].share[thread] = s.sums[0].weight[thread] * (GAIN<T> / unit);
    s.sums[1].share[thread] = s.sums[1].weight[thread] * (GAIN<T> / unit);
    const int hits = __syncthreads_count(hit);
    const int64_t blocks = gridDim.x;
    if (thread == 0) {  // at once: no registers are left to keep them in
        a.parts[blockIdx.x] = term;
        a.parts[blocks + blockIdx.x] = static_cast<float>(hits);
    }

    if (!forward) {
        const int x_tiles = tiles(M), all_tiles = x_tiles + (pair.gradients[1].data ? tiles(pair.counts[1]) : 0);
#pragma unroll 1
        for (int tile = rank; tile < all_tiles; tile += a.blocks) {
            const int side = tile >= x_tiles;
            gradient(problem, windows, side, (side ? tile - x_tiles : tile) * TILE, unit, scale, warp, lane);
        }
    }
    __syncthreads();
    const float along = over_block(s.along[thread], s.warp_values, [](float p, float q) { return p + q; });

    if (thread == 0) {
        a.parts[2 * blocks + blockIdx.x] = -scale * along;
        __threadfence();
        s.ticket = atomicInc(a.ticket, gridDim.x - 1);  // the last one sets it back to 0
    }
    __syncthreads();
    if (s.ticket + 1 != gridDim.x) return;
    __threadfence();
    double total = 0.0, slope = 0.0;
    for (int p = warp; p < a.pair_count; p += WARPS) {  // a warp adds what the blocks of a pair have left
        const int64_t first = a.pairs[p].first_problem * a.blocks;
        const int64_t end = p + 1 < a.pair_count ? a.pairs[p + 1].first_problem * a.blocks : blocks;
        double sums[PARTS] = {};
#pragma unroll 4
        for (int64_t i = first + lane; i < end; i += 32) {
            for (int n = 0; n < PARTS; ++n) sums[n] += __ldcg(a.parts + n * blocks + i);
        }
        for (int distance = 16; distance; distance /= 2) {
            for (int n = 0; n < PARTS; ++n) sums[n] += __shfl_down_sync(~0u, sums[n], distance);
        }
        total += a.pairs[p].weight * sums[0];
        slope += sums[2];
        if (a.means && lane == 0) {
            const double rows = static_cast<double>((end - first) / a.blocks * a.pairs[p].counts[0]);
            a.means[p] = static_cast<float>(sums[0] / rows);
            a.means[a.pair_count + p] = static_cast<float>(sums[1] / rows);
        }
    }
    if (lane == 0) {
        s.warp_totals[0][warp] = total;
        s.warp_totals[1][warp] = slope;
    }
    __syncthreads();
    if (thread < 2) {
        total = 0.0;
        for (int w = 0; w < WARPS; ++w) total += s.warp_totals[thread][w];
        if (thread == 0 && a.task != HDC_CUDA_BACKWARD) *a.total = static_cast<float>(total);
        if (thread == 1 && !forward) *a.d_temperature = static_cast<float>(total);
    }
}

// --- Host -----------------------------------------------------------------------------------------------------------

// How a block of a pair uses its dynamic shared memory.
struct Room {
    int windows[2];
    bool apart;
    int64_t bytes;
};

// `most` is what the device has for a block, beside `Numbers`.
Room room_of(int rows, int columns, int depth, int element_bytes, int64_t most) {
    const int slice = std::min(depth * element_bytes, 512), row_bytes = slice + 16;
    const int64_t sums = TILE * (depth + 4) * int64_t(sizeof(float));
    const bool sliced = slice < depth * element_bytes;  // as each slice comes again, a window is a tile
    const auto longest = [&](int count, int64_t room) {
        const int64_t whole = padded(count), tiled = sliced ? TILE : room / TILE * TILE;
        return int(std::min(whole, tiled));
    };
    Room room = {};
    room.windows[1] = longest(columns, most / row_bytes - TILE);
    room.windows[0] = longest(rows, most / row_bytes - room.windows[1]);
    const int64_t units = (room.windows[0] + room.windows[1]) * int64_t(row_bytes);
    room.apart = units + sums <= most;
    room.bytes = room.apart ? units + sums : std::max(units, sums);
    return room;
}

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
    for (int64_t k = 0; k < call.problems; ++k) widest = std::max(widest, problems[k].width);
    return padded_width(widest);
}

bool aligned(const HdcCudaMatrix& matrix, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && matrix.group_stride * bytes % 16 == 0 &&
           matrix.row_stride * bytes % 16 == 0;
}

// How many blocks share a problem: one for each tile that gets a gradient, or without gradients for each of x, but no
// more in all than there are processors.
int blocks_of(const HdcCudaCall& call, const HdcCudaProblem* problems, int64_t count, int processors) {
    int most = 1;
    for (int64_t k = 0; k < call.problems; ++k) {
        const int y_tiles = problems[k].dy.data ? tiles(int(problems[k].columns)) : 0;
        most = std::max(most, tiles(int(problems[k].rows)) + y_tiles);
    }
    static_assert(2 * (LONGEST / TILE) <= MOST_BLOCKS);
    return int(std::max(int64_t{1}, std::min(int64_t{most}, processors / count)));
}

template <typename T>
cudaError_t launch_depth(const Arguments& arguments, int depth, int64_t count, int shared, cudaStream_t stream) {
    const auto kernel = depth == 64 ? small_kernel<T, 64> : depth == 128 ? small_kernel<T, 128> : small_kernel<T, 256>;
    return launch(kernel, count * arguments.blocks, THREADS, arguments, stream, 1, shared);
}

}  // namespace
}  // namespace small

bool small_fits(const HdcCudaCall& call, const HdcCudaProblem* problems) {
    using namespace small;
    if (call.function != HDC_CUDA_INFO_NCE || call.problems < 1 || call.problems > MOST_PAIRS) return false;
    for (int64_t k = 0; k < call.problems; ++k) {
        const HdcCudaProblem& problem = problems[k];
        if (problem.x_ids || problem.rows < 1 || problem.rows > problem.columns || problem.columns > LONGEST ||
            problem.width < 1 || problem.width > WIDEST) {
            return false;
        }
    }
    const int64_t count = problem_count(call, problems);
    return count >= 1 && count <= INT32_MAX / MOST_BLOCKS;
}

int64_t small_workspace(const HdcCudaCall& call, const HdcCudaProblem* problems, int processors) {
    using namespace small;
    const int64_t count = problem_count(call, problems);
    return PARTS * count * blocks_of(call, problems, count, processors) * int64_t(sizeof(float));
}

cudaError_t small_contrast(
    const HdcCudaCall& call, const HdcCudaProblem* problems, int processors, cudaStream_t stream
) {
    using namespace small;
    const int64_t count = problem_count(call, problems);
    int shared = 0;
    cudaError_t error =
        cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, int(call.device));
    if (error != cudaSuccess) return error;
    Arguments arguments = {};
    arguments.pair_count = int(call.problems);
    arguments.blocks = blocks_of(call, problems, count, processors);
    arguments.task = int(call.task);
    arguments.normalize = call.normalize;
    arguments.symmetric = call.symmetric;
    arguments.temperature = {float(call.temperature), call.device_temperature};
    arguments.total = call.total;
    arguments.means = call.means;
    arguments.terms = call.terms;
    arguments.d_temperature = call.d_temperature;
    arguments.hits = call.hits;
    arguments.lse = call.lse;
    arguments.upstream = call.upstream;
    arguments.ticket = call.ticket;
    arguments.parts = static_cast<float*>(call.workspace);
    const int bytes = element_bytes(call), depth = depth_of(call, problems);
    const int out_bytes = call.task == HDC_CUDA_STEP ? 4 : bytes;
    int64_t first = 0, most = 0;
    for (int64_t k = 0; k < call.problems; ++k) {
        const HdcCudaProblem& problem = problems[k];
        const int rows = int(problem.rows), columns = int(problem.columns);
        const Room room = room_of(rows, columns, depth, bytes, shared - int64_t(sizeof(Numbers)));
        arguments.pairs[k] = {
            {problem.x, problem.y},
            {problem.dx, problem.dy},
            {rows, columns},
            {room.windows[0], room.windows[1]},
            first,
            arguments.T,
            int(problem.width),
            float(problem.weight),
            room.apart,
            aligned(problem.x, bytes) && aligned(problem.y, bytes) && aligned(problem.dx, out_bytes) &&
                aligned(problem.dy, out_bytes),
        };
        first += problem.groups;
        arguments.T += problem.groups * problem.rows;
        most = std::max(most, room.bytes);
    }
    if (bytes == 4) return launch_depth<float>(arguments, depth, count, int(most), stream);
    if (call.dtype == HDC_CUDA_BFLOAT16) return launch_depth<__nv_bfloat16>(arguments, depth, count, int(most), stream);
    return launch_depth<__half>(arguments, depth, count, int(most), stream);
}

}  // namespace hdc::cuda
