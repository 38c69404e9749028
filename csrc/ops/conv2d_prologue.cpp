// conv2d_prologue: activation(input * scale + shift), a convolution's prologue as a pass of its own, and its gradient.
#include "conv2d_prologue_check.h"

namespace pynn {
namespace {

constexpr const char* kOp = "conv2d";

ImagesShape images_of(const Tensor& t, bool channels_last) {
  int64_t count = 16;
  for (int d = 0; d < 4; ++d) count = checked_multiply(kOp, count, std::max<int64_t>(t.size(d), 1));
  return {t.size(0), t.size(1), t.size(2) * t.size(3), channels_last};
}

Tensor fwd(const Tensor& input, std::optional<Tensor> scale, std::optional<Tensor> shift, int64_t activation) {
  const Activation kind = check_prologue(kOp, input, scale, shift, activation);
  const bool last = is_channels_last(input);
  const ImagesShape shape = images_of(input, last);
  Tensor y = empty(kOp, input, sizes_of(input), last);
  if (y.numel() == 0) return y;
  const Tensor x = without_gaps(input, last);
  const PerChannelOperand factors(scale, input), terms(shift, input);
  dispatch_floating(kOp, input.scalar_type(), [&]<class T>(Tag<T>) {
    using A = accumulate_t<T>;
    launch::Conv2dProloguePass<T>::fwd(pointer<T>(x), {factors.get<A>(), terms.get<A>(), kind}, mutable_pointer<T>(y),
                                       shape, current_stream(input));
  });
  return y;
}

Activation check_bwd(const Tensor& grad_output, const Tensor& input, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& shift, int64_t activation) {
  const Activation kind = check_prologue(kOp, input, scale, shift, activation);
  check_same_shape(kOp, "grad_output", grad_output, "input", input);
  check_operand(kOp, "grad_output", grad_output, "input", input);
  return kind;
}

// The gradient of input; and (2, N, C), those of scale and shift for each sample, if with_sums.
std::tuple<Tensor, Tensor> bwd(const Tensor& grad_output, const Tensor& input, std::optional<Tensor> scale,
                               std::optional<Tensor> shift, int64_t activation, bool with_sums) {
  const Activation kind = check_bwd(grad_output, input, scale, shift, activation);
  const bool last = is_channels_last(input);
  const ImagesShape shape = images_of(input, last);
  Tensor dx = empty(kOp, input, sizes_of(input), last);
  const ScalarType compute = compute_type_of(input);
  Tensor sums =
      with_sums ? new_dense(input, {2, shape.batch, shape.channels}, compute) : new_dense(input, {0}, compute);
  if (dx.numel() == 0) {
    torch::stable::zero_(sums);
    return {dx, sums};
  }
  const Tensor x = without_gaps(input, last), dy = without_gaps(grad_output, last);
  const PerChannelOperand factors(scale, input), terms(shift, input);
  dispatch_floating(kOp, input.scalar_type(), [&]<class T>(Tag<T>) {
    using A = accumulate_t<T>;
    Scratch scratch(input, with_sums ? launch::Conv2dProloguePass<T>::bwd_scratch(shape) : 0);
    launch::Conv2dProloguePass<T>::bwd(pointer<T>(dy), pointer<T>(x), {factors.get<A>(), terms.get<A>(), kind},
                                       mutable_pointer<T>(dx), with_sums ? mutable_pointer<A>(sums) : nullptr, shape,
                                       scratch.get(), current_stream(input));
  });
  return {dx, sums};
}

}  // namespace

PYNN_LIBRARY(m) {
  m.impl("conv2d_prologue_fwd", TORCH_BOX(&fwd));
  m.impl("conv2d_prologue_bwd", TORCH_BOX(&bwd));
}

#ifdef PYNN_CHECKS
namespace {

void fwd_check(const Tensor& input, std::optional<Tensor> scale, std::optional<Tensor> shift, int64_t activation) {
  check_prologue(kOp, input, scale, shift, activation);
}

void bwd_check(const Tensor& grad_output, const Tensor& input, std::optional<Tensor> scale, std::optional<Tensor> shift,
               int64_t activation, bool) {
  check_bwd(grad_output, input, scale, shift, activation);
}

}  // namespace

PYNN_CHECKS(m) {
  m.impl("conv2d_prologue_fwd_check", TORCH_BOX(&fwd_check));
  m.impl("conv2d_prologue_bwd_check", TORCH_BOX(&bwd_check));
}
#endif

}  // namespace pynn
