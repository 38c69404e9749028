// The logistic function and the hyperbolic tangent on short SIMD vectors, within about two units in the last place.
//
// NaN stays NaN, infinities give the limits, and tanh keeps its relative accuracy around 0: it is -m / (m + 2) with
// m = e^(-2|x|) - 1 = 2^n p + (2^n - 1), where p = e^r - 1 is the polynomial of exp() without its leading 1.
#pragma once
#include "vec_math.h"

namespace pynn::cpu {

// The larger of x and bound, NaN for NaN.
PYNN_HD VecFloat at_least(VecFloat x, float bound) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(__mmask16(-1), broadcast(bound), x);
#else
  return x < bound ? broadcast(bound) : x;
#endif
}
PYNN_HD VecDouble at_least(VecDouble x, double bound) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_pd(__mmask8(-1), broadcast(bound), x);
#else
  return x < bound ? broadcast(bound) : x;
#endif
}

// 2^n of an integer n within the normal range, in the low bits of n + magic.
PYNN_HD VecFloat power_of_two(VecFloat shifted) { return bit_cast<VecFloat>((bit_cast<VecInt>(shifted) + 127) << 23); }
PYNN_HD VecDouble power_of_two(VecDouble shifted) {
  return bit_cast<VecDouble>((bit_cast<VecLong>(shifted) + 1023) << 52);
}

// e^x - 1 for x within -80 .. 80.
PYNN_HD VecFloat expm1(VecFloat x) {
  const float magic = 0x1.8p23f;
  const VecFloat shifted = fma(x, broadcast(0x1.715476p0f), broadcast(magic)), n = shifted - magic;
  VecFloat r = fma(n, broadcast(-0x1.62e8p-1f), x);
  r = fma(n, broadcast(0x1.e8082ep-16f), r);
  VecFloat p = fma(broadcast(0x1.a1256cp-13f), r, broadcast(0x1.6d43bp-10f));
  p = fma(p, r, broadcast(0x1.1110ep-7f));
  p = fma(p, r, broadcast(0x1.5554e8p-5f));
  p = fma(p, r, broadcast(0x1.555556p-3f));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r * r, r);
  const VecFloat power = power_of_two(shifted);
  return fma(power, p, power - 1.0f);
}
PYNN_HD VecDouble expm1(VecDouble x) {
  const double magic = 0x1.8p52;
  const VecDouble shifted = fma(x, broadcast(0x1.71547652b82fep0), broadcast(magic)), n = shifted - magic;
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
  p = fma(p, r * r, r);
  const VecDouble power = power_of_two(shifted);
  return fma(power, p, power - 1.0);
}

PYNN_HD VecFloat tanh(VecFloat x) {
  const VecInt sign = bit_cast<VecInt>(x) & int32_t(0x80000000);
  const VecFloat size = bit_cast<VecFloat>(bit_cast<VecInt>(x) ^ sign);
  const VecFloat m = expm1(at_least(size * -2.0f, -40.0f)), t = m / (m + 2.0f);  // t <= 0
  return bit_cast<VecFloat>((bit_cast<VecInt>(t) & 0x7fffffff) | sign);
}
PYNN_HD VecDouble tanh(VecDouble x) {
  const VecLong sign = bit_cast<VecLong>(x) & int64_t(0x8000000000000000);
  const VecDouble size = bit_cast<VecDouble>(bit_cast<VecLong>(x) ^ sign);
  const VecDouble m = expm1(at_least(size * -2.0, -80.0)), t = m / (m + 2.0);
  return bit_cast<VecDouble>((bit_cast<VecLong>(t) & int64_t(0x7fffffffffffffff)) | sign);
}

PYNN_HD VecDouble sigmoid(VecDouble x) { return 1 / (exp(VecDouble(-x)) + 1); }
PYNN_HD VecFloat sigmoid(VecFloat x) { return 1 / (exp(VecFloat(-x)) + 1); }

}  // namespace pynn::cpu
