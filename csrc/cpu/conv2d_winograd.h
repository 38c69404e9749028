// Winograd's F(2x2, 3x3): a 3 x 3 correlation of stride 1 computes 2 x 2 output pixels from 4 x 4 input pixels with 16
// products for each pair of channels, where the sums themselves take 36 (Lavin and Gray,
// https://arxiv.org/abs/1509.09308).
//
//   y = A^T [(G w G^T) * (B^T d B)] A, summed over in channels between the brackets
//
// A unit is a few images, or a band of an even number of rows of one. Its input tiles are transformed once; for each
// panel of output channels, 16 products of small matrices follow, one for each place in a tile, and are transformed
// back. Filters are transformed in double and rounded once. The transforms cost some accuracy, shorter sums win it
// back: kChunk products are summed, then kBlock / kChunk such sums, both in registers, then those. The error is 0.7 to
// 0.97 times oneDNN's for normal data and for its ReLU, from 24 channels on. Halves and quarters are the only factors,
// so small integers stay exact. Infinities and NaNs would spread through a tile: where a tile's result is not finite,
// its pixels are summed directly.
#pragma once
#include <limits>

#include "conv2d_geometry.h"
#include "conv2d_padding.h"
#include "conv2d_weights.h"
#include "parallel.h"

namespace pynn::cpu {

namespace winograd {

inline constexpr int64_t kPlaces = 16, kChunk = 8, kBlock = 64;
inline constexpr int kRows = kVectorRegisters == 32 ? 6 : 3;

// c[i][:] (+)= sum over k < depth of a[i * depth_stride + k] * b[k][:] for MR rows of NV vectors.
template <int MR, int NV, class A>
[[gnu::noinline]] void multiply(const A* a, int64_t a_stride, const A* b, int64_t depth, A* c, bool accumulate) {
  constexpr int L = kLanes<A>;
  Vec<A> total[MR][NV] = {};
  for (int64_t k = 0; k < depth;) {
    Vec<A> sum[MR][NV] = {};
    for (const int64_t end = std::min(depth, k + kChunk); k < end; ++k, b += NV * L) {
      Vec<A> column[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) column[v] = load(b + v * L);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const Vec<A> value = broadcast(a[i * a_stride + k]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[i][v] = fma(value, column[v], sum[i][v]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) total[i][v] += sum[i][v];
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      A* to = c + (i * NV + v) * L;
      store(to, accumulate ? load(to) + total[i][v] : total[i][v]);
    }
}

template <int NV, class A, int... I>
inline void multiply_rows(std::integer_sequence<int, I...>, int64_t rows, const A* a, int64_t a_stride, const A* b,
                          int64_t depth, A* c, bool accumulate) {
  static constexpr decltype(&multiply<1, NV, A>) kTiles[] = {&multiply<I + 1, NV, A>...};
  kTiles[rows - 1](a, a_stride, b, depth, c, accumulate);
}

// The two one-dimensional transforms, of any values that add.
template <class V>
PYNN_HD void transform_in(const V& d0, const V& d1, const V& d2, const V& d3, V& v0, V& v1, V& v2, V& v3) {
  v0 = d0 - d2, v1 = d1 + d2, v2 = d2 - d1, v3 = d1 - d3;
}
template <class V>
PYNN_HD void transform_out(const V& m0, const V& m1, const V& m2, const V& m3, V& y0, V& y1) {
  y0 = (m0 + m1) + m2, y1 = (m1 - m2) - m3;
}

}  // namespace winograd

// Where it pays and is accurate, from the shape of one image only: enough channels, and enough tiles for the transform
// of the filters and the reading of 16 / 9 of their size.
template <class T>
bool is_winograd(const Window& window) {
  const Axis &h = window.h, &w = window.w;
  for (const Axis* axis : {&h, &w})
    if (axis->kernel != 3 || axis->stride != 1 || axis->dilation != 1) return false;
  const int64_t tiles = ceil_div(h.out, 2) * ceil_div(w.out, 2), in = window.in_channels, out = window.out_channels;
  return std::is_same_v<T, float> && window.groups == 1 && in >= 24 && out >= 16 && tiles >= 16 &&
         in * out <= 8192 * tiles;
}

// G w G^T of every filter, as [panel][place][in channel][lane].
template <class A>
class WinogradWeights {
  static constexpr int L = kLanes<A>, W = kTileWidth<A>;

 public:
  WinogradWeights(const A* w, const WeightView& view, const Window& window)
      : w_(w),
        view_(view),
        in_(window.in_channels),
        data_(winograd::kPlaces * in_ * round_up(window.out_channels, L)),
        finite_(true) {
    const int64_t out = window.out_channels, panels = ceil_div(out, W);
    std::vector<char> finite(panels);
    parallel_for(panels, 1 + 4096 / in_, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) finite[p] = transform_panel(p * W, std::min<int64_t>(W, out - p * W));
    });
    for (const char f : finite) finite_ = finite_ && f;
  }
  // Whether all filters are: with others, tiles have no meaning.
  bool finite() const { return finite_; }
  const A* panel(int64_t o) const { return data_.get() + o * winograd::kPlaces * in_; }
  A weight(int64_t o, int64_t c, int64_t a, int64_t b) const {
    return w_[o * view_.o + c * view_.c + a * view_.a + b * view_.b];
  }

 private:
  bool transform_panel(int64_t o, int64_t count) {
    const int64_t width = round_up(count, L), place = in_ * width;
    A* to = data_.get() + o * winograd::kPlaces * in_;
    double sum = 0;
    for (int64_t c = 0; c < in_; ++c)
      for (int64_t first = 0; first < width; first += L) {
        double g[3][3][L], t[4][3][L], u[4][4][L];
        read_taps(w_ + (o + first) * view_.o + c * view_.c, std::min<int64_t>(L, count - first), g);
        for (int b = 0; b < 3; ++b) transform(g[0][b], g[1][b], g[2][b], t[0][b], t[1][b], t[2][b], t[3][b]);
        for (int i = 0; i < 4; ++i) transform(t[i][0], t[i][1], t[i][2], u[i][0], u[i][1], u[i][2], u[i][3]);
        for (int i = 0; i < 4; ++i)
          for (int j = 0; j < 4; ++j) {
            A* row = to + (4 * i + j) * place + c * width + first;
            for (int l = 0; l < L; ++l) row[l] = A(u[i][j][l]);
          }
        for (int l = 0; l < L; ++l) sum += A(u[1][1][l]) - A(u[1][1][l]);
      }
    return sum == 0;
  }
  // The taps of one in channel and up to L out channels, the others 0.
  void read_taps(const A* from, int64_t lanes, double (&taps)[3][3][L]) const {
    if constexpr (L >= 9) {
      if (std::abs(view_.b) == 1 && view_.a == 3 * view_.b && lanes == L) {  // filters are runs of memory
        const int64_t lowest = view_.b < 0 ? 8 * view_.b : 0;
        Vec<A> rows[L];
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) rows[l] = load_part(from + l * view_.o + lowest, 9, A(0));
        transpose<A>(rows);
        for (int t = 0; t < 9; ++t) {
          A values[L];
          store(values, rows[view_.b < 0 ? 8 - t : t]);
          for (int l = 0; l < L; ++l) taps[t / 3][t % 3][l] = values[l];
        }
        return;
      }
    }
    for (int a = 0; a < 3; ++a)
      for (int b = 0; b < 3; ++b) {
        const A* tap = from + a * view_.a + b * view_.b;
        for (int64_t l = 0; l < L; ++l) taps[a][b][l] = l < lanes ? tap[l * view_.o] : A(0);
      }
  }
  static void transform(const double* g0, const double* g1, const double* g2, double* u0, double* u1, double* u2,
                        double* u3) {
    for (int l = 0; l < L; ++l) {
      const double even = (g0[l] + g2[l]) * 0.5, odd = g1[l] * 0.5, first = g0[l], last = g2[l];
      u0[l] = first, u1[l] = even + odd, u2[l] = even - odd, u3[l] = last;
    }
  }

  const A* w_;
  WeightView view_;
  int64_t in_;
  Buffer<A> data_;
  bool finite_;
};

template <class A>
class WinogradCorrelation {
  static constexpr int L = kLanes<A>, W = kTileWidth<A>;
  static constexpr int64_t kPlaces = winograd::kPlaces, kGap = 16;  // places begin in different sets of a cache

 public:
  WinogradCorrelation(const A* x, const Strides4& s, const Window& window, const WinogradWeights<A>& weights)
      : x_(x),
        s_(s),
        window_(window),
        weights_(weights),
        padded_(round_up(window.in_channels, L)),
        tile_columns_(ceil_div(window.w.out, 2)),
        units_(units_of(window)),
        tiles_(units_.images * ceil_div(units_.rows, 2) * tile_columns_),
        in_place_(s.c == 1 && !window.bordered()) {
    const int64_t pitch = window.w.in * window.in_channels;
    pixel_ = in_place_ ? s : Strides4{most_input_rows(window, units_) * pitch, 1, pitch, window.in_channels};
  }

  // finish(panel) is called once for every unit and panel.
  template <class Finish>
  void run(const Finish& finish) const {
    const int64_t slots = std::min<int64_t>(units_.count, thread_count());
    const int64_t input = in_place_ ? 0 : round_up(units_.images * pixel_.n + L, 16);
    const int64_t in = kPlaces * (tiles_ * padded_ + kGap), out = kPlaces * (tiles_ * W + kGap);
    const int64_t values = units_.images * units_.rows * window_.w.out * W, size = padded_ + input + in + out + values;
    const Buffer<A> scratch(slots * size);
    parallel_for(slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        A* at = scratch.get() + slot * size;
        std::fill_n(at, padded_, A(0));
        for (int64_t i = slot; i < units_.count; i += slots)
          run_unit(Unit(window_, units_, i), at, at + padded_, at + padded_ + input, at + padded_ + input + in,
                   at + padded_ + input + in + out, finish);
      }
    });
  }

 private:
  static Units units_of(const Window& window) {
    constexpr int64_t kBytes = 512 << 10, kLeastTiles = 48;
    const int64_t columns = ceil_div(window.w.out, 2), rows = ceil_div(window.h.out, 2);
    const int64_t tiles = std::max<int64_t>(kBytes / (kPlaces * window.in_channels * int64_t(sizeof(A))), kLeastTiles);
    Units units(window, int64_t(sizeof(A)));
    units.images = std::clamp<int64_t>(tiles / (columns * rows), 1, ceil_div(window.batch, 4));
    const int64_t bands = units.images > 1 ? 1 : ceil_div(rows, std::max<int64_t>(tiles / columns, 1));
    units.rows = 2 * ceil_div(rows, bands);
    units.per_image = ceil_div(window.h.out, units.rows);
    units.count = ceil_div(window.batch, units.images) * units.per_image;
    return units;
  }

  template <class Finish>
  void run_unit(const Unit& unit, const A* zeros, A* input, A* in, A* out, A* values, const Finish& finish) const {
    const A* base = input;
    if (in_place_) {
      base = x_ + unit.image * s_.n + unit.in_row * s_.h;
    } else {
      const Part part{unit.in_row, unit.in_rows, window_.w.in, 0, window_.in_channels, window_.in_channels};
      for (int64_t n = 0; n < unit.images; ++n)
        pack_part<A, A>(x_ + (unit.image + n) * s_.n, s_, window_, part, input + n * pixel_.n);
    }
    each_tile(unit, [&](int64_t tile, int64_t n, int64_t i, int64_t j) {
      const A* pixels[kPlaces];
      for (int64_t p = 0; p < kPlaces; ++p) {
        const A* pixel = pixel_at(unit, base, n, i, j, p / 4, p % 4);
        pixels[p] = pixel ? pixel : zeros;
      }
      transform_input(pixels, in + tile * padded_);
    });
    for (int64_t o = 0; o < window_.out_channels; o += W) {
      const int64_t channels = std::min<int64_t>(W, window_.out_channels - o), width = round_up(channels, L);
      width == W ? multiply_tiles<kTileVectors>(unit, in, weights_.panel(o), out)
                 : multiply_tiles<1>(unit, in, weights_.panel(o), out);
      if (!transform_output(unit, out, width, values)) sum_nonfinite(unit, base, o, channels, width, values);
      finish(Panel<A>{unit, o, channels, values, width});
    }
  }

  int64_t tiles_of(const Unit& unit) const { return unit.images * ceil_div(unit.rows, 2) * tile_columns_; }

  // Calls body(tile, image of the unit, row of the unit, column) with a tile's first output pixel.
  template <class Body>
  void each_tile(const Unit& unit, const Body& body) const {
    int64_t tile = 0;
    for (int64_t n = 0; n < unit.images; ++n)
      for (int64_t i = 0; i < unit.rows; i += 2)
        for (int64_t j = 0; j < window_.w.out; j += 2) body(tile++, n, i, j);
  }

  // The input pixel that tap (a, b) of an output pixel meets, or null outside the image.
  const A* pixel_at(const Unit& unit, const A* base, int64_t n, int64_t i, int64_t j, int64_t a, int64_t b) const {
    const int64_t row = window_.h.input(unit.row + i, a), column = window_.w.input(j, b);
    if (row < 0 || row >= window_.h.in || column < 0 || column >= window_.w.in) return nullptr;
    if (row >= unit.in_row + unit.in_rows) return nullptr;  // only an output row past the last one wants it
    return base + n * pixel_.n + (row - unit.in_row) * pixel_.h + column * pixel_.w;
  }

  void transform_input(const A* const* pixels, A* to) const {
    const int64_t place = tiles_ * padded_ + kGap, tail = window_.in_channels - (padded_ - L);
    for (int64_t c = 0; c < padded_; c += L, to += L) {
      Vec<A> d[4][4], t[4][4];
#pragma GCC unroll 16
      for (int p = 0; p < kPlaces; ++p)
        d[p / 4][p % 4] = tail == L || c + L < padded_ ? load(pixels[p] + c) : load_part(pixels[p] + c, tail, A(0));
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b)
        winograd::transform_in(d[0][b], d[1][b], d[2][b], d[3][b], t[0][b], t[1][b], t[2][b], t[3][b]);
#pragma GCC unroll 4
      for (int a = 0; a < 4; ++a) {
        Vec<A> v[4];
        winograd::transform_in(t[a][0], t[a][1], t[a][2], t[a][3], v[0], v[1], v[2], v[3]);
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) store(to + (4 * a + b) * place, v[b]);
      }
    }
  }

  template <int NV>
  void multiply_tiles(const Unit& unit, const A* in, const A* b, A* out) const {
    constexpr int64_t kRows = winograd::kRows, width = NV * L;
    const int64_t tiles = tiles_of(unit), groups = ceil_div(tiles, kRows), depth = window_.in_channels;
    for (int64_t p = 0; p < kPlaces; ++p, b += depth * width) {
      const A* a = in + p * (tiles_ * padded_ + kGap);
      A* c = out + p * (tiles_ * W + kGap);
      for (int64_t k = 0; k < depth; k += winograd::kBlock)
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t first = tiles * g / groups, rows = tiles * (g + 1) / groups - first;
          winograd::multiply_rows<NV>(std::make_integer_sequence<int, winograd::kRows>(), rows, a + first * padded_ + k,
                                      padded_, b + k * width, std::min(winograd::kBlock, depth - k), c + first * width,
                                      k > 0);
        }
    }
  }

  // values[pixel][lane]; returns whether all are finite.
  bool transform_output(const Unit& unit, const A* out, int64_t width, A* values) const {
    const int64_t place = tiles_ * W + kGap, columns = window_.w.out;
    Vec<A> wrong = {};
    each_tile(unit, [&](int64_t tile, int64_t n, int64_t i, int64_t j) {
      const bool below = i + 1 < unit.rows, right = j + 1 < columns;
      A* to = values + ((n * unit.rows + i) * columns + j) * width;
      for (int64_t c = 0; c < width; c += L, to += L) {
        const A* from = out + tile * width + c;
        Vec<A> s[2][4], y[2][2];
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b)
          winograd::transform_out(load(from + b * place), load(from + (4 + b) * place), load(from + (8 + b) * place),
                                  load(from + (12 + b) * place), s[0][b], s[1][b]);
#pragma GCC unroll 2
        for (int a = 0; a < 2; ++a) {
          winograd::transform_out(s[a][0], s[a][1], s[a][2], s[a][3], y[a][0], y[a][1]);
          wrong += (y[a][0] - y[a][0]) + (y[a][1] - y[a][1]);
        }
        store(to, y[0][0]);
        if (right) store(to + width, y[0][1]);
        if (below) store(to + columns * width, y[1][0]);
        if (below && right) store(to + (columns + 1) * width, y[1][1]);
      }
    });
    return sum_lanes<A>(wrong) == 0;
  }

  // The pixels of tiles that hold anything not finite, summed over their own taps, in double.
  void sum_nonfinite(const Unit& unit, const A* base, int64_t o, int64_t channels, int64_t width, A* values) const {
    each_tile(unit, [&](int64_t, int64_t n, int64_t i, int64_t j) {
      bool finite = true;
      const auto each_pixel = [&](const auto& body) {
        for (int64_t r = i; r < std::min(i + 2, unit.rows); ++r)
          for (int64_t q = j; q < std::min(j + 2, window_.w.out); ++q)
            body(r, q, values + ((n * unit.rows + r) * window_.w.out + q) * width);
      };
      each_pixel([&](int64_t, int64_t, const A* to) {
        for (int64_t c = 0; c < channels; ++c) finite = finite && std::isfinite(to[c]);
      });
      if (finite) return;
      each_pixel([&](int64_t r, int64_t q, A* to) {
        std::vector<double> sums(channels);
        for (int64_t a = 0; a < 3; ++a)
          for (int64_t b = 0; b < 3; ++b) {
            const A* pixel = pixel_at(unit, base, n, r, q, a, b);
            for (int64_t c = 0; pixel && c < window_.in_channels; ++c) {
              if (std::isnan(pixel[c])) return std::fill_n(to, channels, std::numeric_limits<A>::quiet_NaN()), void();
              for (int64_t l = 0; l < channels; ++l) sums[l] += double(pixel[c]) * weights_.weight(o + l, c, a, b);
            }
          }
        for (int64_t l = 0; l < channels; ++l) to[l] = A(sums[l]);
      });
    });
  }

  const A* x_;
  Strides4 s_;
  Window window_;
  const WinogradWeights<A>& weights_;
  int64_t padded_, tile_columns_;
  Units units_;
  int64_t tiles_;
  bool in_place_;
  Strides4 pixel_;  // strides of the packed or in-place input
};

template <class T, class A, class Finish>
void correlate_winograd(const T* x, const Strides4& s, const Window& window, const WinogradWeights<A>& weights,
                        const Finish& finish) {
  if constexpr (std::is_same_v<T, A>) WinogradCorrelation<A>(x, s, window, weights).run(finish);
}

}  // namespace pynn::cpu
