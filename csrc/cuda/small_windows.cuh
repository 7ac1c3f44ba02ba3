// Unit vectors in shared memory: of each side a window of some rows, or all of them where there is room.
//
// Before a tile is read, `slide` sees to it that the window has it: where it has not, the block normalises rows from
// there on once more, by the norms it knows; the embeddings are in the cache. Bits do not depend on the windows. Rows
// are 512 bytes at most, so that two tiles fit everywhere: float32 of more than 128 dimensions comes in two slices,
// one at a time.
#pragma once

#include <climits>

#include "small_products.cuh"

namespace hdc::cuda::small {

template <typename T, int DEPTH>
class Windows {
    static constexpr int WIDTH = SLICE<T, DEPTH>;

  public:
    // Both windows are at the beginning of their sides, where `begin` fills them.
    __device__ explicit Windows(const Problem<T>& problem) : problem_(problem), x_first_(0), y_first_(0) {}

    // Stores a row, of DEPTH elements, if it is among those that the window begins with.
    __device__ void begin(int side, int row, const float (&unit)[DEPTH / 8], int part) const {
        if (row < problem_.pair.windows[side]) {
            store_row<T, WIDTH>(memory(side) + row * STRIDE<T, DEPTH>, unit, WIDTH, true, part);
        }
    }

    // Slides the windows to where they hold the tiles that these rows are in. The whole block calls it.
    __device__ void slide(int side, int own_row, int other_row, int slice) {
        const int own_tile = own_row / TILE * TILE, other_tile = other_row / TILE * TILE;
        const bool own_slides = lacks(side, own_tile, slice), other_slides = lacks(!side, other_tile, slice);
        if (!own_slides && !other_slides) return;
        __syncthreads();  // nobody reads any longer what is overwritten
#pragma unroll 1
        for (int n = 0; n < 2; ++n) {
            if (n ? other_slides : own_slides) fill(n ? !side : side, n ? other_tile : own_tile, slice);
        }
        __syncthreads();
    }

    // Of a row in the window.
    __device__ const T* unit(int side, int row, int slice) const {
        return memory(side) + (place(row, slice) - first(side)) * STRIDE<T, DEPTH>;
    }

    // Both windows are about to be overwritten. The whole block calls it.
    __device__ void forget() { x_first_ = y_first_ = NOWHERE; }

    // The teams' sums: [TEAMS·SLAB, DEPTH + 4].
    __device__ float* sums() const {
        const int rows = problem_.pair.apart ? problem_.pair.windows[0] + problem_.pair.windows[1] : 0;
        return reinterpret_cast<float*>(memory(0) + rows * STRIDE<T, DEPTH>);
    }

  private:
    static constexpr int NOWHERE = INT_MIN / 2;

    // A row and a slice in one number: far enough apart that no window holds rows of two slices.
    static __device__ int place(int row, int slice) { return slice * 2 * LONGEST + row; }
    __device__ int first(int side) const { return side ? y_first_ : x_first_; }
    __device__ bool lacks(int side, int row, int slice) const {
        return unsigned(place(row, slice) - first(side)) >= unsigned(problem_.pair.windows[side]);
    }
    __device__ T* memory(int side) const {
        return reinterpret_cast<T*>(dynamic_memory()) + (side ? problem_.pair.windows[0] * STRIDE<T, DEPTH> : 0);
    }

    __device__ void fill(int side, int first, int slice) {
        const Pair& pair = problem_.pair;
        const int part = threadIdx.x % 8, count = pair.counts[side];
        const int last = first + pair.windows[side], end = last < padded(count) ? last : padded(count);
        for (int row = first + int(threadIdx.x) / 8; row < end; row += THREADS / 8) {
            float unit[WIDTH / 8];
            const int width = row < count ? pair.width - slice * WIDTH : 0;
            load_row<T, WIDTH>(unit, problem_.embedding(side, row) + slice * WIDTH, width, pair.aligned, part);
            const float inverse = row < count ? problem_.numbers.inverse[side][row] : 0.0f;
#pragma unroll
            for (int e = 0; e < WIDTH / 8; ++e) unit[e] *= inverse;
            store_row<T, WIDTH>(memory(side) + (row - first) * STRIDE<T, DEPTH>, unit, WIDTH, true, part);
        }
        x_first_ = side ? x_first_ : place(first, slice);
        y_first_ = side ? place(first, slice) : y_first_;
    }

    const Problem<T>& problem_;
    int x_first_, y_first_;  // every thread knows where the windows are
};

// c = cosines of the warp's slab, of one side, with its chunk of the other. The whole block calls it, idle warps too.
template <typename T, int DEPTH>
__device__ inline void cosines(
    float (&c)[4][4], Windows<T, DEPTH>& windows, int side, int slab, int chunk, bool idle, int lane
) {
#pragma unroll
    for (int n = 0; n < 4; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
#pragma unroll 1
    for (int slice = 0; slice < SLICES<T, DEPTH>; ++slice) {
        windows.slide(side, slab, chunk, slice);
        if (idle) continue;
        similarity<T, DEPTH>(c, windows.unit(side, slab, slice), windows.unit(!side, chunk, slice), lane);
    }
}

}  // namespace hdc::cuda::small
