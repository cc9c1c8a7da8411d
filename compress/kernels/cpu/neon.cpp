// NEON with dot products: a vector is four registers of 4 rows; four products per lane are added at once, in 32 bits.
// Needs: aarch64 dotprod
#include <arm_neon.h>

#include "kernel.hpp"

namespace {

struct Neon {
    using Bytes = uint8x16_t;
    using Sum = int32x4_t;
    using Ints = int32x4_t;
    using Floats = float32x4_t;
    static constexpr int PARTS = 4, BLOCKS = 2, MOST = 4;

    static Ints no_ints() { return vdupq_n_s32(0); }
    static Sum no_sum() { return vdupq_n_s32(0); }
    static Floats no_floats() { return vdupq_n_f32(0); }
    static Bytes load(const uint8_t *from) { return vld1q_u8(from); }
    static Bytes broadcast(const int8_t *from) {
        int32_t four;
        std::memcpy(&four, from, 4);
        return vreinterpretq_u8_s32(vdupq_n_s32(four));
    }
    static Bytes masked(Bytes code, int mask) { return vandq_u8(code, vdupq_n_u8(static_cast<uint8_t>(mask))); }
    static Bytes twice(Bytes code) { return vaddq_u8(code, code); }
    // One more where the top bit of `other` is set.
    static Bytes plus_top(Bytes code, Bytes other) { return vsraq_n_u8(code, other, 7); }
    template <int BY> static Bytes shifted(Bytes code) { return vshrq_n_u8(code, BY); }
    static Sum add(Sum sum, Bytes code, Bytes digit) { return vdotq_s32(sum, vreinterpretq_s8_u8(code), vreinterpretq_s8_u8(digit)); }
    // Codes less 128 are signed bytes.
    static Ints add_signed(Ints total, Bytes code, Bytes digit) { return add(total, veorq_u8(code, vdupq_n_u8(0x80)), digit); }
    static Ints plus(Ints total, Sum sum) { return vaddq_s32(total, sum); }
    // `quadrupled` is a sum of multiples of four.
    static Sum plus_quarter(Sum sum, Sum quadrupled) { return vsraq_n_s32(sum, quadrupled, 2); }
    static Floats floats(Ints value) { return vcvtq_f32_s32(value); }
    static Floats filled(float value) { return vdupq_n_f32(value); }
    static Floats times(Floats one, Floats other) { return vmulq_f32(one, other); }
    static Floats minus(Floats one, Floats other) { return vsubq_f32(one, other); }
    static Floats less(Floats from, Floats one, Floats other) { return vfmsq_f32(from, one, other); }
    static Floats plus_product(Floats to, Floats one, Floats other) { return vfmaq_f32(to, one, other); }
    static Floats widened(const void *from, int64_t place, int32_t kind) {
        if (kind == T16_FLOAT32) return vld1q_f32(static_cast<const float *>(from) + place);
        const uint16x4_t halves = vld1_u16(static_cast<const uint16_t *>(from) + place);
        if (kind == T16_FLOAT16) return vcvt_f32_f16(vreinterpret_f16_u16(halves));
        return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
    }
    static Floats zeros(const uint8_t *from) {
        uint32_t four;
        std::memcpy(&four, from, 4);
        return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
    }
    static Floats e4m3(const uint8_t *from) {
        uint32_t four;
        std::memcpy(&four, from, 4);
        const int16x4_t codes = vget_low_s16(vmovl_s8(vcreate_s8(four)));
        return vcvt_f32_f16(vreinterpret_f16_u16(vand_u16(vreinterpret_u16_s16(vshl_n_s16(codes, 7)), vdup_n_u16(0xbf80))));
    }
    static Floats e2m1(const uint8_t *from) {
        // Their upper bytes as halves; the lower ones are zero.
        static const uint8_t UPPER[16] = {0x00, 0x38, 0x3c, 0x3e, 0x40, 0x42, 0x44, 0x46, 0x80, 0xb8, 0xbc, 0xbe, 0xc0, 0xc2, 0xc4, 0xc6};
        uint16_t two;
        std::memcpy(&two, from, 2);
        const uint32_t pairs = (two & 0xffu) | (two & 0xff00u) << 8;
        const uint8x8_t upper = vqtbl1_u8(vld1q_u8(UPPER), vcreate_u8((pairs | pairs << 4) & 0x0f0f0f0fu));
        return vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(vshll_n_u8(upper, 8))));
    }
    static void store(float *to, Floats value) { vst1q_f32(to, value); }
};

}  // namespace

extern const t16::Kernels t16_neon;
const t16::Kernels t16_neon = t16::KERNELS<Neon>;
