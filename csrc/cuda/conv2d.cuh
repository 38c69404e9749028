// conv2d on a GPU: which kernel computes what. The choice, like the order of every sum, depends on the shape alone (the
// layout only decides how a kernel reads and writes), so a result has the same bits in any layout.
#pragma once
#include <type_traits>

#include "conv2d_activation_gradient.cuh"
#include "conv2d_bias.cuh"
#include "conv2d_depthwise.cuh"
#include "conv2d_depthwise_weight.cuh"
#include "conv2d_direct.cuh"
#include "conv2d_fold.cuh"
#include "conv2d_gemm_weight.cuh"
#include "conv2d_narrow_weight.cuh"
#include "conv2d_prologue.h"

namespace pynn::cuda {
namespace {

// The input gradient in zero padding, finished and stored as Out.
template <class T, class Out>
void input_gradient(const Output<Out>& out, const T* dy, const Strides4& dy_strides, const T* w,
                    const Strides4& w_strides, const Conv2dShape& s, void* scratch, void* stream) {
  if constexpr (!std::is_same_v<T, double>) {
    if (gemm::suits_input_gradient<T>(s))
      return gemm::input_gradient(out, dy, dy_strides, w, w_strides, s, scratch, stream);
  }
  if constexpr (std::is_same_v<T, Out>) {
    if (is_depthwise_gradient<T>(s)) return depthwise_gradient(out, dy, dy_strides, w, w_strides, s, stream);
    if constexpr (!std::is_same_v<T, double>) {
      if (is_narrow_gradient(s)) return narrow_gradient(out, dy, dy_strides, w, w_strides, s, stream);
    }
  }
  direct_input_gradient<T, Out>(out, dy, dy_strides, w, w_strides, s, stream);
}

// Bytes that input_gradient() needs.
template <class T>
int64_t input_gradient_scratch(const Conv2dShape& s) {
  return gemm::suits_input_gradient<T>(s) ? gemm::input_gradient_scratch<T>(s) : 0;
}

template <class T>
void weight_gradient(T* dw, const T* dy, const Strides4& dy_strides, const T* x, const Strides4& x_strides,
                     const Conv2dShape& s, void* scratch, void* stream) {
  if constexpr (!std::is_same_v<T, double>) {
    if (gemm::suits_weight_gradient<T>(s))
      return gemm::weight_gradient(dw, dy, dy_strides, x, x_strides, s, scratch, stream);
  }
  if (is_depthwise_weight(s)) return depthwise_weight(dw, dy, dy_strides, x, x_strides, s, scratch, stream);
  if constexpr (!std::is_same_v<T, double>) {
    if (is_narrow_weight(s)) return narrow_weight(dw, dy, dy_strides, x, x_strides, s, scratch, stream);
  }
  direct_weight_gradient(dw, dy, dy_strides, x, x_strides, s, scratch, stream);
}

template <class T>
int64_t weight_gradient_scratch(const Conv2dShape& s) {
  if (gemm::suits_weight_gradient<T>(s)) return gemm::weight_gradient_scratch<T>(s);
  if (is_depthwise_weight(s)) return depthwise_weight_scratch<T>(s);
  if (!std::is_same_v<T, double> && is_narrow_weight(s)) return narrow_weight_scratch(s);
  return direct_weight_gradient_scratch<T>(s);
}

}  // namespace

template <class T>
int64_t Conv2d<T>::fwd_scratch(const Conv2dShape& s) {
  return gemm::suits_forward<T>(s) ? gemm::forward_scratch<T>(s) : 0;
}

template <class T>
void Conv2d<T>::fwd(const T* x, Strides4 x_strides, const T* w, Strides4 w_strides, T* y, Strides4 y_strides,
                    const Conv2dEpilogue<T>& epilogue, const Conv2dShape& s, void* scratch, void* stream) {
  const Output<T> out{y, y_strides, epilogue};
  if constexpr (!std::is_same_v<T, double>) {
    if (gemm::suits_forward<T>(s))
      return gemm::forward<T>(out, x, x_strides, w, w_strides, s, nullptr, scratch, stream);
  }
  if (is_depthwise<T>(s)) {
    depthwise(DepthwiseCall<T>{out, x, x_strides, w, w_strides, rows_of(s), columns_of(s), s.batch, s.out_channels,
                               s.out_channels / s.groups, s.padding_mode, stream});
    return;
  }
  if constexpr (!std::is_same_v<T, double>) {
    if (is_narrow(s)) return narrow_forward(out, x, x_strides, w, w_strides, s, stream);
  }
  direct_forward(out, x, x_strides, w, w_strides, s, stream);
}

template <class T>
int64_t Conv2d<T>::bwd_input_scratch(const Conv2dShape& s) {
  if (!needs_fold(s)) return input_gradient_scratch<T>(s);
  Scratch scratch(nullptr);
  scratch.take<accumulate_t<T>>(padded_size(s));
  return scratch.used() + input_gradient_scratch<T>(padded(s));
}

template <class T>
void Conv2d<T>::bwd_input(const T* dy, Strides4 dy_strides, const T* w, Strides4 w_strides, T* dx, Strides4 dx_strides,
                          const Conv2dEpilogue<T>& epilogue, const Conv2dShape& s, void* memory, void* stream) {
  using A = accumulate_t<T>;
  const Output<T> out{dx, dx_strides, epilogue};
  if (!needs_fold(s)) {
    input_gradient<T, T>(out, dy, dy_strides, w, w_strides, s, memory, stream);
    return;
  }
  Scratch scratch(memory);
  A* const image = scratch.take<A>(padded_size(s));
  const bool channels_last = is_channels_last(dx_strides) || gemm::suits_input_gradient<T>(padded(s));
  const Strides4 strides = padded_strides(s, channels_last);
  input_gradient<T, A>({image, strides, {}}, dy, dy_strides, w, w_strides, padded(s), scratch.rest(), stream);
  fold(out, image, strides, s, stream);
}

template <class T>
int64_t Conv2d<T>::bwd_weight_scratch(const Conv2dShape& s) {
  return std::max(weight_gradient_scratch<T>(s), bias_gradient_scratch(s));
}

template <class T>
void Conv2d<T>::bwd_weight(const T* dy, Strides4 dy_strides, const T* x, Strides4 x_strides, T* dw, T* dbias,
                           const Conv2dShape& s, void* scratch, void* stream) {
  if (s.in_channels > 0) weight_gradient(dw, dy, dy_strides, x, x_strides, s, scratch, stream);
  if (dbias) bias_gradient(dbias, dy, dy_strides, s, scratch, stream);
}

template <class T>
void Conv2d<T>::bwd_activation(const T* dy, Strides4 dy_strides, const T* saved, Strides4 saved_strides, T* dz,
                               Strides4 dz_strides, Activation activation, int64_t batch, int64_t channels,
                               int64_t height, int64_t width, void* stream) {
  activation_gradient(dz, dz_strides, dy, dy_strides, saved, saved_strides, activation,
                      {batch, channels, height, width, is_channels_last(dz_strides)}, stream);
}

template <class T>
int64_t PrologueConv2d<T>::fwd_scratch(const Conv2dShape& s) {
  if (gemm::suits_forward<T>(s)) return gemm::forward_scratch<T>(s);
  return s.batch * s.in_channels * s.in_height * s.in_width * int64_t(sizeof(T));
}

// The kernels for few channels read an image that a pass over the input has left in the scratch.
template <class T>
void PrologueConv2d<T>::fwd(const T* x, bool channels_last, const Conv2dPrologue<T>& prologue, const T* w,
                            Strides4 w_strides, T* y, Strides4 y_strides, const Conv2dEpilogue<T>& epilogue,
                            const Conv2dShape& s, void* scratch, void* stream) {
  const int64_t pixels = s.in_height * s.in_width, c = s.in_channels;
  const Strides4 strides = dense_strides(c, s.in_height, s.in_width, channels_last);
  if constexpr (!std::is_same_v<T, double>) {
    if (gemm::suits_forward<T>(s))
      return gemm::forward<T>({y, y_strides, epilogue}, x, strides, w, w_strides, s, &prologue, scratch, stream);
  }
  T* const image = static_cast<T*>(scratch);
  if (c > 0) Conv2dProloguePass<T>::fwd(x, prologue, image, {s.batch, c, pixels, channels_last}, stream);
  Conv2d<T>::fwd(image, strides, w, w_strides, y, y_strides, epilogue, s, nullptr, stream);
}

template struct Conv2d<double>;
template struct Conv2d<float>;
template struct Conv2d<Half>;
template struct Conv2d<BFloat16>;
template struct PrologueConv2d<double>;
template struct PrologueConv2d<float>;
template struct PrologueConv2d<Half>;
template struct PrologueConv2d<BFloat16>;

}  // namespace pynn::cuda
