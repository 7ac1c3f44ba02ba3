// One call: which kernels run it, in what order, and where in the workspace they keep what.
//
//     small      the whole call, wherever one launch takes it (`small_fits`)
//     hopper     the two passes of a batch, on a device of compute capability 9.0, where `hopper_fits`
//     portable   the two passes of every other batch
//
// Pairs of the same sizes that follow each other are a batch and share every launch, until there are enough of them to
// keep the device busy. Batches come one after the other and use the same memory; what is kept of each, besides
// results, are parts of the total and of the temperature's gradient, which the last launch adds in order.
//
// Memory of a batch: unit vectors of both sides, padded, in their own type; then, in the same place, first the
// forward pass's sums, a few numbers a row, and after it gradients by unit vectors, in float32.

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "launch.cuh"
#include "rows.cuh"

namespace hdc::cuda {
namespace {

struct Device {
    int capability, processors;  // 90 is 9.0
};

cudaError_t find(Device& device, int64_t index) {
    int major = 0, minor = 0;
    const struct {
        cudaDeviceAttr attribute;
        int* value;
    } questions[] = {{cudaDevAttrComputeCapabilityMajor, &major},
                     {cudaDevAttrComputeCapabilityMinor, &minor},
                     {cudaDevAttrMultiProcessorCount, &device.processors}};
    for (const auto& [attribute, value] : questions) {
        const cudaError_t error = cudaDeviceGetAttribute(value, attribute, static_cast<int>(index));
        if (error != cudaSuccess) return error;
    }
    device.capability = 10 * major + minor;
    return cudaSuccess;
}

struct Passes {
    decltype(portable_logsumexp_plan)* logsumexp_plan;
    decltype(portable_logsumexp)* logsumexp;
    decltype(portable_gradient_plan)* gradient_plan;
    decltype(portable_gradient)* gradient;
};

constexpr Passes PORTABLE = {portable_logsumexp_plan, portable_logsumexp, portable_gradient_plan, portable_gradient};

#ifdef HDC_CUDA_HOPPER  // the build compiles hopper_*.cu where sm_90a is asked for
constexpr Passes HOPPER = {hopper_logsumexp_plan, hopper_logsumexp, hopper_gradient_plan, hopper_gradient};

const Passes& passes_for(const Pass& pass, const Device& device) {
    return device.capability == 90 && hopper_fits(pass) ? HOPPER : PORTABLE;
}
#else
const Passes& passes_for(const Pass&, const Device&) { return PORTABLE; }
#endif

// Pieces of the workspace. Without one (null), their addresses are where they would be behind 0.
class Pieces {
  public:
    explicit Pieces(void* workspace) : begin_(reinterpret_cast<uintptr_t>(workspace)) {}

    template <typename Element>
    Element* take(int64_t count) {
        const uintptr_t piece = begin_ + static_cast<uintptr_t>(used_);
        used_ += (count * static_cast<int64_t>(sizeof(Element)) + 255) / 256 * 256;
        most_ = std::max(most_, used_);
        return reinterpret_cast<Element*>(piece);
    }
    int64_t used() const { return used_; }
    void back_to(int64_t used) { used_ = used; }
    int64_t most() const { return most_; }

  private:
    uintptr_t begin_;
    int64_t used_ = 0, most_ = 0;
};

bool joins(const HdcCudaProblem& problem, const Batch& batch) {
    return problem.rows == batch.rows && problem.columns == batch.columns &&
           padded_width(problem.width) == batch.width && !problem.dy.data == !batch.of[0].dy.data &&
           !problem.x_ids && !batch.x_ids;
}

// All pairs of a call, in order. Those of a batch have their memory at the same time, so there are no more in one than
// it takes to give every processor something to do.
std::vector<Batch> batches_of(const HdcCudaCall& call, const HdcCudaProblem* problems, const Device& device) {
    const int64_t enough = 256 * int64_t{device.processors};  // padded rows: two blocks of 128 a processor
    std::vector<Batch> batches;
    for (int64_t k = 0; k < call.problems; ++k) {
        const HdcCudaProblem& problem = problems[k];
        const bool full = batches.empty() || batches.back().pairs == Batch::MOST_PAIRS ||
                          batches.back().groups * padded_rows(problem.rows) >= enough;
        if (full || !joins(problem, batches.back())) {
            batches.push_back({0, problem.rows, problem.columns, padded_width(problem.width), problem.x_ids,
                               problem.y_ids});
        }
        Batch& batch = batches.back();
        batch.of[batch.pairs++] = {problem.x, problem.y, problem.dx, problem.dy, batch.groups, int(problem.width),
                                   static_cast<float>(problem.weight)};
        batch.groups += problem.groups;
    }
    return batches;
}

// What every launch of one batch is given.
struct Launches {
    const Passes* passes;
    bool no_pairs;  // one side is empty: every sum is 0
    Packing packing;
    LogsumexpPass rows, columns;  // the latter of 0 splits if there is none
    Terms terms;
    Weights weights;
    GradientPass x, y;  // y's of 0 splits if nobody asks for it
    Unpacking unpacking;
};

template <typename Numbers>
Numbers* behind(Numbers* numbers, int64_t count) {
    return numbers ? numbers + count : nullptr;
}

Plan logsumexp_plan(const Launches& all, const LogsumexpPass& pass, bool columns, const Device& device) {
    return all.no_pairs ? Plan{1, 0} : all.passes->logsumexp_plan(pass, columns, device.processors);
}

int64_t gradient_splits(const Launches& all, const GradientPass& pass, const Device& device) {
    return all.no_pairs ? 1 : all.passes->gradient_plan(pass, device.processors).splits;
}

int64_t sums_of(const LogsumexpPass& pass) { return pass.splits * pass.groups * pass.own.padded; }
int64_t numbers_of(const GradientPass& pass) { return pass.splits * pass.groups * pass.own.padded * pass.width; }

Launches lay_out(const HdcCudaCall& call, const Batch& batch, int64_t first_row, int64_t all_rows,
                 const Device& device, Pieces& pieces) {
    const auto type = static_cast<Type>(call.dtype);
    const int bytes = type == Type::fp32 || type == Type::tf32 ? 4 : 2;
    const int width = batch.width;
    const int64_t groups = batch.groups;
    const int64_t x_padded = padded_rows(batch.rows), y_padded = padded_rows(batch.columns);
    const bool positives = call.function == HDC_CUDA_INFO_NCE;
    const Temperature temperature = {static_cast<float>(call.temperature), call.device_temperature};
    Launches all = {};
    all.no_pairs = groups * batch.rows * batch.columns == 0;

    const int64_t begin = pieces.used();
    void* x_units = pieces.take<char>(groups * x_padded * width * bytes);
    void* y_units = pieces.take<char>(groups * y_padded * width * bytes);
    float* positive = positives ? pieces.take<float>(groups * batch.rows) : nullptr;
    all.packing = {batch, temperature, call.normalize != 0, x_units, y_units, positive};

    const Side x = {x_units, batch.rows, x_padded, batch.x_ids};
    const Side y = {y_units, batch.columns, y_padded, batch.y_ids};
    const Pass x_to_y = {type, width, groups, x, y, temperature, !positives && call.diagonal, call.same != 0};
    Pass y_to_x = x_to_y;
    std::swap(y_to_x.own, y_to_x.other);
    all.passes = &passes_for(x_to_y, device);
    double* lse = call.lse + first_row;
    double* column_lse = call.symmetric ? lse + all_rows : nullptr;

    const int64_t packed = pieces.used();
    if (call.task != HDC_CUDA_BACKWARD) {
        static_cast<Pass&>(all.rows) = x_to_y;
        all.rows.bounded = call.normalize;
        const Plan plan = logsumexp_plan(all, all.rows, call.symmetric, device);
        all.rows.splits = plan.splits;
        all.rows.column_parts = plan.column_parts;
        all.rows.highest = pieces.take<float>(sums_of(all.rows));
        all.rows.total = pieces.take<float>(sums_of(all.rows));
        if (positives) all.rows.diagonal_cosine = pieces.take<float>(groups * x_padded);
        if (plan.column_parts) all.rows.column_total = pieces.take<float>(plan.column_parts * groups * y_padded);
        if (call.symmetric) {
            static_cast<Pass&>(all.columns) = y_to_x;
            all.columns.bounded = call.normalize;
            all.columns.only_running = plan.column_parts > 0;
            all.columns.splits = logsumexp_plan(all, all.columns, false, device).splits;
            all.columns.highest = pieces.take<float>(sums_of(all.columns));
            all.columns.total = pieces.take<float>(sums_of(all.columns));
        }
        all.terms = {
            batch, temperature, all.rows.bounded,
            {all.rows.highest, all.rows.total, all.rows.splits},
            {all.columns.highest, all.columns.total, all.columns.splits},
            all.rows.column_total, all.rows.column_parts, positive, all.rows.diagonal_cosine,
            behind(call.terms, first_row), behind(call.hits, first_row), lse, column_lse, nullptr,
        };
    }
    pieces.back_to(packed);
    if (call.task != HDC_CUDA_FORWARD) {
        Weights& weights = all.weights;
        weights = {batch, call.task == HDC_CUDA_BACKWARD ? call.upstream + first_row : nullptr, positive, lse,
                   column_lse};
        const int64_t count = groups * x_padded;
        weights.share = pieces.take<float>(count);
        weights.shift = pieces.take<float>(count);
        if (call.symmetric) {
            weights.column_share = pieces.take<float>(count);
            weights.column_shift = pieces.take<float>(count);
        }
        weights.largest = pieces.take<float>(groups);
        const Term of_rows = {weights.share, weights.shift}, of_columns = {weights.column_share, weights.column_shift};
        static_cast<Pass&>(all.x) = x_to_y;
        all.x.own_term = of_rows;
        all.x.other_term = of_columns;
        all.x.largest = weights.largest;
        all.x.splits = gradient_splits(all, all.x, device);
        all.x.gradient = pieces.take<float>(numbers_of(all.x));
        if (batch.of[0].dy.data) {
            static_cast<Pass&>(all.y) = y_to_x;
            all.y.own_term = of_columns;
            all.y.other_term = of_rows;
            all.y.largest = weights.largest;
            all.y.splits = gradient_splits(all, all.y, device);
            all.y.gradient = pieces.take<float>(numbers_of(all.y));
        }
        all.unpacking = {
            batch, temperature, call.normalize != 0, all.x.gradient, all.y.gradient, all.x.splits, all.y.splits,
            positives ? weights.share : nullptr, positives ? weights.column_share : nullptr, nullptr,
        };
    }
    pieces.back_to(begin);
    return all;
}

cudaError_t zero(float* numbers, int64_t count, cudaStream_t stream) {
    return cudaMemsetAsync(numbers, 0, count * sizeof(float), stream);
}

cudaError_t logsumexp(const Launches& all, const LogsumexpPass& pass, cudaStream_t stream) {
    if (!all.no_pairs) return all.passes->logsumexp(pass, stream);
    const cudaError_t error = zero(pass.highest, sums_of(pass), stream);
    return error != cudaSuccess ? error : zero(pass.total, sums_of(pass), stream);
}

cudaError_t gradient(const Launches& all, const GradientPass& pass, cudaStream_t stream) {
    return all.no_pairs ? zero(pass.gradient, numbers_of(pass), stream) : all.passes->gradient(pass, stream);
}

cudaError_t launch_all(const HdcCudaCall& call, const Launches& all, cudaStream_t stream) {
    const auto type = static_cast<Type>(call.dtype);
    cudaError_t error = pack(all.packing, type, stream);
    if (call.task != HDC_CUDA_BACKWARD) {
        if (error == cudaSuccess) error = logsumexp(all, all.rows, stream);
        if (error == cudaSuccess && all.columns.splits) error = logsumexp(all, all.columns, stream);
        if (error == cudaSuccess) error = terms(all.terms, stream);
    }
    if (call.task != HDC_CUDA_FORWARD) {
        if (error == cudaSuccess) error = weights(all.weights, stream);
        if (error == cudaSuccess) error = gradient(all, all.x, stream);
        if (error == cudaSuccess && all.y.splits) error = gradient(all, all.y, stream);
        if (error == cudaSuccess) error = unpack(all.unpacking, type, call.task == HDC_CUDA_STEP, stream);
    }
    return error;
}

// --- The sums over all problems -------------------------------------------------------------------------------------

struct Sum {
    float* parts;
    int64_t count;
    float* to;  // or null
};

struct Sums {
    Sum of[2];
};

__global__ void __launch_bounds__(THREADS) sums_kernel(const __grid_constant__ Sums sums) {
    const Sum& sum = sums.of[blockIdx.x];
    if (!sum.to) return;
    double total = 0.0;
#pragma unroll 4
    for (int64_t part = threadIdx.x; part < sum.count; part += THREADS) total += sum.parts[part];
    total = over_block(total, [](double a, double b) { return a + b; });
    if (threadIdx.x == 0) *sum.to = static_cast<float>(total);
}

// --- The call -------------------------------------------------------------------------------------------------------

Sums take_sums(const HdcCudaCall& call, const std::vector<Batch>& batches, Pieces& pieces) {
    int64_t terms = 0, temperatures = 0;
    for (const Batch& batch : batches) {
        terms += terms_parts(batch);
        temperatures += unpack_parts(batch);
    }
    Sums sums = {};
    if (call.task != HDC_CUDA_BACKWARD) sums.of[0] = {pieces.take<float>(terms), terms, call.total};
    if (call.task != HDC_CUDA_FORWARD) {
        sums.of[1] = {pieces.take<float>(temperatures), temperatures, call.d_temperature};
    }
    return sums;
}

cudaError_t contrast(const HdcCudaCall& call, const HdcCudaProblem* problems, const Device& device,
                     cudaStream_t stream) {
    Pieces pieces(call.workspace);
    const std::vector<Batch> batches = batches_of(call, problems, device);
    const Sums sums = take_sums(call, batches, pieces);
    int64_t all_rows = 0;
    for (const Batch& batch : batches) all_rows += batch.groups * batch.rows;
    int64_t first_row = 0, first_total = 0, first_temperature = 0;
    for (const Batch& batch : batches) {
        Launches all = lay_out(call, batch, first_row, all_rows, device, pieces);
        all.terms.total = behind(sums.of[0].parts, first_total);
        all.unpacking.d_temperature = behind(sums.of[1].parts, first_temperature);
        const cudaError_t error = launch_all(call, all, stream);
        if (error != cudaSuccess) return error;
        first_row += batch.groups * batch.rows;
        first_total += terms_parts(batch);
        first_temperature += unpack_parts(batch);
    }
    return launch(sums_kernel, 2, THREADS, sums, stream);
}

}  // namespace
}  // namespace hdc::cuda

using namespace hdc::cuda;

HdcCudaNeeds hdc_cuda_needs(const HdcCudaCall* call, const HdcCudaProblem* problems) {
    Device device = {};
    if (find(device, call->device) != cudaSuccess) return {};  // hdc_cuda_contrast will say why
    if (small_fits(*call, problems)) return {small_workspace(*call, problems, device.processors), true};
    Pieces pieces(nullptr);
    const std::vector<Batch> batches = batches_of(*call, problems, device);
    take_sums(*call, batches, pieces);
    for (const Batch& batch : batches) lay_out(*call, batch, 0, 0, device, pieces);
    return {pieces.most(), false};
}

int hdc_cuda_contrast(const HdcCudaCall* call, const HdcCudaProblem* problems) {
    Device device = {};
    cudaError_t error = find(device, call->device);
    if (error == cudaSuccess) error = cudaSetDevice(static_cast<int>(call->device));
    if (error != cudaSuccess) return error;
    const auto stream = static_cast<cudaStream_t>(call->stream);
    return small_fits(*call, problems) ? small_contrast(*call, problems, device.processors, stream)
                                       : contrast(*call, problems, device, stream);
}

const char* hdc_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int hdc_cuda_runs_on(int capability) {
    // Machine code runs on its own and later minor versions; PTX, of which the build names the oldest, on all later.
    for (const int compiled : {__CUDA_ARCH_LIST__}) {  // nvcc's: 860 is 8.6
        if (compiled / 100 == capability / 10 && compiled / 10 <= capability) return 1;
    }
#ifdef HDC_CUDA_PTX
    if (HDC_CUDA_PTX <= capability) return 1;
#endif
    return 0;
}

int64_t hdc_cuda_interface_size() { return sizeof(HdcCudaCall) + sizeof(HdcCudaProblem); }
