// Gradients by the unit vectors from sm_80 on: `GradientPass` in packed.h.
//
// A block owns up to 128 vectors, 16 a warp, and walks over tiles of the other side that cp.async brings, with the
// tile's terms, one ahead. A warp's vectors are in its registers, as the left factor of S, all the time. It computes S,
// makes coefficients of it in place, rounds them, and has in these very registers the left factor of the second
// product, with the same tile. Nobody else adds to its result: no atomics. Where a row has more than 512 bytes, two
// or four warps share 16 vectors, each with its part of the dimensions: they exchange sums over these for S, and
// each adds the same in the same order.
//
// Budget, by bytes of a row. Two stages; shared memory is at most 72 KiB, so that it runs on sm_86 and sm_89 (99 KiB).
//     128, 256       128 vectors, tiles of 64              stage 8 or 16 KiB; fp32 tiles of 32, half as much
//     512            128 vectors, tiles of 16              stage 8 KiB
//     1024            64 vectors, tiles of 16, 2 warps     stage 16 KiB, exchange 8 KiB
//     2048            32 vectors, tiles of 16, 4 warps     stage 32 KiB, exchange 8 KiB
// Registers for widths 64, 128, 256, 512 on sm_80: 16 bits 150, 198, 254, 252; tf32 166, 184, 186, 186; fp32 194, 255,
// 255, 255; up to ten more on sm_86, 89 and 90a; none spilled. 32 to 128 of them are accumulators of the result, as
// many or half as many the block's own vectors.
// Floor at N = 65,536, D = 128 on an A100, both directions: bf16 14 ms for the four products; tf32 28 ms, fp32 85 ms.
// A right factor of mma.sync, 256 bytes from shared memory, serves 16 rows, 2 clocks of the tensor cores: that is all
// that shared memory gives, and 32 rows a warp would halve it, but for twice the registers.
//
// Tried, by what ptxas says: numbers of a row or a block in registers spill, hence `k` and `factor` in shared memory
// and rows' terms from L1; so do tiles of 32 from 512 bytes on. No GPU has run this yet; tests/test_cuda_portable.py
// runs this very source on emulated warps.
#include "portable_tiles.cuh"

namespace hdc::cuda {
namespace portable {
namespace {

template <Type TYPE>
constexpr float GAIN = probability_gain(TYPE);

template <Type TYPE, int WIDTH>
struct Tile {
    static constexpr int ROW_BYTES = WIDTH * BYTES<TYPE>;
    static constexpr int ACROSS = ROW_BYTES <= 512 ? 1 : ROW_BYTES / 512;  // warps that share rows: a team
    static constexpr int DEPTH = WIDTH / ACROSS;                           // dimensions of a warp
    static constexpr int ROWS = WARPS / ACROSS * 16;
    static constexpr int COLUMNS = ROW_BYTES > 256 ? 16 : TYPE == Type::fp32 ? 32 : 64;
    static constexpr int FRAGMENTS = COLUMNS / 8;
};

template <Type TYPE, int WIDTH>
struct Shared {
    using T = Tile<TYPE, WIDTH>;
    unsigned char units[STAGES][T::COLUMNS * T::ROW_BYTES];
    float shift[STAGES][T::COLUMNS], share[STAGES][T::COLUMNS];
    float k, factor;  // of `weigh`: there are no registers to spare
    float partial[T::ACROSS > 1 ? WARPS : 1][T::FRAGMENTS * 4][32];  // cosines over the dimensions of a warp
};

// The left factor of the second product: coefficients of 16 rows and the step's columns, 16 or 8. Which column of a
// step is which k of mma.sync is free, as long as `load_columns` has the same order; with 32 bits k = t is column
// 2t and k = t + 4 column 2t + 1, so that every lane has what it needs.
template <Type TYPE, int COUNT>
__device__ inline Factor<TYPE> coefficients(const float (&c)[COUNT][4], int step) {
    if constexpr (BYTES<TYPE> == 2) {
        const float(&left)[4] = c[2 * step];
        const float(&right)[4] = c[2 * step + 1];
        using T = Multiplied<TYPE>;
        const uint32_t pairs[4] = {narrow_pair<T>(left[0], left[1]), narrow_pair<T>(left[2], left[3]),
                                   narrow_pair<T>(right[0], right[1]), narrow_pair<T>(right[2], right[3])};
        return Factor<TYPE>(pairs);
    } else {
        uint32_t bits[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float x = c[step][i % 2 * 2 + i / 2];
            bits[i] = __float_as_uint(TYPE == Type::tf32 ? round_to_tf32(x) : x);
        }
        return Factor<TYPE>(bits);
    }
}

// Its right factors: 16 dimensions from `dimension` on of the step's vectors, whose first is `row`. Of 32 bits, lane
// 4g + t loads dimensions 2g and 2g + 1 at once, and they are column g of the one factor and of the other.
template <Type TYPE, int ROW_BYTES>
__device__ inline void load_columns(uint32_t (&to)[4], const unsigned char* tile, int row, int dimension) {
    const int lane = threadIdx.x % 32, byte = dimension * BYTES<TYPE>;
    if constexpr (BYTES<TYPE> == 2) {
        load_transposed(to, tile + place<ROW_BYTES>(row + lane % 16, byte + lane / 16 * PIECE));
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const auto pair = *reinterpret_cast<const uint2*>(
                tile + place<ROW_BYTES>(row + lane % 4 * 2 + i, byte + lane / 4 * 8));
            to[i] = pair.x;
            to[2 + i] = pair.y;
        }
    }
}

// Of the 16 dimensions of two fragments of the result, a lane has twice two neighbours in its upper and its lower row.
template <Type TYPE>
__device__ inline void store_pair(float* to, const float (*c)[4], bool low, float factor) {
    constexpr bool HALF = BYTES<TYPE> == 2;
    const int t = threadIdx.x % 4, e = 2 * low;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        const float first = HALF ? c[which][e] : c[0][e + which], second = HALF ? c[which][e + 1] : c[1][e + which];
        const int dimension = HALF ? which * 8 + t * 2 : t * 4 + which * 2;
        *reinterpret_cast<float2*>(to + dimension) = make_float2(first * factor, second * factor);
    }
}

// Cosines become coefficients, in place. The terms are those of the lane's rows and of all columns. The rows' are not
// kept in registers: there is none to spare.
template <bool OWN, bool OTHER, int COUNT>
__device__ inline void weigh(float (&c)[COUNT][4], const Term& rows, const Term& columns, float k, float factor) {
    float row_shift[2], row_share[2];
    if constexpr (OWN) {
#pragma unroll
        for (int low = 0; low < 2; ++low) {
            row_shift[low] = rows.shift[low * 8];
            row_share[low] = OTHER ? rows.share[low * 8] * factor : factor;
        }
    }
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            const int column = n * 8 + threadIdx.x % 4 * 2 + b;
            float shift = 0.0f, share = 0.0f;
            if constexpr (OTHER) {
                shift = columns.shift[column];
                share = columns.share[column] * factor;
            }
#pragma unroll
            for (int low = 0; low < 2; ++low) {
                float& element = c[n][low * 2 + b];
                float coefficient = 0.0f;
                if constexpr (OTHER) coefficient = power_of_two(fmaf(element, k, -shift)) * share;
                if constexpr (OWN) {
                    coefficient = fmaf(power_of_two(fmaf(element, k, -row_shift[low])), row_share[low], coefficient);
                }
                element = coefficient;
            }
        }
    }
}

template <Type TYPE, int WIDTH>
__global__ void __launch_bounds__(THREADS, 1) gradient_kernel(const __grid_constant__ GradientPass pass) {
    using T = Tile<TYPE, WIDTH>;
    constexpr int STEPS = T::DEPTH * BYTES<TYPE> / STEP, STEPS_AT_ONCE = 4;
    constexpr int STEP_COLUMNS = STEP / BYTES<TYPE>;
    Shared<TYPE, WIDTH>& shared = *reinterpret_cast<Shared<TYPE, WIDTH>*>(dynamic_memory());
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int team = warp / T::ACROSS, part = warp % T::ACROSS;
    const int blocks = static_cast<int>((pass.own.count + T::ROWS - 1) / T::ROWS);
    const int tiles = static_cast<int>((pass.other.count + T::COLUMNS - 1) / T::COLUMNS);
    const int splits = static_cast<int>(pass.splits), split = blockIdx.y, group = blockIdx.x / blocks;
    const int row = blockIdx.x % blocks * T::ROWS + team * 16 + lane / 4;  // the lane's first, the other is 8 below
    const int first = split * tiles / splits, last = (split + 1) * tiles / splits;
    const int own0 = group * static_cast<int>(pass.own.padded) + row;
    const bool own_term = pass.own_term.share, other_term = pass.other_term.share;
    constexpr float gain = GAIN<TYPE>;
    if (threadIdx.x == 0) {
        shared.k = inverse_temperature(pass.temperature) * LOG2_E;
        shared.factor = other_term ? gain / fmaxf(pass.largest[group], 1e-30f) : gain;
    }
    __syncthreads();

    const auto copy = [&](int tile) {
        if (tile < last) {
            const int column0 = group * static_cast<int>(pass.other.padded) + tile * T::COLUMNS;
            const int stage = tile % STAGES;
            const auto* units = static_cast<const unsigned char*>(pass.other.units) + int64_t{column0} * T::ROW_BYTES;
            copy_rows<T::COLUMNS, T::ROW_BYTES>(shared.units[stage], units, T::ROW_BYTES);
            if (other_term && threadIdx.x < T::COLUMNS / 4) {
                copy_async(shared.shift[stage] + threadIdx.x * 4, pass.other_term.shift + column0 + threadIdx.x * 4);
                copy_async(shared.share[stage] + threadIdx.x * 4, pass.other_term.share + column0 + threadIdx.x * 4);
            }
        }
        copy_commit();
    };
    copy(first);

    // The warp's rows and dimensions, as left factors.
    uint32_t own[STEPS][4];
    const unsigned char* from = static_cast<const unsigned char*>(pass.own.units) + int64_t{own0} * T::ROW_BYTES +
                                part * T::DEPTH * BYTES<TYPE> + lane % 4 * 4;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            own[s][i] = *reinterpret_cast<const uint32_t*>(from + i % 2 * 8 * T::ROW_BYTES + s * STEP + i / 2 * PIECE);
        }
    }

    float total[T::DEPTH / 8][4] = {};
    for (int tile = first; tile < last; ++tile) {
        copy_wait<0>();
        __syncthreads();
        copy(tile + 1);
        const int stage = tile % STAGES, column0 = tile * T::COLUMNS;
        const unsigned char* units = shared.units[stage];

        float c[T::FRAGMENTS][4] = {};
#pragma unroll
        for (int some = 0; some < STEPS; some += STEPS_AT_ONCE) {
            accumulate<TYPE, T::FRAGMENTS>(c, [&](auto* sum) {
#pragma unroll
                for (int s = some; s < some + STEPS_AT_ONCE; ++s) {
                    // Keeps the compiler from splitting fp32's before the loop, into twice the registers.
                    asm volatile("" : "+r"(own[s][0]), "+r"(own[s][1]), "+r"(own[s][2]), "+r"(own[s][3]));
                    const Factor<TYPE> left(own[s]);
#pragma unroll
                    for (int n = 0; n < T::FRAGMENTS; n += 2) {
                        uint32_t b[4];
                        load_right<T::ROW_BYTES>(b, units, n * 8, part * T::DEPTH * BYTES<TYPE> + s * STEP);
                        multiply_pair<TYPE, T::FRAGMENTS>(sum + n, left, Factor<TYPE>(b));
                    }
                }
            });
        }
        if constexpr (T::ACROSS > 1) {
#pragma unroll
            for (int i = 0; i < T::FRAGMENTS * 4; ++i) shared.partial[warp][i][lane] = c[i / 4][i % 4];
            __syncthreads();  // whoever writes them again has passed the next tile's barrier
#pragma unroll
            for (int i = 0; i < T::FRAGMENTS * 4; ++i) c[i / 4][i % 4] = 0.0f;
#pragma unroll 1
            for (int p = 0; p < T::ACROSS; ++p) {
#pragma unroll
                for (int i = 0; i < T::FRAGMENTS * 4; ++i) {
                    c[i / 4][i % 4] += shared.partial[team * T::ACROSS + p][i][lane];
                }
            }
        }
        const bool on_diagonal = row / T::COLUMNS == tile;
        if (pass.own.ids || column0 + T::COLUMNS > pass.other.count || (on_diagonal && !pass.diagonal)) {
            mask(c, pass, group, row, column0 + lane % 4 * 2);
        }
        const Term own_rows = {pass.own_term.share + own0, pass.own_term.shift + own0};
        const Term columns = {shared.share[stage], shared.shift[stage]};
        if (!other_term) {
            weigh<true, false>(c, own_rows, columns, shared.k, shared.factor);
        } else if (!own_term) {
            weigh<false, true>(c, own_rows, columns, shared.k, shared.factor);
        } else {
            weigh<true, true>(c, own_rows, columns, shared.k, shared.factor);
        }
        Factor<TYPE> left[T::COLUMNS / STEP_COLUMNS];
#pragma unroll
        for (int s = 0; s < T::COLUMNS / STEP_COLUMNS; ++s) left[s] = coefficients<TYPE>(c, s);
#pragma unroll
        for (int n = 0; n < T::DEPTH / 8; n += 2) {
            accumulate<TYPE, 2>(total + n, [&](auto* sum) {
#pragma unroll
                for (int s = 0; s < T::COLUMNS / STEP_COLUMNS; ++s) {
                    uint32_t b[4];
                    load_columns<TYPE, T::ROW_BYTES>(b, units, s * STEP_COLUMNS, part * T::DEPTH + n * 8);
                    multiply_pair<TYPE, 2>(sum, left[s], Factor<TYPE>(b));
                }
            });
        }
    }

#pragma unroll
    for (int low = 0; low < 2; ++low) {
        if (row + low * 8 >= pass.own.count) continue;
        const float scale = other_term ? 1.0f / shared.factor : pass.own_term.share[own0 + low * 8] / gain;
        float* to = pass.gradient + (split * pass.groups * pass.own.padded + own0 + low * 8) * WIDTH + part * T::DEPTH;
#pragma unroll
        for (int n = 0; n < T::DEPTH / 8; n += 2) store_pair<TYPE>(to + n * 8, total + n, low, scale);
    }
}

template <Type TYPE, typename Call>
auto with_width(int width, Call call) {
    switch (width) {
        case 64: return call(Tile<TYPE, 64>());
        case 128: return call(Tile<TYPE, 128>());
        case 256: return call(Tile<TYPE, 256>());
        default: return call(Tile<TYPE, 512>());
    }
}

// What `call` returns for the tile of the pass.
template <typename Call>
auto with_tile(const GradientPass& pass, Call call) {
    switch (pass.type) {
        case Type::fp32: return with_width<Type::fp32>(pass.width, call);
        case Type::tf32: return with_width<Type::tf32>(pass.width, call);
        case Type::bf16: return with_width<Type::bf16>(pass.width, call);
        default: return with_width<Type::fp16>(pass.width, call);
    }
}

template <Type TYPE, int WIDTH>
int64_t row_blocks(const GradientPass& pass, Tile<TYPE, WIDTH> tile) {
    return pass.groups * ((pass.own.count + tile.ROWS - 1) / tile.ROWS);
}

template <Type TYPE, int WIDTH>
cudaError_t launch_tile(const GradientPass& pass, Tile<TYPE, WIDTH> tile, cudaStream_t stream) {
    constexpr int SHARED_BYTES = sizeof(Shared<TYPE, WIDTH>);
    static_assert(SHARED_BYTES <= 99 * 1024, "more shared memory than a block of sm_86 may have");
    return launch(gradient_kernel<TYPE, WIDTH>, row_blocks(pass, tile), THREADS, pass, stream, pass.splits,
                  SHARED_BYTES);
}

}  // namespace
}  // namespace portable

Plan portable_gradient_plan(const GradientPass& pass, int processors) {
    return portable::with_tile(pass, [&](auto tile) {
        const int64_t tiles = (pass.other.count + tile.COLUMNS - 1) / tile.COLUMNS;
        return Plan{best_splits(portable::row_blocks(pass, tile), tiles, processors), 0};
    });
}

cudaError_t portable_gradient(const GradientPass& pass, cudaStream_t stream) {
    return portable::with_tile(pass, [&](auto tile) { return portable::launch_tile(pass, tile, stream); });
}

}  // namespace hdc::cuda
