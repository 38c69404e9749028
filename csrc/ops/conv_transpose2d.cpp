// conv_transpose2d: conv2d's input gradient as a forward pass, with the epilogue on it. Its gradients are conv2d's ops.
#include "conv2d_check.h"

namespace pynn {
namespace {

constexpr const char* kOp = "conv_transpose2d";

// The size that a convolution with these values takes to `in`; output_padding chooses among the `stride` of them.
int64_t output_size(int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t extra, int64_t dilation) {
  return (in - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra + 1;
}

// The padding at the far end with which that convolution gives `in` positions and no more. Below 0 it is a crop: rows
// of the output that no tap reaches.
int64_t far_padding(int64_t padding, int64_t extra, int64_t stride) {
  return padding - std::max<int64_t>(0, extra - (stride - 1));
}

// The shape of that convolution: its input is the output here.
Conv2dShape check(const Ints& input, const Ints& weight, const Ints& stride, const Ints& padding, const Ints& extra,
                  const Ints& dilation, int64_t groups, bool allow_tf32) {
  PYNN_CHECK(input.size() == 4,
             "Expected 3D (unbatched) or 4D (batched) input to conv_transpose2d, but got input of size: ", text(input));
  PYNN_CHECK(weight.size() == 4, "Expected 4-dimensional weight for 4-dimensional input ", text(input),
             ", but got weight of size ", text(weight), " instead");
  check_list(kOp, "stride", stride, 2);
  check_list(kOp, "padding", padding, 2);
  check_list(kOp, "output_padding", extra, 2);
  check_list(kOp, "dilation", dilation, 2);
  check_steps(stride, padding, dilation, groups);
  for (const int64_t e : extra) PYNN_CHECK(e >= 0, "negative output_padding is not supported");
  for (const int d : {0, 1})
    PYNN_CHECK(extra[d] < stride[d] || extra[d] < dilation[d],
               "output padding must be smaller than either stride or dilation, but got output_padding_height: ",
               extra[0], " output_padding_width: ", extra[1], " stride_height: ", stride[0],
               " stride_width: ", stride[1], " dilation_height: ", dilation[0], " dilation_width: ", dilation[1]);
  check_sizes(kOp, input);
  check_sizes(kOp, weight);
  check_groups(weight, groups);
  PYNN_CHECK(input[1] == weight[0], "Given transposed=1, weight of size ", text(weight), ", expected input",
             text(input), " to have ", weight[0], " channels, but got ", input[1], " channels instead");
  PYNN_CHECK(weight[2] > 0 && weight[3] > 0, kOp, ": expected a kernel of at least 1 x 1, got weight of size ",
             text(weight));
  PYNN_CHECK(input[2] > 0 && input[3] > 0,
             "Only zero batch or zero channel inputs are supported, but got input shape: ", text(input));
  const int64_t height = output_size(input[2], weight[2], stride[0], padding[0], extra[0], dilation[0]);
  const int64_t width = output_size(input[3], weight[3], stride[1], padding[1], extra[1], dilation[1]);
  PYNN_CHECK(height > 0 && width > 0, "Given input size per channel: (", input[2], " x ", input[3],
             "). Calculated output size per channel: (", height, " x ", width, "). Output size is too small");
  const int64_t channels = checked_multiply(kOp, weight[1], groups);
  check_sizes(kOp, {input[0], channels, height, width});
  return {input[0],
          groups,
          channels,
          height,
          width,
          input[1],
          input[2],
          input[3],
          weight[2],
          weight[3],
          stride[0],
          stride[1],
          padding[0],
          padding[1],
          far_padding(padding[0], extra[0], stride[0]),
          far_padding(padding[1], extra[1], stride[1]),
          dilation[0],
          dilation[1],
          PaddingMode::zeros,
          allow_tf32};
}

Ints output_sizes(const Conv2dShape& d) { return {d.batch, d.in_channels, d.in_height, d.in_width}; }

Forward check_fwd(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& residual, const Ints& stride, const Ints& padding,
                  const Ints& output_padding, const Ints& dilation, int64_t groups, bool allow_tf32,
                  int64_t activation) {
  check_floating(kOp, "input", input);
  check_operand(kOp, "weight", weight, "input", input);
  const auto kind = check_activation(kOp, activation);
  const auto shape =
      check(sizes_of(input), sizes_of(weight), stride, padding, output_padding, dilation, groups, allow_tf32);
  if (bias) check_bias(kOp, *bias, weight, shape.in_channels, input);
  Strides4 residual_strides{};
  if (residual) {
    residual_strides = expanded_strides(kOp, "residual", *residual, output_sizes(shape));
    check_operand(kOp, "residual", *residual, "input", input);
  }
  return {shape, kind, residual_strides};
}

std::tuple<Tensor, Tensor> fwd(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
                               std::optional<Tensor> residual, Ints stride, Ints padding, Ints output_padding,
                               Ints dilation, int64_t groups, bool allow_tf32, int64_t activation, bool save_pre) {
  const Forward f = check_fwd(input, weight, bias, residual, stride, padding, output_padding, dilation, groups,
                              allow_tf32, activation);
  const bool last = is_channels_last(input) || is_channels_last(weight);
  const Ints out = output_sizes(f.shape);
  Tensor y = empty(kOp, input, out, last), pre = empty(kOp, input, save_pre ? out : Ints{0}, save_pre && last);
  if (y.numel() == 0) return {y, pre};
  dispatch_floating(kOp, input.scalar_type(), [&]<class T>(Tag<T>) {
    const auto epilogue = epilogue_of<T>(f, bias, residual, save_pre ? &pre : nullptr);
    Scratch scratch(input, launch::Conv2d<T>::bwd_input_scratch(f.shape));
    launch::Conv2d<T>::bwd_input(pointer<T>(input), strides_of(input), pointer<T>(weight), strides_of(weight),
                                 mutable_pointer<T>(y), plain_strides_of(y), epilogue, f.shape, scratch.get(),
                                 current_stream(input));
  });
  return {y, pre};
}

}  // namespace

PYNN_LIBRARY(m) { m.impl("conv_transpose2d_fwd", TORCH_BOX(&fwd)); }

#ifdef PYNN_CHECKS
namespace {

void fwd_check(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
               Ints stride, Ints padding, Ints output_padding, Ints dilation, int64_t groups, bool allow_tf32,
               int64_t activation, bool) {
  check_fwd(input, weight, bias, residual, stride, padding, output_padding, dilation, groups, allow_tf32, activation);
}

}  // namespace

PYNN_CHECKS(m) { m.impl("conv_transpose2d_fwd_check", TORCH_BOX(&fwd_check)); }
#endif

}  // namespace pynn
