// Row sums of exponentials on Hopper, and column sums from the same pass: `LogsumexpPass` in packed.h.
//
// A block owns 256 rows, 128 a consumer warpgroup, and walks over tiles of 128 columns that a producer warp fetches
// by TMA in chunks of 64 dimensions. A consumer's product [128, 128] is two chains of wgmma; while the special-
// function units take its exponentials, the tensor cores work on the other's. Sums of a row stay in registers over
// all tiles. Sums down the columns are taken over a consumer's rows tile by tile and kept in parts: `part` of
// column_parts/2 has row blocks part, part + column_parts/2, …, adds them in that order, and has a row of
// column_total for each consumer, so that memory does not grow with the product of both sides.
//
// Budget, two bytes an element. Registers: 128 of accumulators, at most 240 in all. Shared memory: rows 32, 64 or
// 128 KiB for D = 64, 128, 256; 8, 8 or 5 chunks of columns of 16 KiB; 8 KiB for the column sums.
// Floor at N = 65,536, D = 128 on an H100: 1.11 ms for the product, as much for the exponentials, side by side. A
// tile of columns serves 256 rows: 16 bytes a clock from L2, half of what 128 rows would ask.
//
// Decided on paper: 256 rows a block rather than multicast in a cluster, which asks as little of L2 without
// blocks that wait for each other; no polynomial exp2, before the overlap is measured. No GPU has run this yet.
#include "fragments.cuh"
#include "hopper_tiles.cuh"

namespace hdc::cuda {
namespace hopper {
namespace {

constexpr int ROWS = 2 * WARPGROUP;
constexpr int COLUMNS = 128;
constexpr int STAGE_BYTES = COLUMNS * ROW_BYTES;
constexpr int OWN_CHUNK_BYTES = ROWS * ROW_BYTES;

template <int WIDTH>
constexpr int STAGES = WIDTH == 256 ? 5 : 8;

template <int WIDTH>
struct Shared {
    unsigned char own[WIDTH / CHUNK * OWN_CHUNK_BYTES];
    unsigned char stages[STAGES<WIDTH>][STAGE_BYTES];
    float columns[2][2][4][COLUMNS];  // consumer, one of two tiles, warp
    uint64_t full[STAGES<WIDTH>], empty[STAGES<WIDTH>], own_full, own_empty;
};

// What a block does: row blocks part, part + parts, … of a problem against a range of tiles.
struct Item {
    int group, split, part, first, last;
};

struct Work {
    int blocks, parts, tiles, splits, items;  // counts of blocks and tiles, which fit; addresses have 64 bits

    explicit Work(const LogsumexpPass& pass)
        : blocks(static_cast<int>(pass.own.padded / ROWS)),
          parts(pass.column_parts ? static_cast<int>(pass.column_parts / 2) : blocks),
          tiles(static_cast<int>((pass.other.count + COLUMNS - 1) / COLUMNS)),
          splits(static_cast<int>(pass.splits)),
          items(static_cast<int>(pass.groups) * splits * parts) {}

    __device__ Item item(int index) const {
        const int split = index / parts % splits;
        return {index / (parts * splits), split, index % parts, split * tiles / splits, (split + 1) * tiles / splits};
    }
};

template <int WIDTH>
__device__ void produce(Shared<WIDTH>& shared, const CUtensorMap* own, const CUtensorMap* other,
                        const LogsumexpPass& pass, const Work& work) {
    Ring<STAGES<WIDTH>> ring;
    uint32_t own_parity = 0;
    for (int index = blockIdx.x; index < work.items; index += gridDim.x) {
        const Item item = work.item(index);
        for (int block = item.part; block < work.blocks; block += work.parts) {
            barrier_wait(&shared.own_empty, own_parity ^ 1);
            barrier_expect(&shared.own_full, sizeof(shared.own));
            for (int chunk = 0; chunk < WIDTH / CHUNK; ++chunk) {
                load_box(shared.own + chunk * OWN_CHUNK_BYTES, own, &shared.own_full, chunk * CHUNK,
                         block * ROWS, item.group);
            }
            own_parity ^= 1;
            for (int tile = item.first; tile < item.last; ++tile) {
                for (int chunk = 0; chunk < WIDTH / CHUNK; ++chunk) {
                    barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
                    barrier_expect(&shared.full[ring.stage], STAGE_BYTES);
                    load_box(shared.stages[ring.stage], other, &shared.full[ring.stage], chunk * CHUNK,
                             tile * COLUMNS, item.group);
                    ring.advance();
                }
            }
        }
    }
}

// Cosines [128, 128] of this consumer's rows and the tile whose chunks come next.
template <Type TYPE, int WIDTH>
__device__ void cosines(float (&accumulators)[2][64], Shared<WIDTH>& shared, Ring<STAGES<WIDTH>>& ring, Turns& turns) {
    constexpr int CHUNKS = WIDTH / CHUNK;
    const uint32_t own = shared_address(shared.own) + turns.consumer * WARPGROUP * ROW_BYTES;
    int before = 0;
    turns.wait();
    hold(accumulators[0]);
    hold(accumulators[1]);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        barrier_wait(&shared.full[ring.stage], ring.parity);
        wgmma_fence();
        const uint32_t columns = shared_address(shared.stages[ring.stage]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t rows = own + chunk * OWN_CHUNK_BYTES + half * 64 * ROW_BYTES;
#pragma unroll
            for (int step = 0; step < CHUNK / STEP; ++step) {
                multiply<TYPE, COLUMNS>(accumulators[half], descriptor(rows + step * STEP * 2, 16),
                                        descriptor(columns + step * STEP * 2, 16), chunk + step > 0);
            }
        }
        wgmma_commit();
        if (chunk > 0) {
            wgmma_wait<1>();
            release(&shared.empty[before]);
        }
        before = ring.stage;
        ring.advance();
    }
    turns.pass();
    wgmma_wait<0>();
    hold(accumulators[0]);
    hold(accumulators[1]);
    release(&shared.empty[before]);
}

// −∞ where a pair does not count, on the diagonal (its cosines are stored) and beyond the last column.
__device__ inline void mask(float (&accumulators)[2][64], const LogsumexpPass& pass, bool on_diagonal, int columns,
                            float* diagonal, int64_t own0, int thread) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            const int row = half * 64 + fragment_row(thread) + (i / 2 % 2) * 8;
            const int column = i / 4 * 8 + fragment_column(thread) + i % 2;
            const bool here = on_diagonal && row == column;
            if (here && column < columns && diagonal) diagonal[own0 + row] = accumulators[half][i];
            if (column >= columns || (here && !pass.diagonal)) accumulators[half][i] = -INFINITY;
        }
    }
}

template <Type TYPE, int WIDTH, bool RUNNING, bool DOWN>
__device__ void consume(Shared<WIDTH>& shared, const LogsumexpPass& pass, const Work& work, float shift) {
    const int consumer = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP, lane = thread % 32;
    const float k = inverse_temperature(pass.temperature) * LOG2_E;
    Ring<STAGES<WIDTH>> ring;
    Turns turns{consumer};
    uint32_t own_parity = 0;
    int buffer = 0;
    float accumulators[2][64];
    for (int index = blockIdx.x; index < work.items; index += gridDim.x) {
        const Item item = work.item(index);
        for (int block = item.part; block < work.blocks; block += work.parts) {
            const int row0 = block * ROWS + consumer * WARPGROUP;
            float row_shift[4], top[4], total[4];  // of rows `fragment_row` + 0, 8, 64 and 72
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int row = row0 + fragment_row(thread) + r / 2 * 64 + r % 2 * 8;
                row_shift[r] = row < pass.own.count ? shift : INFINITY;
                top[r] = -INFINITY;
                total[r] = 0.0f;
            }
            barrier_wait(&shared.own_full, own_parity);
            own_parity ^= 1;
            for (int tile = item.first; tile < item.last; ++tile) {
                cosines<TYPE, WIDTH>(accumulators, shared, ring, turns);
                if (tile + 1 == item.last) release(&shared.own_empty);
                const int column0 = tile * COLUMNS, left = static_cast<int>(pass.other.count) - column0;
                const bool on_diagonal = column0 == row0;
                if (left < COLUMNS || (on_diagonal && (pass.diagonal_cosine || !pass.diagonal))) {
                    mask(accumulators, pass, on_diagonal, left, pass.diagonal_cosine, item.group * pass.own.padded + row0, thread);
                }
                float base[4];
                if constexpr (RUNNING) {
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        float higher = top[r];
#pragma unroll
                        for (int n = 0; n < 16; ++n) {
                            const float* pair = &accumulators[r / 2][n * 4 + r % 2 * 2];
                            higher = fmaxf(higher, fmaxf(pair[0], pair[1]));
                        }
                        higher = fmaxf(higher, __shfl_xor_sync(0xffffffff, higher, 1));
                        higher = fmaxf(higher, __shfl_xor_sync(0xffffffff, higher, 2));
                        base[r] = higher == -INFINITY ? 0.0f : higher;
                        total[r] *= power_of_two((top[r] - base[r]) * k);
                        top[r] = higher;
                    }
                }
                float tile_total[4] = {};
#pragma unroll
                for (int quarter = 0; quarter < 4; ++quarter) {
                    float sums[8] = {};
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
#pragma unroll
                        for (int r = 0; r < 4; ++r) {
                            const int n = quarter * 4 + i / 2;
                            const float cosine = accumulators[r / 2][n * 4 + r % 2 * 2 + i % 2];
                            float exponential;
                            if constexpr (RUNNING) {
                                exponential = power_of_two((cosine - base[r]) * k);
                            } else {
                                exponential = power_of_two(fmaf(cosine, k, -row_shift[r]));
                                top[r] = fmaxf(top[r], cosine);
                            }
                            tile_total[r] += exponential;
                            if constexpr (DOWN) sums[i] += exponential;
                        }
                    }
                    if constexpr (DOWN) {
                        const int column = quarter * 32 + lane / 8 * 8 + fragment_column(thread) + lane / 4 % 2;
                        shared.columns[consumer][buffer][thread / 32][column] = over_rows(sums, lane);
                    }
                }
#pragma unroll
                for (int r = 0; r < 4; ++r) total[r] += tile_total[r];
                if constexpr (DOWN) {
                    // Two buffers: whoever writes one again has passed the barrier after which all had read it.
                    named_wait(3 + consumer, WARPGROUP);
                    const float(&parts)[4][COLUMNS] = shared.columns[consumer][buffer];
                    const int64_t row = int64_t{2 * item.part + consumer} * pass.groups + item.group;
                    float* down = pass.column_total + row * pass.other.padded + column0 + thread;
                    const float sum = (parts[0][thread] + parts[1][thread]) + (parts[2][thread] + parts[3][thread]);
                    *down = block == item.part ? sum : *down + sum;
                    buffer ^= 1;
                }
            }
#pragma unroll
            for (int r = 0; r < 4; ++r) {
#pragma unroll
                for (int other = 1; other < 4; other *= 2) {
                    total[r] += __shfl_xor_sync(0xffffffff, total[r], other);
                    top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffff, top[r], other));
                }
                if (lane % 4 == 0) {
                    const int64_t row = (item.split * pass.groups + item.group) * pass.own.padded + row0 +
                                        fragment_row(thread) + r / 2 * 64 + r % 2 * 8;
                    pass.total[row] = total[r];
                    pass.highest[row] = top[r];
                }
            }
        }
    }
    turns.end();
}

template <Type TYPE, int WIDTH, bool DOWN>
__global__ void __launch_bounds__(THREADS, 1)
    logsumexp_kernel(const __grid_constant__ CUtensorMap own, const __grid_constant__ CUtensorMap other,
                     const __grid_constant__ LogsumexpPass pass, const __grid_constant__ Work work) {
    const int64_t longest = pass.own.count > pass.other.count ? pass.own.count : pass.other.count;
    const float shift = fixed_shift(pass.temperature, pass.bounded, longest);
    const bool running = shift != shift;
    if (pass.only_running && !running) return;
    Shared<WIDTH>& shared = *reinterpret_cast<Shared<WIDTH>*>(shared_memory());
    create_barriers(shared, &own, &other);
    if (threadIdx.x < WARPGROUP) {
        give_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce<WIDTH>(shared, &own, &other, pass, work);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        if (running) {
            consume<TYPE, WIDTH, true, false>(shared, pass, work, 0.0f);
        } else {
            consume<TYPE, WIDTH, false, DOWN>(shared, pass, work, shift);
        }
    }
}

template <Type TYPE, int WIDTH>
cudaError_t with_columns(const LogsumexpPass& pass, cudaStream_t stream) {
    const auto kernel = pass.column_total ? logsumexp_kernel<TYPE, WIDTH, true> : logsumexp_kernel<TYPE, WIDTH, false>;
    return launch<Shared<WIDTH>>(kernel, pass, Work(pass), ROWS, COLUMNS, stream);
}

}  // namespace
}  // namespace hopper

bool hopper_fits(const Pass& pass) {
    const bool half = pass.type == Type::bf16 || pass.type == Type::fp16;
    return half && pass.width <= 256 && !pass.own.ids && pass.own.count > 0 && pass.other.count > 0;
}

Plan hopper_logsumexp_plan(const LogsumexpPass& pass, bool columns, int processors) {
    const int64_t blocks = pass.own.padded / hopper::ROWS;
    const int64_t tiles = (pass.other.count + hopper::COLUMNS - 1) / hopper::COLUMNS;
    // Parts of equally many row blocks, at most as many as there are processors.
    const int64_t in_turn = columns ? (blocks + processors - 1) / processors : 1;
    const int64_t parts = (blocks + in_turn - 1) / in_turn;
    return {best_splits(pass.groups * parts, tiles, processors), columns ? 2 * parts : 0};
}

cudaError_t hopper_logsumexp(const LogsumexpPass& pass, cudaStream_t stream) {
    return hopper::with_vectors(pass, [&](auto vectors) {
        using V = decltype(vectors);
        return hopper::with_columns<V::TYPE, V::WIDTH>(pass, stream);
    });
}

}  // namespace hdc::cuda
