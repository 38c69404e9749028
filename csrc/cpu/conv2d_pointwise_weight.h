// Weight and bias gradient of the correlations in conv2d_pointwise.h: dw[o, c] = sum over n, i, j of dy[n, o, i, j] *
// x[n, c, i * stride, j * stride]. The channels of one operand are lanes, in vectors as short as there are channels,
// those of the other come as single values, so that one of them has to lie pixel by pixel only: of two operands that
// lie channel by channel, the smaller is copied. A unit is a band of rows of one image; its pixels are summed in short
// chains. Units are dealt to a fixed number of parts whose sums are added in order, in double, so threads do not
// matter, and neither does the layout: every sum goes over the pixels in the same order.
#pragma once
#include "conv2d_pointwise.h"

namespace pynn::cpu {

// Whether a weight gradient is one of those: few products, whose sums all stay in the cache.
inline bool has_pointwise_weights(const Window& window) {
  return is_pointwise(window) && window.taps() == 1 && window.in_channels * window.out_channels <= 1 << 14;
}

// Rows of a tile of one vector of lanes, and of two.
inline constexpr int kPointwiseRows[2] = {kVectorRegisters == 32 ? 12 : 6, kVectorRegisters == 32 ? 8 : 4};

// Values of `channels` channels: channel c of pixel p is at data[p * step + c * channel_step].
template <class A>
struct Values {
  const A* data;
  int64_t step, channel_step;
  Values at(int64_t pixel, int64_t channel) const {
    return {data + pixel * step + channel * channel_step, step, channel_step};
  }
};

// sums[r * stride + lane] += sum over p < count of rows[p][r] * lanes[p][lane], for R rows and N vectors of type V.
template <int R, int N, class V, class A>
[[gnu::noinline]] void pointwise_weight_tile(const Values<A>& rows, const Values<A>& lanes, int64_t count, A* sums,
                                             int64_t stride) {
  constexpr int L = sizeof(V) / sizeof(A);
  const A *from = rows.data, *vectors = lanes.data;
  const int64_t row_step = rows.channel_step;
  V sum[R][N] = {};
  for (int64_t p = 0; p < count; ++p, from += rows.step, vectors += lanes.step) {
    V lane[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) lane[n] = in_register(load_lanes<V>(vectors + n * L));
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const V value = from[r * row_step] - V{};
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[r][n] = fma(value, lane[n], sum[r][n]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      A* to = sums + r * stride + n * L;
      store_lanes(to, load_lanes<V>(to) + sum[r][n]);
    }
  }
}

template <int N, class V, class A, int... R>
inline auto pointwise_weight_tile_of(std::integer_sequence<int, R...>, int64_t rows) {
  static constexpr decltype(&pointwise_weight_tile<1, N, V, A>) kTiles[] = {&pointwise_weight_tile<R + 1, N, V, A>...};
  return kTiles[rows - 1];
}

// body.operator()<V, N>() for the vectors of a panel.
template <class A, class Body>
auto with_vectors(const PixelPanel& panel, const Body& body) {
  constexpr int L = kLanes<A>;
  if (panel.vectors == 2) return body.template operator()<Vec<A>, 2>();
  if constexpr (L >= 8) {
    if (panel.lanes == L / 2) return body.template operator()<Lanes<A, L / 2>, 1>();
  }
  if constexpr (L >= 16) {
    if (panel.lanes == L / 4) return body.template operator()<Lanes<A, L / 4>, 1>();
  }
  return body.template operator()<Vec<A>, 1>();
}

// A bias gradient is summed for every pixel number modulo kClasses in the compute type, then over those in double.
inline constexpr int kClasses = 16;

template <class Class>
double sum_classes(const Class& of) {
  double total = 0;
  for (int i = 0; i < kClasses; ++i) total += double(of(i));
  return total;
}

// sums[c] += channel c over `count` pixels, for N vectors of channels, or one plane.
template <class V, int N, class A>
void add_pixel_vectors(const A* from, int64_t step, int64_t count, double* sums) {
  constexpr int kWidth = sizeof(V) / sizeof(A);
  for (int n = 0; n < N; ++n, from += kWidth, sums += kWidth) {
    V sum[kClasses] = {};
    int64_t p = 0;
    for (; p + kClasses <= count; p += kClasses)
#pragma GCC unroll 16
      for (int i = 0; i < kClasses; ++i) sum[i] += load_lanes<V>(from + (p + i) * step);
    for (; p < count; ++p) sum[p % kClasses] += load_lanes<V>(from + p * step);
    for (int c = 0; c < kWidth; ++c) sums[c] += sum_classes([&](int i) { return sum[i][c]; });
  }
}
template <class A>
double sum_plane(const A* from, int64_t count) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[kClasses / L] = {};
  int64_t p = 0;
  for (; p + kClasses <= count; p += kClasses)
    for (int v = 0; v < kClasses / L; ++v) sum[v] += load(from + p + v * L);
  for (int v = 0; p < count; p += L, ++v)
    sum[v] += count - p < L ? load_part(from + p, count - p, A(0)) : load(from + p);
  return sum_classes([&](int i) { return sum[i / L][i % L]; });
}

template <class T>
class PointwiseWeightGradient {
  using A = accumulate_t<T>;
  static constexpr int64_t kPixels = 24, kMost = 16 * kPixels;  // of a chain, of the chains that are added in fp32

 public:
  PointwiseWeightGradient(const T* dy, const Strides4& g, const T* x, const Strides4& s, const Window& window)
      : window_(window),
        width_(window.w.out),
        dy_(dy, g, window.out_channels, width_),
        x_(x, {s.n, s.c, s.h * window.h.stride, s.w * window.w.stride}, window.in_channels, width_) {
    const int64_t pixels = std::clamp<int64_t>(65536 / (dy_.channels + x_.channels), 4 * kPixels, kMost);
    int64_t bands = ceil_div(window.h.out, std::max<int64_t>(1, pixels / width_));
    bands = std::max(bands, std::min(ceil_div(8, window.batch), window.h.out / 8));
    rows_ = ceil_div(window.h.out, bands);
    bands_ = ceil_div(window.h.out, rows_);
    parts_ = std::min<int64_t>(8, window.batch * bands_);
    if (dy_.planes && x_.planes) (dy_.channels < x_.channels ? dy_ : x_).copy_as_pixels();
    lanes_are_outputs_ = x_.planes || (!dy_.planes && dy_.channels >= x_.channels);
    panels_ = pixel_panels<A>(lanes().channels, 4);
  }

  void run(T* dw, T* dbias) const {
    const int64_t out = dy_.channels, in = x_.channels, products = scalars().channels * lanes().padded;
    const int64_t slots = std::min<int64_t>(parts_, thread_count());
    const int64_t dy_size = dy_.copy_size(rows_ * width_), x_size = x_.copy_size(rows_ * width_);
    const int64_t slot_size = dy_size + x_size + round_up(products, 16);
    const Buffer<A> scratch(slots * slot_size);
    const Buffer<double> totals(parts_ * products), biases(parts_ * dy_.padded);
    parallel_for(slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        A *dy = scratch.get() + slot * slot_size, *x = dy + dy_size;
        std::fill_n(dy, dy_size + x_size, A(0));
        for (int64_t part = slot; part < parts_; part += slots)
          sum_part(part, dy, x, x + x_size, totals.get() + part * products,
                   dbias ? biases.get() + part * dy_.padded : nullptr);
      }
    });
    const auto total = [&](const double* sums, int64_t i, int64_t stride) {
      double sum = sums[i];
      for (int64_t part = 1; part < parts_; ++part) sum += sums[part * stride + i];
      return from_float<T>(A(sum));
    };
    for (int64_t o = 0; o < out; ++o)
      for (int64_t c = 0; c < in; ++c)
        dw[o * in + c] =
            total(totals.get(), lanes_are_outputs_ ? c * lanes().padded + o : o * lanes().padded + c, products);
    for (int64_t o = 0; dbias && o < out; ++o) dbias[o] = total(biases.get(), o, dy_.padded);
  }

 private:
  // An operand and where its values come from: pixels, or planes, in place or copied for each unit.
  struct Operand {
    const T* data;
    Strides4 s;
    int64_t channels, width, padded;  // padded: whole vectors
    bool planes, copied;

    Operand(const T* data, const Strides4& s, int64_t channels, int64_t width)
        : data(data), s(s), channels(channels), width(width), padded(round_up(channels, 4)) {
      planes = s.c != 1 || s.w == 1;
      copied = !std::is_same_v<T, A> || s.h != width * s.w || (planes ? s.w != 1 : padded != channels);
    }
    void copy_as_pixels() { planes = false, copied = true; }
    static int64_t pitch(int64_t pixels) { return round_up(pixels, 16) + 16; }  // not a power of two
    int64_t copy_size(int64_t pixels) const {
      return copied ? round_up(planes ? channels * pitch(pixels) : padded * pixels, 16) : 0;
    }
    Values<A> unit(int64_t image, int64_t row, int64_t rows, A* to) const {
      const T* from = data + image * s.n;
      if (copied && planes) {
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t i = 0; i < rows; ++i)
            copy_row(from + c * s.c + (row + i) * s.h, s.w, width, to + c * pitch(rows * width) + i * width, s.c);
        return {to, 1, pitch(rows * width)};
      }
      if (copied) {
        pack_image<T, A>(from, s, {row, rows, width, 0, channels, padded}, to);
        return {to, padded, 1};
      }
      if constexpr (std::is_same_v<T, A>) return {from + row * s.h, s.w, s.c};
      return {};
    }
  };
  const Operand& lanes() const { return lanes_are_outputs_ ? dy_ : x_; }
  const Operand& scalars() const { return lanes_are_outputs_ ? x_ : dy_; }

  void sum_part(int64_t part, A* dy_copy, A* x_copy, A* sums, double* totals, double* biases) const {
    const int64_t units = window_.batch * bands_, products = scalars().channels * lanes().padded;
    std::fill_n(totals, products, 0.0);
    if (biases) std::fill_n(biases, dy_.padded, 0.0);
    std::fill_n(sums, products, A(0));
    int64_t summed = 0;  // pixels
    const auto flush = [&] {
      for (int64_t i = 0; i < products; ++i) totals[i] += double(sums[i]);
      std::fill_n(sums, products, A(0));
      summed = 0;
    };
    for (int64_t u = units * part / parts_; u < units * (part + 1) / parts_; ++u) {
      const int64_t row = u % bands_ * rows_, rows = std::min(rows_, window_.h.out - row), pixels = rows * width_;
      const Values<A> dy = dy_.unit(u / bands_, row, rows, dy_copy), x = x_.unit(u / bands_, row, rows, x_copy);
      const int64_t blocks = ceil_div(pixels, kMost);  // one, unless rows are long
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t p = pixels * block / blocks, count = pixels * (block + 1) / blocks - p;
        if (summed + count > kMost) flush();
        summed += count;
        lanes_are_outputs_ ? add_products(x.at(p, 0), dy.at(p, 0), count, sums)
                           : add_products(dy.at(p, 0), x.at(p, 0), count, sums);
        if (biases) add_biases(dy.at(p, 0), count, biases);
      }
    }
    flush();
  }

  // All chains of a few planes, which are long streams, or all products of a chain, which stays in the cache.
  void add_products(const Values<A>& scalars, const Values<A>& vectors, int64_t count, A* sums) const {
    const int64_t rows = this->scalars().channels, most = kPointwiseRows[panels_[0].vectors - 1];
    const int64_t tiles = ceil_div(rows, most), chains = ceil_div(count, kPixels);
    const bool planes = scalars.channel_step != 1;
    for (int64_t i = 0; i < tiles * chains; ++i) {
      const int64_t tile = planes ? i / chains : i % tiles, chain = planes ? i % chains : i / tiles;
      const int64_t r = rows * tile / tiles, p = count * chain / chains, pixels = count * (chain + 1) / chains - p;
      for (const PixelPanel& panel : panels_)
        add_tile(panel, rows * (tile + 1) / tiles - r, scalars.at(p, r), vectors.at(p, panel.first), pixels,
                 sums + r * lanes().padded + panel.first);
    }
  }

  void add_tile(const PixelPanel& panel, int64_t rows, const Values<A>& scalars, const Values<A>& vectors,
                int64_t count, A* sums) const {
    with_vectors<A>(panel, [&]<class V, int N>() {
      pointwise_weight_tile_of<N, V, A>(std::make_integer_sequence<int, kPointwiseRows[N - 1]>(), rows)(
          scalars, vectors, count, sums, lanes().padded);
    });
  }

  void add_biases(const Values<A>& dy, int64_t count, double* biases) const {
    if (dy_.planes) {
      for (int64_t o = 0; o < dy_.channels; ++o) biases[o] += sum_plane(dy.data + o * dy.channel_step, count);
      return;
    }
    for (const PixelPanel& panel : pixel_panels<A>(dy_.channels, 4))
      with_vectors<A>(panel, [&]<class V, int N>() {
        add_pixel_vectors<V, N>(dy.data + panel.first, dy.step, count, biases + panel.first);
      });
  }

  Window window_;
  int64_t width_, rows_, bands_, parts_;  // rows of a unit, units of an image
  Operand dy_, x_;
  bool lanes_are_outputs_;
  std::vector<PixelPanel> panels_;  // of the lanes
};

}  // namespace pynn::cpu
