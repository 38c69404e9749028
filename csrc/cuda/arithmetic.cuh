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

// tanh: its continued fraction near 0, exponentials elsewhere.
template <class T>
__device__ accumulate_t<T> hyperbolic_tangent(accumulate_t<T> x) {
  if constexpr (sizeof(T) == 8) {
    return tanh(x);
  } else {
    const float a = fabsf(x), q = x * x;
    if (a < 0.6f)
      return x * polynomial(q, {21.0f, 1260.0f, 10395.0f}) / polynomial(q, {1.0f, 210.0f, 4725.0f, 10395.0f});
    return copysignf(1.0f - 2.0f / (exp_of<T>(a + a) + 1.0f), x);
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace pynn::cuda
