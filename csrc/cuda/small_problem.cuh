// What a launch of small.cu is told, and what a block keeps of its problem, beside the unit vectors.
#pragma once

#include <cstdint>
#include <type_traits>

#include "packed.h"
#include "warp.cuh"

namespace hdc::cuda::small {

constexpr int WARPS = 8, THREADS = 32 * WARPS, TEAMS = WARPS / 2;  // a team is two warps
constexpr int SLAB = 16;                // own vectors of a team
constexpr int CHUNK = 32;               // other vectors that a warp takes at a time
constexpr int TILE = TEAMS * SLAB;      // own vectors that a block takes at a time,
static_assert(TILE == 2 * CHUNK);       // and as many others: a chunk for each warp of a team
constexpr int LONGEST = THREADS;        // rows or columns: one thread each
constexpr int WIDEST = 256;
constexpr int MOST_BLOCKS = 8;  // that share a problem
constexpr int MOST_PAIRS = 24;  // in the 4 KB that a kernel's arguments may take
constexpr int PARTS = 3;        // numbers that a block leaves for the last one

struct Pair {  // every [2]: of x and of y
    HdcCudaMatrix sides[2], gradients[2];
    int counts[2];
    int windows[2];  // how many unit vectors shared memory holds at a time; `room_of` in small.cu decides
    int64_t first_problem, first_row;  // the latter in [T]
    int width;
    float weight;
    bool apart;    // whether the teams' sums lie behind the windows, or take their place
    bool aligned;  // whether every row of all four begins at a multiple of 16 bytes
};

struct Arguments {
    Pair pairs[MOST_PAIRS];
    int pair_count, blocks;
    int task;
    bool normalize, symmetric;
    Temperature temperature;
    int64_t T;
    float *total, *means, *terms, *d_temperature;
    uint8_t* hits;
    double* lse;
    const float* upstream;
    unsigned* ticket;
    float* parts;  // [PARTS, problems·blocks]: sum of terms, number of hits, temperature's gradient
};
static_assert(sizeof(Arguments) <= 4096, "a kernel's arguments");

__host__ __device__ constexpr int tiles(int count) { return (count + TILE - 1) / TILE; }
__host__ __device__ constexpr int padded(int count) { return (count + CHUNK - 1) / CHUNK * CHUNK; }

template <typename T>
constexpr float GAIN = probability_gain(std::is_same_v<T, __half> ? Type::fp16 : Type::fp32);  // bf16's is fp32's

// Of one side's vectors, for exp2((cosine − highest)·k − log_total); log_total is −∞ where nothing counts.
struct Sums {
    float highest[LONGEST], log_total[LONGEST];
    float weight[LONGEST];  // upstream · (1 − exp(−term)): what pulls the positive
    float share[LONGEST];   // the weight as it enters a rounded coefficient
};

// In shared memory, by row. What `room_of` deals out begins at a multiple of 16 bytes behind it.
struct alignas(16) Numbers {
    float inverse[2][LONGEST];  // 1/|x|, 1/|y|
    float positive[LONGEST], own[LONGEST];  // cosine of the positive: exact, and of the rounded vectors
    float along[LONGEST];
    Sums sums[2];
    float half_highest[WARPS][SLAB], half_total[WARPS][SLAB];
    float warp_values[WARPS];
    double warp_totals[2][WARPS];
    unsigned ticket;
};

// The problem of a block.
template <typename T>
struct Problem {
    const Arguments& arguments;
    const Pair& pair;
    Numbers& numbers;
    int64_t group;

    __device__ const T* embedding(int side, int row) const {
        const HdcCudaMatrix& matrix = pair.sides[side];
        return static_cast<const T*>(matrix.data) + group * matrix.group_stride + row * matrix.row_stride;
    }
};

}  // namespace hdc::cuda::small
