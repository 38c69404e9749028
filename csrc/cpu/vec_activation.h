// The logistic function and the hyperbolic tangent of vectors of float, to about one unit in the last place.
#pragma once
#include "vec_math.h"

namespace pynn::cpu {

PYNN_HD VecFloat select(VecInt condition, VecFloat yes, VecFloat no) {
  return (VecFloat)((condition & (VecInt)yes) | (~condition & (VecInt)no));
}
PYNN_HD VecFloat absolute(VecFloat x) { return (VecFloat)((VecInt)x & 0x7fffffff); }
template <size_t N>
PYNN_HD VecFloat polynomial(VecFloat x, const float (&coefficients)[N]) {
  VecFloat sum = broadcast(coefficients[0]);
#pragma GCC unroll 16
  for (size_t i = 1; i < N; ++i) sum = fma(sum, x, broadcast(coefficients[i]));
  return sum;
}

PYNN_HD VecFloat logistic(VecFloat x) { return 1.0f / (1.0f + exp(-x)); }

// tanh: x plus an odd polynomial near 0, so that its last rounding is nearly the only one; exponentials elsewhere.
PYNN_HD VecFloat hyperbolic_tangent(VecFloat x) {
  const VecFloat a = absolute(x), q = x * x;
  const VecFloat series =
      polynomial(q, {7.28574605e-6f, -7.45494472e-5f, 3.70493246e-4f, -1.25441269e-3f, 3.46975564e-3f, -8.8162059e-3f,
                     2.18588617e-2f, -5.39670177e-2f, 0.133333281f, -0.333333343f});
  const VecFloat near = fma(x * q, series, x);
  const VecFloat far = 1.0f - 2.0f / (exp(a + a) + 1.0f);
  const VecFloat signed_far = (VecFloat)((VecInt)far | ((VecInt)x & INT32_MIN));
  return select(a < 1.0f, near, signed_far);
}

}  // namespace pynn::cpu
