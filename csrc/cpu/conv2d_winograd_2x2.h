// Winograd's F(2x2, 2x2) for correlations with 2 x 2 taps, which is what each phase of a transposed convolution with
// kernel 4 and stride 2 is: nine products for four outputs instead of sixteen. Along an axis, with outputs
//   y0 = d0 g0 + d1 g1,  y1 = d1 g0 + d2 g1:    m = ((d0 - d1) g0, d1 (g0 + g1), (d1 - d2) g1),  y = (m0 + m1, m1 - m2)
// The transforms add a few roundings, which the shorter sums more than make up for from about a hundred channels on.
#pragma once
#include "conv2d_geometry.h"
#include "conv2d_weights.h"
#include "gemm_tile.h"

namespace pynn::cpu {

template <class A>
class Winograd2x2 {
  static constexpr int L = kLanes<A>, W = kTileWidth<A>;
  static constexpr int64_t kProducts = 9, kPiece = 32;  // channels whose products are summed in registers

 public:
  // Where the result is no less exact than one long sum, and enough tiles meet each transformed filter. Not a question
  // of the batch: the result of an image must not depend on it.
  template <class T>
  static bool fits(const Window& window) {
    const auto two = [](const Axis& axis) { return axis.kernel == 2 && axis.stride * axis.dilation == 1; };
    constexpr int64_t least = sizeof(T) == 4 ? 96 : 32;
    if constexpr (sizeof(T) == 8) return false;
    return two(window.h) && two(window.w) && window.in_channels >= least && window.in_channels % L == 0 &&
           window.out_channels >= L && window.h.out * window.w.out >= 128;
  }

  Winograd2x2(const PackedWeights<A>& packed, const Window& window)
      : window_(window),
        group_size_(kProducts * window.in_channels * round_up(window.out_channels, L)),
        weights_(window.groups * group_size_) {
    for (int64_t g = 0; g < window.groups; ++g)
      for (int64_t o = 0; o < window.out_channels; o += W) {
        const int64_t size = window.in_channels * width_at(o);
        const A* from = packed.group(g) + o * window.depth();  // [tap][channel][lane]
        A* to = weights_.get() + g * group_size_ + o * kProducts * window.in_channels;
        for (int64_t i = 0; i < size; i += L) {
          Vec<A> rows[3][2];
          for (int b = 0; b < 2; ++b) {
            const Vec<A> first = load(from + b * size + i), second = load(from + (2 + b) * size + i);
            rows[0][b] = first, rows[1][b] = first + second, rows[2][b] = second;
          }
          for (int a = 0; a < 3; ++a) {
            store(to + (3 * a) * size + i, rows[a][0]);
            store(to + (3 * a + 1) * size + i, rows[a][0] + rows[a][1]);
            store(to + (3 * a + 2) * size + i, rows[a][1]);
          }
        }
      }
  }

  static int64_t tiles(int64_t images, int64_t rows, int64_t columns) {
    return images * ceil_div(rows, 2) * ceil_div(columns, 2);
  }
  // Elements of scratch for that many tiles.
  static int64_t scratch(int64_t tiles, int64_t channels) { return kProducts * tiles * (channels + W); }

  // The sums of one group over a unit, whose rows begin at an even one: sums[panel][pixel][lane]. base is the unit's
  // first input row, with strides s. not_finite(image) is called for images in which a sum overflowed or met a NaN:
  // there the differences above have other NaNs than the products they stand for.
  template <class Flag>
  void run(const A* base, const Strides4& s, const Unit& unit, int64_t group, const Layout& layout, int64_t pixels,
           A* scratch, int64_t* lists, A* sums, const Flag& not_finite) const {
    const int64_t rows = std::min(unit.rows, window_.h.out - unit.row), down = ceil_div(rows, 2);
    const int64_t across = ceil_div(window_.w.out, 2), count = unit.images * down * across;
    const int64_t channels = window_.in_channels;
    A *inputs = scratch, *products = scratch + kProducts * count * channels;
    const Buffer<A> zeros(channels);
    std::fill_n(zeros.get(), channels, A(0));
    for (int64_t t = 0; t < count; ++t) {
      const int64_t n = t / (down * across), i = unit.row + t / across % down * 2, j = t % across * 2;
      const A* pixel[3][3];
      for (int a = 0; a < 3; ++a)
        for (int b = 0; b < 3; ++b) {
          const int64_t row = window_.h.input(i, a), column = window_.w.input(j, b);
          const bool inside = row >= 0 && row < window_.h.in && column >= 0 && column < window_.w.in &&
                              row - unit.in_row < unit.in_rows;
          pixel[a][b] = inside ? base + n * s.n + (row - unit.in_row) * s.h + column * s.w : zeros.get();
        }
      transform(pixel, inputs + t * channels, count * channels);
      lists[t] = t * channels;
      lists[count + t] = t;
    }
    const int64_t pieces = ceil_div(channels, kPiece);
    for (int64_t o = 0; o < window_.out_channels; o += W) {
      const int64_t width = width_at(o);
      const A* weights = weights_.get() + group * group_size_ + o * kProducts * channels;
      for (int64_t k = 0; k < kProducts; ++k)
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const int64_t begin = channels * piece / pieces, end = channels * (piece + 1) / pieces;
          multiply(inputs + k * count * channels + begin, lists, count, end - begin,
                   weights + (k * channels + begin) * width, width, products + k * count * width, piece > 0);
        }
      finish(products, unit, rows, width, layout, sums + o * pixels, not_finite);
    }
  }

 private:
  int64_t width_at(int64_t o) const { return std::min<int64_t>(W, round_up(window_.out_channels - o, L)); }

  // to[product * step + channel]
  void transform(const A* const (&pixel)[3][3], A* to, int64_t step) const {
    for (int64_t c = 0; c < window_.in_channels; c += L) {
      Vec<A> across[3][3];
#pragma GCC unroll 3
      for (int a = 0; a < 3; ++a) {
        const Vec<A> d0 = load(pixel[a][0] + c), d1 = load(pixel[a][1] + c), d2 = load(pixel[a][2] + c);
        across[a][0] = d0 - d1, across[a][1] = d1, across[a][2] = d1 - d2;
      }
#pragma GCC unroll 3
      for (int b = 0; b < 3; ++b) {
        store(to + b * step + c, across[0][b] - across[1][b]);
        store(to + (3 + b) * step + c, across[1][b]);
        store(to + (6 + b) * step + c, across[1][b] - across[2][b]);
      }
    }
  }

  static void multiply(const A* from, const int64_t* lists, int64_t count, int64_t length, const A* weights,
                       int64_t width, A* products, bool more) {
    const int64_t tiles = ceil_div(count, kTileRows);
    const Runs run{1, length, 0, 0};
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t p = count * tile / tiles, rows = count * (tile + 1) / tiles - p;
      const int64_t *offsets = lists + p, *places = lists + count + p;
      if (width == W)
        multiply_rows<kTileVectors>(TileHeights(), rows, from, offsets, run, weights, products, places, more);
      else
        multiply_rows<1>(TileHeights(), rows, from, offsets, run, weights, products, places, more);
    }
  }

  template <class Flag>
  void finish(const A* products, const Unit& unit, int64_t rows, int64_t width, const Layout& layout, A* sums,
              const Flag& not_finite) const {
    const int64_t down = ceil_div(rows, 2), across = ceil_div(window_.w.out, 2);
    const int64_t step = unit.images * down * across * width;
    for (int64_t n = 0; n < unit.images; ++n) {
      Vec<A> zero_or_nan{};
      for (int64_t i = 0; i < rows; i += 2)
        for (int64_t j = 0; j < window_.w.out; j += 2, products += width) {
          const bool second_row = i + 1 < rows, second_column = j + 1 < window_.w.out;
          A* to = sums + layout(n, unit.row + i, j) * width;
          const int64_t below = layout.row * width, right = layout.column * width;
          for (int64_t v = 0; v < width; v += L) {
            Vec<A> top[3], bottom[3];
#pragma GCC unroll 3
            for (int b = 0; b < 3; ++b) {
              const A* m = products + b * step + v;
              const Vec<A> middle = load(m + 3 * step);
              top[b] = load(m) + middle, bottom[b] = middle - load(m + 6 * step);
            }
            const Vec<A> y[2][2] = {{top[0] + top[1], top[1] - top[2]}, {bottom[0] + bottom[1], bottom[1] - bottom[2]}};
            zero_or_nan += (y[0][0] - y[0][0]) + (y[0][1] - y[0][1]) + (y[1][0] - y[1][0]) + (y[1][1] - y[1][1]);
            store(to + v, y[0][0]);
            if (second_column) store(to + right + v, y[0][1]);
            if (second_row) store(to + below + v, y[1][0]);
            if (second_row && second_column) store(to + below + right + v, y[1][1]);
          }
        }
      for (int l = 0; l < L; ++l)
        if (zero_or_nan[l] != 0) {
          not_finite(unit.image + n);
          break;
        }
    }
  }

  Window window_;
  int64_t group_size_;
  Buffer<A> weights_;
};

}  // namespace pynn::cpu
