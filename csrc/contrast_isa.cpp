// The kernels for one instruction set: this file is compiled once for each, with HDC_ISA its name and
// HDC_VECTOR_BYTES the width of its vectors. Here the groups are dealt out to threads.
#include <memory>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "backward.h"
#include "contrast_kernel.h"
#include "forward.h"
#include "gradients.h"
#include "numbers.h"
#include "pack.h"
#include "softplus.h"
#include "step.h"

namespace HDC_ISA {
namespace {

int thread_index() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Of the team that is at work: OpenMP may give fewer threads than it was asked for.
int thread_count() {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

// The scratch of the threads that work on one group together.
template <typename T>
struct Team {
    Scratch scratch;
    Packed<T> packed;
    std::vector<Private<T>> own;

    void lay_out(const HdcProblem& problem, const HdcCall& call) {
        scratch.rewind();
        packed.lay_out(scratch, problem, call);
        for (Private<T>& thread : own) thread.lay_out(scratch, problem, call, int(own.size()), &thread == &own.front());
    }

    bool allocate(int threads, const HdcCall& call, const HdcProblem* problems) {
        own.resize(size_t(threads));
        for (int64_t k = 0; k < call.problems; k++) lay_out(problems[k], call);
        return scratch.allocate();
    }
};

template <typename T, typename Stored, Elements ELEMENTS = SINGLE>
class Calculation {
    struct Item {
        const HdcProblem* problem;
        int64_t group, row;  // which of the problem's groups; its first row in the flat outputs
    };

    const HdcCall& call;
    const HdcProblem* problems;
    int64_t rows = 0;  // of all groups
    std::vector<Item> items;

    template <typename Element>
    static Element* at(Element* array, int64_t row) {
        return array ? array + row : nullptr;
    }

    template <typename Element>
    static HdcMatrix at(const HdcMatrix& matrix, int64_t group) {
        return {at(static_cast<Element*>(matrix.data), group * matrix.group_stride), 0, matrix.row_stride, matrix.column_stride};
    }

    Group<T> group_of(const Item& item) const {
        const HdcProblem& p = *item.problem;
        double* lse = at(call.lse, item.row);
        const bool full = call.task == HDC_STEP;
        return {at<Stored>(p.x, item.group), at<Stored>(p.y, item.group),
                full ? at<T>(p.dx, item.group) : at<Stored>(p.dx, item.group),
                full ? at<T>(p.dy, item.group) : at<Stored>(p.dy, item.group),
                p.rows, p.columns, p.width, p.weight,
                at(static_cast<T*>(call.terms), item.row), at(call.hits, item.row), at(call.ranks, item.row), lse,
                call.symmetric ? at(lse, rows) : nullptr, call.function == HDC_TILTED ? at(lse, rows) : nullptr,
                at(static_cast<const T*>(call.upstream), item.row),
                at(p.x_ids, item.group * p.rows), at(p.y_ids, item.group * p.columns),
                p.left_out_starts, p.left_out,
                at(static_cast<const T*>(call.bias), item.row), at(static_cast<T*>(call.d_bias), item.row)};
    }

    void run(const Item& item, Team<T>& team) const {
        team.lay_out(*item.problem, call);
        const Group<T> group = group_of(item);
        if (team.own.front().in_place) team.own.front().dy = static_cast<T*>(group.dy.data);
        const int wanted = int(team.own.size());
        const bool saved = call.task == HDC_BACKWARD, softplus = call.function == HDC_SOFTPLUS;
        const bool one_pass = call.task == HDC_STEP && !call.symmetric && call.function != HDC_TILTED;
#pragma omp parallel num_threads(wanted) if (wanted > 1)
        {
            const int threads = thread_count();
            const Threads<T> all{team.own.data(), threads};
            Contrast<T, Stored, ELEMENTS> work(call, group, team.packed, team.own[size_t(thread_index())]);
            const Share mine = share_of(group.rows, thread_index(), threads, TILE_ROWS);
            const Share columns = share_of(group.columns, thread_index(), threads, Packed<T>::W);
            work.pack(share_of(std::max(group.rows, group.columns), thread_index(), threads, Packed<T>::W));
#pragma omp barrier
            if (softplus) {
                work.softplus(mine);
            } else if (one_pass) {
                work.step(mine);
            } else if (!saved) {
                work.forward(mine);
#pragma omp barrier
                work.merge_columns(columns, all);
#pragma omp barrier
                work.finish_terms(mine);
            }
            if (call.task != HDC_FORWARD && !one_pass && !softplus) {
                work.weigh(mine, saved);
#pragma omp barrier
                work.backward(mine);
            }
#pragma omp barrier
            if (call.task != HDC_FORWARD) work.finish_dy(columns, all);
        }
    }

    // Of every pair, from what was written for its rows.
    void fill_means() const {
        T* means = static_cast<T*>(call.means);
        int64_t row = 0;
        for (int64_t k = 0; k < call.problems; k++) {
            const int64_t first = row, count = problems[k].groups * problems[k].rows;
            double terms = 0, hits = 0;
            for (; row < first + count; row++) terms += static_cast<const T*>(call.terms)[row], hits += call.hits[row];
            means[k] = T(terms / double(count));
            means[call.problems + k] = T(hits / double(count));
        }
    }

  public:
    Calculation(const HdcCall& call, const HdcProblem* problems) : call(call), problems(problems) {
        for (int64_t k = 0; k < call.problems; k++)
            for (int64_t g = 0; g < problems[k].groups; g++) {
                items.push_back({&problems[k], g, rows});
                rows += problems[k].rows;
            }
    }

    // As many groups as there are threads, or a multiple, run side by side, each on one thread. The rest
    // follow one after the other, each on all threads.
    int operator()() const {
        const int64_t threads = call.threads, count = int64_t(items.size()), side_by_side = count / threads * threads;
        std::unique_ptr<Team<T>[]> soloists(new Team<T>[size_t(threads)]);
        Team<T> together;
        for (int64_t t = 0; t < threads && side_by_side; t++)
            if (!soloists[size_t(t)].allocate(1, call, problems)) return 1;
        if (side_by_side < count && !together.allocate(int(threads), call, problems)) return 1;

#pragma omp parallel for num_threads(int(threads)) schedule(static) if (threads > 1)
        for (int64_t i = 0; i < side_by_side; i++) run(items[size_t(i)], soloists[size_t(thread_index())]);
        for (int64_t i = side_by_side; i < count; i++) run(items[size_t(i)], together);

        double total = 0, d_temperature = 0;
        const auto add = [&](const Team<T>& team) {
            for (const Private<T>& thread : team.own) total += thread.total, d_temperature += thread.d_temperature;
        };
        for (int64_t t = 0; t < threads; t++) add(soloists[size_t(t)]);
        add(together);
        if (call.task != HDC_BACKWARD) *static_cast<T*>(call.total) = T(total);
        if (call.task != HDC_FORWARD) *static_cast<T*>(call.d_temperature) = T(d_temperature);
        if (call.means) fill_means();
        return 0;
    }
};

}  // namespace

int contrast(const HdcCall& call, const HdcProblem* problems) {
#ifdef __AVX512BF16__
    if (call.bfloat16 && call.dtype == HDC_FLOAT32) return Calculation<float, float, PAIRS>(call, problems)();
    if (call.bfloat16 && call.dtype == HDC_BFLOAT16) return Calculation<float, BFloat16, PAIRS>(call, problems)();
#endif
    switch (call.dtype) {
        case HDC_FLOAT64: return Calculation<double, double>(call, problems)();
        case HDC_FLOAT32: return Calculation<float, float>(call, problems)();
        case HDC_BFLOAT16: return Calculation<float, BFloat16>(call, problems)();
        default: return Calculation<float, Float16>(call, problems)();
    }
}

}  // namespace HDC_ISA
