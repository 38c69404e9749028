// Launcher of rotary_embedding (Su et al. 2021, arXiv 2104.09864): pairs of channels turned by an angle.
//
//   a', b' = a cos - b sin, b cos + a sin        inverse: by the negative angle, which is the transpose
//
// x (batch, heads, length, width), in which the channels of a row lie one after the other. Of the first 2 `pairs`
// channels of a row, pair i is (i, i + pairs) or, interleaved, (2 i, 2 i + 1); the others stay as they are. cos and sin
// are (batch, length, pairs), in the precision of sums. Products are rounded as fma(a, cos, -(b sin)) and
// fma(b, cos, a sin) on every backend.
#pragma once
#include "dtype.h"

namespace pynn {

struct RotaryStrides {
  int64_t batch, head, row;
};

template <class T>
struct RotaryEmbeddingCall {
  using F = accumulate_t<T>;
  const T* x;
  T* y;  // may be x
  const F *cos, *sin;
  RotaryStrides x_strides, y_strides;
  int64_t table_batch, table_row;  // strides of cos and sin; 0 where all share a row
  int64_t batch, heads, length, width, pairs;
  bool interleaved, inverse;
};

}  // namespace pynn

namespace pynn::PYNN_LAUNCH_NAMESPACE {

template <class T>
struct RotaryEmbedding {
  static void run(const RotaryEmbeddingCall<T>& call, void* stream);
};

}  // namespace pynn::PYNN_LAUNCH_NAMESPACE
