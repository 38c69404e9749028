// group_norm: y = act((x - mean) * rstd * weight + bias), mean and rstd over the channels of a group and all pixels.
#pragma once
#include "dtype.h"

namespace pynn {

struct GroupNormShape {
  int64_t batch, groups, width, pixels;  // width: channels per group
  bool channels_last;                    // memory is (batch, pixels, channels), otherwise (batch, channels, pixels)
  bool silu;                             // act is SiLU, otherwise the identity
  int64_t channels() const { return groups * width; }
  int64_t group_size() const { return width * pixels; }
};

// weight, bias: (channels) or null; mean, rstd: (batch, groups).
#define PYNN_GROUP_NORM_FWD(T)                                                                                  \
  void group_norm_fwd(const T* x, const accumulate_t<T>* weight, const accumulate_t<T>* bias, double eps, T* y, \
                      accumulate_t<T>* mean, accumulate_t<T>* rstd, const GroupNormShape& shape, void* stream)
// sums: scratch of 2 * batch * channels. dweight and dbias are written whole, also without weight and bias.
#define PYNN_GROUP_NORM_BWD(T)                                                                                   \
  void group_norm_bwd(const T* dy, const T* x, const accumulate_t<T>* weight, const accumulate_t<T>* bias,       \
                      const accumulate_t<T>* mean, const accumulate_t<T>* rstd, T* dx, accumulate_t<T>* dweight, \
                      accumulate_t<T>* dbias, double* sums, const GroupNormShape& shape, void* stream)

namespace cpu {
template <class T>
PYNN_GROUP_NORM_FWD(T);
template <class T>
PYNN_GROUP_NORM_BWD(T);
}  // namespace cpu
namespace cuda {
template <class T>
PYNN_GROUP_NORM_FWD(T);
template <class T>
PYNN_GROUP_NORM_BWD(T);
}  // namespace cuda

}  // namespace pynn
