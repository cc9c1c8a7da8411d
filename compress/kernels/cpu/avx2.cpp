// AVX2 and FMA: a vector is two registers of 8 rows. Products of codes and digits are added in 16 bits, a few at a time, then in 32.
// Needs: x86_64 avx2 fma f16c
#include <immintrin.h>

#include "kernel.hpp"

namespace {

struct Avx2 {
    using Bytes = __m256i;
    using Sum = __m256i;
    using Ints = __m256i;
    using Floats = __m256;
    static constexpr int PARTS = 2, BLOCKS = 2, MOST = 4;

    static Ints no_ints() { return _mm256_setzero_si256(); }
    static Sum no_sum() { return _mm256_setzero_si256(); }
    static Floats no_floats() { return _mm256_setzero_ps(); }
    static Bytes load(const uint8_t *from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)); }
    static Bytes broadcast(const int8_t *from) {
        int32_t four;
        std::memcpy(&four, from, 4);
        return _mm256_set1_epi32(four);
    }
    static Bytes masked(Bytes code, int mask) { return _mm256_and_si256(code, _mm256_set1_epi8(static_cast<char>(mask))); }
    static Bytes twice(Bytes code) { return _mm256_add_epi8(code, code); }
    // One more where the top bit of `other` is set.
    static Bytes plus_top(Bytes code, Bytes other) { return _mm256_sub_epi8(code, _mm256_cmpgt_epi8(_mm256_setzero_si256(), other)); }
    template <int BY> static Bytes shifted(Bytes code) { return _mm256_srli_epi16(code, BY); }
    static Sum add(Sum sum, Bytes code, Bytes digit) {
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(code, digit));
        // In this order: a compiler that adds in trees runs out of registers, and half of its instructions are then spills.
        asm("" : "+x"(sum));
        return sum;
    }
    // Codes less 128 as a magnitude times digits with its sign: both factors fit, and so does the sum of two products.
    static Ints add_signed(Ints total, Bytes code, Bytes digit) {
        const __m256i centred = _mm256_xor_si256(code, _mm256_set1_epi8(static_cast<char>(0x80)));
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(centred), _mm256_sign_epi8(digit, centred));
        return _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static Ints plus(Ints total, Sum sum) { return _mm256_add_epi32(total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1))); }
    // `quadrupled` is a sum of multiples of four.
    static Sum plus_quarter(Sum sum, Sum quadrupled) { return _mm256_add_epi16(sum, _mm256_srai_epi16(quadrupled, 2)); }
    static Floats floats(Ints value) { return _mm256_cvtepi32_ps(value); }
    static Floats filled(float value) { return _mm256_set1_ps(value); }
    static Floats times(Floats one, Floats other) { return _mm256_mul_ps(one, other); }
    static Floats minus(Floats one, Floats other) { return _mm256_sub_ps(one, other); }
    static Floats less(Floats from, Floats one, Floats other) { return _mm256_fnmadd_ps(one, other, from); }
    static Floats plus_product(Floats to, Floats one, Floats other) { return _mm256_fmadd_ps(one, other, to); }
    static Floats widened(const void *from, int64_t place, int32_t kind) {
        if (kind == T16_FLOAT32) return _mm256_loadu_ps(static_cast<const float *>(from) + place);
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(static_cast<const uint16_t *>(from) + place));
        if (kind == T16_FLOAT16) return _mm256_cvtph_ps(halves);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
    static Floats zeros(const uint8_t *from) {
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from))));
    }
    static Floats e4m3(const uint8_t *from) {
        const __m128i codes = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from)));
        return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(codes, 7), _mm_set1_epi16(static_cast<short>(0xbf80))));
    }
    static Floats e2m1(const uint8_t *from) {
        int32_t four;
        std::memcpy(&four, from, 4);
        const __m256i codes = _mm256_set1_epi32(four), down = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
        const __m256 magnitude = _mm256_permutevar8x32_ps(_mm256_loadu_ps(t16::E2M1), _mm256_srlv_epi32(codes, down));
        const __m256i up = _mm256_sllv_epi32(codes, _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0));
        return _mm256_xor_ps(magnitude, _mm256_and_ps(_mm256_castsi256_ps(up), _mm256_set1_ps(-0.0f)));
    }
    static void store(float *to, Floats value) { _mm256_storeu_ps(to, value); }
};

}  // namespace

extern const t16::Kernels t16_avx2;
const t16::Kernels t16_avx2 = t16::KERNELS<Avx2>;
