// Runs every kernel on memory of exactly the size it may touch, for a sanitizer to watch, and compares it with the plain one, bit for bit.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "t16.h"

static uint32_t seed = 1;
static uint32_t next() { return (seed = seed * 1664525u + 1013904223u) >> 8; }

int main() {
    std::string ran;
    for (int tier = 0; t16_tier(tier); ++tier)
        if (t16_present(tier)) ran += std::string(" ") + t16_tier(tier);
    for (int bits : {2, 3, 4, 8})
        for (int columns : {32, 128, 384})
            for (int step : {32, 128})
                for (int rows : {1, 16, 37})
                    for (int inputs : {1, 3, 9})
                        for (int digits : {1, 2})
                            for (int zeros : {0, 1})
                                for (int scale : {T16_FLOAT32, T16_BFLOAT16, T16_FLOAT16}) {
                                    if (columns % step) continue;
                                    const int blocks = (rows + 15) / 16, steps = columns / step, given = columns - 3;
                                    std::vector<uint8_t> codes(blocks * columns * bits * 2), points(blocks * 16 * steps);
                                    for (uint8_t &code : codes) code = static_cast<uint8_t>(next());
                                    for (uint8_t &point : points) point = static_cast<uint8_t>(next() % (1u << bits));
                                    std::vector<uint16_t> halves(blocks * 16 * steps, 0x3c12);
                                    std::vector<float> floats(blocks * 16 * steps, 0.37f), x(given * inputs), expected;
                                    for (float &value : x) value = static_cast<float>(next() % 2001) - 1000;
                                    const void *scales = scale == T16_FLOAT32 ? static_cast<const void *>(floats.data()) : halves.data();
                                    const t16_matrix matrix = {codes.data(), scales, zeros ? points.data() : nullptr, rows, columns, step, step, bits, scale};
                                    for (int tier = 0; t16_tier(tier); ++tier) {
                                        if (!t16_present(tier)) continue;
                                        std::vector<float> y(inputs * rows, 7);
                                        t16_linear(tier, &matrix, x.data(), inputs, given, digits, y.data(), 2);
                                        if (expected.empty()) expected = y;
                                        if (std::memcmp(y.data(), expected.data(), y.size() * sizeof(float))) {
                                            std::printf("%s differs: %d bits, %d columns, %d inputs\n", t16_tier(tier), bits, columns, inputs);
                                            return 1;
                                        }
                                    }
                                }
    for (int columns : {1, 16, 37})
        for (int rows : {1, 4, 7})
            for (int kind : {T16_FLOAT32, T16_BFLOAT16, T16_FLOAT16}) {
                const std::vector<float> floats(rows * columns, 2), x(3 * columns, 1.5f);
                const std::vector<uint16_t> halves(rows * columns, 0x4000);  // 2 in either type
                const void *weight = kind == T16_FLOAT32 ? static_cast<const void *>(floats.data()) : halves.data();
                for (int tier = 0; t16_tier(tier); ++tier) {
                    if (!t16_present(tier)) continue;
                    std::vector<float> y(3 * rows);
                    t16_dense(tier, weight, kind, rows, columns, x.data(), 3, y.data(), 2);
                    for (const float value : y)
                        if (value != 3.0f * columns) return std::printf("%s: a dense product is wrong\n", t16_tier(tier)), 1;
                }
            }
    for (int kept : {1, 16, 37})
        for (int height : {1, 4, 7})
            for (int blocks : {1, 3}) {
                const int columns = 2 * kept, rows = blocks * height;
                std::vector<float> values(rows * kept), x(3 * columns);
                for (float &value : values) value = static_cast<float>(next() % 7);
                for (float &value : x) value = static_cast<float>(next() % 7);
                std::vector<int32_t> places(blocks * kept);
                for (int at = 0; at < blocks * kept; ++at) places[at] = static_cast<int32_t>(2 * (at % kept) + next() % 2);
                for (int tier = 0; t16_tier(tier); ++tier) {
                    if (!t16_present(tier)) continue;
                    std::vector<float> y(3 * rows);
                    t16_vnm(tier, values.data(), T16_FLOAT32, rows, kept, height, places.data(), x.data(), columns, 3, y.data(), 2);
                    for (int at = 0; at < 3 * rows; ++at) {
                        const int token = at / rows, row = at % rows;
                        float expected = 0;  // of whole numbers, and exact
                        for (int k = 0; k < kept; ++k) expected += values[row * kept + k] * x[token * columns + places[row / height * kept + k]];
                        if (y[at] != expected) return std::printf("%s: a product of V:N:M is wrong\n", t16_tier(tier)), 1;
                    }
                }
            }
    for (int code : {T16_E4M3, T16_E2M1})
        for (int group : {2, 16, 32, 38, 256})
            for (int rows : {1, 4, 7})
                for (int inputs : {1, 3, 9})
                    for (int scale : {T16_FLOAT32, T16_BFLOAT16, T16_FLOAT16, T16_E8M0, T16_E4M3}) {
                        const int columns = 3 * group, each = code == T16_E4M3 ? 1 : 2;
                        std::vector<uint8_t> codes(rows * columns / each), bytes(rows * 3, scale == T16_E8M0 ? 128 : 0x40);  // 2 in either type
                        for (uint8_t &byte : codes) byte = static_cast<uint8_t>(next() % 256);
                        if (each == 1)
                            for (uint8_t &byte : codes) byte = (byte & 127) == 127 ? 0 : byte;
                        const std::vector<float> floats(rows * 3, 2);
                        const std::vector<uint16_t> halves(rows * 3, 0x4000);
                        std::vector<float> x(inputs * columns);
                        for (float &value : x) value = static_cast<float>(next() % 2001) - 1000;
                        const void *scales = scale == T16_FLOAT32                            ? static_cast<const void *>(floats.data())
                                             : scale == T16_E8M0 || scale == T16_E4M3 ? static_cast<const void *>(bytes.data())
                                                                                      : halves.data();
                        const float unit = 4;
                        const t16_small matrix = {codes.data(), scales, &unit, rows, columns, group, code, scale};
                        for (int tier = 0; t16_tier(tier); ++tier) {
                            if (!t16_present(tier)) continue;
                            std::vector<float> y(inputs * rows);
                            t16_small_floats(tier, &matrix, x.data(), inputs, y.data(), 2);
                            for (int input = 0; input < inputs; ++input)
                                for (int row = 0; row < rows; ++row) {
                                    double expected = 0, most = 0;
                                    for (int k = 0; k < columns; ++k) {
                                        const int at = row * columns + k, byte = codes[at / each], bits = each == 1 ? byte : byte >> at % 2 * 4 & 15;
                                        const int wide = each == 1 ? 3 : 1, bias = each == 1 ? 7 : 1, top = each == 1 ? 128 : 8;
                                        const int exponent = (bits & (top - 1)) >> wide, fraction = bits & ((1 << wide) - 1);
                                        const double value = std::ldexp(exponent ? fraction + (1 << wide) : fraction, (exponent ? exponent : 1) - bias - wide);
                                        expected += (bits & top ? -value : value) * x[input * columns + k] / 2;
                                        most += std::fabs(value * x[input * columns + k] / 2);
                                    }
                                    if (std::fabs(y[input * rows + row] - expected) > 1e-5 * most)
                                        return std::printf("%s: a product of small floats is wrong: code %d, group %d\n", t16_tier(tier), code, group), 1;
                                }
                        }
                    }
    for (int bits : {2, 3, 4, 8})
        for (int scale : {T16_FLOAT32, T16_BFLOAT16})
            for (int zeros : {0, 1}) {
                const int rows = 37, blocks = 3, columns = 64, group = 32, experts = 4, values = experts * blocks * 16 * (columns / group);
                const int64_t ends[experts] = {0, 2, 2, 5};
                std::vector<uint8_t> codes(experts * blocks * columns * bits * 2), points(values);
                for (uint8_t &code : codes) code = static_cast<uint8_t>(next());
                for (uint8_t &point : points) point = static_cast<uint8_t>(next() % (1u << bits));
                std::vector<float> floats(values), x(5 * columns);
                std::vector<uint16_t> halves(values);
                for (float &value : floats) value = static_cast<float>(next() % 100);
                for (uint16_t &value : halves) value = static_cast<uint16_t>(0x3f80 + next() % 100);
                for (float &value : x) value = static_cast<float>(next() % 2001) - 1000;
                for (int tier = 0; t16_tier(tier); ++tier) {
                    if (!t16_present(tier)) continue;
                    const auto of = [&](int expert) {
                        const int at = expert * values / experts;
                        return t16_matrix{codes.data() + expert * (codes.size() / experts),
                                          scale == T16_FLOAT32 ? static_cast<const void *>(floats.data() + at) : halves.data() + at,
                                          zeros ? points.data() + at : nullptr, rows, columns, group, group, bits, scale};
                    };
                    std::vector<float> all(5 * rows), each(5 * rows);
                    const t16_matrix first = of(0), second = of(1), last = of(3);
                    t16_experts(tier, &first, experts, ends, x.data(), columns, 2, all.data(), 2);
                    t16_linear(tier, &second, x.data(), 2, columns, 2, each.data(), 2);
                    t16_linear(tier, &last, x.data() + 2 * columns, 3, columns, 2, each.data() + 2 * rows, 2);
                    if (std::memcmp(all.data(), each.data(), all.size() * sizeof(float)))
                        return std::printf("%s: experts of %d bits differ from their products\n", t16_tier(tier), bits), 1;
                }
            }
    std::vector<uint64_t> data(1024, 1);
    if (t16_read(data.data(), 8192, 2) != 1024) std::abort();
    std::printf("clean:%s\n", ran.c_str());
}
