// The AVX-512 that avx512.cpp uses, on any processor: SIMDe's, and what its version in Debian 12 lacks, lane by lane.
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

template <class From, class To, int LANES, class Register, class Result, class F> static inline Result each(const Register &from, F of) {
    From in[LANES];
    To out[LANES];
    __builtin_memcpy(in, &from, sizeof in);
    for (int lane = 0; lane < LANES; ++lane) out[lane] = of(in[lane]);
    Result result;
    __builtin_memcpy(&result, out, sizeof result);
    return result;
}

#undef _mm512_srai_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepu8_epi64
#undef _mm512_cvtph_ps
#undef _mm512_cvtepi32_ps
#define _mm512_srai_epi32(a, by) (each<int32_t, int32_t, 16, simde__m512i, simde__m512i>(a, [](int32_t lane) { return lane >> (by); }))
#define _mm512_cvtepu16_epi32(a) (each<uint16_t, int32_t, 16, simde__m256i, simde__m512i>(a, [](uint16_t lane) { return int32_t(lane); }))
#define _mm512_cvtepu8_epi32(a) (each<uint8_t, int32_t, 16, simde__m128i, simde__m512i>(a, [](uint8_t lane) { return int32_t(lane); }))
#define _mm512_cvtepu8_epi64(a) \
    (each<uint8_t, int64_t, 8, simde__m128i, simde__m512i>(a, [](uint8_t lane) { return int64_t(lane); }))
#define _mm512_cvtph_ps(a) (each<uint16_t, float, 16, simde__m256i, simde__m512>(a, [](uint16_t lane) { return _cvtsh_ss(lane); }))
#define _mm512_cvtepi32_ps(a) (each<int32_t, float, 16, simde__m512i, simde__m512>(a, [](int32_t lane) { return static_cast<float>(lane); }))
