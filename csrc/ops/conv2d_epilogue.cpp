// conv2d_epilogue: activation(sum + bias + residual) over a convolution's sums, in place.
#include "conv2d_check.h"

namespace pynn {
namespace {

constexpr const char* kOp = "conv2d_epilogue";

// `sum` receives the value before the activation and `output` the result; without `output`, `sum` receives the result.
void run(Tensor sum, std::optional<Tensor> bias, std::optional<Tensor> residual, int64_t activation,
         std::optional<Tensor> output) {
  check_floating(kOp, "sum", sum);
  check_rank(kOp, "sum", sum, 4);
  const Activation kind = check_activation(kOp, activation);
  if (bias) {
    check_shape(kOp, "bias", *bias, {sum.size(1)});
    check_same_dtype(kOp, "bias", *bias, "sum", sum);
    check_same_device(kOp, "bias", *bias, "sum", sum);
  }
  const auto packed = [&](std::initializer_list<int> order) {  // no gaps, the first dimension fastest
    int64_t expected = 1;
    for (const int d : order) {
      if (sum.size(d) > 1 && sum.stride(d) != expected) return false;
      expected *= sum.size(d);
    }
    return true;
  };
  PYNN_CHECK(sum.numel() == 0 || packed({3, 2, 1, 0}) || packed({1, 3, 2, 0}), kOp,
             ": expected sum to be contiguous or channels last, got strides ", to_string(sum.strides()));
  if (output) {
    check_same_shape(kOp, "output", *output, "sum", sum);
    check_same_dtype(kOp, "output", *output, "sum", sum);
    check_same_device(kOp, "output", *output, "sum", sum);
    bool same = true;
    for (int d = 0; d < 4; ++d) same = same && (sum.size(d) == 1 || output->stride(d) == sum.stride(d));
    PYNN_CHECK(same, kOp, ": expected output with the strides of sum ", to_string(sum.strides()), ", got ",
               to_string(output->strides()));
  }
  const int64_t channels = sum.size(1), height = sum.size(2), width = sum.size(3);
  const Strides4 strides = packed({3, 2, 1, 0}) ? Strides4{channels * height * width, height * width, width, 1}
                                                : Strides4{channels * height * width, 1, width * channels, channels};
  Strides4 residual_strides{};
  if (residual) {
    check_rank(kOp, "residual", *residual, 4);
    residual_strides = expanded_strides(kOp, "residual", *residual, sizes_of(sum));
    check_same_dtype(kOp, "residual", *residual, "sum", sum);
    check_same_device(kOp, "residual", *residual, "sum", sum);
  }
  if (sum.numel() == 0) return;
  dispatch_floating(kOp, sum.scalar_type(), [&]<class T>(Tag<T>) {
    T* values = mutable_pointer<T>(sum);
    const auto epilogue = epilogue_of<T>({{}, kind, residual_strides}, bias, residual, output ? &sum : nullptr);
    launch::Conv2dEpiloguePass<T>::run(values, output ? mutable_pointer<T>(*output) : values, strides, epilogue,
                                       sum.size(0), channels, height, width, current_stream(sum));
  });
}

}  // namespace

PYNN_LIBRARY(m) { m.impl("conv2d_epilogue", TORCH_BOX(&run)); }

}  // namespace pynn
