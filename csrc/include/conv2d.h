// 2-D convolution with a fused epilogue: y = activation(conv(x, w) + bias + residual), and its gradients.
// Every 4-D tensor comes with its strides in elements, any of them may be 0 or overlap for tensors that are only read.
#pragma once
#include <cstdint>

namespace pynn {

enum class Activation : int64_t { none, relu, leaky_relu, silu, gelu, gelu_tanh, sigmoid, tanh };
inline constexpr int64_t kActivations = 8;

// Slope of leaky_relu for negative input, torch's default.
inline constexpr double kLeakySlope = 0.01;

struct Strides4 {
  int64_t n, c, h, w;
};

// Padding at the bottom and right only shows in the output size, so it is not kept.
struct Conv2dShape {
  int64_t batch, groups;
  int64_t in_channels, in_height, in_width;     // channels of all groups together
  int64_t out_channels, out_height, out_width;  // channels of all groups together
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t pad_top, pad_left;
  int64_t dilation_height, dilation_width;
};

#define PYNN_CONV2D_LAUNCHERS                                                                                          \
  /* x (N, C, H, W), w (O, C / groups, KH, KW), bias (O) or null, residual (N, O, OH, OW) or null; pre, when not    */ \
  /* null, receives the value before the activation, with y's strides.                                              */ \
  template <class T>                                                                                                   \
  void conv2d_fwd(const T* x, Strides4 x_strides, const T* w, Strides4 w_strides, const T* bias, int64_t bias_stride,  \
                  const T* residual, Strides4 residual_strides, T* y, Strides4 y_strides, T* pre,                      \
                  Activation activation, const Conv2dShape& shape, void* stream);                                      \
  template <class T>                                                                                                   \
  void conv2d_bwd_input(const T* dy, Strides4 dy_strides, const T* w, Strides4 w_strides, T* dx, Strides4 dx_strides,  \
                        const Conv2dShape& shape, void* stream);                                                       \
  /* dw is contiguous; dbias (O) or null.                                                                           */ \
  template <class T>                                                                                                   \
  void conv2d_bwd_weight(const T* dy, Strides4 dy_strides, const T* x, Strides4 x_strides, T* dw, T* dbias,            \
                         const Conv2dShape& shape, void* stream);                                                      \
  /* dz = dy * activation'(.), where `saved` is the input of silu and gelu and the output of the others.            */ \
  template <class T>                                                                                                   \
  void conv2d_bwd_activation(const T* dy, Strides4 dy_strides, const T* saved, Strides4 saved_strides, T* dz,          \
                             Strides4 dz_strides, Activation activation, int64_t batch, int64_t channels,              \
                             int64_t height, int64_t width, void* stream);

namespace cpu {
PYNN_CONV2D_LAUNCHERS
}
namespace cuda {
PYNN_CONV2D_LAUNCHERS
}

}  // namespace pynn
