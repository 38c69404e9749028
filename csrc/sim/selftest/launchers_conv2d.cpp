// Every launcher of csrc/include/conv2d.h: each kernel in both layouts, tails, operands that allow no vectors, padding
// modes, epilogues.
#include "conv2d.h"
#include "launchers.h"

namespace {

using launchers::Run;
using namespace pynn;

struct Case {
  int64_t batch, groups, in, out, height, width, kernel_h, kernel_w;  // channels are per group
  int64_t stride = 1, pad = 0, dilation = 1;
  PaddingMode mode = PaddingMode::zeros;
  bool all_types = true;
};
constexpr Case kCases[] = {
    {2, 6, 1, 1, 6, 9, 3, 3, 1, 1},                                // depthwise
    {1, 5, 1, 1, 7, 6, 3, 3, 2, 1},                                // ... and stride 2
    {1, 4, 1, 1, 6, 7, 5, 5, 1, 2, 1, PaddingMode::zeros, false},  // ... other kernels
    {1, 4, 1, 1, 7, 8, 5, 5, 2, 2, 1, PaddingMode::zeros, false},
    {1, 4, 1, 1, 7, 8, 7, 7, 1, 3, 1, PaddingMode::zeros, false},
    {1, 3, 1, 2, 8, 9, 2, 9, 1, 4, 1},  // ... a multiplier
    {1, 4, 1, 1, 7, 8, 4, 4, 2, 1, 1},
    {1, 3, 1, 2, 6, 6, 3, 3, 3, 1, 1},  // ... and stride 3
    {1, 4, 1, 1, 6, 6, 3, 3, 1, 2, 2, PaddingMode::reflect},
    {1, 1, 9, 3, 5, 9, 3, 3, 1, 1},                            // head
    {1, 1, 2, 6, 5, 9, 3, 3, 1, 1},                            // stem
    {1, 2, 3, 2, 6, 5, 2, 3, 2, 1, 1, PaddingMode::circular},  // small groups
    {1, 2, 2, 5, 5, 6, 3, 3, 1, 2, 1, PaddingMode::replicate},
    {2, 1, 24, 20, 5, 6, 3, 3, 1, 1},  // implicit GEMM
    {1, 1, 16, 16, 6, 5, 3, 3, 2, 1, 1},
    {1, 1, 256, 16, 4, 5, 1, 1, 1, 0, 1, PaddingMode::zeros, false},
    {1, 1, 24, 16, 5, 4, 2, 3, 1, 1, 2, PaddingMode::reflect},
    {1, 1, 115, 17, 5, 4, 3, 3, 1, 1},  // ... in true fp32, and a sum in several blocks
};

struct alignas(64) Line {
  char bytes[64];
};

Strides4 strides_of(int64_t c, int64_t h, int64_t w, bool channels_last) {
  return channels_last ? Strides4{h * w * c, 1, w * c, c} : Strides4{c * h * w, h * w, w, 1};
}

Conv2dShape shape_of(const Case& c) {
  const auto outputs = [&](int64_t in, int64_t kernel) {
    return (in + 2 * c.pad - c.dilation * (kernel - 1) - 1) / c.stride + 1;
  };
  return {c.batch,
          c.groups,
          c.groups * c.in,
          c.height,
          c.width,
          c.groups * c.out,
          outputs(c.height, c.kernel_h),
          outputs(c.width, c.kernel_w),
          c.kernel_h,
          c.kernel_w,
          c.stride,
          c.stride,
          c.pad,
          c.pad,
          c.pad,
          c.pad,
          c.dilation,
          c.dilation,
          c.mode,
          c.in % 2 == 0};
}

template <class T>
void launch_case(Run& run, const Case& c, bool channels_last, Activation activation) {
  using Conv2d = launch::Conv2d<T>;
  const Conv2dShape s = shape_of(c);
  const size_t inputs = size_t(s.batch * s.in_channels * s.in_height * s.in_width),
               outputs = size_t(s.batch * s.out_channels * s.out_height * s.out_width),
               weights = size_t(s.out_channels * c.in * c.kernel_h * c.kernel_w);
  const Strides4 x_strides = strides_of(s.in_channels, s.in_height, s.in_width, channels_last),
                 y_strides = strides_of(s.out_channels, s.out_height, s.out_width, channels_last),
                 w_strides = strides_of(c.in, c.kernel_h, c.kernel_w, false);
  const T *x = run.normals<T>(inputs), *w = run.normals<T>(weights), *dy = run.normals<T>(outputs);
  const bool full = activation != Activation::none;
  Conv2dEpilogue<T> epilogue{};
  epilogue.activation = activation;
  if (full) {
    epilogue.bias = run.normals<T>(size_t(s.out_channels)), epilogue.bias_stride = 1;
    epilogue.residual = run.normals<T>(outputs), epilogue.residual_strides = y_strides;
    epilogue.pre = run.output<T>(outputs);
  }
  const auto scratch = [&](int64_t bytes) { return run.scratch<Line>(size_t(bytes + 63) / 64); };
  Conv2d::fwd(x, x_strides, w, w_strides, run.output<T>(outputs), y_strides, epilogue, s,
              scratch(Conv2d::fwd_scratch(s)), nullptr);
  Conv2d::bwd_input(dy, y_strides, w, w_strides, run.output<T>(inputs), x_strides, {}, s,
                    scratch(Conv2d::bwd_input_scratch(s)), nullptr);
  Conv2d::bwd_weight(dy, y_strides, x, x_strides, run.output<T>(weights),
                     full ? run.output<T>(size_t(s.out_channels)) : nullptr, s, scratch(Conv2d::bwd_weight_scratch(s)),
                     nullptr);
  const bool saved_last = channels_last != (c.groups > 1);  // not as grad_output lies, for some
  const Strides4 saved_strides = strides_of(s.out_channels, s.out_height, s.out_width, saved_last);
  Conv2d::bwd_activation(dy, y_strides, run.normals<T>(outputs), saved_strides, run.output<T>(outputs), y_strides,
                         activation, s.batch, s.out_channels, s.out_height, s.out_width, nullptr);
}

void launch_all(Run& run) {
  int64_t next = 0;
  launchers::for_each_type(run, [&]<class T>(T) {
    for (const Case& c : kCases) {
      if (!c.all_types && sizeof(T) != 2) continue;
      for (const bool channels_last : {false, true})
        launch_case<T>(run, c, channels_last, Activation(next++ % (kActivations + 1) % kActivations));
    }
  });
}

const launchers::Op op{"conv2d", &launch_all};

}  // namespace
