// Scalar functions in the precision that results of type T need.
#pragma once
#include "dtype.h"
#include "launch.h"

namespace pynn::cuda {
namespace {

template <class T>
__device__ accumulate_t<T> exp_of(accumulate_t<T> x) {
  if constexpr (sizeof(T) == 2)
    return __expf(x);
  else if constexpr (sizeof(T) == 4)
    return expf(x);
  else
    return exp(x);
}
template <class T>
__device__ accumulate_t<T> divide(accumulate_t<T> a, accumulate_t<T> b) {
  if constexpr (sizeof(T) == 2)
    return __fdividef(a, b);
  else
    return a / b;
}

template <size_t count>
__device__ float polynomial(float x, const float (&coefficients)[count]) {
  float sum = coefficients[0];
#pragma unroll
  for (size_t i = 1; i < count; ++i) sum = fmaf(sum, x, coefficients[i]);
  return sum;
}

// tanh, to less than 1.4 units in the last place. Near 0 it is x and a small rest, whose roundings hardly count: the
// rest is x^3 times a polynomial of least relative error in x^2; exponentials elsewhere.
template <class T>
__device__ accumulate_t<T> hyperbolic_tangent(accumulate_t<T> x) {
  if constexpr (sizeof(T) == 8) {
    return tanh(x);
  } else {
    const float a = fabsf(x), q = x * x;
    if (a < 0.625f)
      return fmaf(x * q, polynomial(q, {-0.00570499f, 0.02063909f, -0.053739715f, 0.13331442f, -0.3333328f}), x);
    return copysignf(1.0f - 2.0f / (exp_of<T>(a + a) + 1.0f), x);
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace pynn::cuda
