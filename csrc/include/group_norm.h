// group_norm: y = act((x - mean) * rstd * weight + bias), mean and rstd over the channels of a group and all pixels.
#pragma once
#include "dtype.h"

namespace pynn {

struct GroupNormShape {
  int64_t batch, groups, width, pixels;  // width: channels per group
  bool channels_last;                    // memory is (batch, pixels, channels), otherwise (batch, channels, pixels)
  bool silu;                             // act is SiLU, otherwise the identity
  PYNN_HD int64_t channels() const { return groups * width; }
  PYNN_HD int64_t group_size() const { return width * pixels; }
};

}  // namespace pynn

namespace pynn::PYNN_LAUNCH_NAMESPACE {

template <class T>
struct GroupNorm {
  using A = accumulate_t<T>;

  // Doubles of scratch that the launchers want; with_y: fwd's y is not null.
  static int64_t fwd_scratch(const GroupNormShape& shape, bool with_y);
  static int64_t bwd_scratch(const GroupNormShape& shape);

  // weight, bias: (channels) or nullptr; mean, rstd: (batch, groups). y: nullptr where only the statistics are wanted.
  static void fwd(const T* x, const A* weight, const A* bias, double eps, T* y, A* mean, A* rstd, double* scratch,
                  const GroupNormShape& shape, void* stream);
  // dweight and dbias are written whole, also without weight and bias.
  static void bwd(const T* dy, const T* x, const A* weight, const A* bias, const A* mean, const A* rstd, T* dx,
                  A* dweight, A* dbias, double* scratch, const GroupNormShape& shape, void* stream);
};

}  // namespace pynn::PYNN_LAUNCH_NAMESPACE
