// The digits of inputs, the choice of an instruction set, and threads.
#include "t16.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernel.hpp"

// What files need beyond any processor of their kind. On ARM that is dotprod, which Apple's have always had.
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#define HAS(feature) (getauxval(AT_HWCAP) & HWCAP_ASIMDDP)
#elif defined(__aarch64__)
#define HAS(feature) true
#else
#define HAS(feature) __builtin_cpu_supports(feature)
#endif

// tiers.inc is written by build.py: TIER(file, whether the processor HAS all it needs) for each file.
#define TIER(name, present) extern const t16::Kernels t16_##name;
#include "tiers.inc"
#undef TIER

namespace {

struct Tier {
    const char *name;
    const t16::Kernels &kernels;
    bool (*present)();
};

constexpr Tier TIERS[] = {
#define TIER(name, present) {#name, t16_##name, [] { return static_cast<bool>(present); }},
#include "tiers.inc"
#undef TIER
};

constexpr int32_t COUNT = sizeof TIERS / sizeof *TIERS;

}  // namespace

extern "C" const char *t16_tier(int32_t number) { return number < COUNT ? TIERS[number].name : nullptr; }

extern "C" int32_t t16_present(int32_t number) { return number < COUNT && TIERS[number].present(); }

namespace {

// Rounds one input. `out` is [digits][columns], `scales` [digits][steps], `sums`, of what the digits stand for, [steps].
void round_input(const float *x, int64_t given, int64_t columns, int64_t step, int32_t digits, int8_t *out, float *scales, float *sums) {
    const float reach = digits == 2 ? 128 * 127 : 127;
    // Adding and taking away this rounds to whole numbers, ties to even, and unlike library calls several at once.
    constexpr float WHOLE = 12582912;
    for (int64_t start = 0, place = 0; start < columns; start += step, ++place) {
        const int64_t end = std::max(start, std::min(start + step, given));
        uint32_t magnitude = 0;  // as bits, which order as the numbers do
        for (int64_t k = start; k < end; ++k) {
            uint32_t bits;
            std::memcpy(&bits, x + k, 4);
            magnitude = std::max(magnitude, bits & 0x7fffffffu);
        }
        float largest;
        std::memcpy(&largest, &magnitude, 4);
        if (!std::isfinite(largest)) {  // shows in every output instead of in none
            std::memset(out + start, 0, step);
            if (digits == 2) {
                std::memset(out + columns + start, 0, step);
                scales[columns / step + place] = largest - largest;
            }
            scales[place] = sums[place] = largest - largest;
            continue;
        }
        const float inverse = reach / largest, scale = std::isfinite(inverse) ? largest / reach : 0, factor = scale > 0 ? inverse : 0;
        int32_t sum = 0;
        std::memset(out + start, 0, step);
        if (digits == 2) {
            int8_t *second = out + columns;
            std::memset(second + start, 0, step);
            for (int64_t k = start; k < end; ++k) {
                const int32_t whole = static_cast<int32_t>((x[k] * factor + WHOLE) - WHOLE), first = (whole + 64) >> 7;
                out[k] = static_cast<int8_t>(first);
                second[k] = static_cast<int8_t>(whole - 128 * first);
                sum += whole;
            }
            scales[columns / step + place] = scale;
        } else {
            for (int64_t k = start; k < end; ++k) {
                const int32_t whole = static_cast<int32_t>((x[k] * factor + WHOLE) - WHOLE);
                out[k] = static_cast<int8_t>(whole);
                sum += whole;
            }
        }
        scales[place] = digits == 2 ? scale * 128 : scale;
        sums[place] = scale * static_cast<float>(sum);
    }
}

}  // namespace

extern "C" void t16_linear(int32_t tier, const t16_matrix *matrix, const float *x, int64_t tokens, int64_t given, int32_t digits, float *y,
                           int32_t threads) {
    // As many inputs at a time as stay in the second-level cache while every block of rows is multiplied with them.
    constexpr int64_t CACHED = 256 << 10;
    const int64_t columns = matrix->columns, steps = columns / matrix->step, blocks = (matrix->rows + t16::ROWS - 1) / t16::ROWS;
    const int64_t most = std::min(tokens, std::max<int64_t>(8, CACHED / (columns * digits)));
    std::vector<int8_t> rounded(most * digits * columns);
    std::vector<float> scales(most * digits * steps), sums(most * steps);
    const t16::Run run = TIERS[tier].kernels.run;
    for (int64_t start = 0; start < tokens; start += most) {
        const int64_t count = std::min(most, tokens - start);
        const t16_inputs inputs = {rounded.data(), scales.data(), sums.data(), static_cast<int32_t>(count * digits), digits};
        const auto round_one = [&](int64_t token) {
            round_input(x + (start + token) * given, given, columns, matrix->step, digits, rounded.data() + token * digits * columns,
                        scales.data() + token * digits * steps, sums.data() + token * steps);
        };
        float *to = y + start * matrix->rows;
        if (threads <= 1) {
            for (int64_t token = 0; token < count; ++token) round_one(token);
            run(*matrix, inputs, to, matrix->rows, 0, blocks);
            continue;
        }
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t token = 0; token < count; ++token) round_one(token);
#pragma omp for schedule(static, 1)
            for (int32_t thread = 0; thread < threads; ++thread)
                run(*matrix, inputs, to, matrix->rows, blocks * thread / threads, blocks * (thread + 1) / threads);
        }
    }
}

extern "C" void t16_experts(int32_t tier, const t16_matrix *matrix, int64_t experts, const int64_t *ends, const float *x, int64_t given,
                            int32_t digits, float *y, int32_t threads) {
    const int64_t rows = (matrix->rows + t16::ROWS - 1) / t16::ROWS * t16::ROWS, scales = rows * (matrix->columns / matrix->group);
    for (int64_t expert = 0, start = 0; expert < experts; start = ends[expert++]) {
        if (start == ends[expert]) continue;
        t16_matrix own = *matrix;
        own.codes += expert * rows * matrix->columns * matrix->bits / 8;
        own.scales = static_cast<const char *>(own.scales) + expert * scales * (matrix->scale == T16_FLOAT32 ? 4 : 2);
        if (own.zeros) own.zeros += expert * scales;
        t16_linear(tier, &own, x + start * given, ends[expert] - start, given, digits, y + start * matrix->rows, threads);
    }
}

extern "C" void t16_multiply(int32_t tier, const t16_matrix *matrix, const t16_inputs *inputs, float *y, int32_t threads) {
    const int64_t blocks = (matrix->rows + t16::ROWS - 1) / t16::ROWS;
    const t16::Run run = TIERS[tier].kernels.run;
    if (threads <= 1) return run(*matrix, *inputs, y, matrix->rows, 0, blocks);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int32_t thread = 0; thread < threads; ++thread)
        run(*matrix, *inputs, y, matrix->rows, blocks * thread / threads, blocks * (thread + 1) / threads);
}

extern "C" void t16_dense(int32_t tier, const void *weight, int32_t kind, int64_t rows, int64_t columns, const float *x, int64_t tokens, float *y,
                          int32_t threads) {
    const t16::Dense dense = TIERS[tier].kernels.dense;
    if (threads <= 1) return dense(weight, kind, rows, columns, x, tokens, y, 0, rows);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int32_t thread = 0; thread < threads; ++thread)
        dense(weight, kind, rows, columns, x, tokens, y, rows * thread / threads, rows * (thread + 1) / threads);
}

extern "C" void t16_vnm(int32_t tier, const void *values, int32_t kind, int64_t rows, int64_t kept, int64_t height, const int32_t *places,
                           const float *x, int64_t columns, int64_t tokens, float *y, int32_t threads) {
    const t16::Dense dense = TIERS[tier].kernels.dense;
    const int64_t blocks = rows / height;
    const auto some = [&](int64_t first, int64_t last) {
        std::vector<float> given(tokens * kept);
        for (int64_t block = first; block < last; ++block) {
            for (int64_t token = 0; token < tokens; ++token)
                for (int64_t k = 0; k < kept; ++k) given[token * kept + k] = x[token * columns + places[block * kept + k]];
            dense(values, kind, rows, kept, given.data(), tokens, y, block * height, (block + 1) * height);
        }
    };
    if (threads <= 1) return some(0, blocks);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int32_t thread = 0; thread < threads; ++thread) some(blocks * thread / threads, blocks * (thread + 1) / threads);
}

extern "C" void t16_small_floats(int32_t tier, const t16_small *matrix, const float *x, int64_t tokens, float *y, int32_t threads) {
    const t16::Small small = TIERS[tier].kernels.small;
    if (threads <= 1) return small(*matrix, x, tokens, y, 0, matrix->rows);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int32_t thread = 0; thread < threads; ++thread)
        small(*matrix, x, tokens, y, matrix->rows * thread / threads, matrix->rows * (thread + 1) / threads);
}

extern "C" uint64_t t16_read(const void *data, int64_t bytes, int32_t threads) {
    uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
    for (int32_t thread = 0; thread < threads; ++thread) {
        // Eight streams, 256 bytes of each in turn: what was fastest of one to eight.
        constexpr int64_t STREAMS = 8, WORDS = 32;
        const int64_t part = bytes / threads / STREAMS / 256 * WORDS;
        const uint64_t *from = static_cast<const uint64_t *>(data) + STREAMS * part * thread;
        uint64_t sums[WORDS] = {};
        for (int64_t place = 0; place < part; place += WORDS)
            for (int64_t stream = 0; stream < STREAMS; ++stream) {
                const uint64_t *words = from + stream * part + place;
                for (int64_t line = 0; line < WORDS; line += 8) __builtin_prefetch(words + line + 64);
                for (int64_t word = 0; word < WORDS; ++word) sums[word] += words[word];
            }
        for (const uint64_t sum : sums) total += sum;
    }
    return total;
}
