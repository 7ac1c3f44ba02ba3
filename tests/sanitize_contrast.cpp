// Calls hdc_contrast on buffers that end where the last element does, for a build with sanitizers.
//
// Under ASAN_OPTIONS=malloc_fill_byte=255 fresh memory reads as NaN, and every output starts as NaN: whatever
// is read before it is written, or never written, is no finite number at the end.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "contrast.h"

namespace {

constexpr int64_t SIZES[] = {8, 4, 2, 2};  // of a HdcDtype

struct Shape {
    int64_t groups, rows, columns, width;
};

enum Layout { CONTIGUOUS, TRANSPOSED, EVERY_OTHER, REPEATED_ROWS, LAYOUTS };

uint32_t random_bits() {
    static uint32_t state = 1;
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return state;
}

// One element, ±[1, 2).
void write_random(char* to, int64_t dtype) {
    const uint32_t bits = random_bits(), sign = bits >> 31;
    const double value = (sign ? -1 : 1) * (1 + double(bits >> 9 & 1023) / 1024);
    const float narrow = float(value);
    const uint16_t bfloat16 = uint16_t(sign << 15 | 0x3f80 | (bits & 0x7f));
    const uint16_t float16 = uint16_t(sign << 15 | 0x3c00 | (bits & 0x3ff));
    const void* const from[] = {&value, &narrow, &bfloat16, &float16};
    std::memcpy(to, from[dtype], size_t(SIZES[dtype]));
}

bool is_finite(const char* at, int64_t dtype) {
    double wide;
    float narrow;
    uint16_t half;
    switch (dtype) {
        case HDC_FLOAT64: std::memcpy(&wide, at, sizeof wide); return std::isfinite(wide);
        case HDC_FLOAT32: std::memcpy(&narrow, at, sizeof narrow); return std::isfinite(narrow);
        default: std::memcpy(&half, at, sizeof half);
    }
    const uint16_t exponent = dtype == HDC_BFLOAT16 ? 0x7f80 : 0x7c00;
    return (half & exponent) != exponent;
}

// Memory of exactly as many bytes as it needs.
struct Buffer {
    std::unique_ptr<char[]> bytes;
    int64_t count, dtype;

    Buffer(int64_t count, int64_t dtype) : bytes(new char[size_t(count * SIZES[dtype])]), count(count), dtype(dtype) {
        std::memset(bytes.get(), 0xff, size_t(count * SIZES[dtype]));
    }

    char* at(int64_t i) const { return bytes.get() + i * SIZES[dtype]; }

    void require_finite(const char* what) const {
        for (int64_t i = 0; i < count; i++)
            if (!is_finite(at(i), dtype)) std::printf("%s[%ld] is not finite\n", what, long(i)), std::exit(1);
    }
};

struct Matrix {
    Buffer buffer;
    HdcMatrix view;
    int64_t groups, rows, width;

    static int64_t span(const HdcMatrix& v, int64_t groups, int64_t rows, int64_t width) {
        return (groups - 1) * v.group_stride + (rows - 1) * v.row_stride + (width - 1) * v.column_stride + 1;
    }

    static HdcMatrix strides(int64_t rows, int64_t width, Layout layout) {
        switch (layout) {
            case TRANSPOSED: return {nullptr, rows * width, 1, rows};
            case EVERY_OTHER: return {nullptr, 2 * rows * width + 3, 2 * width + 1, 2};
            case REPEATED_ROWS: return {nullptr, width, 0, 1};
            default: return {nullptr, rows * width, width, 1};
        }
    }

    Matrix(int64_t groups, int64_t rows, int64_t width, int64_t dtype, Layout layout)
        : buffer(span(strides(rows, width, layout), groups, rows, width), dtype), view(strides(rows, width, layout)),
          groups(groups), rows(rows), width(width) {
        view.data = buffer.bytes.get();
    }

    template <typename Visit>
    void each(Visit visit) const {
        for (int64_t g = 0; g < groups; g++)
            for (int64_t r = 0; r < rows; r++)
                for (int64_t d = 0; d < width; d++)
                    visit(buffer.at(g * view.group_stride + r * view.row_stride + d * view.column_stride));
    }

    void fill() {
        each([&](char* at) { write_random(at, buffer.dtype); });
    }

    void require_finite(const char* what) const {
        each([&](char* at) {
            if (!is_finite(at, buffer.dtype)) std::printf("%s is not finite\n", what), std::exit(1);
        });
    }
};

struct Run {
    int64_t task, dtype, normalize, symmetric, threads, bfloat16;
    Layout layout;
    int64_t function = HDC_INFO_NCE;
    bool masked = false;  // by all there is: the diagonal, ids and, of one group alone, single entries
    bool needs_y = true;
    bool per_row = true;  // or the total alone; BACKWARD reads logsumexps in any case
};

// Ids of two kinds in turn, and the last column left out of every row.
struct Mask {
    std::vector<std::vector<int64_t>> x_ids, y_ids;
    std::vector<int64_t> starts, left_out;

    Mask(const std::vector<Shape>& shapes) {
        for (const Shape& s : shapes) {
            x_ids.push_back(alternating(s.groups * s.rows));
            y_ids.push_back(alternating(s.groups * s.columns));
        }
        const Shape& s = shapes[0];
        for (int64_t i = 0; i <= s.rows; i++) starts.push_back(i);
        left_out.assign(size_t(s.rows), s.columns - 1);
        for (std::vector<int64_t>* exact : {&starts, &left_out}) exact->shrink_to_fit();
    }

    static std::vector<int64_t> alternating(int64_t count) {
        std::vector<int64_t> ids(size_t(count), 0);
        for (size_t i = 0; i < ids.size(); i++) ids[i] = int64_t(i % 2) << 40;
        return ids;
    }
};

void contrast(const Run& run, const std::vector<Shape>& shapes) {
    const int64_t wide = run.dtype == HDC_FLOAT64 ? HDC_FLOAT64 : HDC_FLOAT32;
    const Layout written = run.layout == REPEATED_ROWS ? CONTIGUOUS : run.layout;  // gradients may not overlap
    std::vector<Matrix> matrices;
    int64_t rows = 0;
    for (const Shape& s : shapes) {
        const int64_t gradients = run.task == HDC_STEP ? wide : run.dtype;
        matrices.emplace_back(s.groups, s.rows, s.width, run.dtype, run.layout).fill();
        matrices.emplace_back(s.groups, s.columns, s.width, run.dtype, run.layout).fill();
        matrices.emplace_back(s.groups, s.rows, s.width, gradients, written);
        matrices.emplace_back(s.groups, s.columns, s.width, gradients, written);
        rows += s.groups * s.rows;
    }
    const int64_t sums = run.symmetric || run.function == HDC_TILTED ? 2 : 1;  // of every row
    const Mask mask(shapes);
    const bool entries = run.masked && shapes.size() == 1 && shapes[0].groups == 1;
    std::vector<HdcProblem> problems;
    for (size_t k = 0; k < shapes.size(); k++) {
        const Shape& s = shapes[k];
        const Matrix* m = &matrices[4 * k];
        const bool gradients = run.task != HDC_FORWARD;
        problems.push_back({m[0].view, m[1].view, gradients ? m[2].view : HdcMatrix{},
                            gradients && run.needs_y ? m[3].view : HdcMatrix{}, s.groups, s.rows, s.columns, s.width,
                            1.5 - double(k), run.masked ? mask.x_ids[k].data() : nullptr,
                            run.masked ? mask.y_ids[k].data() : nullptr, entries ? mask.starts.data() : nullptr,
                            entries ? mask.left_out.data() : nullptr});
    }
    const Buffer total(1, wide), means(2 * int64_t(shapes.size()), wide), terms(rows, wide), lse(rows * sums, HDC_FLOAT64), slope(1, wide);
    const std::unique_ptr<uint8_t[]> hits(new uint8_t[size_t(rows)]);
    const std::unique_ptr<int64_t[]> ranks(new int64_t[size_t(rows)]);
    Buffer upstream(rows, wide), bias(rows, wide);
    const Buffer d_bias(rows, wide);
    for (const Buffer* random : {&upstream, &bias})
        for (int64_t i = 0; i < rows; i++) write_random(random->at(i), wide);
    std::fill_n(ranks.get(), rows, int64_t(-1));
    std::memset(hits.get(), 0xff, size_t(rows));

    bool ranked = run.function == HDC_INFO_NCE || run.masked;  // of the diagonal, where it is no column of its own
    for (const Shape& s : shapes) ranked = ranked && s.rows <= s.columns;
    const bool per_row = run.per_row || run.task == HDC_BACKWARD;
    HdcCall call{run.task,
                 run.dtype,
                 run.normalize,
                 run.symmetric,
                 run.threads,
                 int64_t(problems.size()),
                 run.bfloat16,
                 run.function,
                 !run.masked,
                 0,
                 0.5,
                 0.7,
                 total.at(0),
                 per_row && run.task != HDC_BACKWARD ? means.at(0) : nullptr,
                 per_row ? terms.at(0) : nullptr,
                 per_row ? hits.get() : nullptr,
                 ranked ? ranks.get() : nullptr,
                 per_row ? reinterpret_cast<double*>(lse.at(0)) : nullptr,
                 nullptr,
                 nullptr,
                 run.function == HDC_SOFTPLUS ? bias.at(0) : nullptr,
                 nullptr};
    if (run.task == HDC_BACKWARD) {  // first the logsumexps; the outputs of FORWARD are then no longer allowed
        std::vector<HdcProblem> first = problems;
        for (HdcProblem& p : first) p.dx = p.dy = HdcMatrix{};
        call.task = HDC_FORWARD;
        if (hdc_contrast(&call, first.data())) std::exit(1);
        call.task = HDC_BACKWARD;
        call.total = call.terms = nullptr;
        call.hits = nullptr;
        call.ranks = nullptr;
        call.upstream = upstream.at(0);
    }
    if (run.task != HDC_FORWARD) call.d_temperature = slope.at(0), call.d_bias = d_bias.at(0);
    if (hdc_contrast(&call, problems.data())) std::exit(1);

    const bool may_be_empty = run.masked || run.function == HDC_LOGSUMEXP || run.function == HDC_TILTED;  // then a logarithm of 0 is −inf
    if (!may_be_empty) total.require_finite("total");
    if (!may_be_empty && per_row) terms.require_finite("terms");
    if (!may_be_empty && per_row && run.task != HDC_BACKWARD) means.require_finite("means");
    int64_t row = 0;
    for (const Shape& s : shapes)
        for (int64_t i = 0; i < s.groups * s.rows; i++, row++) {
            if (per_row && hits[size_t(row)] > 1) std::printf("hits[%ld] was not written\n", long(row)), std::exit(1);
            if (ranked && (ranks[row] < 0 || ranks[row] >= s.columns))
                std::printf("ranks[%ld] is %ld\n", long(row), long(ranks[row])), std::exit(1);
            for (int64_t side = 0; side < sums && per_row && run.function != HDC_SOFTPLUS; side++) {
                double value;
                std::memcpy(&value, lse.at(side * rows + row), sizeof value);
                const bool empty = may_be_empty && value == -INFINITY;
                const bool alone = s.columns == 1 && run.function == HDC_INFO_NCE;
                if (!empty && (alone ? value != -INFINITY : !std::isfinite(value)))
                    std::printf("lse[%ld, %ld] is %g\n", long(side), long(row), value), std::exit(1);
            }
        }
    if (run.task == HDC_FORWARD) return;
    slope.require_finite("d_temperature");
    if (run.function == HDC_SOFTPLUS) d_bias.require_finite("d_bias");
    for (size_t k = 0; k < shapes.size(); k++) {
        matrices[4 * k + 2].require_finite("dx");
        if (run.needs_y) matrices[4 * k + 3].require_finite("dy");
    }
}

}  // namespace

int main() {
    // A panel has 256 rows.
    const std::vector<std::vector<Shape>> square = {
        {{1, 1, 1, 1}}, {{1, 7, 7, 3}}, {{1, 129, 129, 33}}, {{3, 9, 9, 17}, {1, 2, 2, 40}}, {{1, 260, 260, 5}}};
    const std::vector<std::vector<Shape>> wide = {
        {{1, 1, 2, 1}}, {{2, 6, 8, 64}}, {{1, 5, 257, 31}, {5, 3, 4, 2}, {1, 1, 1, 9}}, {{1, 255, 256, 16}}};
    int64_t calls = 0;
    for (int64_t task = HDC_FORWARD; task <= HDC_STEP; task++)
        for (int64_t dtype = HDC_FLOAT64; dtype <= HDC_FLOAT16; dtype++)
            for (const int64_t threads : {1, 3})  // 3: one group on all, and a group for each
                for (int64_t symmetric = 0; symmetric <= 1; symmetric++) {
                    const bool rounds = hdc_has_bfloat16() && (dtype == HDC_FLOAT32 || dtype == HDC_BFLOAT16);
                    const auto each = [&](const std::vector<Shape>& shapes) {
                        for (int64_t bfloat16 = 0; bfloat16 <= int64_t(rounds); bfloat16++, calls++) {
                            const Layout layout = Layout(random_bits() % LAYOUTS);
                            const int64_t normalize = random_bits() >> 16 & 1;
                            const Run plain{task, dtype, normalize, symmetric, threads, bfloat16, layout};
                            contrast(plain, shapes);
                            for (int64_t function = HDC_INFO_NCE; function <= HDC_TILTED; function++, calls++) {
                                if (symmetric && function >= HDC_SOFTPLUS) continue;  // these are not
                                Run run = plain;
                                run.function = function;
                                run.masked = random_bits() >> 16 & 1;
                                run.needs_y = random_bits() >> 16 & 1;
                                run.per_row = random_bits() >> 16 & 1;
                                contrast(run, shapes);
                            }
                        }
                    };
                    for (const auto& shapes : square) each(shapes);
                    if (symmetric) continue;
                    for (const auto& shapes : wide) each(shapes);
                    for (int64_t function : {HDC_LOGSUMEXP, HDC_SOFTPLUS, HDC_TILTED}) {  // more rows than columns
                        for (int64_t masked = 0; masked <= 1; masked++, calls++)
                            contrast({task, dtype, 1, 0, threads, 0, CONTIGUOUS, function, masked == 1}, {{1, 257, 5, 31}});
                        contrast({task, dtype, 1, 0, threads, rounds, CONTIGUOUS, function}, {{1, 9, 0, 31}}), calls++;
                    }
                }
    std::printf("%s: %ld calls\n", hdc_instruction_set(), long(calls));
}
