// The kernels, written once over what an instruction set must offer (`Isa`), instantiated by one file per instruction set.
//
// Bytes moved per multiplication: N * K * bits / 8 codes, N * K / group scales of 2 or 4 bytes and zero points of 1; K bytes per digit of an
// input, N floats out. Everything else lives in registers or the first-level cache: the digits of the inputs are read once per block of rows.
//
// `Isa` has: Bytes, a register of codes (64 / PARTS bytes of a vector); Sum, what dot products of up to SPAN codes with digits are kept in;
// Ints and Floats, 32 bits per lane.
#pragma once
#include <cstring>

#include "t16.h"

namespace t16 {

constexpr int ROWS = 16;

inline float widened(const void *scales, int64_t place, int32_t kind) {
    if (kind == T16_FLOAT32) return static_cast<const float *>(scales)[place];
    const uint16_t half = static_cast<const uint16_t *>(scales)[place];
    uint32_t bits;
    if (kind == T16_BFLOAT16) {
        bits = static_cast<uint32_t>(half) << 16;
    } else {
        const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31, fraction = half & 1023;
        if (exponent == 31) {
            bits = sign | 0x7f800000u | (fraction << 13);
        } else if (exponent) {
            bits = sign | ((exponent + 112) << 23) | (fraction << 13);
        } else {
            const float value = static_cast<float>(fraction) * 0x1p-24f;
            return sign ? -value : value;
        }
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// What a width means: columns and vectors per unit.
template <int BITS> struct Width;
template <> struct Width<8> { static constexpr int COLUMNS = 4, VECTORS = 1; };
template <> struct Width<4> { static constexpr int COLUMNS = 8, VECTORS = 1; };
template <> struct Width<3> { static constexpr int COLUMNS = 32, VECTORS = 3; };
template <> struct Width<2> { static constexpr int COLUMNS = 16, VECTORS = 1; };

// Adds to 16-bit sums the products of one unit's codes with COUNT digits.
template <class Isa, int BITS, int COUNT>
inline __attribute__((always_inline)) void unit(const uint8_t *codes, const int8_t *digits, int64_t stride, typename Isa::Sum (&low)[COUNT],
                                                typename Isa::Sum (&high)[COUNT]) {
    using Bytes = typename Isa::Bytes;
    const auto field = [&](Bytes code, int place, typename Isa::Sum(&sums)[COUNT]) __attribute__((always_inline)) {
        for (int c = 0; c < COUNT; ++c) sums[c] = Isa::add(sums[c], code, Isa::broadcast(digits + c * stride + 4 * place));
    };
    if constexpr (BITS == 4) {
        const Bytes code = Isa::load(codes);
        field(Isa::masked(code, 0x0f), 0, low);
        field(Isa::masked(Isa::template shifted<4>(code), 0x0f), 1, low);
    } else if constexpr (BITS == 2) {
        const Bytes code = Isa::load(codes), upper = Isa::template shifted<4>(code);
        field(Isa::masked(code, 0x03), 0, low);
        field(Isa::masked(code, 0x0c), 1, high);
        field(Isa::masked(upper, 0x03), 2, low);
        field(Isa::masked(upper, 0x0c), 3, high);
    } else {
        const Bytes first = Isa::load(codes), second = Isa::load(codes + 64), third = Isa::load(codes + 128);
        field(Isa::masked(first, 0x07), 0, low);
        field(Isa::masked(Isa::template shifted<3>(first), 0x07), 1, low);
        field(Isa::masked(second, 0x07), 2, low);
        field(Isa::masked(Isa::template shifted<3>(second), 0x07), 3, low);
        field(Isa::masked(third, 0x07), 4, low);
        field(Isa::masked(Isa::template shifted<3>(third), 0x07), 5, low);
        const Bytes lowest = Isa::masked(Isa::template shifted<6>(third), 0x03);
        field(Isa::either(Isa::masked(Isa::template shifted<5>(first), 0x06), Isa::masked(lowest, 0x01)), 6, low);
        field(Isa::either(Isa::masked(Isa::template shifted<5>(second), 0x06), Isa::masked(Isa::template shifted<1>(lowest), 0x01)), 7, low);
    }
}

// Dot products of COUNT digits with one register of codes, `units` units long; what comes AHEAD of them is fetched. For 8 bits as if each
// code were less by 128, which no 8-bit product then overflows.
template <class Isa, int BITS, int COUNT, bool FETCH>
inline __attribute__((always_inline)) void dots(const uint8_t *codes, const int8_t *digits, int64_t stride, int64_t units,
                                                typename Isa::Ints (&total)[COUNT]) {
    constexpr int BYTES = 64 * Width<BITS>::VECTORS, COLUMNS = Width<BITS>::COLUMNS;
    const auto fetch = [&](int64_t place) __attribute__((always_inline)) {
        if constexpr (FETCH)
            for (int vector = 0; vector < Width<BITS>::VECTORS; ++vector) Isa::prefetch(codes + place * BYTES + 64 * vector + Isa::AHEAD);
    };
    for (int c = 0; c < COUNT; ++c) total[c] = Isa::no_ints();
    if constexpr (BITS == 8) {
        for (int64_t place = 0; place < units; ++place) {
            const typename Isa::Bytes code = Isa::load(codes + place * BYTES);
            fetch(place);
            for (int c = 0; c < COUNT; ++c) total[c] = Isa::add_signed(total[c], code, Isa::broadcast(digits + c * stride + place * 4));
        }
    } else {
        constexpr int SPAN = BITS == 3 ? 2 : 4;  // units until 16-bit sums could overflow
        const auto some = [&](int64_t start, int64_t count) __attribute__((always_inline)) {
            typename Isa::Sum low[COUNT], high[COUNT];
            for (int c = 0; c < COUNT; ++c) low[c] = high[c] = Isa::no_sum();
            for (int64_t place = start; place < start + count; ++place) {
                fetch(place);
                unit<Isa, BITS, COUNT>(codes + place * BYTES, digits + place * COLUMNS, stride, low, high);
            }
            for (int c = 0; c < COUNT; ++c) {
                total[c] = Isa::plus(total[c], low[c]);
                if constexpr (BITS == 2) total[c] = Isa::plus_quarter(total[c], high[c]);
            }
        };
        int64_t place = 0;
        for (; place + SPAN <= units; place += SPAN) some(place, SPAN);
        if (units % SPAN) some(place, units % SPAN);
    }
}

// y for BLOCKS blocks of rows, one at `first` and the others `apart` blocks further on each, for COUNT digits of COUNT / DIGITS inputs.
// STEP: the matrix' step if it is known when compiling, else 0.
template <class Isa, int BITS, int COUNT, int DIGITS, int BLOCKS, int STEP>
void multiply(const t16_matrix &matrix, const t16_inputs &inputs, int first_digit, float *y, int64_t y_stride, int64_t first, int64_t apart) {
    using Floats = typename Isa::Floats;
    constexpr int PARTS = Isa::PARTS, LANES = ROWS / PARTS, BYTES = 64 * Width<BITS>::VECTORS, INPUTS = COUNT / DIGITS;
    const int64_t columns = matrix.columns, width = STEP ? STEP : matrix.step, units = width / Width<BITS>::COLUMNS;
    const int64_t steps = columns / width, groups = columns / matrix.group, per_group = matrix.group / width;
    const int8_t *digits = inputs.digits + first_digit * columns;
    const float *unit = inputs.scales + first_digit * steps, *sum = inputs.sums + first_digit / DIGITS * steps;
    const uint8_t *codes[BLOCKS];
    int64_t place[BLOCKS];
    Floats result[BLOCKS][PARTS][INPUTS];
    for (int block = 0; block < BLOCKS; ++block) {
        codes[block] = matrix.codes + (first + block * apart) * columns * BITS * 2;
        place[block] = (first + block * apart) * groups * ROWS;
        for (int part = 0; part < PARTS; ++part)
            for (int input = 0; input < INPUTS; ++input) result[block][part][input] = Isa::no_floats();
    }
    for (int64_t group = 0, step = 0; group < groups; ++group)
        for (const int64_t end = step + per_group; step < end; ++step, digits += width)
#pragma GCC unroll 4
            for (int block = 0; block < BLOCKS; ++block) {
#pragma GCC unroll 2
                for (int part = 0; part < PARTS; ++part) {
                    typename Isa::Ints total[COUNT];
                    if (part == 0)
                        dots<Isa, BITS, COUNT, true>(codes[block], digits, columns, units, total);
                    else
                        dots<Isa, BITS, COUNT, false>(codes[block] + part * (64 / PARTS), digits, columns, units, total);
                    const int64_t rows = place[block] + group * ROWS + part * LANES;
                    const Floats scale = Isa::scales(matrix.scales, rows, matrix.scale);
                    // Codes of 8 bits were multiplied as if less by 128.
                    constexpr float MIDDLE = BITS == 8 ? 128 : 0;
                    const Floats zero = matrix.zeros ? Isa::minus(Isa::zeros(matrix.zeros + rows), Isa::filled(MIDDLE))
                                                     : Isa::filled((1 << (BITS - 1)) - MIDDLE);
                    const Floats scaled_zero = Isa::times(scale, zero);
                    for (int input = 0; input < INPUTS; ++input) {
                        Floats &to = result[block][part][input];
                        for (int digit = input * DIGITS; digit < (input + 1) * DIGITS; ++digit)
                            to = Isa::plus_product(to, Isa::floats(total[digit]), Isa::times(scale, Isa::filled(unit[digit * steps + step])));
                        if (BITS != 8 || matrix.zeros) to = Isa::less(to, scaled_zero, Isa::filled(sum[input * steps + step]));
                    }
                }
                codes[block] += units * BYTES;
            }
    for (int block = 0; block < BLOCKS; ++block)
        for (int part = 0; part < PARTS; ++part) {
            const int64_t row = (first + block * apart) * ROWS + part * LANES, left = matrix.rows - row;
            for (int input = 0; input < INPUTS && left > 0; ++input) {
                float lanes[LANES];
                Isa::store(lanes, result[block][part][input]);
                std::memcpy(y + (first_digit / DIGITS + input) * y_stride + row, lanes, sizeof(float) * (left < LANES ? left : LANES));
            }
        }
}

template <class Isa, int BITS, int COUNT, int DIGITS>
void blocks_of(const t16_matrix &matrix, const t16_inputs &inputs, int digit, float *y, int64_t y_stride, int64_t first, int64_t last) {
    // What is common is compiled for itself: every variant costs seconds of compiling.
    if constexpr (COUNT <= 2 && Isa::BLOCKS > 1)
        if (matrix.step == 128) {
            const int64_t apart = (last - first) / Isa::BLOCKS;
            for (int64_t block = first; block < first + apart; ++block)
                multiply<Isa, BITS, COUNT, DIGITS, Isa::BLOCKS, 128>(matrix, inputs, digit, y, y_stride, block, apart);
            first += apart * Isa::BLOCKS;
        }
    for (int64_t block = first; block < last; ++block) multiply<Isa, BITS, COUNT, DIGITS, 1, 0>(matrix, inputs, digit, y, y_stride, block, 0);
}

template <class Isa, int BITS, int DIGITS>
void width(const t16_matrix &matrix, const t16_inputs &inputs, float *y, int64_t y_stride, int64_t first, int64_t last) {
    int digit = 0;
    for (; inputs.count - digit >= 8; digit += 8) blocks_of<Isa, BITS, 8, DIGITS>(matrix, inputs, digit, y, y_stride, first, last);
    for (; inputs.count - digit >= 4; digit += 4) blocks_of<Isa, BITS, 4, DIGITS>(matrix, inputs, digit, y, y_stride, first, last);
    for (; inputs.count - digit >= 2; digit += 2) blocks_of<Isa, BITS, 2, DIGITS>(matrix, inputs, digit, y, y_stride, first, last);
    if constexpr (DIGITS == 1)
        if (digit < inputs.count) blocks_of<Isa, BITS, 1, 1>(matrix, inputs, digit, y, y_stride, first, last);
}

template <class Isa, int BITS>
void digits(const t16_matrix &matrix, const t16_inputs &inputs, float *y, int64_t y_stride, int64_t first, int64_t last) {
    if (inputs.per_input == 2)
        width<Isa, BITS, 2>(matrix, inputs, y, y_stride, first, last);
    else
        width<Isa, BITS, 1>(matrix, inputs, y, y_stride, first, last);
}

template <class Isa> void run(const t16_matrix &matrix, const t16_inputs &inputs, float *y, int64_t y_stride, int64_t first, int64_t last) {
    switch (matrix.bits) {
        case 2: return digits<Isa, 2>(matrix, inputs, y, y_stride, first, last);
        case 3: return digits<Isa, 3>(matrix, inputs, y, y_stride, first, last);
        case 4: return digits<Isa, 4>(matrix, inputs, y, y_stride, first, last);
        case 8: return digits<Isa, 8>(matrix, inputs, y, y_stride, first, last);
    }
}

}  // namespace t16
