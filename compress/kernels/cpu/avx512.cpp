// AVX-512 with VNNI: a vector is one register; four products per lane are added at once, in 32 bits.
// Needs: x86_64 avx512f avx512bw avx512vl avx512vnni fma f16c
#include <immintrin.h>

#include "kernel.hpp"

namespace {

struct Avx512 {
    using Bytes = __m512i;
    using Sum = __m512i;
    using Ints = __m512i;
    using Floats = __m512;
    static constexpr int PARTS = 1, BLOCKS = 2, MOST = 8;

    static Ints no_ints() { return _mm512_setzero_si512(); }
    static Sum no_sum() { return _mm512_setzero_si512(); }
    static Floats no_floats() { return _mm512_setzero_ps(); }
    static Bytes load(const uint8_t *from) { return _mm512_loadu_si512(from); }
    static Bytes broadcast(const int8_t *from) {
        int32_t four;
        std::memcpy(&four, from, 4);
        return _mm512_set1_epi32(four);
    }
    static Bytes masked(Bytes code, int mask) { return _mm512_and_si512(code, _mm512_set1_epi8(static_cast<char>(mask))); }
    static Bytes twice(Bytes code) { return _mm512_add_epi8(code, code); }
    // One more where the top bit of `other` is set.
    static Bytes plus_top(Bytes code, Bytes other) { return _mm512_or_si512(code, masked(_mm512_srli_epi16(other, 7), 0x01)); }
    template <int BY> static Bytes shifted(Bytes code) { return _mm512_srli_epi16(code, BY); }
    static Sum add(Sum sum, Bytes code, Bytes digit) { return _mm512_dpbusd_epi32(sum, code, digit); }
    // Codes times digits, less 128 times the digits.
    static Ints add_signed(Ints total, Bytes code, Bytes digit) {
        const __m512i all = _mm512_dpbusd_epi32(total, code, digit);
        return _mm512_sub_epi32(all, _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(static_cast<char>(0x80)), digit));
    }
    static Ints plus(Ints total, Sum sum) { return _mm512_add_epi32(total, sum); }
    static Sum plus_quarter(Sum sum, Sum quadrupled) { return _mm512_add_epi32(sum, _mm512_srai_epi32(quadrupled, 2)); }
    static Floats floats(Ints value) { return _mm512_cvtepi32_ps(value); }
    static Floats filled(float value) { return _mm512_set1_ps(value); }
    static Floats times(Floats one, Floats other) { return _mm512_mul_ps(one, other); }
    static Floats minus(Floats one, Floats other) { return _mm512_sub_ps(one, other); }
    static Floats less(Floats from, Floats one, Floats other) { return _mm512_fnmadd_ps(one, other, from); }
    static Floats plus_product(Floats to, Floats one, Floats other) { return _mm512_fmadd_ps(one, other, to); }
    static Floats widened(const void *from, int64_t place, int32_t kind) {
        if (kind == T16_FLOAT32) return _mm512_loadu_ps(static_cast<const float *>(from) + place);
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(static_cast<const uint16_t *>(from) + place));
        if (kind == T16_FLOAT16) return _mm512_cvtph_ps(halves);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    static Floats zeros(const uint8_t *from) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))));
    }
    static Floats e4m3(const uint8_t *from) {
        const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
        return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(static_cast<short>(0xbf80))));
    }
    static Floats e2m1(const uint8_t *from) {
        const __m512i pairs = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from)));
        // Of each lane the lower four bits count.
        return _mm512_permutexvar_ps(_mm512_or_si512(pairs, _mm512_slli_epi64(pairs, 28)), _mm512_loadu_ps(t16::E2M1));
    }
    static void store(float *to, Floats value) { _mm512_storeu_ps(to, value); }
};

}  // namespace

extern const t16::Kernels t16_avx512;
const t16::Kernels t16_avx512 = t16::KERNELS<Avx512>;
