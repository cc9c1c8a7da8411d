// The digits of inputs, the choice of an instruction set, and threads.
#include "t16.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernel.hpp"

using Run = void (*)(const t16_matrix &, const t16_inputs &, float *, int64_t, int64_t, int64_t);

// tiers.inc is written by build.py: TIER(file, whether the processor has all it needs) for each file.
#define TIER(name, present) void t16_run_##name(const t16_matrix &, const t16_inputs &, float *, int64_t, int64_t, int64_t);
#include "tiers.inc"
#undef TIER

namespace {

struct Tier {
    const char *name;
    Run run;
    bool (*present)();
};

constexpr Tier TIERS[] = {
#define TIER(name, present) {#name, t16_run_##name, [] { return static_cast<bool>(present); }},
#include "tiers.inc"
#undef TIER
};

constexpr int32_t COUNT = sizeof TIERS / sizeof *TIERS;

}  // namespace

extern "C" const char *t16_tier(int32_t number) { return number < COUNT ? TIERS[number].name : nullptr; }

extern "C" int32_t t16_present(int32_t number) { return number < COUNT && TIERS[number].present(); }

extern "C" void t16_digits(const float *x, int64_t given, int64_t columns, int64_t step, int32_t digits, int8_t *out, float *scales, float *sums) {
    const float reach = digits == 2 ? 128 * 127 : 127;
    for (int64_t start = 0, place = 0; start < columns; start += step, ++place) {
        const int64_t end = std::max(start, std::min(start + step, given));
        float largest = 0;
        for (int64_t k = start; k < end; ++k) largest = std::max(largest, std::fabs(x[k]));
        const float inverse = reach / largest, scale = std::isfinite(inverse) ? largest / reach : 0, factor = scale > 0 ? inverse : 0;
        int32_t sum = 0;
        std::memset(out + start, 0, step);
        if (digits == 2) {
            int8_t *second = out + columns;
            std::memset(second + start, 0, step);
            for (int64_t k = start; k < end; ++k) {
                const int32_t whole = static_cast<int32_t>(std::nearbyint(x[k] * factor)), first = (whole + 64) >> 7;
                out[k] = static_cast<int8_t>(first);
                second[k] = static_cast<int8_t>(whole - 128 * first);
                sum += whole;
            }
            scales[columns / step + place] = scale;
        } else {
            for (int64_t k = start; k < end; ++k) {
                const int32_t whole = static_cast<int32_t>(std::nearbyint(x[k] * factor));
                out[k] = static_cast<int8_t>(whole);
                sum += whole;
            }
        }
        scales[place] = digits == 2 ? scale * 128 : scale;
        sums[place] = scale * static_cast<float>(sum);
    }
}

extern "C" void t16_multiply(int32_t tier, const t16_matrix *matrix, const t16_inputs *inputs, float *y, int64_t y_stride, int32_t threads) {
    const int64_t blocks = (matrix->rows + t16::ROWS - 1) / t16::ROWS;
    const Run run = TIERS[tier].run;
    if (threads <= 1) return run(*matrix, *inputs, y, y_stride, 0, blocks);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int32_t thread = 0; thread < threads; ++thread) run(*matrix, *inputs, y, y_stride, blocks * thread / threads, blocks * (thread + 1) / threads);
}

extern "C" uint64_t t16_read(const void *data, int64_t bytes, int32_t threads) {
    uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
    for (int32_t thread = 0; thread < threads; ++thread) {
        // Two streams, as the kernels have them.
        const int64_t half = bytes / threads / 512 * 32;
        const uint64_t *one = static_cast<const uint64_t *>(data) + 2 * half * thread, *other = one + half;
        uint64_t sums[16] = {};
        for (int64_t place = 0; place + 8 <= half; place += 8) {
            __builtin_prefetch(one + place + 256);
            __builtin_prefetch(other + place + 256);
            for (int lane = 0; lane < 8; ++lane) {
                sums[lane] += one[place + lane];
                sums[8 + lane] += other[place + lane];
            }
        }
        for (const uint64_t sum : sums) total += sum;
    }
    return total;
}
