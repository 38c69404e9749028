// Filters in the order the tiles of a correlation read them.
#pragma once
#include "conv2d_geometry.h"
#include "gemm_tile.h"

namespace pynn::cpu {

// Strides of filters: weight (o, c, a, b) of a group, o and c counted within the group.
struct WeightView {
  int64_t group, o, c, a, b;
};

// panels: kTileWidth output channels each (the last may be one vector), as [kernel row][kernel column][in
// channel][lane] dots: for few output channels, one row [kernel row][kernel column][in channel] per channel
enum class Form { panels, dots };

// The filters of every group in compute dtype.
template <class A>
class PackedWeights {
  static constexpr int L = kLanes<A>, W = kTileWidth<A>;

 public:
  template <class T>
  PackedWeights(const T* w, const WeightView& view, const Window& window)
      : form_(form_of(window)), group_size_(size_of(window)), data_(group_size_ * window.groups) {
    for (int64_t g = 0; g < window.groups; ++g) {
      A* to = data_.get() + g * group_size_;
      for (int64_t o = 0; o < window.out_channels; o += W) {
        const T* from = w + g * view.group + o * view.o;
        const int64_t columns = std::min<int64_t>(W, window.out_channels - o);
        form_ == Form::dots ? pack_rows(from, view, window, columns, to) : pack_panel(from, view, window, columns, to);
        to += window.depth() * W;
      }
    }
  }
  Form form() const { return form_; }
  const A* group(int64_t g) const { return data_.get() + g * group_size_; }

 private:
  static Form form_of(const Window& window) {
    const Window core = window.core();
    return core.out_channels <= 4 && core.in_channels >= L ? Form::dots : Form::panels;
  }
  static int64_t size_of(const Window& window) {
    return window.depth() * (form_of(window) == Form::dots ? window.out_channels : round_up(window.out_channels, L));
  }

  template <class T>
  static void pack_rows(const T* w, const WeightView& view, const Window& window, int64_t count, A* to) {
    const int64_t kw = window.w.kernel;
    for (int64_t o = 0; o < count; ++o)
      for (int64_t t = 0; t < window.taps(); ++t)
        for (int64_t c = 0; c < window.in_channels; ++c)
          *to++ = to_float(w[o * view.o + c * view.c + t / kw * view.a + t % kw * view.b]);
  }

  template <class T>
  static void pack_panel(const T* from, const WeightView& view, const Window& window, int64_t columns, A* to) {
    const int64_t width = round_up(columns, L), inner = window.in_channels, kw = window.w.kernel, taps = window.taps();
    if (columns < width) std::fill_n(to, taps * inner * width, A(0));
    if (view.b == 1 && view.a == kw && view.c == taps && taps * inner >= L) {
      // A filter is one run of memory, (c, tap) order: square transposes, each vector stored where its tap belongs.
      for (; columns >= L; columns -= L, from += L * view.o, to += L)
        transpose_in(from, view.o, taps * inner, L, to,
                     [&](int64_t q) { return (q % taps * inner + q / taps) * width; });
    }
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < inner; ++c) {
        const T* row = from + c * view.c + t / kw * view.a + t % kw * view.b;
        A* target = to + (t * inner + c) * width;
        for (int64_t o = 0; o < columns; ++o) target[o] = to_float(row[o * view.o]);
      }
  }

  Form form_;
  int64_t group_size_;
  Buffer<A> data_;
};

}  // namespace pynn::cpu
