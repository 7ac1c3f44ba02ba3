// How many fused multiply-adds this core does in a second: sixteen independent chains of the widest vectors,
// which is more than their latency times the number of units.
#include <chrono>

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

typedef float Vector __attribute__((vector_size(BYTES)));
constexpr int CHAINS = 16;

// Floating-point operations a second, over about as many as are asked for.
extern "C" double flops_per_second(double flops) {
    const double pass = 2.0 * (BYTES / sizeof(float)) * CHAINS;
    const long rounds = static_cast<long>(flops / pass) + 1;
    Vector chain[CHAINS];
    for (int c = 0; c < CHAINS; c++) chain[c] = Vector{} + float(c);
    // Not constants, or the compiler would do the work itself.
    volatile float unknown = 0.5f;
    const Vector factor = Vector{} + unknown, summand = Vector{} + unknown;

    const auto start = std::chrono::steady_clock::now();
    for (long round = 0; round < rounds; round++) {
#pragma GCC unroll 16
        for (int c = 0; c < CHAINS; c++) chain[c] = chain[c] * factor + summand;
    }
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;

    Vector sum{};
    for (int c = 0; c < CHAINS; c++) sum += chain[c];
    volatile float used = sum[0];
    (void)used;
    return pass * rounds / taken.count();
}
