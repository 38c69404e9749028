// conv2d: validation, allocation, dispatch. Messages are torch's own where torch has one.
#include "conv2d_prologue_check.h"

namespace pynn {
namespace {

constexpr const char* kOp = "conv2d";

int64_t output_size(int64_t in, int64_t before, int64_t after, int64_t kernel, int64_t stride, int64_t dilation) {
  return (in + before + after - dilation * (kernel - 1) - 1) / stride + 1;
}

// What F.pad asks of an image that its own pixels continue: every pixel of the border has its source.
void check_border(const Ints& input, const Ints& padding, PaddingMode mode) {
  constexpr const char* kNames[] = {"zeros", "reflect", "replicate", "circular"};
  for (int d = 0; mode != PaddingMode::zeros && d < 2; ++d) {
    const int64_t size = input[2 + d], before = padding[d], after = padding[2 + d], most = std::max(before, after);
    const auto got = [&] {
      return "padding (" + std::to_string(before) + ", " + std::to_string(after) + ") at dimension " +
             std::to_string(2 + d) + " of input " + text(input);
    };
    PYNN_CHECK(mode != PaddingMode::reflect || most == 0 || most < size, kOp, ": padding_mode='reflect': Padding size ",
               "should be less than the corresponding input dimension, but got: ", got());
    PYNN_CHECK(mode != PaddingMode::circular || most <= size, kOp, ": padding_mode='circular': Padding value causes ",
               "wrapping around more than once, got ", got());
    PYNN_CHECK(most == 0 || size > 0, kOp, ": padding_mode='", kNames[int(mode)], "': expected non-empty input, got ",
               got());
  }
}

// The checks every op of the family shares. padding is (top, left, bottom, right).
Conv2dShape check(const Ints& input, const Ints& weight, const Ints& stride, const Ints& padding, const Ints& dilation,
                  int64_t groups, int64_t padding_mode, bool allow_tf32) {
  PYNN_CHECK(input.size() == 4,
             "Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: ", text(input));
  PYNN_CHECK(weight.size() == 4, "Expected 4-dimensional weight for 4-dimensional input ", text(input),
             ", but got weight of size ", text(weight), " instead");
  check_list(kOp, "stride", stride, 2);
  check_list(kOp, "padding", padding, 4);
  check_list(kOp, "dilation", dilation, 2);
  check_steps(stride, padding, dilation, groups);
  PYNN_CHECK(padding_mode >= 0 && padding_mode < kPaddingModes, kOp, ": expected padding_mode from 0 to ",
             kPaddingModes - 1, ", got ", padding_mode);
  check_sizes(kOp, input);
  check_sizes(kOp, weight);
  check_groups(weight, groups);
  PYNN_CHECK(groups < kLargest && input[1] == weight[1] * groups, "Given groups=", groups, ", weight of size ",
             text(weight), ", expected input", text(input), " to have ", weight[1] * (groups < kLargest ? groups : 0),
             " channels, but got ", input[1], " channels instead");
  PYNN_CHECK(weight[2] > 0 && weight[3] > 0, kOp, ": expected a kernel of at least 1 x 1, got weight of size ",
             text(weight));
  check_border(input, padding, PaddingMode(padding_mode));
  const int64_t height = input[2] + padding[0] + padding[2], width = input[3] + padding[1] + padding[3];
  const int64_t reach_h = dilation[0] * (weight[2] - 1) + 1, reach_w = dilation[1] * (weight[3] - 1) + 1;
  PYNN_CHECK(height >= reach_h && width >= reach_w, "Calculated padded input size per channel: (", height, " x ", width,
             "). Kernel size: (", reach_h, " x ", reach_w, "). Kernel size can't be greater than actual input size");
  PYNN_CHECK(input[2] > 0 && input[3] > 0,
             "Only zero batch or zero channel inputs are supported, but got input shape: ", text(input));
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

Ints output_sizes(const Conv2dShape& d) { return {d.batch, d.out_channels, d.out_height, d.out_width}; }

Forward check_fwd(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& residual, const Ints& stride, const Ints& padding, const Ints& dilation,
                  int64_t groups, int64_t padding_mode, bool allow_tf32, int64_t activation) {
  check_floating(kOp, "input", input);
  check_operand(kOp, "weight", weight, "input", input);
  const auto kind = check_activation(kOp, activation);
  const auto shape =
      check(sizes_of(input), sizes_of(weight), stride, padding, dilation, groups, padding_mode, allow_tf32);
  if (bias) check_bias(kOp, *bias, weight, shape.out_channels, input);
  Strides4 residual_strides{};
  if (residual) {
    residual_strides = expanded_strides(kOp, "residual", *residual, output_sizes(shape));
    check_operand(kOp, "residual", *residual, "input", input);
  }
  return {shape, kind, residual_strides};
}

std::tuple<Tensor, Tensor> fwd(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
                               std::optional<Tensor> residual, Ints stride, Ints padding, Ints dilation, int64_t groups,
                               int64_t padding_mode, bool allow_tf32, int64_t activation, bool save_pre) {
  const Forward f =
      check_fwd(input, weight, bias, residual, stride, padding, dilation, groups, padding_mode, allow_tf32, activation);
  const Conv2dShape& shape = f.shape;
  const bool last = is_channels_last(input) || is_channels_last(weight);
  const Ints out = output_sizes(shape);
  Tensor y = empty(kOp, input, out, last), pre = empty(kOp, input, save_pre ? out : Ints{0}, save_pre && last);
  if (y.numel() == 0) return {y, pre};
  dispatch_floating(kOp, input.scalar_type(), [&]<class T>(Tag<T>) {
    const auto epilogue = epilogue_of<T>(f, bias, residual, save_pre ? &pre : nullptr);
    Scratch scratch(input, launch::Conv2d<T>::fwd_scratch(shape));
    launch::Conv2d<T>::fwd(pointer<T>(input), strides_of(input), pointer<T>(weight), strides_of(weight),
                           mutable_pointer<T>(y), plain_strides_of(y), epilogue, shape, scratch.get(),
                           current_stream(input));
  });
  return {y, pre};
}

std::tuple<Forward, Activation> check_prologue_fwd(const Tensor& input, const std::optional<Tensor>& scale,
                                                   const std::optional<Tensor>& shift, int64_t input_activation,
                                                   const Tensor& weight, const std::optional<Tensor>& bias,
                                                   const std::optional<Tensor>& residual, const Ints& stride,
                                                   const Ints& padding, const Ints& dilation, int64_t groups,
                                                   int64_t padding_mode, bool allow_tf32, int64_t activation) {
  const Activation kind = check_prologue(kOp, input, scale, shift, input_activation);
  return {
      check_fwd(input, weight, bias, residual, stride, padding, dilation, groups, padding_mode, allow_tf32, activation),
      kind};
}

std::tuple<Tensor, Tensor> prologue_fwd(const Tensor& input, std::optional<Tensor> scale, std::optional<Tensor> shift,
                                        int64_t input_activation, const Tensor& weight, std::optional<Tensor> bias,
                                        std::optional<Tensor> residual, Ints stride, Ints padding, Ints dilation,
                                        int64_t groups, int64_t padding_mode, bool allow_tf32, int64_t activation,
                                        bool save_pre) {
  const auto [f, kind] = check_prologue_fwd(input, scale, shift, input_activation, weight, bias, residual, stride,
                                            padding, dilation, groups, padding_mode, allow_tf32, activation);
  const Conv2dShape& shape = f.shape;
  const bool input_last = is_channels_last(input), last = input_last || is_channels_last(weight);
  const Ints out = output_sizes(shape);
  Tensor y = empty(kOp, input, out, last), pre = empty(kOp, input, save_pre ? out : Ints{0}, save_pre && last);
  if (y.numel() == 0) return {y, pre};
  const Tensor x = without_gaps(input, input_last);
  const PerChannelOperand factors(scale, input), terms(shift, input);
  const Forward& fwd = f;
  const Activation on_input = kind;
  dispatch_floating(kOp, input.scalar_type(), [&]<class T>(Tag<T>) {
    using A = accumulate_t<T>;
    const auto epilogue = epilogue_of<T>(fwd, bias, residual, save_pre ? &pre : nullptr);
    Scratch scratch(input, launch::PrologueConv2d<T>::fwd_scratch(shape));
    launch::PrologueConv2d<T>::fwd(pointer<T>(x), input_last, {factors.get<A>(), terms.get<A>(), on_input},
                                   pointer<T>(weight), strides_of(weight), mutable_pointer<T>(y), plain_strides_of(y),
                                   epilogue, shape, scratch.get(), current_stream(input));
  });
  return {y, pre};
}

void check_gradient(const Tensor& grad_output, const Conv2dShape& shape) {
  const Ints expected = output_sizes(shape);
  PYNN_CHECK(sizes_of(grad_output) == expected, kOp, ": expected grad_output of shape ", text(expected), ", got ",
             shape_of(grad_output));
}

Conv2dShape check_bwd_input(const Tensor& grad_output, const Tensor& weight, const Ints& input_shape,
                            const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                            int64_t padding_mode, bool allow_tf32) {
  check_floating(kOp, "grad_output", grad_output);
  check_operand(kOp, "weight", weight, "grad_output", grad_output);
  const auto shape = check(input_shape, sizes_of(weight), stride, padding, dilation, groups, padding_mode, allow_tf32);
  check_gradient(grad_output, shape);
  return shape;
}

Tensor bwd_input(const Tensor& grad_output, const Tensor& weight, Ints input_shape, Ints stride, Ints padding,
                 Ints dilation, int64_t groups, int64_t padding_mode, bool allow_tf32, bool channels_last) {
  const auto shape =
      check_bwd_input(grad_output, weight, input_shape, stride, padding, dilation, groups, padding_mode, allow_tf32);
  Tensor dx = empty(kOp, grad_output, input_shape, channels_last);
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
  check_operand(kOp, "input", input, "grad_output", grad_output);
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
  Tensor dw = empty(kOp, input, weight_shape, false),
         dbias = empty(kOp, input, {with_bias ? shape.out_channels : 0}, false);
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
  check_operand(kOp, "saved", saved, "grad_output", grad_output);
  return check_activation(kOp, activation);
}

Tensor bwd_activation(const Tensor& grad_output, const Tensor& saved, int64_t activation) {
  const auto kind = check_bwd_activation(grad_output, saved, activation);
  Tensor dz = empty(kOp, saved, sizes_of(saved), is_channels_last(saved));
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
  m.impl("prologue_conv2d_fwd", TORCH_BOX(&prologue_fwd));
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

void prologue_fwd_check(const Tensor& input, std::optional<Tensor> scale, std::optional<Tensor> shift,
                        int64_t input_activation, const Tensor& weight, std::optional<Tensor> bias,
                        std::optional<Tensor> residual, Ints stride, Ints padding, Ints dilation, int64_t groups,
                        int64_t padding_mode, bool allow_tf32, int64_t activation, bool) {
  check_prologue_fwd(input, scale, shift, input_activation, weight, bias, residual, stride, padding, dilation, groups,
                     padding_mode, allow_tf32, activation);
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
  m.impl("prologue_conv2d_fwd_check", TORCH_BOX(&prologue_fwd_check));
  m.impl("conv2d_bwd_input_check", TORCH_BOX(&bwd_input_check));
  m.impl("conv2d_bwd_weight_check", TORCH_BOX(&bwd_weight_check));
  m.impl("conv2d_bwd_activation_check", TORCH_BOX(&bwd_activation_check));
}
#endif

}  // namespace pynn
