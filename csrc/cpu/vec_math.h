// exp of short SIMD vectors, within about one unit in the last place of the correctly rounded value.
//
// e^x = 2^n * e^r with n = round(x / ln 2) and r = x - n ln 2 taken off in two parts, the first of which has so few
// bits that n times it is exact. e^r = 1 + r + r^2 P(r) on |r| <= ln 2 / 2 (P by interpolation in Chebyshev nodes). The
// power of two is applied in two halves, so that results below the normal range round once and overflow gives infinity.
// exp(0) is exactly 1, exp(-inf) is 0, exp(+inf) is +inf, NaN stays NaN.
#pragma once
#include "vec.h"

namespace pynn::cpu {

typedef int64_t VecLong __attribute__((vector_size(kVectorBytes)));

// The larger, or the smaller, of x and a limit: x where one of them is NaN. One instruction, which compilers do not
// find.
PYNN_HD VecFloat at_least(VecFloat x, VecFloat least) {
#if defined(__AVX512F__)
  return _mm512_max_ps(least, x);
#elif defined(__AVX__)
  return _mm256_max_ps(least, x);
#elif defined(__x86_64__)
  return _mm_max_ps(least, x);
#else
  return x < least ? least : x;
#endif
}
PYNN_HD VecFloat at_most(VecFloat x, VecFloat most) {
#if defined(__AVX512F__)
  return _mm512_min_ps(most, x);
#elif defined(__AVX__)
  return _mm256_min_ps(most, x);
#elif defined(__x86_64__)
  return _mm_min_ps(most, x);
#else
  return x > most ? most : x;
#endif
}

// 2^n x for whole numbers n, at least -300 and at most 300, with shifted = n + 3 * 2^22; rounds once.
PYNN_HD VecFloat scale_by_power(VecFloat x, VecFloat n, VecFloat shifted) {
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(__mmask16(-1), x, n);
#else
  const VecInt exponent = bit_cast<VecInt>(shifted) - bit_cast<int32_t>(0x1.8p23f), half = exponent >> 1;
  return x * bit_cast<VecFloat>((half + 127) << 23) * bit_cast<VecFloat>((exponent - half + 127) << 23);
#endif
}

PYNN_HD VecFloat exp(VecFloat x) {
  x = at_least(x, broadcast(-104.5f));  // already 0 there, and 2^n stays representable in two halves
  x = at_most(x, broadcast(89.5f));     // already infinite there
  const float magic = 0x1.8p23f;        // adding it leaves the nearest integer in the low bits
  const VecFloat shifted = fma(x, broadcast(0x1.715476p0f), broadcast(magic));
  const VecFloat n = shifted - magic;
  VecFloat r = fma(n, broadcast(-0x1.62e8p-1f), x);
  r = fma(n, broadcast(0x1.e8082ep-16f), r);
  VecFloat p = fma(broadcast(0x1.a1256cp-13f), r, broadcast(0x1.6d43bp-10f));
  p = fma(p, r, broadcast(0x1.1110ep-7f));
  p = fma(p, r, broadcast(0x1.5554e8p-5f));
  p = fma(p, r, broadcast(0x1.555556p-3f));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r * r, r) + 1.0f;
  return scale_by_power(p, n, shifted);
}

// 2^x for results that are rounded to 16 bits, and x <= 0: within 3e-6. 2^0 is exactly 1, 2^-inf is 0, NaN stays NaN.
PYNN_HD VecFloat coarse_exp2(VecFloat x) {
#if defined(__AVX512F__)
  const VecFloat n = _mm512_maskz_roundscale_ps(__mmask16(-1), x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                 shifted = n;
#else
  x = at_least(x, broadcast(-151.0f));  // already 0 there
  const float magic = 0x1.8p23f;
  const VecFloat shifted = x + magic, n = shifted - magic;
#endif
  const VecFloat f = x - n;  // of -inf NaN, which the instruction that multiplies by 2^n turns into 0
  VecFloat p = fma(broadcast(0x1.3a02ccp-7f), f, broadcast(0x1.c9fc46p-5f));
  p = fma(p, f, broadcast(0x1.ec0378p-3f));
  p = fma(p, f, broadcast(0x1.62e12cp-1f));
  p = fma(p, f, broadcast(1.0f));
  return scale_by_power(p, n, shifted);
}

PYNN_HD VecDouble exp(VecDouble x) {
  x = x < -746.0 ? broadcast(-746.0) : x;
  x = x > 710.0 ? broadcast(710.0) : x;
  const double magic = 0x1.8p52;
  const VecDouble shifted = fma(x, broadcast(0x1.71547652b82fep0), broadcast(magic));
  const VecDouble n = shifted - magic;
  VecDouble r = fma(n, broadcast(-0x1.62e42feep-1), x);
  r = fma(n, broadcast(-0x1.a39ef35793c76p-33), r);
  VecDouble p = fma(broadcast(0x1.61bff1c64f494p-33), r, broadcast(0x1.1f7f6aa421dd8p-29));
  p = fma(p, r, broadcast(0x1.ae642c5c1fa33p-26));
  p = fma(p, r, broadcast(0x1.27e4d3f50d87fp-22));
  p = fma(p, r, broadcast(0x1.71de3a5aaefb9p-19));
  p = fma(p, r, broadcast(0x1.a01a01a9f72adp-16));
  p = fma(p, r, broadcast(0x1.a01a01a01969bp-13));
  p = fma(p, r, broadcast(0x1.6c16c16c15a48p-10));
  p = fma(p, r, broadcast(0x1.1111111111109p-7));
  p = fma(p, r, broadcast(0x1.5555555555557p-5));
  p = fma(p, r, broadcast(0x1.5555555555555p-3));
  p = fma(p, r, broadcast(0.5));
  p = fma(p, r * r, r) + 1.0;
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_pd(__mmask8(-1), p, n);
#else
  const VecLong exponent = bit_cast<VecLong>(shifted) - bit_cast<int64_t>(magic), half = exponent >> 1;
  return p * bit_cast<VecDouble>((half + 1023) << 52) * bit_cast<VecDouble>((exponent - half + 1023) << 52);
#endif
}

}  // namespace pynn::cpu
