// What a convolution looks like to the implicit GEMM: output pixels are rows, filter taps times channels are the sum,
// output channels are columns.
//
// Along each axis the output position `o` meets the filter tap `i` at the image position
//     o * stride + origin + i * step,   0 <= i < taps.
// The forward pass is one such correlation. The input gradient is one for each stride phase: the input pixels with the
// same position modulo the stride meet the same taps (in falling order, so that the image position rises), and no
// product with an inserted zero is ever computed. All phases are one launch: a phase is part of the block index.
#pragma once
#include "conv2d_geometry.cuh"

namespace pynn::cuda {
namespace {
namespace gemm {

constexpr int kMaxPhases = 8;  // of one axis
constexpr int64_t kMostRows = int64_t(1) << 30;

inline int64_t round_up(int64_t value, int64_t to) { return ceil_div(value, to) * to; }

// Division of numbers below 2^31 by a constant, as a multiplication.
struct Divider {
  uint32_t divisor, factor, shift;

  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d), factor(0), shift(0) {
    if (d <= 1) return;
    int log = 0;
    while ((uint64_t(1) << log) < d) ++log;
    factor = uint32_t(((uint64_t(1) << (31 + log)) + d - 1) / d);
    shift = uint32_t(log - 1);
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n, uint32_t& remainder) const {
    const uint32_t quotient = divisor == 1 ? n : __umulhi(n, factor) >> shift;
    remainder = n - quotient * divisor;
    return quotient;
  }
};

// One stride phase of an axis: output positions first, first + out_stride, ... (`count` of them).
struct Phase {
  Divider count;
  int first, taps, first_tap, origin;
};

struct Line {
  int size;                                // of the image
  int stride, step, tap_step, out_stride;  // see above; the i-th tap is filter tap first_tap + i * tap_step
  int phases;
  Phase phase[kMaxPhases];

  int most_pixels() const {
    uint32_t most = 0;
    for (int f = 0; f < phases; ++f) most = std::max(most, phase[f].count.divisor);
    return int(most);
  }
  int most_taps() const {
    int most = 0;
    for (int f = 0; f < phases; ++f) most = std::max(most, phase[f].taps);
    return most;
  }
};

inline Line forward_line(const Axis& a) {
  Line line{int(a.in), int(a.stride), int(a.dilation), 1, 1, 1, {}};
  line.phase[0] = {Divider(uint32_t(a.out)), 0, int(a.kernel), 0, int(-a.pad)};
  return line;
}

// The image is grad_output here.
inline Line gradient_line(const Axis& a) {
  const int64_t shared = std::gcd(a.stride, a.dilation), tap_step = a.stride / shared;
  Line line{int(a.out), 1, int(a.dilation / shared), int(-tap_step), int(a.stride), int(std::min(a.stride, a.in)), {}};
  for (int64_t first = 0; first < line.phases; ++first) {
    Phase& phase = line.phase[first];
    phase = {Divider(uint32_t(ceil_div(a.in - first, a.stride))), int(first), 0, 0, 0};
    for (int64_t tap = 0; tap < std::min(a.kernel, tap_step); ++tap)
      if ((first + a.pad - tap * a.dilation) % a.stride == 0) {
        phase.taps = int(ceil_div(a.kernel - tap, tap_step));
        phase.first_tap = int(tap + (phase.taps - 1) * tap_step);
        phase.origin = int((first + a.pad - phase.first_tap * a.dilation) / a.stride);
      }
  }
  return line;
}

// Operands as the kernels read them: channels (of one group: `channels`, whole packs of 16 bytes) lie next to each
// other, every other stride is a multiple of a pack.
template <class T>
struct Image {
  const T* data;
  int64_t n, h, w;  // strides
  int group, channels;
};

template <class T>
struct Filter {
  const T* data;  // rows of taps of channels
  int64_t group, row;
  int tap_h, tap_w;
};

template <class T>
struct Correlation {
  Line h, w;
  Image<T> image;
  Filter<T> filter;
  int batch, groups, columns;  // columns: output channels of a group
  int column_tiles;
  int chunk, split;  // steps of the sum that make a chunk, and its blocks for each blockIdx.z
  PaddingMode padding_mode;
};

// The pixel of a row of the tile, in the output tensor.
struct Pixel {
  int n, h, w;
};

template <class T>
__device__ __forceinline__ Pixel pixel_of(const Correlation<T>& p, const Phase& h, const Phase& w, uint32_t row) {
  uint32_t i, j;
  const uint32_t line = w.count.divide(row, j), n = h.count.divide(line, i);
  return {int(n), int(i), int(j)};
}

}  // namespace gemm
}  // namespace
}  // namespace pynn::cuda
