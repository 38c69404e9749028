// Activations and their derivatives on a GPU, in the precision that T's results need: about one unit in the last place
// for fp32, the C library for fp64, fast exponentials for 16-bit types, whose rounding hides their error.
#pragma once
#include "arithmetic.cuh"
#include "conv2d.h"

namespace pynn::cuda {
namespace {

// x / (1 + exp(-z)); no exponential overflows.
template <class T>
__device__ accumulate_t<T> times_logistic(accumulate_t<T> x, accumulate_t<T> z) {
  const accumulate_t<T> e = exp_of<T>(z < 0 ? z : -z);
  return divide<T>(z < 0 ? x * e : x, 1 + e);
}
template <class T>
__device__ accumulate_t<T> logistic(accumulate_t<T> x) {
  return times_logistic<T>(1, x);
}

// The normal distribution function: erf's power series near 0, exp(-x^2 / 2) times a polynomial in 1 / (2 + |x|)
// beyond.
template <class T>
__device__ accumulate_t<T> normal_cdf(accumulate_t<T> x) {
  if constexpr (sizeof(T) == 8) {
    return 0.5 * erfc(-x * 0.70710678118654752);
  } else {
    const float a = fabsf(x), q = x * x * 0.5f;
    if (a < 1.25f) {
      const float series = polynomial(q, {-1.45038522e-7f, 1.4589169e-6f, -1.32275132e-5f, 1.06837607e-4f,
                                          -7.57575758e-4f, 4.62962963e-3f, -2.38095238e-2f, 0.1f, -0.333333333f, 1.0f});
      return fmaf(x * 0.398942280f, series, 0.5f);
    }
    const float u = 1.0f / (a + 2.0f);
    const float tail =
        exp_of<T>(-q) * polynomial(u, {-34.3291595f, 49.7581589f, -22.6687529f, 0.356147486f, 0.60634422f, 1.20287888f,
                                       0.798102114f, 0.398920052f, 4.81131253e-7f});
    return x < 0 ? tail : 1.0f - tail;  // a NaN stays one
  }
}

constexpr double kSqrt2OverPi = 0.79788456080286536, kInvSqrt2Pi = 0.39894228040143268, kGeluCubic = 0.044715;

template <class T, Activation activation>
__device__ accumulate_t<T> activated(accumulate_t<T> x) {
  using A = accumulate_t<T>;
  if constexpr (activation == Activation::relu) return x < 0 ? A(0) : x;
  if constexpr (activation == Activation::leaky_relu) return x < 0 ? x * A(kLeakySlope) : x;
  if constexpr (activation == Activation::silu) return times_logistic<T>(x, x);
  if constexpr (activation == Activation::gelu) return x * normal_cdf<T>(x);
  if constexpr (activation == Activation::gelu_tanh)
    return x * A(0.5) * (1 + hyperbolic_tangent<T>(x * (1 + x * x * A(kGeluCubic)) * A(kSqrt2OverPi)));
  if constexpr (activation == Activation::sigmoid) return logistic<T>(x);
  if constexpr (activation == Activation::tanh) return hyperbolic_tangent<T>(x);
  return x;
}

// The derivative; s is the activation's input for silu and the gelus, its output for the others.
template <class T, Activation activation>
__device__ accumulate_t<T> derivative(accumulate_t<T> s) {
  using A = accumulate_t<T>;
  if constexpr (activation == Activation::relu) return s <= 0 ? A(0) : A(1);
  if constexpr (activation == Activation::leaky_relu) return s <= 0 ? A(kLeakySlope) : A(1);
  if constexpr (activation == Activation::silu) {
    const A p = logistic<T>(s);
    return fma(s * p, 1 - p, p);
  }
  if constexpr (activation == Activation::gelu)
    return normal_cdf<T>(s) + s * exp_of<T>(s * s * A(-0.5)) * A(kInvSqrt2Pi);
  if constexpr (activation == Activation::gelu_tanh) {
    const A t = hyperbolic_tangent<T>(s * (1 + s * s * A(kGeluCubic)) * A(kSqrt2OverPi));
    const A inner = (1 + s * s * A(3 * kGeluCubic)) * A(kSqrt2OverPi);
    return A(0.5) * (1 + t) + A(0.5) * s * fma(-t, t, A(1)) * inner;
  }
  if constexpr (activation == Activation::sigmoid) return s * (1 - s);
  if constexpr (activation == Activation::tanh) return fma(-s, s, A(1));
  return 1;
}

// Calls body with the activation as a compile-time constant; not for Activation::none.
template <class Body>
__host__ __device__ __forceinline__ void with_activation(Activation activation, const Body& body) {
  using enum Activation;
  switch (activation) {
    case none:
      return;
    case relu:
      return body.template operator()<relu>();
    case leaky_relu:
      return body.template operator()<leaky_relu>();
    case silu:
      return body.template operator()<silu>();
    case gelu:
      return body.template operator()<gelu>();
    case gelu_tanh:
      return body.template operator()<gelu_tanh>();
    case sigmoid:
      return body.template operator()<sigmoid>();
    case tanh:
      return body.template operator()<tanh>();
  }
}

}  // namespace
}  // namespace pynn::cuda
