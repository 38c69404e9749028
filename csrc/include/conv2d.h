// 2-D convolution with a fused epilogue: y = activation(conv(x, w) + bias + residual), and its gradients.
// Every 4-D tensor comes with its strides in elements, any of them may be 0 or overlap for tensors that are only read.
#pragma once
#include "dtype.h"

namespace pynn {

enum class Activation : int64_t { none, relu, leaky_relu, silu, gelu, gelu_tanh, sigmoid, tanh };
inline constexpr int64_t kActivations = 8;

// Slope of leaky_relu for negative input, torch's default.
inline constexpr double kLeakySlope = 0.01;

// What stands outside the image: zeros, or the image continued as torch.nn.Conv2d's padding_mode says.
enum class PaddingMode : int64_t { zeros, reflect, replicate, circular };
inline constexpr int64_t kPaddingModes = 4;

struct Strides4 {
  int64_t n, c, h, w;
};

struct Conv2dShape {
  int64_t batch, groups;
  int64_t in_channels, in_height, in_width;     // channels of all groups together
  int64_t out_channels, out_height, out_width;  // channels of all groups together
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t pad_top, pad_left, pad_bottom, pad_right;
  int64_t dilation_height, dilation_width;
  PaddingMode padding_mode;
  bool allow_tf32;  // fp32 products may be rounded to TF32 where tensor cores compute them
};

// What happens to a finished sum before it is rounded and stored: activation(sum + bias + residual).
template <class T>
struct Conv2dEpilogue {
  const T* bias;  // a value per output channel, or null
  int64_t bias_stride;
  const T* residual;  // of the output's shape, or null
  Strides4 residual_strides;
  T* pre;  // not null: receives the value before the activation, with the output's strides
  Activation activation;
};

}  // namespace pynn

namespace pynn::PYNN_LAUNCH_NAMESPACE {

// The launchers. `scratch` is device memory of at least the bytes the function beside it asks for, on 64 bytes.
template <class T>
struct Conv2d {
  // x (N, C, H, W), w (O, C / groups, KH, KW), y (N, O, OH, OW).
  static int64_t fwd_scratch(const Conv2dShape& shape);
  static void fwd(const T* x, Strides4 x_strides, const T* w, Strides4 w_strides, T* y, Strides4 y_strides,
                  const Conv2dEpilogue<T>& epilogue, const Conv2dShape& shape, void* scratch, void* stream);

  // dx, the sum over the outputs that read each input; with an epilogue over dx it is also conv_transpose2d.
  static int64_t bwd_input_scratch(const Conv2dShape& shape);
  static void bwd_input(const T* dy, Strides4 dy_strides, const T* w, Strides4 w_strides, T* dx, Strides4 dx_strides,
                        const Conv2dEpilogue<T>& epilogue, const Conv2dShape& shape, void* scratch, void* stream);

  // dw is contiguous; dbias (O) or null.
  static int64_t bwd_weight_scratch(const Conv2dShape& shape);
  static void bwd_weight(const T* dy, Strides4 dy_strides, const T* x, Strides4 x_strides, T* dw, T* dbias,
                         const Conv2dShape& shape, void* scratch, void* stream);

  // dz = dy * activation'(.), where `saved` is the input of silu and gelu and the output of the others.
  static void bwd_activation(const T* dy, Strides4 dy_strides, const T* saved, Strides4 saved_strides, T* dz,
                             Strides4 dz_strides, Activation activation, int64_t batch, int64_t channels,
                             int64_t height, int64_t width, void* stream);
};

// The epilogue alone, over sums that a vendor's library computed: y = activation(sum + bias + residual) for tensors of
// (N, C, H, W) with common strides. y, or the epilogue's pre, may be `sum` itself.
template <class T>
struct Conv2dEpiloguePass {
  static void run(const T* sum, T* y, Strides4 strides, const Conv2dEpilogue<T>& epilogue, int64_t batch,
                  int64_t channels, int64_t height, int64_t width, void* stream);
};

}  // namespace pynn::PYNN_LAUNCH_NAMESPACE
