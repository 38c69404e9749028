// Vectorised normals: the same bits as normal4() of philox.h, kCounters counters at a time.
#pragma once
#include "philox.h"
#include "vec.h"

namespace pynn::cpu {
typedef uint32_t VecUint __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VecUint64 __attribute__((vector_size(kVectorBytes)));
}  // namespace pynn::cpu

namespace pynn {

#if defined(__x86_64__) && !defined(__FMA__)
// a * b + c rounded once, on machines without the instruction: exact product and sum in float64, the sum rounded to odd
// (Boldo and Melquiond 2008), so that the final rounding to float32 sees which side of a tie the exact value is on.
PYNN_HD __m128d fma_rounded_to_odd(__m128d a, __m128d b, __m128d c) {
  const __m128d product = a * b, sum = product + c, back = sum - product, error = (product - (sum - back)) + (c - back);
  // An even sum that is not exact moves to its odd neighbour on the side of the error.
  const __m128i bits = _mm_castpd_si128(sum), one = _mm_set1_epi64x(1);
  const __m128i opposite = _mm_srli_epi64(_mm_xor_si128(_mm_castpd_si128(error), bits), 63);
  const __m128i side = _mm_sub_epi64(one, _mm_slli_epi64(opposite, 1));
  const __m128i even = _mm_sub_epi64(_mm_and_si128(bits, one), one);  // all bits set, or none
  const __m128i inexact = _mm_castpd_si128(_mm_cmpneq_pd(error, _mm_setzero_pd()));
  return _mm_castsi128_pd(_mm_add_epi64(bits, _mm_and_si128(side, _mm_and_si128(even, inexact))));
}
PYNN_HD cpu::VecFloat emulated_fma(cpu::VecFloat a, cpu::VecFloat b, cpu::VecFloat c) {
  const __m128d low = fma_rounded_to_odd(_mm_cvtps_pd(a), _mm_cvtps_pd(b), _mm_cvtps_pd(c));
  const __m128d high = fma_rounded_to_odd(_mm_cvtps_pd(_mm_movehl_ps(a, a)), _mm_cvtps_pd(_mm_movehl_ps(b, b)),
                                          _mm_cvtps_pd(_mm_movehl_ps(c, c)));
  return _mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high));
}
#endif

template <>
struct Lanes<cpu::VecFloat> {
  using Int = cpu::VecInt;
  using Uint = cpu::VecUint;
  static PYNN_HD cpu::VecFloat convert(Int v) { return __builtin_convertvector(v, cpu::VecFloat); }
  static PYNN_HD cpu::VecFloat convert_unsigned(Uint v) {
#if defined(__AVX512F__)
    return _mm512_cvtepu32_ps(__m512i(v));
#else
    return convert(Int(v >> 16)) * 65536.0f + convert(Int(v & 0xffffu));  // only the sum rounds
#endif
  }
  static PYNN_HD cpu::VecFloat multiply_add(cpu::VecFloat a, cpu::VecFloat b, cpu::VecFloat c) {
#if defined(__FMA__)
    return cpu::fma(a, b, c);
#elif defined(__x86_64__)
    return emulated_fma(a, b, c);
#else
    for (int i = 0; i < cpu::kLanes<float>; ++i) a[i] = std::fma(a[i], b[i], c[i]);
    return a;
#endif
  }
  static PYNN_HD cpu::VecFloat square_root(cpu::VecFloat v) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(v);
#elif defined(__AVX__)
    return _mm256_sqrt_ps(v);
#elif defined(__x86_64__)
    return _mm_sqrt_ps(v);
#else
    for (int i = 0; i < cpu::kLanes<float>; ++i) v[i] = std::sqrt(v[i]);
    return v;
#endif
  }
};
}  // namespace pynn

namespace pynn::cpu {

// Product of the low 32 bits of each 64-bit lane.
PYNN_HD VecUint64 multiply_low(VecUint64 a, VecUint64 b) {
#if defined(__AVX512F__)
  return VecUint64(_mm512_mul_epu32(__m512i(a), __m512i(b)));
#elif defined(__AVX2__)
  return VecUint64(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#elif defined(__x86_64__)
  return VecUint64(_mm_mul_epu32(__m128i(a), __m128i(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

inline constexpr int kCounters = kLanes<float>;  // counters per call of normals()
inline constexpr int kNormals = 4 * kCounters;   // normals per call

// philox4x32 of kCounters consecutive counters; word w of counter k lands in lane k of words[w]. The state lives in
// 64-bit lanes (their high halves hold leftovers that multiply_low ignores), even and odd counters apart.
PYNN_HD void philox(uint64_t seed, uint64_t counter, VecUint words[4]) {
  VecUint64 c[2][4];
  for (int odd = 0; odd < 2; ++odd) {
    VecUint64 index{};
    for (int lane = 0; lane < kLanes<double>; ++lane) index[lane] = uint64_t(2 * lane + odd);
    const VecUint64 value = index + counter;
    c[odd][0] = value, c[odd][1] = value >> 32, c[odd][2] = c[odd][3] = VecUint64{};
  }
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  const VecUint64 m0 = VecUint64{} + uint64_t(kPhiloxM0), m1 = VecUint64{} + uint64_t(kPhiloxM1);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (auto& s : c) {
      const VecUint64 p0 = multiply_low(m0, s[0]), p1 = multiply_low(m1, s[2]);
      s[0] = (p1 >> 32) ^ s[1] ^ uint64_t(k0);
      s[1] = p1;
      s[2] = (p0 >> 32) ^ s[3] ^ uint64_t(k1);
      s[3] = p0;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  for (int w = 0; w < 4; ++w) words[w] = VecUint((c[0][w] & 0xffffffffu) | (c[1][w] << 32));
}

// kNormals normals in draw order, starting with word 0 of this counter.
PYNN_HD void normals(uint64_t seed, uint64_t counter, float* out) {
  VecUint word[4];
  philox(seed, counter, word);
  VecFloat z[4];
  box_muller<VecFloat>(word[0], word[1], z[0], z[1]);
  box_muller<VecFloat>(word[2], word[3], z[2], z[3]);
  for (int k = 0; k < kCounters; ++k)
    for (int w = 0; w < 4; ++w) out[4 * k + w] = z[w][k];
}

}  // namespace pynn::cpu
