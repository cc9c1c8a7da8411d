// The kernels, written once over what an instruction set must offer (`Isa`), instantiated by one file per instruction set.
//
// Bytes moved per multiplication: N * K * bits / 8 codes, N * K / group scales of 2 or 4 bytes and zero points of 1; K bytes per digit of an
// input, N floats out. Everything else lives in registers or the first-level cache: the digits of the inputs are read once per block of rows.
//
// `Isa` has: Bytes, a register of codes (64 / PARTS bytes of a vector); Sum, what dot products of up to SPAN units with digits are kept in;
// Ints and Floats, 32 bits per lane; BLOCKS of rows read at once for one input; MOST digits, for which its registers suffice; `e4m3` and `e2m1`,
// which widen as many codes as Floats have lanes, those of E4M3 divided by 256.
#pragma once
#include <cstring>

#include "t16.h"

namespace t16 {

constexpr int ROWS = 16;

// Where to fetch, in bytes past what is read. It has to be inlined: of a call that only fetches, compilers find that it does nothing.
constexpr int AHEAD = 2048;
inline __attribute__((always_inline)) void prefetch(const uint8_t *from) { __builtin_prefetch(from); }

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// All but the NaN. As bits of 32 its exponent is less by 120.
inline float e4m3(uint8_t code) { return from_bits((code & 0x80u) << 24 | (code & 0x7fu) << 20) * 0x1p120f; }

inline float e8m0(uint8_t code) { return from_bits(code == 255 ? 0x7fc00000u : code ? static_cast<uint32_t>(code) << 23 : 0x00400000u); }

constexpr float E2M1[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

inline float widened(const void *scales, int64_t place, int32_t kind) {
    if (kind == T16_FLOAT32) return static_cast<const float *>(scales)[place];
    if (kind == T16_E8M0) return e8m0(static_cast<const uint8_t *>(scales)[place]);
    if (kind == T16_E4M3) return e4m3(static_cast<const uint8_t *>(scales)[place]);
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
    return from_bits(bits);
}

// What a width means: columns and vectors per unit.
template <int BITS> struct Width;
template <> struct Width<8> { static constexpr int COLUMNS = 4, VECTORS = 1; };
template <> struct Width<4> { static constexpr int COLUMNS = 8, VECTORS = 1; };
template <> struct Width<3> { static constexpr int COLUMNS = 32, VECTORS = 3; };
template <> struct Width<2> { static constexpr int COLUMNS = 16, VECTORS = 1; };

// Whether every other code of 2 bits is multiplied where it stands, as four times itself, into sums of its own: it saves shifts, which a
// few digits feel, and costs registers, which many digits need.
template <int COUNT> constexpr bool FOURFOLD = COUNT <= 2;

// Adds to `low` and `high` the products of one unit's codes with COUNT digits. The registers of a vector share what is loaded of the inputs.
template <class Isa, int BITS, int COUNT>
inline __attribute__((always_inline)) void unit(const uint8_t *codes, const int8_t *digits, int64_t stride,
                                                typename Isa::Sum (&low)[Isa::PARTS][COUNT], typename Isa::Sum (&high)[Isa::PARTS][COUNT]) {
    using Bytes = typename Isa::Bytes;
    constexpr int PARTS = Isa::PARTS;
    const auto field = [&](int place, typename Isa::Sum(&sums)[PARTS][COUNT], auto code) __attribute__((always_inline)) {
        Bytes fields[PARTS];
        for (int part = 0; part < PARTS; ++part) fields[part] = code(part);
        for (int c = 0; c < COUNT; ++c) {
            const Bytes digit = Isa::broadcast(digits + c * stride + 4 * place);
            for (int part = 0; part < PARTS; ++part) sums[part][c] = Isa::add(sums[part][c], fields[part], digit);
        }
    };
    Bytes first[PARTS], second[PARTS], third[PARTS];
    for (int part = 0; part < PARTS; ++part) {
        first[part] = Isa::load(codes + part * (64 / PARTS));
        if constexpr (BITS == 3) {
            second[part] = Isa::load(codes + part * (64 / PARTS) + 64);
            third[part] = Isa::load(codes + part * (64 / PARTS) + 128);
        }
    }
    if constexpr (BITS == 4) {
        field(0, low, [&](int part) { return Isa::masked(first[part], 0x0f); });
        field(1, low, [&](int part) { return Isa::masked(Isa::template shifted<4>(first[part]), 0x0f); });
    } else if constexpr (BITS == 2) {
        for (int place = 0; place < 4; place += 2) {
            field(place, low, [&](int part) { return Isa::masked(first[part], 0x03); });
            if constexpr (FOURFOLD<COUNT>)
                field(place + 1, high, [&](int part) { return Isa::masked(first[part], 0x0c); });
            else
                field(place + 1, low, [&](int part) { return Isa::masked(Isa::template shifted<2>(first[part]), 0x03); });
            for (int part = 0; part < PARTS; ++part) first[part] = Isa::template shifted<4>(first[part]);
        }
    } else {
        field(0, low, [&](int part) { return Isa::masked(first[part], 0x07); });
        field(1, low, [&](int part) { return Isa::masked(Isa::template shifted<3>(first[part]), 0x07); });
        field(2, low, [&](int part) { return Isa::masked(second[part], 0x07); });
        field(3, low, [&](int part) { return Isa::masked(Isa::template shifted<3>(second[part]), 0x07); });
        field(4, low, [&](int part) { return Isa::masked(third[part], 0x07); });
        field(5, low, [&](int part) { return Isa::masked(Isa::template shifted<3>(third[part]), 0x07); });
        field(6, low, [&](int part) { return Isa::plus_top(Isa::masked(Isa::template shifted<5>(first[part]), 0x06), Isa::twice(third[part])); });
        field(7, low, [&](int part) { return Isa::plus_top(Isa::masked(Isa::template shifted<5>(second[part]), 0x06), third[part]); });
    }
}

// Dot products of COUNT digits with 16 rows of codes, `units` units long; what comes AHEAD of them is fetched. For 8 bits as if each code
// were less by 128, which no 8-bit product then overflows.
template <class Isa, int BITS, int COUNT>
inline __attribute__((always_inline)) void dots(const uint8_t *codes, const int8_t *digits, int64_t stride, int64_t units,
                                                typename Isa::Ints (&total)[Isa::PARTS][COUNT]) {
    constexpr int PARTS = Isa::PARTS, BYTES = 64 * Width<BITS>::VECTORS, COLUMNS = Width<BITS>::COLUMNS;
    const auto fetch = [&](int64_t place) __attribute__((always_inline)) {
        for (int vector = 0; vector < Width<BITS>::VECTORS; ++vector) prefetch(codes + place * BYTES + 64 * vector + AHEAD);
    };
    for (int part = 0; part < PARTS; ++part)
        for (int c = 0; c < COUNT; ++c) total[part][c] = Isa::no_ints();
    if constexpr (BITS == 8) {
        for (int64_t place = 0; place < units; ++place) {
            fetch(place);
            typename Isa::Bytes code[PARTS];
            for (int part = 0; part < PARTS; ++part) code[part] = Isa::load(codes + place * BYTES + part * (64 / PARTS));
            for (int c = 0; c < COUNT; ++c) {
                const typename Isa::Bytes digit = Isa::broadcast(digits + c * stride + place * 4);
                for (int part = 0; part < PARTS; ++part) total[part][c] = Isa::add_signed(total[part][c], code[part], digit);
            }
        }
    } else {
        // Units until 16-bit sums could overflow; of 2 bits, where one sum is of fourfold codes, that one comes back to the other earlier.
        constexpr int SPAN = BITS == 3 ? 2 : BITS == 4 ? 4 : 8, INNER = BITS == 2 && FOURFOLD<COUNT> ? 4 : SPAN;
        const auto some = [&](int64_t start, int64_t count) __attribute__((always_inline)) {
            typename Isa::Sum low[PARTS][COUNT], high[PARTS][COUNT];
            for (int part = 0; part < PARTS; ++part)
                for (int c = 0; c < COUNT; ++c) low[part][c] = Isa::no_sum();
            for (int64_t inner = start; inner < start + count; inner += INNER) {
                if constexpr (BITS == 2 && FOURFOLD<COUNT>)
                    for (int part = 0; part < PARTS; ++part)
                        for (int c = 0; c < COUNT; ++c) high[part][c] = Isa::no_sum();
                for (int64_t place = inner; place < inner + INNER && place < start + count; ++place) {
                    fetch(place);
                    unit<Isa, BITS, COUNT>(codes + place * BYTES, digits + place * COLUMNS, stride, low, high);
                }
                if constexpr (BITS == 2 && FOURFOLD<COUNT>)
                    for (int part = 0; part < PARTS; ++part)
                        for (int c = 0; c < COUNT; ++c) low[part][c] = Isa::plus_quarter(low[part][c], high[part][c]);
            }
            for (int part = 0; part < PARTS; ++part)
                for (int c = 0; c < COUNT; ++c) total[part][c] = Isa::plus(total[part][c], low[part][c]);
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
                typename Isa::Ints total[PARTS][COUNT];
                dots<Isa, BITS, COUNT>(codes[block], digits, columns, units, total);
                for (int part = 0; part < PARTS; ++part) {
                    const int64_t rows = place[block] + group * ROWS + part * LANES;
                    const Floats scale = Isa::widened(matrix.scales, rows, matrix.scale);
                    // Codes of 8 bits were multiplied as if less by 128.
                    constexpr float MIDDLE = BITS == 8 ? 128 : 0;
                    const Floats zero = matrix.zeros ? Isa::minus(Isa::zeros(matrix.zeros + rows), Isa::filled(MIDDLE))
                                                     : Isa::filled((1 << (BITS - 1)) - MIDDLE);
                    const Floats scaled_zero = Isa::times(scale, zero);
                    for (int input = 0; input < INPUTS; ++input) {
                        Floats &to = result[block][part][input];
                        for (int digit = input * DIGITS; digit < (input + 1) * DIGITS; ++digit)
                            to = Isa::plus_product(to, Isa::floats(total[part][digit]), Isa::times(scale, Isa::filled(unit[digit * steps + step])));
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

// One digit of one input, or both of it. What is common is compiled for itself: every variant costs seconds of compiling.
template <class Isa, int BITS, int DIGITS>
void one_input(const t16_matrix &matrix, const t16_inputs &inputs, float *y, int64_t first, int64_t last) {
    if constexpr (Isa::BLOCKS > 1)
        if (matrix.step == 128) {
            const int64_t apart = (last - first) / Isa::BLOCKS;
            for (int64_t block = first; block < first + apart; ++block)
                multiply<Isa, BITS, DIGITS, DIGITS, Isa::BLOCKS, 128>(matrix, inputs, 0, y, 0, block, apart);
            first += apart * Isa::BLOCKS;
        }
    for (int64_t block = first; block < last; ++block) multiply<Isa, BITS, DIGITS, DIGITS, 1, 0>(matrix, inputs, 0, y, 0, block, 0);
}

template <class Isa, int BITS, int DIGITS>
void width(const t16_matrix &matrix, const t16_inputs &inputs, float *y, int64_t y_stride, int64_t first, int64_t last) {
    if (inputs.count == DIGITS) return one_input<Isa, BITS, DIGITS>(matrix, inputs, y, first, last);
    // Of many inputs, a block stays in the cache while all of them are multiplied with it.
    for (int64_t block = first; block < last; ++block) {
        int digit = 0;
        for (; inputs.count - digit >= Isa::MOST; digit += Isa::MOST)
            if (matrix.step == 128)
                multiply<Isa, BITS, Isa::MOST, DIGITS, 1, 128>(matrix, inputs, digit, y, y_stride, block, 0);
            else
                multiply<Isa, BITS, Isa::MOST, DIGITS, 1, 0>(matrix, inputs, digit, y, y_stride, block, 0);
        for (; digit < inputs.count; digit += DIGITS) multiply<Isa, BITS, DIGITS, DIGITS, 1, 0>(matrix, inputs, digit, y, y_stride, block, 0);
    }
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

// y for rows first to last of a weight that is stored in floats of 16 or 32 bits: four rows at once share what is loaded of an input.
template <class Isa, int KIND>
void dense_of(const void *weight, int64_t rows, int64_t columns, const float *x, int64_t tokens, float *y, int64_t first, int64_t last) {
    using Floats = typename Isa::Floats;
    constexpr int TOGETHER = 4, LANES = ROWS / Isa::PARTS, SIZE = KIND == T16_FLOAT32 ? 4 : 2;
    const int64_t whole = columns / LANES * LANES;
    for (int64_t row = first; row < last; row += TOGETHER) {
        int64_t starts[TOGETHER];  // the last of too few rows stands in for those that are missing
        for (int r = 0; r < TOGETHER; ++r) starts[r] = (row + r < last ? row + r : last - 1) * columns;
        for (int64_t token = 0; token < tokens; ++token) {
            const float *input = x + token * columns;
            Floats sums[TOGETHER];
            for (Floats &sum : sums) sum = Isa::no_floats();
            for (int64_t line = 0; line < whole; line += 64 / SIZE) {
                for (const int64_t start : starts) prefetch(static_cast<const uint8_t *>(weight) + (start + line) * SIZE + AHEAD);
                for (int64_t k = line; k < whole && k < line + 64 / SIZE; k += LANES) {
                    const Floats given = Isa::widened(input, k, T16_FLOAT32);
                    for (int r = 0; r < TOGETHER; ++r) sums[r] = Isa::plus_product(sums[r], Isa::widened(weight, starts[r] + k, KIND), given);
                }
            }
            for (int r = 0; r < TOGETHER && row + r < last; ++r) {
                float lanes[LANES], total = 0;
                Isa::store(lanes, sums[r]);
                for (const float lane : lanes) total += lane;
                for (int64_t k = whole; k < columns; ++k) total += widened(weight, starts[r] + k, KIND) * input[k];
                y[token * rows + row + r] = total;
            }
        }
    }
}

template <class Isa> void dense(const void *weight, int32_t kind, int64_t rows, int64_t columns, const float *x, int64_t tokens, float *y,
                                int64_t first, int64_t last) {
    switch (kind) {
        case T16_FLOAT32: return dense_of<Isa, T16_FLOAT32>(weight, rows, columns, x, tokens, y, first, last);
        case T16_BFLOAT16: return dense_of<Isa, T16_BFLOAT16>(weight, rows, columns, x, tokens, y, first, last);
        case T16_FLOAT16: return dense_of<Isa, T16_FLOAT16>(weight, rows, columns, x, tokens, y, first, last);
    }
}

// A power of two that E4M3 codes are less by as they come out of `Isa::e4m3`: shifted as they are, halves hold them all.
template <int CODE> constexpr float FACTOR = CODE == T16_E4M3 ? 256 : 1;

// y of TOKENS inputs for up to TOGETHER rows from `row` on. Codes are widened in registers, once for all inputs; sums of a group are scaled.
// GROUP: the matrix' group if it is known when compiling, else 0.
template <class Isa, int CODE, int GROUP, int TOKENS, int TOGETHER>
void small_rows(const t16_small &matrix, const float *x, float *y, int64_t row, int64_t last) {
    using Floats = typename Isa::Floats;
    constexpr int LANES = ROWS / Isa::PARTS, PER_BYTE = CODE == T16_E2M1 ? 2 : 1;
    const int64_t columns = matrix.columns, width = GROUP ? GROUP : matrix.group, groups = columns / width, whole = width / LANES * LANES;
    const uint8_t *codes[TOGETHER];
    int64_t scales[TOGETHER];
    Floats result[TOKENS][TOGETHER];
    float rest[TOKENS][TOGETHER] = {};
    for (int r = 0; r < TOGETHER; ++r) {  // the last of too few rows stands in for those that are missing
        const int64_t at = row + r < last ? row + r : last - 1;
        codes[r] = matrix.codes + at * (columns / PER_BYTE);
        scales[r] = at * groups;
        for (int t = 0; t < TOKENS; ++t) result[t][r] = Isa::no_floats();
    }
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t start = group * width, end = start + whole;
        Floats sums[TOKENS][TOGETHER];
        for (auto &each : sums)
            for (Floats &sum : each) sum = Isa::no_floats();
        for (int64_t line = start; line < end; line += 64 * PER_BYTE) {
            for (const uint8_t *from : codes) prefetch(from + line / PER_BYTE + AHEAD);
            for (int64_t k = line; k < end && k < line + 64 * PER_BYTE; k += LANES) {
                Floats given[TOKENS];
                for (int t = 0; t < TOKENS; ++t) given[t] = Isa::widened(x, t * columns + k, T16_FLOAT32);
                for (int r = 0; r < TOGETHER; ++r) {
                    const uint8_t *from = codes[r] + k / PER_BYTE;
                    const Floats code = CODE == T16_E4M3 ? Isa::e4m3(from) : Isa::e2m1(from);
                    for (int t = 0; t < TOKENS; ++t) sums[t][r] = Isa::plus_product(sums[t][r], code, given[t]);
                }
            }
        }
        for (int r = 0; r < TOGETHER; ++r) {
            const float scale = widened(matrix.scales, scales[r] + group, matrix.scale);
            for (int t = 0; t < TOKENS; ++t) {
                result[t][r] = Isa::plus_product(result[t][r], sums[t][r], Isa::filled(scale));
                if (whole == width) continue;
                float left = 0;
                for (int64_t k = end; k < start + width; ++k) {
                    const uint8_t byte = codes[r][k / PER_BYTE];
                    left += (CODE == T16_E4M3 ? e4m3(byte) : E2M1[byte >> k % 2 * 4 & 15]) * x[t * columns + k];
                }
                rest[t][r] += left * scale;
            }
        }
    }
    const float unit = matrix.unit ? *matrix.unit : 1;
    for (int r = 0; r < TOGETHER && row + r < last; ++r)
        for (int t = 0; t < TOKENS; ++t) {
            float lanes[LANES], total = 0;
            Isa::store(lanes, result[t][r]);
            for (const float lane : lanes) total += lane;
            y[t * matrix.rows + row + r] = (total * FACTOR<CODE> + rest[t][r]) / unit;
        }
}

template <class Isa, int CODE, int GROUP>
void small_of(const t16_small &matrix, const float *x, int64_t tokens, float *y, int64_t first, int64_t last) {
    constexpr int MANY = 4;
    for (int64_t row = first; row < last; row += 4) {  // which stay in the cache while all inputs are multiplied with them
        int64_t token = 0;
        for (; token + MANY <= tokens; token += MANY)
            for (int64_t pair = row; pair < row + 4 && pair < last; pair += 2)
                small_rows<Isa, CODE, GROUP, MANY, 2>(matrix, x + token * matrix.columns, y + token * matrix.rows, pair, last);
        for (; token < tokens; ++token)
            small_rows<Isa, CODE, GROUP, 1, 4>(matrix, x + token * matrix.columns, y + token * matrix.rows, row, last);
    }
}

template <class Isa> void small(const t16_small &matrix, const float *x, int64_t tokens, float *y, int64_t first, int64_t last) {
    // Groups of MXFP4 and NVFP4 are so small that what is known of them counts.
    if (matrix.code == T16_E4M3) return small_of<Isa, T16_E4M3, 0>(matrix, x, tokens, y, first, last);
    if (matrix.group == 16) return small_of<Isa, T16_E2M1, 16>(matrix, x, tokens, y, first, last);
    if (matrix.group == 32) return small_of<Isa, T16_E2M1, 32>(matrix, x, tokens, y, first, last);
    small_of<Isa, T16_E2M1, 0>(matrix, x, tokens, y, first, last);
}

// What a file gives of its instruction set.
using Run = void (*)(const t16_matrix &, const t16_inputs &, float *, int64_t, int64_t, int64_t);
using Dense = void (*)(const void *, int32_t, int64_t, int64_t, const float *, int64_t, float *, int64_t, int64_t);
using Small = void (*)(const t16_small &, const float *, int64_t, float *, int64_t, int64_t);
struct Kernels {
    Run run;
    Dense dense;
    Small small;
};
template <class Isa> constexpr Kernels KERNELS = {run<Isa>, dense<Isa>, small<Isa>};

}  // namespace t16
