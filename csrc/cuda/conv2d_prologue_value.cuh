// The prologue of a convolution on a GPU: activation(x * scale + shift) of one element.
#pragma once
#include "conv2d_activation.cuh"
#include "conv2d_prologue.h"

namespace pynn::cuda {
namespace {

// Calls body with any activation as a compile-time constant.
template <class Body>
__host__ __device__ __forceinline__ void with_any_activation(Activation activation, const Body& body) {
  if (activation == Activation::none)
    body.template operator()<Activation::none>();
  else
    with_activation(activation, body);
}

template <class A>
__device__ __forceinline__ A value_of(const PerChannel<A>& p, int64_t n, int64_t c, A none) {
  return p.values ? p.values[n * p.stride + c] : none;
}

// The coefficients of one channel of a sample.
template <class T>
struct ChannelPrologue {
  using A = accumulate_t<T>;
  A scale, shift;

  ChannelPrologue() = default;
  __device__ __forceinline__ ChannelPrologue(const Conv2dPrologue<T>& p, int64_t n, int64_t c)
      : scale(value_of(p.scale, n, c, A(1))), shift(value_of(p.shift, n, c, A(0))) {}
  __device__ __forceinline__ A before(A x) const { return fma(x, scale, shift); }  // the activation
  template <Activation kind>
  __device__ __forceinline__ T of(T x) const {
    return from_float<T>(activated<T, kind>(before(to_float(x))));
  }
};

}  // namespace
}  // namespace pynn::cuda
