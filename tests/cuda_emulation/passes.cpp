// The two passes of packed.h as plain loops, and a stand-in for the one launch: what contrast.cu calls.
//
// Sums are float64. Splits, parts and padding are as an unfriendly kernel would have them: several of each, and NaN
// wherever nothing need be written.
#include <vector>

#include "packed.h"

namespace hdc::cuda {
namespace {

float element(const Pass& pass, const Side& side, int64_t group, int64_t row, int column) {
    const int64_t place = (group * side.padded + row) * pass.width + column;
    if (pass.type == Type::bf16) return widen(static_cast<const __nv_bfloat16*>(side.units)[place]);
    if (pass.type == Type::fp16) return widen(static_cast<const __half*>(side.units)[place]);
    return static_cast<const float*>(side.units)[place];
}

double cosine_of(const Pass& pass, int64_t group, int64_t i, int64_t j) {
    double cosine = 0.0;
    for (int d = 0; d < pass.width; ++d) {
        cosine += double(element(pass, pass.own, group, i, d)) * element(pass, pass.other, group, j, d);
    }
    return cosine;
}

bool in_sum(const Pass& pass, int64_t group, int64_t i, int64_t j) {
    if (i == j && !pass.diagonal) return false;
    if (!pass.own.ids) return true;
    return counts(pass.own.ids[group * pass.own.count + i], pass.other.ids[group * pass.other.count + j], pass.same);
}

Plan plan_of(const Pass& pass, bool columns) {
    return {pass.other.count < 3 ? 1 : 3, columns && pass.own.count > 1 ? 2 : 0};
}

}  // namespace

Plan portable_logsumexp_plan(const LogsumexpPass& pass, bool columns, int) { return plan_of(pass, columns); }
Plan portable_gradient_plan(const GradientPass& pass, int) { return plan_of(pass, false); }

cudaError_t portable_logsumexp(const LogsumexpPass& pass, cudaStream_t) {
    const float shift = fixed_shift(pass.temperature, pass.bounded, std::max(pass.own.count, pass.other.count));
    const bool running = shift != shift, down = pass.column_total && !running;
    if (pass.only_running && !running) return cudaSuccess;
    const double k = inverse_temperature(pass.temperature) * LOG2_E;
    const int64_t rows = pass.groups * pass.own.padded;
    std::fill_n(pass.highest, pass.splits * rows, NAN);
    std::fill_n(pass.total, pass.splits * rows, NAN);
    std::vector<double> columns(down ? pass.column_parts * pass.groups * pass.other.padded : 0);
    for (int64_t group = 0; group < pass.groups; ++group) {
        for (int64_t i = 0; i < pass.own.count; ++i) {
            for (int64_t split = 0; split < pass.splits; ++split) {
                const int64_t first = split * pass.other.count / pass.splits;
                const int64_t last = (split + 1) * pass.other.count / pass.splits;
                std::vector<double> cosines;
                float highest = -INFINITY;
                for (int64_t j = first; j < last; ++j) {
                    cosines.push_back(cosine_of(pass, group, i, j));
                    if (i == j && pass.diagonal_cosine) {
                        pass.diagonal_cosine[group * pass.own.padded + i] = cosines.back();
                    }
                    if (in_sum(pass, group, i, j)) highest = std::fmax(highest, float(cosines.back()));
                }
                double total = 0.0;
                for (int64_t j = first; j < last; ++j) {
                    if (!in_sum(pass, group, i, j)) continue;
                    const double cosine = cosines[j - first];
                    const double term = running ? std::exp2((cosine - highest) * k) : std::exp2(cosine * k - shift);
                    total += term;
                    if (down) columns[((i % pass.column_parts) * pass.groups + group) * pass.other.padded + j] += term;
                }
                pass.highest[split * rows + group * pass.own.padded + i] = highest;
                pass.total[split * rows + group * pass.own.padded + i] = float(total);
            }
        }
    }
    std::copy(columns.begin(), columns.end(), pass.column_total);
    return cudaSuccess;
}

cudaError_t portable_gradient(const GradientPass& pass, cudaStream_t) {
    const double k = inverse_temperature(pass.temperature) * LOG2_E;
    const int64_t rows = pass.groups * pass.own.padded;
    std::fill_n(pass.gradient, pass.splits * rows * pass.width, NAN);
    for (int64_t group = 0; group < pass.groups; ++group) {
        float largest = 0.0f;
        for (const auto& [term, side] : {std::pair(pass.own_term, pass.own), std::pair(pass.other_term, pass.other)}) {
            for (int64_t i = 0; term.share && i < side.padded; ++i) {
                largest = std::fmax(largest, std::fabs(term.share[group * side.padded + i]));
            }
        }
        if (largest != pass.largest[group]) return 1;
        for (int64_t i = 0; i < pass.own.count; ++i) {
            for (int64_t split = 0; split < pass.splits; ++split) {
                std::vector<double> gradient(pass.width);
                const int64_t first = split * pass.other.count / pass.splits;
                const int64_t last = (split + 1) * pass.other.count / pass.splits;
                for (int64_t j = first; j < last; ++j) {
                    if (!in_sum(pass, group, i, j)) continue;
                    const double exponent = cosine_of(pass, group, i, j) * k;
                    double coefficient = 0.0;
                    for (const auto& [term, place] : {std::pair(pass.own_term, group * pass.own.padded + i),
                                                      std::pair(pass.other_term, group * pass.other.padded + j)}) {
                        if (term.share) coefficient += term.share[place] * std::exp2(exponent - term.shift[place]);
                    }
                    for (int d = 0; d < pass.width; ++d) {
                        gradient[d] += coefficient * element(pass, pass.other, group, j, d);
                    }
                }
                const int64_t row = split * rows + group * pass.own.padded + i;
                for (int d = 0; d < pass.width; ++d) pass.gradient[row * pass.width + d] = float(gradient[d]);
            }
        }
    }
    return cudaSuccess;
}

// The test decides whether the one launch takes a call, and sees by its total that it was asked to.
bool takes_small = false;
bool small_fits(const HdcCudaCall&, const HdcCudaProblem*, int) { return takes_small; }
int64_t small_workspace(const HdcCudaCall&, const HdcCudaProblem*) { return 7; }
cudaError_t small_contrast(const HdcCudaCall& call, const HdcCudaProblem*, cudaStream_t) {
    *call.total = 77;
    return cudaSuccess;
}

}  // namespace hdc::cuda

extern "C" void take_small(int takes) { hdc::cuda::takes_small = takes; }
