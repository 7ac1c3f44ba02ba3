// Row sums of exponentials from sm_80 on, and column sums from the same pass: `LogsumexpPass` in packed.h.
//
// A block multiplies 128 rows by tiles of 128 columns, eight warps 32 × 64 each, in chunks of 128 bytes of the width:
// cp.async fills one stage of shared memory while mma.sync reads the other. The width is a number of chunks, no
// template: rows of one chunk or two stay in shared memory over all tiles, of more come again with every tile. Two
// blocks share an SM, so that the exponentials of one have the product of the other beside them. Sums of a row stay
// in registers over all tiles, and the two warps that share rows are joined at the end. Sums down the columns are
// taken over 128 rows tile by tile and kept in parts: `part` of column_parts has row blocks part, part +
// column_parts, … and adds them in that order, so that memory does not grow with the product of both sides.
//
// Budget. Shared memory: 64 KiB of stages and 3 KiB of sums, so that it runs on sm_86 and sm_89 (99 KiB), there one
// block at a time. Registers: 64 of accumulators, 128 in all (124 to 128 on sm_80, 86, 89, 90a), none spilled; fp32
// takes up to 254, for one block at a time.
// Floor at N = 65,536, D = 128 on an A100: bf16 3.5 ms for the product, 1.8 ms for the exponentials beside it; tf32
// 7.0 ms; fp32 21 ms, where FMA would take 56. A chunk of columns, 16 KiB, serves 1,024 clocks of the tensor cores;
// where rows come again it is 32 KiB, which is about what L2 gives.
//
// Decided on paper: two blocks of two stages rather than one of four. Tried, by what ptxas says: ids in registers for
// all columns of a lane at once spill, hence the bits in `mask`; four steps of a chunk unrolled spill, two do not. No
// GPU has run this yet; tests/test_cuda_portable.py runs this very source on emulated warps.
#include "portable_tiles.cuh"

namespace hdc::cuda {
namespace portable {
namespace {

constexpr int TILE = 128;   // rows and columns
constexpr int CHUNK = 128;  // bytes of a row
constexpr int WARPS_DOWN = 4, WARPS_ACROSS = 2;
constexpr int WARP_ROWS = TILE / WARPS_DOWN, WARP_COLUMNS = TILE / WARPS_ACROSS;
constexpr int SLABS = WARP_ROWS / 16, FRAGMENTS = WARP_COLUMNS / 8;  // of a warp: a slab is 16 rows
constexpr int LANE_ROWS = 2 * SLABS;  // of a lane: its row r is 8·r below its first

template <Type TYPE>
constexpr int BLOCKS = TYPE == Type::fp32 ? 1 : 2;  // that an SM runs at a time

struct Shared {
    unsigned char own[STAGES][TILE * CHUNK], other[STAGES][TILE * CHUNK];
    float columns[WARPS_DOWN][TILE];
    float highest[TILE], total[TILE];  // of the right half of the columns
};
static_assert(sizeof(Shared) <= 99 * 1024, "more shared memory than a block of sm_86 may have");

__host__ __device__ inline int64_t tiles_of(int64_t count) { return (count + TILE - 1) / TILE; }

// What a block does: row blocks part, part + parts, … of a problem against a range of tiles.
struct Item {
    int group, split, part, parts, blocks, first, last;

    __device__ explicit Item(const LogsumexpPass& pass) {
        blocks = static_cast<int>(tiles_of(pass.own.count));
        parts = pass.column_parts ? static_cast<int>(pass.column_parts) : blocks;
        const int tiles = static_cast<int>(tiles_of(pass.other.count));
        const int splits = static_cast<int>(pass.splits);
        part = static_cast<int>(blockIdx.x) % parts;
        group = static_cast<int>(blockIdx.x) / parts;
        split = static_cast<int>(blockIdx.y);
        first = split * tiles / splits;
        last = (split + 1) * tiles / splits;
    }
};

// A block's copies in the order in which the products need them: chunks of a tile, tiles of a row block, row blocks.
// Rows of two chunks or of one stay in the stages over all tiles.
class Copies {
    const LogsumexpPass& pass;
    const Item& item;
    const int row_bytes;
    int block, tile, chunk = 0, own_stage = 0, other_stage = 0;

    __device__ void copy(unsigned char* to, const Side& side, int row) const {
        const auto* units = static_cast<const unsigned char*>(side.units);
        copy_rows<TILE, CHUNK>(to, units + (item.group * side.padded + row) * row_bytes + chunk * CHUNK, row_bytes);
    }

   public:
    struct Stages {
        int own, other;
    };

    __device__ Copies(const LogsumexpPass& pass, const Item& item, int row_bytes)
        : pass(pass),
          item(item),
          row_bytes(row_bytes),
          block(item.first < item.last ? item.part : item.blocks),
          tile(item.first) {}

    // Begins the next chunk's, if there is one; a group either way. Returns where those lie that began before.
    __device__ Stages next(Shared& shared) {
        const Stages before = {own_stage, other_stage};
        if (block < item.blocks) {
            const int chunks = row_bytes / CHUNK;
            other_stage ^= 1;
            copy(shared.other[other_stage], pass.other, tile * TILE);
            const bool first = tile == item.first;
            if (chunks > 1 || first) own_stage ^= 1;
            if (chunks > 2 || first) copy(shared.own[own_stage], pass.own, block * TILE);
            if (++chunk == chunks) {
                chunk = 0;
                if (++tile == item.last) {
                    tile = item.first;
                    block += item.parts;
                }
            }
        }
        copy_commit();
        return before;
    }
};

// c += the warp's rows · its columns, over a chunk.
template <Type TYPE>
__device__ inline void multiply_chunk(float (&c)[SLABS][FRAGMENTS][4], const unsigned char* own,
                                      const unsigned char* other, int row0, int column0) {
#pragma unroll TYPE == Type::fp32 ? 1 : 2  // more would not fit into the registers
    for (int byte = 0; byte < CHUNK; byte += STEP) {
        uint32_t a[SLABS][4];
#pragma unroll
        for (int s = 0; s < SLABS; ++s) load_left<CHUNK>(a[s], own, row0 + s * 16, byte);
#pragma unroll
        for (int n = 0; n < FRAGMENTS; n += 2) {
            uint32_t b[4];
            load_right<CHUNK>(b, other, column0 + n * 8, byte);
            const Factor<TYPE> right(b);
#pragma unroll
            for (int s = 0; s < SLABS; ++s) {
                const Factor<TYPE> left(a[s]);
                accumulate<TYPE, 2>(&c[s][n], [&](auto* sum) { multiply_pair<TYPE, 2>(sum, left, right); });
            }
        }
    }
}

template <Type TYPE, bool RUNNING, bool DOWN>
__device__ void sum_exponentials(Shared& shared, const LogsumexpPass& pass, float shift) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp / WARPS_ACROSS * WARP_ROWS, warp_column = warp % WARPS_ACROSS * WARP_COLUMNS;
    const int lane_row = warp_row + lane / 4, lane_column = warp_column + lane % 4 * 2;
    const int count = static_cast<int>(pass.other.count);
    const float k = inverse_temperature(pass.temperature) * LOG2_E;
    const Item item(pass);
    const int row_bytes = pass.width * BYTES<TYPE>;
    Copies copies(pass, item, row_bytes);
    copies.next(shared);
    for (int block = item.part; block < item.blocks; block += item.parts) {
        const int row0 = block * TILE;
        float top[LANE_ROWS], total[LANE_ROWS];
#pragma unroll
        for (int r = 0; r < LANE_ROWS; ++r) {
            top[r] = -INFINITY;
            total[r] = 0.0f;
        }
        for (int tile = item.first; tile < item.last; ++tile) {
            float c[SLABS][FRAGMENTS][4] = {};
            for (int chunk = 0; chunk < row_bytes / CHUNK; ++chunk) {
                copy_wait<0>();
                __syncthreads();
                const auto [own, other] = copies.next(shared);
                multiply_chunk<TYPE>(c, shared.own[own], shared.other[other], warp_row, warp_column);
            }
            const int column0 = tile * TILE;
            const bool on_diagonal = block == tile;
            if (on_diagonal && pass.diagonal_cosine) {
#pragma unroll
                for (int i = 0; i < SLABS * FRAGMENTS * 4; ++i) {
                    const int s = i / 4 / FRAGMENTS, n = i / 4 % FRAGMENTS, e = i % 4;
                    const int row = lane_row + s * 16 + e / 2 * 8, column = lane_column + n * 8 + e % 2;
                    if (row == column && column0 + column < count) {
                        pass.diagonal_cosine[item.group * pass.own.padded + row0 + row] = c[s][n][e];
                    }
                }
            }
            if (pass.own.ids || row0 + TILE > pass.own.count || column0 + TILE > count ||
                (on_diagonal && !pass.diagonal)) {
#pragma unroll
                for (int s = 0; s < SLABS; ++s) {
                    mask(c[s], pass, item.group, row0 + lane_row + s * 16, column0 + lane_column);
                }
            }
            float base[LANE_ROWS];
            if constexpr (RUNNING) {
#pragma unroll
                for (int r = 0; r < LANE_ROWS; ++r) {
                    float higher = top[r];
#pragma unroll
                    for (int n = 0; n < FRAGMENTS; ++n) {
                        const float* pair = &c[r / 2][n][r % 2 * 2];
                        higher = fmaxf(higher, fmaxf(pair[0], pair[1]));
                    }
                    base[r] = higher == -INFINITY ? 0.0f : higher;
                    total[r] *= power_of_two((top[r] - base[r]) * k);
                    top[r] = higher;
                }
            }
            float tile_total[LANE_ROWS] = {};
#pragma unroll
            for (int quarter = 0; quarter < FRAGMENTS; quarter += 4) {
                float sums[8] = {};
#pragma unroll
                for (int i = 0; i < 8; ++i) {
#pragma unroll
                    for (int r = 0; r < LANE_ROWS; ++r) {
                        const float cosine = c[r / 2][quarter + i / 2][r % 2 * 2 + i % 2];
                        float exponential;
                        if constexpr (RUNNING) {
                            exponential = power_of_two((cosine - base[r]) * k);
                        } else {
                            exponential = power_of_two(fmaf(cosine, k, -shift));
                            top[r] = fmaxf(top[r], cosine);
                        }
                        tile_total[r] += exponential;
                        if constexpr (DOWN) sums[i] += exponential;
                    }
                }
                if constexpr (DOWN) {
                    const int column = warp_column + (quarter + lane / 8) * 8 + lane % 4 * 2 + lane / 4 % 2;
                    shared.columns[warp / WARPS_ACROSS][column] = over_rows(sums, lane);
                }
            }
#pragma unroll
            for (int r = 0; r < LANE_ROWS; ++r) total[r] += tile_total[r];
            if constexpr (DOWN) {
                __syncthreads();  // whoever writes the columns again has passed the next chunk's
                if (threadIdx.x < TILE) {
                    const int column = threadIdx.x;
                    const int64_t row = int64_t{item.part} * pass.groups + item.group;
                    float* down = pass.column_total + row * pass.other.padded + column0 + column;
                    const float sum = (shared.columns[0][column] + shared.columns[1][column]) +
                                      (shared.columns[2][column] + shared.columns[3][column]);
                    *down = block == item.part ? sum : *down + sum;
                }
            }
        }
        const auto add = [k](float& highest, float& sum, float other_highest, float other_sum) {
            if constexpr (RUNNING) {
                join(highest, sum, other_highest, other_sum, k);
            } else {
                highest = fmaxf(highest, other_highest);
                sum += other_sum;
            }
        };
#pragma unroll
        for (int r = 0; r < LANE_ROWS; ++r) {
#pragma unroll
            for (int other = 1; other < 4; other *= 2) {
                const float other_top = __shfl_xor_sync(0xffffffff, top[r], other);
                add(top[r], total[r], other_top, __shfl_xor_sync(0xffffffff, total[r], other));
            }
        }
        if (warp_column && lane % 4 == 0) {
#pragma unroll
            for (int r = 0; r < LANE_ROWS; ++r) {
                shared.highest[lane_row + r * 8] = top[r];
                shared.total[lane_row + r * 8] = total[r];
            }
        }
        __syncthreads();  // whoever writes them again has passed the next chunk's
        if (!warp_column && lane % 4 == 0) {
            const int64_t to = (item.split * pass.groups + item.group) * pass.own.padded + row0 + lane_row;
#pragma unroll
            for (int r = 0; r < LANE_ROWS; ++r) {
                add(top[r], total[r], shared.highest[lane_row + r * 8], shared.total[lane_row + r * 8]);
                pass.highest[to + r * 8] = top[r];
                pass.total[to + r * 8] = total[r];
            }
        }
    }
}

template <Type TYPE, bool DOWN>
__global__ void __launch_bounds__(THREADS, BLOCKS<TYPE>)
    logsumexp_kernel(const __grid_constant__ LogsumexpPass pass) {
    const int64_t longest = pass.own.count > pass.other.count ? pass.own.count : pass.other.count;
    const float shift = fixed_shift(pass.temperature, pass.bounded, longest);
    const bool running = shift != shift;
    if (pass.only_running && !running) return;
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_memory());
    if (running) {
        sum_exponentials<TYPE, true, false>(shared, pass, 0.0f);
    } else {
        sum_exponentials<TYPE, false, DOWN>(shared, pass, shift);
    }
}

template <Type TYPE>
cudaError_t with_columns(const LogsumexpPass& pass, cudaStream_t stream) {
    const int64_t parts = pass.column_parts ? pass.column_parts : tiles_of(pass.own.count);
    const auto kernel = pass.column_total ? logsumexp_kernel<TYPE, true> : logsumexp_kernel<TYPE, false>;
    return launch(kernel, pass.groups * parts, THREADS, pass, stream, pass.splits, sizeof(Shared));
}

}  // namespace
}  // namespace portable

Plan portable_logsumexp_plan(const LogsumexpPass& pass, bool columns, int processors) {
    using namespace portable;
    const int64_t at_a_time = (pass.type == Type::fp32 ? BLOCKS<Type::fp32> : BLOCKS<Type::bf16>) * processors;
    const int64_t blocks = tiles_of(pass.own.count);
    // Parts of equally many row blocks, no more in all than run at a time.
    const int64_t in_turn = columns ? (pass.groups * blocks + at_a_time - 1) / at_a_time : 1;
    const int64_t parts = blocks ? (blocks + in_turn - 1) / in_turn : 0;
    return {best_splits(pass.groups * parts, tiles_of(pass.other.count), at_a_time), columns ? parts : 0};
}

cudaError_t portable_logsumexp(const LogsumexpPass& pass, cudaStream_t stream) {
    switch (pass.type) {
        case Type::fp32: return portable::with_columns<Type::fp32>(pass, stream);
        case Type::tf32: return portable::with_columns<Type::tf32>(pass, stream);
        case Type::bf16: return portable::with_columns<Type::bf16>(pass, stream);
        default: return portable::with_columns<Type::fp16>(pass, stream);
    }
}

}  // namespace hdc::cuda
