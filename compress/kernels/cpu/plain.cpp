// Plain C++: the same kernels on arrays, for processors without a file of their own and to compare the others with, bit for bit.
// Needs: any
#include "kernel.hpp"

namespace {

struct Plain {
    struct Bytes { uint8_t lane[64]; };
    struct Ints { int32_t lane[16]; };
    struct Floats { float lane[16]; };
    using Sum = Ints;
    static constexpr int PARTS = 1, BLOCKS = 1, MOST = 4;

    static Ints no_ints() { return Ints{}; }
    static Sum no_sum() { return Sum{}; }
    static Floats no_floats() { return Floats{}; }
    static Bytes load(const uint8_t *from) {
        Bytes bytes;
        std::memcpy(bytes.lane, from, 64);
        return bytes;
    }
    static Bytes broadcast(const int8_t *from) {
        Bytes bytes;
        for (int lane = 0; lane < 16; ++lane) std::memcpy(bytes.lane + 4 * lane, from, 4);
        return bytes;
    }
    static Bytes masked(Bytes code, int mask) {
        for (uint8_t &byte : code.lane) byte &= static_cast<uint8_t>(mask);
        return code;
    }
    static Bytes twice(Bytes code) {
        for (uint8_t &byte : code.lane) byte = static_cast<uint8_t>(2 * byte);
        return code;
    }
    static Bytes plus_top(Bytes code, Bytes other) {
        for (int byte = 0; byte < 64; ++byte) code.lane[byte] = static_cast<uint8_t>(code.lane[byte] + (other.lane[byte] >> 7));
        return code;
    }
    template <int BY> static Bytes shifted(Bytes code) {
        for (uint8_t &byte : code.lane) byte = static_cast<uint8_t>(byte >> BY);
        return code;
    }
    static Sum add(Sum sum, Bytes code, Bytes digit) {
        for (int byte = 0; byte < 64; ++byte) sum.lane[byte / 4] += code.lane[byte] * static_cast<int8_t>(digit.lane[byte]);
        return sum;
    }
    static Ints add_signed(Ints total, Bytes code, Bytes digit) {
        for (int byte = 0; byte < 64; ++byte) total.lane[byte / 4] += (code.lane[byte] - 128) * static_cast<int8_t>(digit.lane[byte]);
        return total;
    }
    static Ints plus(Ints total, Sum sum) {
        for (int lane = 0; lane < 16; ++lane) total.lane[lane] += sum.lane[lane];
        return total;
    }
    static Sum plus_quarter(Sum sum, Sum quadrupled) {
        for (int lane = 0; lane < 16; ++lane) sum.lane[lane] += quadrupled.lane[lane] / 4;
        return sum;
    }
    template <class F> static Floats each(F value) {
        Floats floats;
        for (int lane = 0; lane < 16; ++lane) floats.lane[lane] = value(lane);
        return floats;
    }
    static Floats floats(Ints value) { return each([&](int lane) { return static_cast<float>(value.lane[lane]); }); }
    static Floats filled(float value) { return each([&](int) { return value; }); }
    static Floats times(Floats one, Floats other) { return each([&](int lane) { return one.lane[lane] * other.lane[lane]; }); }
    static Floats minus(Floats one, Floats other) { return each([&](int lane) { return one.lane[lane] - other.lane[lane]; }); }
    static Floats less(Floats from, Floats one, Floats other) {
        return each([&](int lane) { return __builtin_fmaf(-one.lane[lane], other.lane[lane], from.lane[lane]); });
    }
    static Floats plus_product(Floats to, Floats one, Floats other) {
        return each([&](int lane) { return __builtin_fmaf(one.lane[lane], other.lane[lane], to.lane[lane]); });
    }
    static Floats widened(const void *from, int64_t place, int32_t kind) {
        return each([&](int lane) { return t16::widened(from, place + lane, kind); });
    }
    static Floats zeros(const uint8_t *from) { return each([&](int lane) { return static_cast<float>(from[lane]); }); }
    static Floats e4m3(const uint8_t *from) { return each([&](int lane) { return t16::e4m3(from[lane]) / 256; }); }
    static Floats e2m1(const uint8_t *from) {
        return each([&](int lane) { return t16::E2M1[from[lane / 2] >> lane % 2 * 4 & 15]; });
    }
    static void store(float *to, Floats value) { std::memcpy(to, value.lane, sizeof value.lane); }
};

}  // namespace

extern const t16::Kernels t16_plain;
const t16::Kernels t16_plain = t16::KERNELS<Plain>;
