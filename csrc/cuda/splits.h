// How a pass is divided among blocks.
#pragma once

#include <cstdint>

namespace hdc::cuda {

// Into how many parts the tiles are split, so that `items` times it end soonest where `slots` blocks run at a time;
// every block of rows costs about a tile of waiting besides.
inline int64_t best_splits(int64_t items, int64_t tiles, int64_t slots) {
    int64_t best = 1, least = INT64_MAX;
    for (int64_t splits = 1; splits <= 32 && splits <= tiles; ++splits) {
        const int64_t rounds = (items * splits + slots - 1) / slots;
        const int64_t time = rounds * ((tiles + splits - 1) / splits + 1);
        if (time < least) {
            least = time;
            best = splits;
        }
    }
    return best;
}

}  // namespace hdc::cuda
