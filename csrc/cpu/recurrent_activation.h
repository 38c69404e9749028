// The logistic function and the hyperbolic tangent of recurrent cells.
//
// NaN stays NaN, infinities give the limits. tanh keeps its relative accuracy around 0: it is -m / (m + 2) with
// m = e^(-2|x|) - 1 = 2^n p + (2^n - 1), where p = e^r - 1 is the polynomial of exp() without its leading 1.
//
// Of values that become 16 bits wide, sigmoid_of and tanh_of take shorter ways, within 1.5e-6 of the value: a hundredth
// of what the rounding to float16 takes.
#pragma once
#include "vec_activation.h"

namespace pynn::cpu {

// The larger of x and bound, NaN for NaN.
PYNN_HD VecDouble at_least(VecDouble x, double bound) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_pd(__mmask8(-1), broadcast(bound), x);
#else
  return x < bound ? broadcast(bound) : x;
#endif
}

// 2^n of an integer n within the normal range, in the low bits of n + magic.
PYNN_HD VecDouble power_of_two(VecDouble shifted) {
  return bit_cast<VecDouble>((bit_cast<VecLong>(shifted) + 1023) << 52);
}

// e^x - 1 for x within -80 .. 80.
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

PYNN_HD VecDouble tanh(VecDouble x) {
  const VecLong sign = bit_cast<VecLong>(x) & int64_t(0x8000000000000000);
  const VecDouble size = bit_cast<VecDouble>(bit_cast<VecLong>(x) ^ sign);
  const VecDouble m = expm1(at_least(size * -2.0, -80.0)), t = m / (m + 2.0);
  return bit_cast<VecDouble>((bit_cast<VecLong>(t) & int64_t(0x7fffffffffffffff)) | sign);
}

PYNN_HD VecDouble sigmoid(VecDouble x) { return 1 / (exp(VecDouble(-x)) + 1); }

#if defined(__AVX512F__)
// e^x for x within -104.5 .. 89.5. n ln 2 is taken off in one part, for a float happens to hold ln 2 to 2^-29: that
// costs a unit in the last place only where |x| > 20.
PYNN_HD VecFloat exp_near(VecFloat x) {
  const float magic = 0x1.8p23f;
  const VecFloat shifted = fma(x, broadcast(0x1.715476p0f), broadcast(magic)), n = shifted - magic;
  const VecFloat r = fma(n, broadcast(-0x1.62e43p-1f), x);
  const VecFloat series =
      polynomial(r, {0.000197394722f, 0.00139350875f, 0.00833357126f, 0.041666463f, 0.166666657f, 0.5f});
  return scale_by_power(fma(series, r * r, r) + 1.0f, n, shifted);
}
PYNN_HD VecFloat sigmoid(VecFloat x) {
  return 1.0f / (1.0f + exp_near(at_most(at_least(-x, broadcast(-104.5f)), broadcast(89.5f))));
}
// x plus an odd polynomial near 0, so that its last rounding is nearly the only one; an exponential elsewhere. Both are
// within 2e-10 before they are rounded: a bias of 4e-9 already shows in the sums of thousands of steps.
PYNN_HD VecFloat tanh(VecFloat x) {
  const VecFloat a = absolute(x), q = x * x;
  const VecFloat series =
      polynomial(q, {0.00215761387f, -0.00819507334f, 0.0217087474f, -0.053948462f, 0.133332223f, -0.333333313f});
  const VecFloat near = fma(x * q, series, x);
  const VecFloat far = 1.0f - 2.0f / (exp_near(at_most(a + a, broadcast(20.0f))) + 1.0f);
  const VecFloat signed_far = (VecFloat)((VecInt)far | ((VecInt)x & INT32_MIN));
  return select(a < 0.625f, near, signed_far);
}
#else
PYNN_HD VecFloat sigmoid(VecFloat x) { return logistic(x); }
PYNN_HD VecFloat tanh(VecFloat x) { return hyperbolic_tangent(x); }
#endif

// e^x - 1 = power * p + (power - 1), for x within -80 .. 80.
struct ShortExponential {
  VecFloat power, p;
  explicit PYNN_HD ShortExponential(VecFloat x) {
    const float magic = 0x1.8p23f;
    const VecFloat shifted = fma(x, broadcast(0x1.715476p0f), broadcast(magic));
    const VecFloat r = fma(shifted - magic, broadcast(-0x1.62e43p-1f), x);
    const VecFloat series = polynomial(r, {0.00833807234f, 0.0418725759f, 0.166668311f, 0.49999404f});
    p = fma(series, r * r, r);
    power = bit_cast<VecFloat>((bit_cast<VecInt>(shifted) + (127 - bit_cast<int32_t>(magic))) << 23);
  }
};
PYNN_HD VecFloat short_quotient(VecFloat a, VecFloat b) {
#if defined(__AVX512F__)
  const VecFloat estimate = _mm512_maskz_rcp14_ps(__mmask16(-1), b);
  return a * (estimate * fma(-b, estimate, broadcast(2.0f)));
#else
  return a / b;
#endif
}
PYNN_HD VecFloat between(VecFloat x, float low, float high) {  // NaN for NaN
#if defined(__AVX512F__)
  constexpr __mmask16 all = __mmask16(-1);
  return _mm512_maskz_min_ps(all, broadcast(high), _mm512_maskz_max_ps(all, broadcast(low), x));
#else
  x = x < low ? broadcast(low) : x;
  return x > high ? broadcast(high) : x;
#endif
}
PYNN_HD VecFloat short_sigmoid(VecFloat x) {
  const ShortExponential e(between(-x, -80.0f, 80.0f));
  const VecFloat value = short_quotient(broadcast(1.0f), fma(e.power, e.p, e.power + 1.0f));
  return (VecFloat)((VecInt)value & ~(x < -80.0f));
}
PYNN_HD VecFloat short_tanh(VecFloat x) {
  const VecInt sign = (VecInt)x & INT32_MIN;
  const ShortExponential e(between(absolute(x) * -2.0f, -80.0f, 0.0f));
  const VecFloat m = fma(e.power, e.p, e.power - 1.0f);
  return (VecFloat)((VecInt)absolute(short_quotient(m, m + 2.0f)) | sign);
}

template <class T, class V = Vec<accumulate_t<T>>>
PYNN_HD V sigmoid_of(V x) {
  if constexpr (sizeof(T) == 2)
    return short_sigmoid(x);
  else
    return sigmoid(x);
}
template <class T, class V = Vec<accumulate_t<T>>>
PYNN_HD V tanh_of(V x) {
  if constexpr (sizeof(T) == 2)
    return short_tanh(x);
  else
    return tanh(x);
}

}  // namespace pynn::cpu
