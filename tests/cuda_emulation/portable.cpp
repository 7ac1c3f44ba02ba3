// The passes of portable_*.cu on emulated warps, behind C functions.
#include "packed.h"

using namespace hdc::cuda;

extern "C" {
struct Shapes {
    int64_t type, width, groups, own_count, other_count, diagonal, same;
    double temperature;
    const void *own, *other;
    const int64_t *own_ids, *other_ids;
};
}

static Pass pass_of(const Shapes& s) {
    const Side own = {s.own, s.own_count, padded_rows(s.own_count), s.own_ids};
    const Side other = {s.other, s.other_count, padded_rows(s.other_count), s.other_ids};
    const Temperature temperature = {float(s.temperature), nullptr};
    return {static_cast<Type>(s.type), int(s.width), s.groups, own, other, temperature, s.diagonal != 0, s.same != 0};
}

static void write(int64_t* plan, const Plan& found) {
    plan[0] = found.splits;
    plan[1] = found.column_parts;
}

extern "C" {
void logsumexp_plan(const Shapes* shapes, bool columns, int processors, int64_t* plan) {
    LogsumexpPass pass{pass_of(*shapes)};
    write(plan, portable_logsumexp_plan(pass, columns, processors));
}

int logsumexp(const Shapes* shapes, bool bounded, bool only_running, const int64_t* plan, float* highest, float* total,
              float* diagonal_cosine, float* column_total) {
    const LogsumexpPass pass{pass_of(*shapes), bounded, only_running, plan[0], plan[1], highest, total, diagonal_cosine,
                             column_total};
    return portable_logsumexp(pass, nullptr);
}

void gradient_plan(const Shapes* shapes, int processors, int64_t* plan) {
    GradientPass pass{pass_of(*shapes)};
    write(plan, portable_gradient_plan(pass, processors));
}

int gradient(const Shapes* shapes, const int64_t* plan, const float* own_share, const float* own_shift,
             const float* other_share, const float* other_shift, const float* largest, float* result) {
    const GradientPass pass{pass_of(*shapes), {own_share, own_shift}, {other_share, other_shift}, largest, plan[0],
                            result};
    return portable_gradient(pass, nullptr);
}
}
