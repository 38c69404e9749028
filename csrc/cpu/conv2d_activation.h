// Activations and their derivatives on vectors: fp32 with polynomials good to about one unit in the last place, fp64
// through the C library.
#pragma once
#include <cmath>

#include "conv2d.h"
#include "vec_activation.h"
#include "vec_load.h"

namespace pynn::cpu {

// The normal distribution function: erf's power series near 0, exp(-x^2 / 2) times a polynomial in 1 / (2 + |x|)
// beyond.
PYNN_HD VecFloat normal_cdf(VecFloat x) {
  const VecFloat a = absolute(x), q = x * x * 0.5f;
  const VecFloat series = polynomial(q, {-1.45038522e-7f, 1.4589169e-6f, -1.32275132e-5f, 1.06837607e-4f,
                                         -7.57575758e-4f, 4.62962963e-3f, -2.38095238e-2f, 0.1f, -0.333333333f, 1.0f});
  const VecFloat near = fma(x * 0.398942280f, series, broadcast(0.5f));
  const VecFloat u = 1.0f / (a + 2.0f);
  const VecFloat tail = exp(-q) * polynomial(u, {-34.3291595f, 49.7581589f, -22.6687529f, 0.356147486f, 0.60634422f,
                                                 1.20287888f, 0.798102114f, 0.398920052f, 4.81131253e-7f});
  return select(a < 1.25f, near, select(x < 0.0f, tail, 1.0f - tail));
}

// The lane-wise functions below are written once for vectors of float and for double.
PYNN_HD double select(bool condition, double yes, double no) { return condition ? yes : no; }
PYNN_HD double fma(double a, double b, double c) { return a * b + c; }
PYNN_HD double exp(double x) { return std::exp(x); }
PYNN_HD double logistic(double x) { return 1 / (1 + std::exp(-x)); }
PYNN_HD double hyperbolic_tangent(double x) { return std::tanh(x); }
PYNN_HD double normal_cdf(double x) { return 0.5 * std::erfc(-x * M_SQRT1_2); }

template <class A>
struct Lane {
  using type = Vec<A>;
};
template <>
struct Lane<double> {
  using type = double;
};
template <class A>
inline constexpr int kLaneStep = sizeof(typename Lane<A>::type) / sizeof(A);

inline constexpr double kSqrt2OverPi = 0.79788456080286536, kInvSqrt2Pi = 0.39894228040143268, kGeluCubic = 0.044715;

template <Activation activation, class A, class V>
PYNN_HD V activated(V x) {
  const V zero = V{};
  if constexpr (activation == Activation::relu) return select(x < zero, zero, x);
  if constexpr (activation == Activation::leaky_relu) return select(x < zero, x * A(kLeakySlope), x);
  if constexpr (activation == Activation::silu) return x / (A(1) + exp(-x));
  if constexpr (activation == Activation::gelu) return x * normal_cdf(x);
  if constexpr (activation == Activation::gelu_tanh)
    return x * A(0.5) *
           (A(1) + hyperbolic_tangent(x * fma(x * x, V{} + A(kGeluCubic * kSqrt2OverPi), V{} + A(kSqrt2OverPi))));
  if constexpr (activation == Activation::sigmoid) return logistic(x);
  if constexpr (activation == Activation::tanh) return hyperbolic_tangent(x);
  return x;
}

// The derivative; s is the activation's input for silu and gelu, its output for the others.
template <Activation activation, class A, class V>
PYNN_HD V derivative(V s) {
  const V zero = V{}, one = zero + A(1);
  if constexpr (activation == Activation::relu) return select(s <= zero, zero, one);
  if constexpr (activation == Activation::leaky_relu) return select(s <= zero, zero + A(kLeakySlope), one);
  if constexpr (activation == Activation::silu) {
    const V p = logistic(s);
    return fma(s * p, A(1) - p, p);
  }
  if constexpr (activation == Activation::gelu) return normal_cdf(s) + s * exp(s * s * A(-0.5)) * A(kInvSqrt2Pi);
  if constexpr (activation == Activation::gelu_tanh) {
    const V t = hyperbolic_tangent(s * fma(s * s, V{} + A(kGeluCubic * kSqrt2OverPi), V{} + A(kSqrt2OverPi)));
    const V inner = (A(1) + s * s * A(3 * kGeluCubic)) * A(kSqrt2OverPi);
    return A(0.5) * (A(1) + t) + A(0.5) * s * fma(-t, t, one) * inner;
  }
  if constexpr (activation == Activation::sigmoid) return s * (A(1) - s);
  if constexpr (activation == Activation::tanh) return fma(-s, s, one);
  return one;
}

template <class Body>
void with_activation(Activation activation, const Body& body) {
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

template <class A>
PYNN_HD typename Lane<A>::type load_lane(const A* from) {
  typename Lane<A>::type v;
  memcpy(&v, from, sizeof(v));
  return v;
}

// Both over whole vectors; double has no vector functions.
template <Activation kind>
PYNN_HD Vec<float> activated_lanes(Vec<float> x) {
  return activated<kind, float>(x);
}
template <Activation kind>
PYNN_HD Vec<double> activated_lanes(Vec<double> x) {
  if constexpr (kind != Activation::none)
    for (int i = 0; i < kLanes<double>; ++i) x[i] = activated<kind, double>(x[i]);
  return x;
}
template <Activation kind>
PYNN_HD Vec<float> derivative_lanes(Vec<float> s) {
  return derivative<kind, float>(s);
}
template <Activation kind>
PYNN_HD Vec<double> derivative_lanes(Vec<double> s) {
  for (int i = 0; i < kLanes<double>; ++i) s[i] = derivative<kind, double>(s[i]);
  return s;
}

// values = activation(values); count may be rounded up to whole vectors, so the buffer must be.
template <class A>
void activate(Activation activation, A* values, int64_t count) {
  with_activation(activation, [&]<Activation kind>() {
    for (int64_t i = 0; i < count; i += kLaneStep<A>) {
      const auto y = activated<kind, A>(load_lane(values + i));
      memcpy(values + i, &y, sizeof(y));
    }
  });
}

// dz = dy * activation'(saved) along lines without gaps.
template <class T>
void multiply_derivative_line(Activation activation, const T* dy, const T* saved, T* dz, int64_t count) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  with_activation(activation, [&]<Activation kind>() {
    int64_t i = 0;
    for (; i + L <= count; i += L)
      store_compute(dz + i, load_compute(dy + i) * derivative_lanes<kind>(load_compute(saved + i)));
    if (i < count) {
      const Vec<A> d = derivative_lanes<kind>(load_part(saved + i, count - i, A(0)));
      store_part(dz + i, count - i, load_part(dy + i, count - i, A(0)) * d);
    }
  });
}

// gradient = gradient * activation'(saved); both buffers are rounded up to whole vectors.
template <class A>
void multiply_derivative(Activation activation, A* gradient, const A* saved, int64_t count) {
  with_activation(activation, [&]<Activation kind>() {
    for (int64_t i = 0; i < count; i += kLaneStep<A>) {
      const auto d = load_lane(gradient + i) * derivative<kind, A>(load_lane(saved + i));
      memcpy(gradient + i, &d, sizeof(d));
    }
  });
}

}  // namespace pynn::cpu
