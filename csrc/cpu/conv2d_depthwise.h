// Weight and bias gradient of a depthwise convolution (one input channel per group): channels are the vectors. A unit
// packs a block of channels of x and dy; for each tap, vectors of products are summed over the pixels whose tap falls
// inside the image, eight pixels in flight. As in conv2d_weight.cpp, units are dealt to a fixed number of parts whose
// sums are added in order.
#pragma once
#include "conv2d_geometry.h"
#include "conv2d_padding.h"
#include "parallel.h"

namespace pynn::cpu {

template <class T>
class DepthwiseWeightGradient {
  using A = accumulate_t<T>;
  static constexpr int L = kLanes<A>;
  static constexpr int64_t kChannels = 4 * L, kPixels = 32;

 public:
  DepthwiseWeightGradient(const T* dy, const Strides4& g, const T* x, const Strides4& s, const Window& window)
      : dy_(dy),
        g_(g),
        x_(x),
        s_(s),
        window_(window),
        units_(window, kChannels * sizeof(A)),
        channels_(window.groups * window.out_channels),
        parts_(std::min<int64_t>(8, units_.count)) {}

  void run(T* dw, T* dbias) const {
    const int64_t taps = window_.taps(), blocks = ceil_div(channels_, kChannels), work = blocks * parts_;
    const int64_t slots = std::min<int64_t>(work, torch::stable::get_num_threads());
    const int64_t pixels = units_.images * units_.rows * window_.w.out, sums_size = (taps + 2) * kChannels;
    const int64_t x_size = units_.images * most_input_rows(window_, units_) * window_.w.in * kChannels;
    const Buffer<A> sums(work * sums_size), scratch(slots * (x_size + pixels * kChannels));
    const Buffer<int64_t> lists(slots * 2 * pixels);
    parallel_for(slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot)
        for (int64_t i = slot; i < work; i += slots) {
          A* packed = scratch.get() + slot * (x_size + pixels * kChannels);
          sum_part(i / parts_ * kChannels, i % parts_, sums.get() + i * sums_size, packed, packed + x_size,
                   lists.get() + slot * 2 * pixels, lists.get() + (slot * 2 + 1) * pixels);
        }
    });
    for (int64_t o = 0; o < channels_; ++o) {
      const int64_t c = o % kChannels;
      const A* block = sums.get() + o / kChannels * parts_ * sums_size;
      const auto total = [&](const auto& value_of) {
        A sum = value_of(block);
        for (int64_t part = 1; part < parts_; ++part) sum += value_of(block + part * sums_size);
        return from_float<T>(sum);
      };
      for (int64_t tap = 0; tap < taps; ++tap)
        dw[o * taps + tap] = total([=](const A* from) { return from[tap * kChannels + c]; });
      if (dbias)
        dbias[o] = total([=](const A* from) { return pixel_sum(from + taps * kChannels + c / L * 2 * L + c % L); });
    }
  }

 private:
  // sums: [tap][channel], then the bias as [vector][sum, error][lane].
  void sum_part(int64_t first, int64_t part, A* sums, A* packed_x, A* packed_dy, int64_t* x_offsets,
                int64_t* dy_offsets) const {
    const int64_t count = std::min(kChannels, channels_ - first), taps = window_.taps();
    std::fill_n(sums, (taps + 2) * kChannels, A(0));
    for (int64_t u = units_.count * part / parts_; u < units_.count * (part + 1) / parts_; ++u) {
      const Unit unit(window_, units_, u);
      const int64_t in_width = window_.w.in, out_width = window_.w.out;
      const Strides4 x{unit.in_rows * in_width * kChannels, 1, in_width * kChannels, kChannels};
      const Strides4 dy{unit.rows * out_width * kChannels, 1, out_width * kChannels, kChannels};
      for (int64_t n = 0; n < unit.images; ++n) {
        const Part of_x{unit.in_row, unit.in_rows, in_width, first, count, window_.out_channels, kChannels};
        const Part of_dy{unit.row, unit.rows, out_width, first, count, 1, kChannels};
        pack_part<T, A>(x_ + (unit.image + n) * s_.n, s_, window_, of_x, packed_x + n * x.n);
        pack_image<T, A>(dy_ + (unit.image + n) * g_.n, g_, of_dy, packed_dy + n * dy.n);
      }
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t pixels =
            list_pixels(window_, unit, tap / window_.w.kernel, tap % window_.w.kernel, x, dy, x_offsets, dy_offsets);
        for (int64_t at = 0; at < pixels; at += kPixels)
          for (int64_t c = 0; c < count; c += L) {
            A* to = sums + tap * kChannels + c;
            store(to, load(to) + product(packed_x + c, x_offsets + at, packed_dy + c, dy_offsets + at,
                                         std::min(kPixels, pixels - at)));
          }
      }
      const int64_t pixels = list_all_pixels(window_, unit, dy, dy_offsets);
      for (int64_t c = 0; c < count; c += L)
        add_pixels(packed_dy + c, dy_offsets, pixels, sums + taps * kChannels + 2 * c);
    }
  }

  static Vec<A> product(const A* x, const int64_t* x_offsets, const A* dy, const int64_t* dy_offsets, int64_t count) {
    constexpr int U = 8;
    Vec<A> sum[U] = {};
    int64_t p = 0;
    for (; p + U <= count; p += U) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) sum[u] = fma(load(x + x_offsets[p + u]), load(dy + dy_offsets[p + u]), sum[u]);
    }
    for (; p < count; ++p) sum[0] = fma(load(x + x_offsets[p]), load(dy + dy_offsets[p]), sum[0]);
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  }

  const T* dy_;
  Strides4 g_;
  const T* x_;
  Strides4 s_;
  Window window_;
  Units units_;
  int64_t channels_, parts_;
};

}  // namespace pynn::cpu
