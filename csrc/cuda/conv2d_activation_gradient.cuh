// The gradient of conv2d's activation: dz = dy * activation'(saved).
#pragma once
#include "conv2d_activation.cuh"
#include "conv2d_geometry.cuh"
#include "pack.cuh"

namespace pynn::cuda {
namespace {

// Tensors that lie in memory alike and without gaps: 16 bytes of each to a thread.
template <class T>
__global__ void __launch_bounds__(kThreads)
    activation_gradient_packs_kernel(T* dz, const T* dy, const T* saved, Activation activation, int64_t count,
                                     bool aligned) {
  using A = accumulate_t<T>;
  constexpr int kPack = 16 / int(sizeof(T));
  const int64_t first = thread_index() * kPack;
  if (first >= count) return;
  const int valid = int(min(count - first, int64_t(kPack)));
  PackOf<T, kPack> gradient, value;
  load_pack(gradient, dy + first, valid, aligned);
  load_pack(value, saved + first, valid, aligned);
  with_activation(activation, [&]<Activation kind>() {
#pragma unroll
    for (int k = 0; k < kPack; ++k)
      gradient.element[k] =
          from_float<T>(A(to_float(gradient.element[k])) * derivative<T, kind>(to_float(value.element[k])));
  });
  store_pack(dz + first, gradient, valid, aligned);
}

// Any strides, one element to a thread.
template <class T>
__global__ void __launch_bounds__(kThreads)
    activation_gradient_strided_kernel(T* dz, Strides4 z, const T* dy, Strides4 g, const T* saved, Strides4 s,
                                       Activation activation, Elements elements, int64_t count) {
  using A = accumulate_t<T>;
  const int64_t index = thread_index();
  if (index >= count) return;
  const Element e = elements[index];
  A gradient = to_float(dy[e.at(g)]);
  const A value = to_float(saved[e.at(s)]);
  with_activation(activation, [&]<Activation kind>() { gradient *= derivative<T, kind>(value); });
  dz[e.at(z)] = from_float<T>(gradient);
}

// Whether the elements of a tensor follow each other in their order.
inline bool is_dense(const Strides4& s, const Elements& e) {
  const int64_t pixels = e.height * e.width, c = e.channels_last ? 1 : pixels, w = e.channels_last ? e.channels : 1;
  return (e.batch == 1 || s.n == e.channels * pixels) && (e.channels == 1 || s.c == c) &&
         (e.height == 1 || s.h == e.width * w) && (e.width == 1 || s.w == w);
}

template <class T>
void activation_gradient(T* dz, const Strides4& z, const T* dy, const Strides4& g, const T* saved, const Strides4& s,
                         Activation activation, const Elements& elements, void* stream) {
  const int64_t count = elements.count();
  if (is_dense(z, elements) && is_dense(g, elements) && is_dense(s, elements)) {
    LAUNCH(activation_gradient_packs_kernel<T>, blocks_of(ceil_div(count * int64_t(sizeof(T)), 16)), kThreads, 0,
           stream, dz, dy, saved, activation, count, is_aligned({dz, dy, saved}));
    return;
  }
  LAUNCH(activation_gradient_strided_kernel<T>, blocks_of(count), kThreads, 0, stream, dz, z, dy, g, saved, s,
         activation, elements, count);
}

}  // namespace
}  // namespace pynn::cuda
