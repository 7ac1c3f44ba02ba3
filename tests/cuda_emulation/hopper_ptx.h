// csrc/cuda/hopper_ptx.cuh on emulated threads: transaction barriers, TMA and wgmma as the PTX manual describes them.
//
// What is asynchronous is done as late as the program allows: boxes arrive when their barrier is waited for, products
// are made when their group is waited for, out of what registers and shared memory hold by then. Until then the box's
// place and the accumulators hold NaN. HDC_EMULATION_COPIES=early does all of it at once. What reads or overwrites too
// soon shows in one of the two.
#pragma once
#define HDC_HOPPER_PTX_CUH

#include <cuda.h>

#include <cstdio>
#include <deque>
#include <map>

#include "packed.h"
#include "warp.h"

inline void __syncwarp() { emulated::wait(emulated::block.warps[emulated::thread_index.x / 32], 32); }

namespace emulated {

struct Transfer {
    unsigned char* to;
    std::vector<unsigned char> bytes;
};

struct TransactionBarrier {
    uint32_t arrivals, pending;
    int64_t bytes = 0, phase = 0;
    std::vector<Transfer> transfers;

    void settle() {
        if (pending || bytes) return;
        pending = arrivals;
        ++phase;
    }
    void complete(const Transfer& transfer) {
        std::memcpy(transfer.to, transfer.bytes.data(), transfer.bytes.size());
        bytes -= int64_t(transfer.bytes.size());
        settle();
    }
};

inline std::map<uint64_t*, TransactionBarrier> transaction_barriers;

struct Product {  // 64 × 2·count of a warpgroup; this thread's part
    float* d;
    int count;
    bool accumulate, half, a_in_registers;
    uint64_t a, b;
    const uint32_t* registers;
};

struct TensorCore {  // as a thread sees it
    std::deque<std::vector<Product>> groups;  // not waited for, the last one open
    std::map<float*, std::vector<float>> accumulators;  // of these
};

inline std::map<unsigned, TensorCore> tensor_cores;

inline unsigned char* shared_base() {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(dynamic.data()) + 1023) / 1024 * 1024);
}

inline void fail(const char* what) {
    std::fprintf(stderr, "emulation: thread %u of block %u %s\n", thread_index.x, block_index.x, what);
    std::abort();
}

inline void transfer(uint64_t* barrier, void* to, std::vector<unsigned char> bytes) {
    TransactionBarrier& found = transaction_barriers.at(barrier);
    Transfer made{static_cast<unsigned char*>(to), std::move(bytes)};
    if (early_copies) return found.complete(made);
    std::memset(to, 0xff, made.bytes.size());
    found.transfers.push_back(std::move(made));
}

// The 16-bit element of a matrix at `row` of eight-row groups and `k` of 128-byte rows, through the swizzle.
inline float shared_element(uint64_t address, bool half) {
    address ^= (address >> 7 & 7) << 4;
    return half ? hdc::cuda::widen(*reinterpret_cast<__half*>(shared_base() + address))
                : hdc::cuda::widen(*reinterpret_cast<__nv_bfloat16*>(shared_base() + address));
}

inline float register_element(uint32_t bits, int which, bool half) {
    return half ? hdc::cuda::half_of<__half>(bits, which) : hdc::cuda::half_of<__nv_bfloat16>(bits, which);
}

// Of a descriptor: where the matrix begins, and its strides between chunks of 64 contiguous and groups of eight rows.
struct Matrix {
    uint64_t start, leading, stride;
    explicit Matrix(uint64_t d) : start((d & 0x3fff) << 4), leading((d >> 16 & 0x3fff) << 4), stride((d >> 32 & 0x3fff) << 4) {
        if (d >> 62 != 1) fail("describes another swizzle than that of 128 bytes");
    }
};

struct Quad {
    uint32_t registers[4];
};

inline void multiply(const Product& product) {
    const int thread = int(thread_index.x % 128), lane = thread % 32, columns = product.count * 2;
    const Matrix b(product.b);
    float left[2][16];  // rows r and r + 8 of A
    if (product.a_in_registers) {
        Quad mine;
        std::memcpy(mine.registers, product.registers, sizeof(mine));
        const Together<Quad> all(mine);
        for (int h = 0; h < 2; ++h)
            for (int k = 0; k < 16; ++k)
                left[h][k] = register_element(all.of[lane / 4 * 4 + k % 8 / 2].registers[h + k / 8 * 2], k % 2, product.half);
    } else {
        const Matrix a(product.a);
        for (int h = 0; h < 2; ++h) {
            const int row = thread / 32 * 16 + lane / 4 + 8 * h;
            for (int k = 0; k < 16; ++k)
                left[h][k] = shared_element(a.start + row / 8 * a.stride + row % 8 * 128 + k * 2, product.half);
        }
    }
    std::vector<float>& sums = tensor_cores[thread_index.x].accumulators.at(product.d);
    for (int n = 0; n < columns / 8; ++n) {
        for (int e = 0; e < 2; ++e) {
            const int column = n * 8 + lane % 4 * 2 + e;
            float right[16];
            for (int k = 0; k < 16; ++k) {
                // A in registers goes with a B whose columns are contiguous, A in memory with one whose rows are.
                const uint64_t address = product.a_in_registers
                    ? b.start + column / 64 * b.leading + k / 8 * b.stride + k % 8 * 128 + column % 64 * 2
                    : b.start + column / 8 * b.stride + column % 8 * 128 + k * 2;
                right[k] = shared_element(address, product.half);
            }
            for (int h = 0; h < 2; ++h) {
                float& sum = sums[n * 4 + h * 2 + e];
                double exact = product.accumulate ? sum : 0.0;
                for (int k = 0; k < 16; ++k) exact += double(left[h][k]) * right[k];
                sum = hdc::cuda::cut_off(exact);
            }
        }
    }
}

inline void start(const Product& product) {
    TensorCore& core = tensor_cores[thread_index.x];
    if (core.groups.empty()) core.groups.emplace_back();
    auto [found, fresh] = core.accumulators.try_emplace(product.d);
    if (fresh) found->second.assign(product.d, product.d + product.count);
    core.groups.back().push_back(product);
    std::fill_n(product.d, product.count, NAN);
}

// Makes the products of all but the last `left` groups.
inline void finish(size_t left) {
    TensorCore& core = tensor_cores[thread_index.x];
    while (core.groups.size() > left + 1) {
        const std::vector<Product> group = core.groups.front();
        core.groups.pop_front();
        for (const Product& product : group) multiply(product);
        for (const Product& product : group) {
            bool in_flight = false;
            for (const auto& other : core.groups)
                for (const Product& later : other) in_flight |= later.d == product.d;
            const auto found = core.accumulators.find(product.d);
            if (in_flight || found == core.accumulators.end()) continue;
            std::copy(found->second.begin(), found->second.end(), product.d);
            core.accumulators.erase(found);
        }
    }
}

}  // namespace emulated

namespace hdc::cuda::hopper {

inline unsigned char* shared_memory() { return emulated::shared_base(); }
inline uint32_t shared_address(const void* pointer) {
    return uint32_t(static_cast<const unsigned char*>(pointer) - emulated::shared_base());
}

inline void barrier_create(uint64_t* barrier, uint32_t arrivals) {
    emulated::transaction_barriers[barrier] = {arrivals, arrivals};
}
inline void barrier_publish() {}
inline void barrier_arrive(uint64_t* barrier) {
    auto& found = emulated::transaction_barriers.at(barrier);
    if (!found.pending--) emulated::fail("arrives at a barrier where all have come");
    found.settle();
}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    emulated::transaction_barriers.at(barrier).bytes += bytes;
    barrier_arrive(barrier);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
    auto& found = emulated::transaction_barriers.at(barrier);
    while ((found.phase & 1) == parity) {
        emulated::yield();
        if (found.transfers.empty()) continue;
        const emulated::Transfer arrived = found.transfers.front();
        found.transfers.erase(found.transfers.begin());
        found.complete(arrived);
    }
}

inline void prefetch_map(const CUtensorMap*) {}
inline void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z) {
    if (shared_address(to) % 1024) emulated::fail("loads a box to an address that is no multiple of 1,024");
    const uint32_t row_bytes = map->box[0] * 2;
    std::vector<unsigned char> box(size_t(row_bytes) * map->box[1]);
    for (uint32_t row = 0; row < map->box[1]; ++row) {
        if (uint64_t(y) + row >= map->sizes[1] || uint64_t(x) + map->box[0] > map->sizes[0]) continue;  // zeros
        const char* from = map->data + x * 2 + (y + int64_t(row)) * map->strides[1] + z * int64_t(map->strides[2]);
        for (uint32_t piece = 0; piece < row_bytes / 16; ++piece)
            std::memcpy(box.data() + row * row_bytes + (piece ^ row % 8) * 16, from + piece * 16, 16);
    }
    emulated::transfer(barrier, to, std::move(box));
}
inline void load_bytes(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    if (bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16 || shared_address(to) % 16) emulated::fail("loads bytes that are not aligned to 16");
    const auto* first = static_cast<const unsigned char*>(from);
    emulated::transfer(barrier, to, {first, first + bytes});
}

inline void named_wait(int number, int threads) { emulated::wait(emulated::block.named[number], threads); }
inline void named_arrive(int number, int threads) {
    emulated::Barrier& barrier = emulated::block.named[number];
    if (++barrier.waiting < threads) return;
    barrier.waiting = 0;
    ++barrier.round;
}
template <int>
void give_registers() {}
template <int>
void take_registers() {}

inline void hide(int&) {}
template <Type TYPE>
uint32_t round_pair(float low, float high) {
    using T = std::conditional_t<TYPE == Type::bf16, __nv_bfloat16, __half>;
    const T pair[2] = {narrow<T>(low), narrow<T>(high)};
    uint32_t bits;
    std::memcpy(&bits, pair, 4);
    return bits;
}

inline void wgmma_fence() {}
inline void wgmma_commit() { emulated::tensor_cores[threadIdx.x].groups.emplace_back(); }
template <int GROUPS>
void wgmma_wait() { emulated::finish(GROUPS); }
template <typename Registers>
void hold(Registers&) {}

template <Type TYPE, int N>
void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    emulated::start({d, N / 2, accumulate, TYPE == Type::fp16, false, a, b, nullptr});
}
template <Type TYPE, int N>
void multiply_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    emulated::start({d, N / 2, accumulate, TYPE == Type::fp16, true, 0, b, a});
}

}  // namespace hdc::cuda::hopper

struct cudaLaunchConfig_t {
    dim3 gridDim{1}, blockDim{1};
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Parameters&... given) {
    emulated::grid = config->gridDim;
    emulated::threads = config->blockDim;
    emulated::block.body = [&] { kernel(given...); };
    for (unsigned b = 0; b < emulated::grid.x; ++b) {
        emulated::block_index.x = b;
        emulated::dynamic.assign(config->dynamicSmemBytes / 4 + 512, 0x7fffffffu);  // NaN
        emulated::transaction_barriers.clear();
        emulated::tensor_cores.clear();
        emulated::run_block();
    }
    return cudaSuccess;
}
