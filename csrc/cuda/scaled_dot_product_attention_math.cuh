// The scalar functions of the attention kernels.
#pragma once
#include "arithmetic.cuh"

namespace pynn::cuda {
namespace {
namespace attention {

constexpr unsigned kWarp = 0xffffffffu;

// 16-bit data: exponentials are powers of 2 in one instruction, so that scores come in units of log 2.
template <class T>
constexpr bool kBase2 = sizeof(T) == 2;
template <class T>
constexpr accumulate_t<T> kLogUnit = accumulate_t<T>(kBase2<T> ? 1.4426950408889634074 : 1.0);

template <class F>
__device__ __forceinline__ F minus_infinity() {
  return F(-INFINITY);
}
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }

template <class T>
__device__ __forceinline__ accumulate_t<T> exponential(accumulate_t<T> x) {
  if constexpr (kBase2<T>)
    return ex2_approx(x);
  else
    return exp_of<T>(x);
}
// exp(x - shift). In fp32 the rounding of a difference of 8 costs 5e-7 of the result, more than all else, so what it
// takes (Knuth's two-sum) is put back.
template <class T>
__device__ __forceinline__ accumulate_t<T> shifted_exponential(accumulate_t<T> x, accumulate_t<T> shift) {
  const accumulate_t<T> difference = x - shift, e = exponential<T>(difference);
  if constexpr (!std::is_same_v<T, float>) return e;
  const accumulate_t<T> back = difference - x;
  return multiply_add(e, (x - (difference - back)) - (shift + back), e);
}
__device__ __forceinline__ bool is_finite(float v) { return fabsf(v) < INFINITY; }
__device__ __forceinline__ bool is_finite(double v) { return fabs(v) < double(INFINITY); }

// tanh for soft caps: where results are 16 bits wide, an error of 1e-7 beside 1 is none, and one formula does.
template <class T>
__device__ __forceinline__ accumulate_t<T> tangent(accumulate_t<T> x) {
  if constexpr (sizeof(T) == 2)
    return 1 - divide<T>(2, 1 + exp_of<T>(2 * x));
  else
    return hyperbolic_tangent<T>(x);
}

}  // namespace attention
}  // namespace
}  // namespace pynn::cuda
