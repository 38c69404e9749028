// What a convolution may do to its input while reading it: x' = activation(x * scale + shift), per channel, as after a
// normalisation. The padding of x' is zero.
#pragma once
#include "conv2d.h"

namespace pynn {

// A value per channel, in the compute type and without gaps; those of the next sample lie `stride` further (0: the same
// for all samples). Null means 1 for a scale, 0 for a shift.
template <class A>
struct PerChannel {
  const A* values;
  int64_t stride;
};

template <class T>
struct Conv2dPrologue {
  PerChannel<accumulate_t<T>> scale, shift;
  Activation activation;
};

// Images without gaps: (batch, channels, pixels), or (batch, pixels, channels) where channels_last.
struct ImagesShape {
  int64_t batch, channels, pixels;
  bool channels_last;

  int64_t count() const { return batch * channels * pixels; }
};

// Of images without gaps.
inline Strides4 dense_strides(int64_t channels, int64_t height, int64_t width, bool channels_last) {
  const int64_t pixels = height * width, image = channels * pixels;
  if (channels_last) return {image, 1, width * channels, channels};
  return {image, channels == 1 ? 1 : pixels, width, 1};
}

}  // namespace pynn

namespace pynn::PYNN_LAUNCH_NAMESPACE {

// The prologue as a pass of its own, and its gradient.
template <class T>
struct Conv2dProloguePass {
  using A = accumulate_t<T>;
  static void fwd(const T* x, const Conv2dPrologue<T>& prologue, T* y, const ImagesShape& shape, void* stream);

  // dx, and sums (2, batch, channels): the gradients of scale and shift, each sample's own. sums may be null.
  static int64_t bwd_scratch(const ImagesShape& shape);
  static void bwd(const T* dy, const T* x, const Conv2dPrologue<T>& prologue, T* dx, A* sums, const ImagesShape& shape,
                  void* scratch, void* stream);
};

// Conv2d::fwd of x'. x has no gaps.
template <class T>
struct PrologueConv2d {
  static int64_t fwd_scratch(const Conv2dShape& shape);
  static void fwd(const T* x, bool channels_last, const Conv2dPrologue<T>& prologue, const T* w, Strides4 w_strides,
                  T* y, Strides4 y_strides, const Conv2dEpilogue<T>& epilogue, const Conv2dShape& shape, void* scratch,
                  void* stream);
};

}  // namespace pynn::PYNN_LAUNCH_NAMESPACE
