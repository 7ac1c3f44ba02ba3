// Gradients by the unit vectors on Hopper: `GradientPass` in packed.h.
//
// A block owns 128 vectors, 64 a consumer warpgroup, and walks over tiles of the other side that a producer warp
// fetches by TMA, with the tile's terms. A consumer computes S again, makes coefficients of it in registers, rounds
// them, and multiplies them, as the operand in registers, with the same tile. S of the next tile is asked for
// before the second product of this one, so that the exponentials of a consumer have its own second product and
// the other consumer's two beside them. Nobody else adds to its result: no atomics.
//
// Budget, two bytes an element. Registers: accumulators of 32, 64 or 128 for D = 64, 128, 256, beside S and the
// coefficients, 64 + 32 for tiles of 128 and 32 + 16 for the tiles of 64 at D = 256; at most 240 in all. Shared
// memory: own 16, 32 or 64 KiB, tiles of 16, 32, 32 KiB in 4 stages, and 1 KiB of terms each.
// Floor at N = 65,536, D = 128 on an H100: 4.45 ms for the four products of both directions.
//
// Decided on paper: 64 columns at D = 256, where 128 would need 224 registers before any address.
//
// For ptxas to let products overlap (or it says C7513 and makes them wait for each other), no register that goes into
// one may be written while another is under way: so the loop has no first round of its own, and coefficients are
// rounded from cosines that are held until the product before is done.
//
// No GPU has run this yet.
#include "hopper_tiles.cuh"
#include "warp.cuh"

namespace hdc::cuda {
namespace hopper {
namespace {

constexpr int ROWS = 128, CONSUMER_ROWS = 64, STAGES = 4;
constexpr int OWN_CHUNK_BYTES = ROWS * ROW_BYTES;

template <int WIDTH>
constexpr int COLUMNS = WIDTH == 256 ? 64 : 128;

template <int WIDTH>
struct Stage {
    unsigned char units[WIDTH / CHUNK][COLUMNS<WIDTH> * ROW_BYTES];
};

template <int WIDTH>
struct Shared {
    unsigned char own[WIDTH / CHUNK * OWN_CHUNK_BYTES];
    Stage<WIDTH> stages[STAGES];
    float shift[STAGES][COLUMNS<WIDTH>], share[STAGES][COLUMNS<WIDTH>];
    uint64_t full[STAGES], empty[STAGES], own_full, own_empty;
};

template <Type TYPE>
constexpr float GAIN = probability_gain(TYPE);

struct Item {
    int group, split, block, first, last;
};

template <int WIDTH>
struct Work {
    int blocks, tiles, splits, items;  // counts of blocks and tiles, which fit; addresses have 64 bits

    explicit Work(const GradientPass& pass)
        : blocks(static_cast<int>((pass.own.count + ROWS - 1) / ROWS)),
          tiles(static_cast<int>((pass.other.count + COLUMNS<WIDTH> - 1) / COLUMNS<WIDTH>)),
          splits(static_cast<int>(pass.splits)),
          items(static_cast<int>(pass.groups) * splits * blocks) {}

    __device__ Item item(int index) const {
        const int split = index / blocks % splits;
        return {index / (blocks * splits), split, index % blocks, split * tiles / splits, (split + 1) * tiles / splits};
    }
};

template <int WIDTH, bool OTHER>
__device__ void produce(Shared<WIDTH>& shared, const CUtensorMap* own, const CUtensorMap* other,
                        const GradientPass& pass, const Work<WIDTH>& work) {
    constexpr int TERM_BYTES = COLUMNS<WIDTH> * sizeof(float);
    Ring<STAGES> ring;
    uint32_t own_parity = 0;
    for (int index = blockIdx.x; index < work.items; index += gridDim.x) {
        const Item item = work.item(index);
        barrier_wait(&shared.own_empty, own_parity ^ 1);
        barrier_expect(&shared.own_full, sizeof(shared.own));
        for (int chunk = 0; chunk < WIDTH / CHUNK; ++chunk) {
            load_box(shared.own + chunk * OWN_CHUNK_BYTES, own, &shared.own_full, chunk * CHUNK, item.block * ROWS,
                     item.group);
        }
        own_parity ^= 1;
        for (int tile = item.first; tile < item.last; ++tile) {
            uint64_t* full = &shared.full[ring.stage];
            barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
            barrier_expect(full, sizeof(Stage<WIDTH>) + (OTHER ? 2 * TERM_BYTES : 0));
            for (int chunk = 0; chunk < WIDTH / CHUNK; ++chunk) {
                load_box(shared.stages[ring.stage].units[chunk], other, full, chunk * CHUNK, tile * COLUMNS<WIDTH>,
                         item.group);
            }
            if constexpr (OTHER) {
                const int64_t column0 = item.group * pass.other.padded + tile * COLUMNS<WIDTH>;
                load_bytes(shared.shift[ring.stage], pass.other_term.shift + column0, TERM_BYTES, full);
                load_bytes(shared.share[ring.stage], pass.other_term.share + column0, TERM_BYTES, full);
            }
            ring.advance();
        }
    }
}

template <Type TYPE, int WIDTH, bool OWN, bool OTHER>
struct Consumer {
    static constexpr int N = COLUMNS<WIDTH>, WIDE = WIDTH < 128 ? WIDTH : 128, PARTS = WIDTH / WIDE;

    Shared<WIDTH>& shared;
    const GradientPass& pass;
    const Work<WIDTH>& work;
    const float k, scale;  // of shares before they are rounded: gain/unit
    const int consumer, thread;
    Ring<STAGES> ring{};
    float cosine[N / 2], total[PARTS][WIDE / 2];
    uint32_t coefficients[N / STEP][4];

    // Cosines [64, N] of the tile in the ring's stage; not waited for.
    __device__ void first_product() {
        barrier_wait(&shared.full[ring.stage], ring.parity);
        hold(cosine);
        wgmma_fence();
        const uint32_t own = shared_address(shared.own) + consumer * CONSUMER_ROWS * ROW_BYTES;
#pragma unroll
        for (int chunk = 0; chunk < WIDTH / CHUNK; ++chunk) {
            const uint32_t columns = shared_address(shared.stages[ring.stage].units[chunk]);
#pragma unroll
            for (int step = 0; step < CHUNK / STEP; ++step) {
                multiply<TYPE, N>(cosine, descriptor(own + chunk * OWN_CHUNK_BYTES + step * STEP * 2, 16),
                                  descriptor(columns + step * STEP * 2, 16), chunk + step > 0);
            }
        }
        wgmma_commit();
    }

    // The coefficients times the tile in `stage`, added to the total; not waited for.
    __device__ void second_product(int stage) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < N / STEP; ++step) {
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const uint32_t rows =
                    shared_address(shared.stages[stage].units[part * WIDE / CHUNK]) + step * STEP * ROW_BYTES;
                multiply_registers<TYPE, WIDE>(total[part], coefficients[step], descriptor(rows, N * ROW_BYTES),
                                               true);
            }
        }
        wgmma_commit();
    }

    // Cosines become coefficients, in place; those that do not count become 0.
    __device__ void weigh(int stage, int row0, int column0, const float (&row_shift)[2], const float (&row_share)[2]) {
        const int left = static_cast<int>(pass.other.count) - column0;
        const bool on_diagonal = !pass.diagonal && column0 <= row0 && row0 < column0 + N;
        if (left < N || on_diagonal) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) {
                const int row = row0 + fragment_row(thread) + i / 2 % 2 * 8;
                const int column = i / 4 * 8 + fragment_column(thread) + i % 2;
                if (column >= left || (on_diagonal && row == column0 + column)) cosine[i] = -INFINITY;
            }
        }
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                const int column = n * 8 + fragment_column(thread) + b;
                float shift = 0.0f, share = 0.0f;
                if constexpr (OTHER) {
                    shift = shared.shift[stage][column];
                    share = shared.share[stage][column] * scale;
                }
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float& element = cosine[n * 4 + h * 2 + b];
                    float coefficient = 0.0f;
                    if constexpr (OTHER) coefficient = power_of_two(fmaf(element, k, -shift)) * share;
                    if constexpr (OWN) {
                        coefficient = fmaf(power_of_two(fmaf(element, k, -row_shift[h])), row_share[h], coefficient);
                    }
                    element = coefficient;
                }
            }
        }
    }

    __device__ void narrow() {
#pragma unroll
        for (int step = 0; step < N / STEP; ++step) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                coefficients[step][j] =
                    round_pair<TYPE>(cosine[step * 8 + j * 2], cosine[step * 8 + j * 2 + 1]);
            }
        }
    }

    __device__ void hold_total() {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) hold(total[part]);
    }

    __device__ void run(int index, Turns& turns, uint32_t own_parity) {
        const Item item = work.item(index);
        const int row0 = item.block * ROWS + consumer * CONSUMER_ROWS;
        const int64_t own0 = item.group * pass.own.padded + row0 + fragment_row(thread);
        float row_shift[2] = {}, row_share[2] = {};
        if constexpr (OWN) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                row_shift[h] = pass.own_term.shift[own0 + h * 8];
                row_share[h] = OTHER ? pass.own_term.share[own0 + h * 8] * scale : GAIN<TYPE>;
            }
        }
        barrier_wait(&shared.own_full, own_parity);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
#pragma unroll
            for (int i = 0; i < WIDE / 2; ++i) total[part][i] = 0.0f;
        }
        turns.wait();
        first_product();
        turns.pass();
        wgmma_wait<0>();
        hold(cosine);
        weigh(ring.stage, row0, item.first * N, row_shift, row_share);
        narrow();
        int before = ring.stage;
        ring.advance();
        for (int tile = item.first + 1; tile < item.last; ++tile) {
            const int stage = ring.stage;
            hold(coefficients);
            turns.wait();
            first_product();
            second_product(before);
            turns.pass();
            wgmma_wait<1>();
            hold(cosine);
            weigh(stage, row0, tile * N, row_shift, row_share);
            wgmma_wait<0>();
            hold(coefficients);
            hold(cosine);
            release(&shared.empty[before]);
            narrow();
            before = stage;
            ring.advance();
        }
        release(&shared.own_empty);
        hold(coefficients);
        turns.wait();
        second_product(before);
        turns.pass();
        wgmma_wait<0>();
        hold(coefficients);
        hold_total();
        release(&shared.empty[before]);
        store(index);
    }

    __device__ void store(int index) {
        hide(index);  // the item is found again rather than kept: D = 256 takes all registers there are
        const Item item = work.item(index);
        const int row0 = item.block * ROWS + consumer * CONSUMER_ROWS;
        const int64_t own0 = item.group * pass.own.padded + row0 + fragment_row(thread);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (row0 + fragment_row(thread) + h * 8 >= pass.own.count) continue;
            const float factor = OTHER ? 1.0f / scale : pass.own_term.share[own0 + h * 8] / GAIN<TYPE>;
            const int64_t row = item.split * pass.groups * pass.own.padded + own0 + h * 8;
            float* to = pass.gradient + row * WIDTH + fragment_column(thread);
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
#pragma unroll
                for (int n = 0; n < WIDE / 8; ++n) {
                    const float* pair = &total[part][n * 4 + h * 2];
                    *reinterpret_cast<float2*>(to + part * WIDE + n * 8) =
                        make_float2(pair[0] * factor, pair[1] * factor);
                }
            }
        }
    }
};

template <Type TYPE, int WIDTH, bool OWN, bool OTHER>
__global__ void __launch_bounds__(THREADS, 1)
    gradient_kernel(const __grid_constant__ CUtensorMap own, const __grid_constant__ CUtensorMap other,
                    const __grid_constant__ GradientPass pass, const __grid_constant__ Work<WIDTH> work) {
    Shared<WIDTH>& shared = *reinterpret_cast<Shared<WIDTH>*>(shared_memory());
    create_barriers(shared, &own, &other);
    if (threadIdx.x < WARPGROUP) {
        give_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce<WIDTH, OTHER>(shared, &own, &other, pass, work);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        const int consumer = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP;
        const float k = inverse_temperature(pass.temperature) * LOG2_E;
        Turns turns{consumer};
        Ring<STAGES> ring;
        uint32_t own_parity = 0;
        for (int index = blockIdx.x; index < work.items; index += gridDim.x) {
            const float unit = fmaxf(pass.largest[work.item(index).group], 1e-30f);
            Consumer<TYPE, WIDTH, OWN, OTHER> item_of{shared, pass, work, k, GAIN<TYPE> / unit, consumer, thread, ring};
            item_of.run(index, turns, own_parity);
            ring = item_of.ring;
            own_parity ^= 1;
        }
        turns.end();
    }
}

template <Type TYPE, int WIDTH>
cudaError_t with_terms(const GradientPass& pass, cudaStream_t stream) {
    const auto kernel = !pass.other_term.share ? gradient_kernel<TYPE, WIDTH, true, false>
                        : !pass.own_term.share ? gradient_kernel<TYPE, WIDTH, false, true>
                                               : gradient_kernel<TYPE, WIDTH, true, true>;
    return launch<Shared<WIDTH>>(kernel, pass, Work<WIDTH>(pass), ROWS, COLUMNS<WIDTH>, stream);
}

}  // namespace
}  // namespace hopper

Plan hopper_gradient_plan(const GradientPass& pass, int processors) {
    const int64_t blocks = (pass.own.count + hopper::ROWS - 1) / hopper::ROWS;
    const int64_t columns = pass.width == 256 ? hopper::COLUMNS<256> : hopper::COLUMNS<128>;
    return {best_splits(pass.groups * blocks, (pass.other.count + columns - 1) / columns, processors), 0};
}

cudaError_t hopper_gradient(const GradientPass& pass, cudaStream_t stream) {
    return hopper::with_vectors(pass, [&](auto vectors) {
        using V = decltype(vectors);
        return hopper::with_terms<V::TYPE, V::WIDTH>(pass, stream);
    });
}

}  // namespace hdc::cuda
