// conv2d: validation, allocation, dispatch. Messages are torch's own where torch has one.
#include "conv2d.h"

#include "library.h"

namespace pynn {
namespace {

using Ints = std::vector<int64_t>;
constexpr const char* kOp = "conv2d";
constexpr int64_t kLargest = int64_t(1) << 31;  // of any size, pad, stride or dilation: their sums and products fit

Strides4 strides_of(const Tensor& t) {
  return {t.stride(0), t.size(1) == 1 ? 1 : t.stride(1), t.stride(2), t.stride(3)};
}

Strides4 plain_strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// Torch's rule for tensors whose strides fit both layouts: a size of 1 does not decide, and NCHW wins a tie.
bool is_channels_last(const Tensor& t) {
  if (t.stride(1) == 0) return false;
  int64_t least = 0;
  for (const int d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < least || (d == 0 && least == t.stride(1))) return false;
    least = t.stride(d) * std::max<int64_t>(t.size(d), 1);
  }
  return true;
}

Tensor empty(const Tensor& like, const Ints& shape, bool channels_last) {
  int64_t count = 16;
  for (const int64_t size : shape) count = checked_multiply(kOp, count, size);
  return torch::stable::empty(
      shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
}

void check_list(const char* name, const Ints& values, size_t count) {
  PYNN_CHECK(values.size() == count, "expected ", name,
             " to be a single integer value or a list of 2 values to match the ", "convolution dimensions, but got ",
             name, "=", to_string(Sizes(values.data(), values.size())));
  for (const int64_t v : values) PYNN_CHECK(v < kLargest, kOp, ": expected ", name, " below 2**31, got ", v);
}

int64_t output_size(int64_t in, int64_t before, int64_t after, int64_t kernel, int64_t stride, int64_t dilation) {
  return (in + before + after - dilation * (kernel - 1) - 1) / stride + 1;
}

// The checks every op of the family shares. padding is (top, left, bottom, right).
Conv2dShape check(const Ints& input, const Ints& weight, const Ints& stride, const Ints& padding, const Ints& dilation,
                  int64_t groups, int64_t padding_mode, bool allow_tf32) {
  const auto text = [](const Ints& v) { return to_string(Sizes(v.data(), v.size())); };
  PYNN_CHECK(input.size() == 4,
             "Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: ", text(input));
  PYNN_CHECK(weight.size() == 4, "Expected 4-dimensional weight for 4-dimensional input ", text(input),
             ", but got weight of size ", text(weight), " instead");
  check_list("stride", stride, 2);
  check_list("padding", padding, 4);
  check_list("dilation", dilation, 2);
  for (const int64_t p : padding) PYNN_CHECK(p >= 0, "negative padding is not supported");
  for (const int64_t s : stride) PYNN_CHECK(s > 0, "non-positive stride is not supported");
  for (const int64_t d : dilation) PYNN_CHECK(d > 0, "dilation should be greater than zero, but got ", text(dilation));
  PYNN_CHECK(groups > 0, "non-positive groups is not supported");
  PYNN_CHECK(padding_mode >= 0 && padding_mode < kPaddingModes, kOp, ": expected padding_mode from 0 to ",
             kPaddingModes - 1, ", got ", padding_mode);
  for (const auto* sizes : {&input, &weight})
    for (const int64_t size : *sizes)
      PYNN_CHECK(size >= 0 && size < kLargest, kOp, ": expected sizes from 0 to 2**31 - 1, got ", text(*sizes));
  PYNN_CHECK(weight[0] >= groups, "Given groups=", groups, ", expected weight to be at least ", groups,
             " at dimension 0, but got weight of size ", text(weight), " instead");
  PYNN_CHECK(weight[0] % groups == 0, "Given groups=", groups, ", expected weight to be divisible by ", groups,
             " at dimension 0, but got weight of size ", text(weight), " instead");
  PYNN_CHECK(groups < kLargest && input[1] == weight[1] * groups, "Given groups=", groups, ", weight of size ",
             text(weight), ", expected input", text(input), " to have ", weight[1] * (groups < kLargest ? groups : 0),
             " channels, but got ", input[1], " channels instead");
  PYNN_CHECK(weight[2] > 0 && weight[3] > 0, kOp, ": expected a kernel of at least 1 x 1, got weight of size ",
             text(weight));
  const int64_t height = input[2] + padding[0] + padding[2], width = input[3] + padding[1] + padding[3];
  const int64_t reach_h = dilation[0] * (weight[2] - 1) + 1, reach_w = dilation[1] * (weight[3] - 1) + 1;
  PYNN_CHECK(height >= reach_h && width >= reach_w, "Calculated padded input size per channel: (", height, " x ", width,
             "). Kernel size: (", reach_h, " x ", reach_w, "). Kernel size can't be greater than actual input size");
  int64_t padded = checked_multiply(kOp, height, width);
  for (const int64_t factor : {std::max<int64_t>(input[1], 1), std::max<int64_t>(input[0], 1), int64_t(16)})
    padded = checked_multiply(kOp, padded, factor);
  return {input[0],
          groups,
          input[1],
          input[2],
          input[3],
          weight[0],
          output_size(input[2], padding[0], padding[2], weight[2], stride[0], dilation[0]),
          output_size(input[3], padding[1], padding[3], weight[3], stride[1], dilation[1]),
          weight[2],
          weight[3],
          stride[0],
          stride[1],
          padding[0],
          padding[1],
          padding[2],
          padding[3],
          dilation[0],
          dilation[1],
          PaddingMode(padding_mode),
          allow_tf32};
}

Ints sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }
Ints output_sizes(const Conv2dShape& d) { return {d.batch, d.out_channels, d.out_height, d.out_width}; }

void check_operand(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  PYNN_CHECK(t.scalar_type() == other.scalar_type(), "Input type (", name_of(other.scalar_type()), ") and ", name,
             " type (", name_of(t.scalar_type()), ") should be the same");
  check_same_device(kOp, name, t, other_name, other);
}

Activation check_activation(int64_t activation) {
  PYNN_CHECK(activation >= 0 && activation < kActivations, kOp, ": expected activation from 0 to ", kActivations - 1,
             ", got ", activation);
  return Activation(activation);
}

// Strides that read a tensor of up to four dimensions as if expanded to `shape`.
Strides4 expanded_strides(const char* name, const Tensor& t, const Ints& shape) {
  int64_t strides[4] = {0, 0, 0, 0};
  bool fits = t.dim() <= 4;
  for (int64_t d = 4 - std::min<int64_t>(t.dim(), 4), from = 0; fits && d < 4; ++d, ++from) {
    fits = t.size(from) == shape[d] || t.size(from) == 1;
    strides[d] = t.size(from) == 1 ? 0 : t.stride(from);
  }
  PYNN_CHECK(fits, kOp, ": expected ", name, " that can be expanded to ", to_string(Sizes(shape.data(), 4)), ", got ",
             shape_of(t));
  return {strides[0], strides[1], strides[2], strides[3]};
}

// What fwd and its check take, validated.
struct Forward {
  Conv2dShape shape;
  Activation activation;
  Strides4 residual_strides;
};

Forward check_fwd(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& residual, const Ints& stride, const Ints& padding, const Ints& dilation,
                  int64_t groups, int64_t padding_mode, bool allow_tf32, int64_t activation) {
  check_floating(kOp, "input", input);
  check_operand("weight", weight, "input", input);
  const auto kind = check_activation(activation);
  const auto shape =
      check(sizes_of(input), sizes_of(weight), stride, padding, dilation, groups, padding_mode, allow_tf32);
  if (bias) {
    PYNN_CHECK(bias->dim() == 1 && bias->size(0) == shape.out_channels, "Given weight of size ", shape_of(weight),
               ", expected bias to be 1-dimensional with ", shape.out_channels, " elements, but got bias of size ",
               shape_of(*bias), " instead");
    check_operand("bias", *bias, "input", input);
  }
  Strides4 residual_strides{};
  if (residual) {
    residual_strides = expanded_strides("residual", *residual, output_sizes(shape));
    check_operand("residual", *residual, "input", input);
  }
  return {shape, kind, residual_strides};
}

std::tuple<Tensor, Tensor> fwd(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
                               std::optional<Tensor> residual, Ints stride, Ints padding, Ints dilation, int64_t groups,
                               int64_t padding_mode, bool allow_tf32, int64_t activation, bool save_pre) {
  const auto [shape, kind, residual_strides] =
      check_fwd(input, weight, bias, residual, stride, padding, dilation, groups, padding_mode, allow_tf32, activation);
  const bool last = is_channels_last(input) || is_channels_last(weight);
  const Ints out = output_sizes(shape);
  Tensor y = empty(input, out, last), pre = save_pre ? empty(input, out, last) : empty(input, {0}, false);
  if (y.numel() == 0) return {y, pre};
  dispatch_floating(kOp, input.scalar_type(), [&]<class T>(Tag<T>) {
    const Conv2dEpilogue<T> epilogue{bias ? pointer<T>(*bias) : nullptr,           bias ? bias->stride(0) : 0,
                                     residual ? pointer<T>(*residual) : nullptr,   residual_strides,
                                     save_pre ? mutable_pointer<T>(pre) : nullptr, kind};
    Scratch scratch(input, launch::Conv2d<T>::fwd_scratch(shape));
    launch::Conv2d<T>::fwd(pointer<T>(input), strides_of(input), pointer<T>(weight), strides_of(weight),
                           mutable_pointer<T>(y), plain_strides_of(y), epilogue, shape, scratch.get(),
                           current_stream(input));
  });
  return {y, pre};
}

void check_gradient(const Tensor& grad_output, const Conv2dShape& shape) {
  const Ints expected = output_sizes(shape);
  PYNN_CHECK(sizes_of(grad_output) == expected, kOp, ": expected grad_output of shape ",
             to_string(Sizes(expected.data(), 4)), ", got ", shape_of(grad_output));
}

Conv2dShape check_bwd_input(const Tensor& grad_output, const Tensor& weight, const Ints& input_shape,
                            const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                            int64_t padding_mode, bool allow_tf32) {
  check_floating(kOp, "grad_output", grad_output);
  check_operand("weight", weight, "grad_output", grad_output);
  const auto shape = check(input_shape, sizes_of(weight), stride, padding, dilation, groups, padding_mode, allow_tf32);
  check_gradient(grad_output, shape);
  return shape;
}

Tensor bwd_input(const Tensor& grad_output, const Tensor& weight, Ints input_shape, Ints stride, Ints padding,
                 Ints dilation, int64_t groups, int64_t padding_mode, bool allow_tf32, bool channels_last) {
  const auto shape =
      check_bwd_input(grad_output, weight, input_shape, stride, padding, dilation, groups, padding_mode, allow_tf32);
  Tensor dx = empty(grad_output, input_shape, channels_last);
  if (dx.numel() == 0) return dx;
  dispatch_floating(kOp, grad_output.scalar_type(), [&]<class T>(Tag<T>) {
    Scratch scratch(grad_output, launch::Conv2d<T>::bwd_input_scratch(shape));
    launch::Conv2d<T>::bwd_input(pointer<T>(grad_output), strides_of(grad_output), pointer<T>(weight),
                                 strides_of(weight), mutable_pointer<T>(dx), plain_strides_of(dx), Conv2dEpilogue<T>{},
                                 shape, scratch.get(), current_stream(grad_output));
  });
  return dx;
}

Conv2dShape check_bwd_weight(const Tensor& grad_output, const Tensor& input, const Ints& kernel_size,
                             const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                             int64_t padding_mode, bool allow_tf32) {
  check_floating(kOp, "grad_output", grad_output);
  check_operand("input", input, "grad_output", grad_output);
  PYNN_CHECK(kernel_size.size() == 2, kOp, ": expected kernel_size of 2 values, got ", kernel_size.size());
  PYNN_CHECK(groups > 0, "non-positive groups is not supported");
  PYNN_CHECK(input.dim() == 4,
             "Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: ", shape_of(input));
  check_rank(kOp, "grad_output", grad_output, 4);
  PYNN_CHECK(input.size(1) % groups == 0, kOp, ": expected input channels divisible by groups=", groups, ", got ",
             shape_of(input));
  const Ints weight_shape{grad_output.size(1), input.size(1) / groups, kernel_size[0], kernel_size[1]};
  const auto shape = check(sizes_of(input), weight_shape, stride, padding, dilation, groups, padding_mode, allow_tf32);
  check_gradient(grad_output, shape);
  return shape;
}

std::tuple<Tensor, Tensor> bwd_weight(const Tensor& grad_output, const Tensor& input, Ints kernel_size, Ints stride,
                                      Ints padding, Ints dilation, int64_t groups, int64_t padding_mode,
                                      bool allow_tf32, bool with_bias) {
  const auto shape =
      check_bwd_weight(grad_output, input, kernel_size, stride, padding, dilation, groups, padding_mode, allow_tf32);
  const Ints weight_shape{shape.out_channels, shape.in_channels / groups, shape.kernel_height, shape.kernel_width};
  Tensor dw = empty(input, weight_shape, false), dbias = empty(input, {with_bias ? shape.out_channels : 0}, false);
  if (grad_output.numel() == 0) {
    torch::stable::zero_(dw);
    torch::stable::zero_(dbias);
    return {dw, dbias};
  }
  if (dw.numel() == 0 && !with_bias) return {dw, dbias};
  dispatch_floating(kOp, input.scalar_type(), [&]<class T>(Tag<T>) {
    Scratch scratch(input, launch::Conv2d<T>::bwd_weight_scratch(shape));
    launch::Conv2d<T>::bwd_weight(
        pointer<T>(grad_output), strides_of(grad_output), pointer<T>(input), strides_of(input), mutable_pointer<T>(dw),
        with_bias ? mutable_pointer<T>(dbias) : nullptr, shape, scratch.get(), current_stream(input));
  });
  return {dw, dbias};
}

Activation check_bwd_activation(const Tensor& grad_output, const Tensor& saved, int64_t activation) {
  check_floating(kOp, "grad_output", grad_output);
  check_rank(kOp, "grad_output", grad_output, 4);
  check_same_shape(kOp, "saved", saved, "grad_output", grad_output);
  check_operand("saved", saved, "grad_output", grad_output);
  return check_activation(activation);
}

Tensor bwd_activation(const Tensor& grad_output, const Tensor& saved, int64_t activation) {
  const auto kind = check_bwd_activation(grad_output, saved, activation);
  Tensor dz = empty(saved, sizes_of(saved), is_channels_last(saved));
  if (dz.numel() == 0) return dz;
  dispatch_floating(kOp, saved.scalar_type(), [&]<class T>(Tag<T>) {
    launch::Conv2d<T>::bwd_activation(pointer<T>(grad_output), strides_of(grad_output), pointer<T>(saved),
                                      strides_of(saved), mutable_pointer<T>(dz), plain_strides_of(dz), kind, dz.size(0),
                                      dz.size(1), dz.size(2), dz.size(3), current_stream(saved));
  });
  return dz;
}

}  // namespace

PYNN_LIBRARY(m) {
  m.impl("conv2d_fwd", TORCH_BOX(&fwd));
  m.impl("conv2d_bwd_input", TORCH_BOX(&bwd_input));
  m.impl("conv2d_bwd_weight", TORCH_BOX(&bwd_weight));
  m.impl("conv2d_bwd_activation", TORCH_BOX(&bwd_activation));
}

#ifdef PYNN_CHECKS
namespace {

void fwd_check(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
               Ints stride, Ints padding, Ints dilation, int64_t groups, int64_t padding_mode, bool allow_tf32,
               int64_t activation, bool) {
  check_fwd(input, weight, bias, residual, stride, padding, dilation, groups, padding_mode, allow_tf32, activation);
}

void bwd_input_check(const Tensor& grad_output, const Tensor& weight, Ints input_shape, Ints stride, Ints padding,
                     Ints dilation, int64_t groups, int64_t padding_mode, bool allow_tf32, bool) {
  check_bwd_input(grad_output, weight, input_shape, stride, padding, dilation, groups, padding_mode, allow_tf32);
}

void bwd_weight_check(const Tensor& grad_output, const Tensor& input, Ints kernel_size, Ints stride, Ints padding,
                      Ints dilation, int64_t groups, int64_t padding_mode, bool allow_tf32, bool) {
  check_bwd_weight(grad_output, input, kernel_size, stride, padding, dilation, groups, padding_mode, allow_tf32);
}

void bwd_activation_check(const Tensor& grad_output, const Tensor& saved, int64_t activation) {
  check_bwd_activation(grad_output, saved, activation);
}

}  // namespace

PYNN_CHECKS(m) {
  m.impl("conv2d_fwd_check", TORCH_BOX(&fwd_check));
  m.impl("conv2d_bwd_input_check", TORCH_BOX(&bwd_input_check));
  m.impl("conv2d_bwd_weight_check", TORCH_BOX(&bwd_weight_check));
  m.impl("conv2d_bwd_activation_check", TORCH_BOX(&bwd_activation_check));
}
#endif

}  // namespace pynn
