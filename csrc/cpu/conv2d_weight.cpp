// conv2d weight and bias gradient for the CPU: dw[o, c, a, b] = sum over n, i, j of dy[n, o, i, j] * x[n, c, i', j'].
// For each filter tap, register tiles hold (in channels) x (out channels) and run over the pixels of a unit, a few
// images, whose tap falls inside the image; channels-last operands are read in place, others are packed once per unit.
// With few out channels the in channels are the vectors. Units are dealt to a fixed number of parts, each with its own
// sums; the parts are added in order at the end, so the result does not depend on the number of threads.
#include "conv2d_depthwise.h"
#include "conv2d_geometry.h"
#include "conv2d_narrow_weight.h"
#include "conv2d_padding.h"
#include "conv2d_pointwise_weight.h"
#include "gemm_tile.h"
#include "parallel.h"

namespace pynn::cpu {
namespace {

template <class T>
class WeightGradient {
  using A = accumulate_t<T>;
  static constexpr int L = kLanes<A>, W = kTileWidth<A>;
  static constexpr int64_t kPixels = 48;

 public:
  WeightGradient(const T* dy, const Strides4& g, const T* x, const Strides4& s, bool with_bias, const Window& window)
      : dy_(dy),
        g_(g),
        x_(x),
        s_(s),
        with_bias_(with_bias),
        window_(window),
        core_(window.core()),
        in_(core_.in_channels),
        out_(core_.out_channels),
        units_(core_, std::max(in_, out_) * sizeof(A)) {
    exchanged_ = out_ <= 4 && in_ >= L;
    constexpr bool kSameType = sizeof(T) == sizeof(A);
    x_in_place_ =
        kSameType && !window.patches() && !window.bordered() && (s.c == 1 || in_ == 1) && (!exchanged_ || in_ % L == 0);
    dy_in_place_ = kSameType && g.c == 1 && !exchanged_ && out_ % L == 0;
    const int64_t width = core_.w.in;
    packed_ = x_in_place_ ? s : Strides4{most_input_rows(core_, units_) * width * in_, 1, width * in_, in_};
    columns_ = round_up(exchanged_ ? in_ : out_, L);
    group_size_ = core_.taps() * (exchanged_ ? out_ : in_) * columns_;
    bias_size_ = 2 * round_up(out_, L);
    parts_ = 1;
    while (parts_ < 8 && parts_ * 2 <= units_.count && parts_ * 2 * window.groups * group_size_ <= 1 << 19) parts_ *= 2;
    panels_ = ceil_div(out_, W);
    splits_ = std::min(panels_, ceil_div(8, parts_ * window.groups));
  }

  void run(T* dw, T* dbias) const {
    const int64_t work = window_.groups * parts_ * splits_, slots = std::min<int64_t>(work, thread_count());
    const int64_t pixels = units_.images * units_.rows * core_.w.out;
    const int64_t x_size = x_in_place_ ? 0 : round_up(units_.images * packed_.n + 4 * L, 16);
    const int64_t dy_size = dy_in_place_ ? 0 : round_up(pixels * round_up(out_, L), 16);
    const Buffer<A> sums(window_.groups * parts_ * (group_size_ + bias_size_)), scratch(slots * (x_size + dy_size));
    const Buffer<int64_t> lists(slots * 2 * pixels);
    parallel_for(slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot)
        for (int64_t i = slot; i < work; i += slots) {
          const int64_t part = i / splits_ % parts_, group = i / splits_ / parts_, split = i % splits_;
          A* packed_x = scratch.get() + slot * (x_size + dy_size);
          sum_part(group, part, panels_ * split / splits_ * W, std::min(panels_ * (split + 1) / splits_ * W, out_),
                   sums.get() + (group * parts_ + part) * (group_size_ + bias_size_), packed_x, packed_x + x_size,
                   lists.get() + slot * 2 * pixels, lists.get() + (slot * 2 + 1) * pixels);
        }
    });
    finish(sums.get(), dw, dbias);
  }

 private:
  // Out channels [begin, end), over the part's share of the units. sums: [panel][tap][in channel][lane], then
  // the bias as [vector][sum, error][lane].
  void sum_part(int64_t group, int64_t part, int64_t begin, int64_t end, A* sums, A* packed_x, A* packed_dy,
                int64_t* x_offsets, int64_t* dy_offsets) const {
    A* bias = sums + group_size_;
    const int64_t first = exchanged_ ? 0 : begin * core_.depth();
    std::fill(sums + first, sums + (exchanged_ ? group_size_ : round_up(end, L) * core_.depth()), A(0));
    std::fill(bias + 2 * begin, bias + 2 * round_up(end, L), A(0));
    for (int64_t u = units_.count * part / parts_; u < units_.count * (part + 1) / parts_; ++u) {
      const Unit unit(core_, units_, u);
      const A* x = pack_x(unit, group, packed_x);
      for (int64_t o = begin; o < end; o += W) {
        const int64_t width = std::min<int64_t>(W, round_up(out_ - o, L));
        const A* dy = pack_dy(unit, group, o, packed_dy);
        const Strides4 strides =
            dy_in_place_ ? g_ : Strides4{unit.rows * core_.w.out * width, 1, core_.w.out * width, width};
        for (int64_t a = 0; a < core_.h.kernel; ++a)
          for (int64_t b = 0; b < core_.w.kernel; ++b) {
            const int64_t tap = a * core_.w.kernel + b;
            const int64_t pixels = list_pixels(core_, unit, a, b, packed_, strides, x_offsets, dy_offsets);
            A* to = sums + (exchanged_ ? tap * out_ * columns_ : o * core_.depth() + tap * in_ * width);
            const int64_t pieces = std::max(ceil_div(pixels, kPixels), std::min<int64_t>(pixels / 16, 6));
            for (int64_t piece = 0; piece < pieces; ++piece) {
              const int64_t at = pixels * piece / pieces, count = pixels * (piece + 1) / pieces - at;
              exchanged_ ? add_exchanged(x, x_offsets + at, dy, dy_offsets + at, count, to)
                         : add_tap(x, x_offsets + at, dy, dy_offsets + at, count, width, to);
            }
          }
        if (with_bias_) add_bias(dy, strides, unit, width, dy_offsets, bias + 2 * o);
      }
    }
  }

  const A* pack_x(const Unit& unit, int64_t group, A* packed) const {
    if (x_in_place_) {
      if constexpr (sizeof(T) == sizeof(A)) return x_ + unit.image * s_.n + group * in_ * s_.c + unit.in_row * s_.h;
    }
    if (window_.patches()) {
      pack_any_patches<T, A>(x_ + group * window_.in_channels * s_.c, s_, window_, unit, packed);
      return packed;
    }
    const Part part{unit.in_row, unit.in_rows, core_.w.in, group * in_, in_, in_};
    for (int64_t n = 0; n < unit.images; ++n)
      pack_part<T, A>(x_ + (unit.image + n) * s_.n, s_, window_, part, packed + n * packed_.n);
    return packed;
  }

  // One panel of grad_output: in place, or [pixel][lane].
  const A* pack_dy(const Unit& unit, int64_t group, int64_t o, A* packed) const {
    const T* from = dy_ + unit.image * g_.n;
    if (dy_in_place_) {
      if constexpr (sizeof(T) == sizeof(A)) return from + group * out_ + o + unit.row * g_.h;
    }
    const int64_t width = std::min<int64_t>(W, round_up(out_ - o, L));
    const Part part{unit.row, unit.rows, core_.w.out, group * out_ + o, std::min<int64_t>(W, out_ - o), width};
    for (int64_t n = 0; n < unit.images; ++n)
      pack_image<T, A>(from + n * g_.n, g_, part, packed + n * unit.rows * core_.w.out * width);
    return packed;
  }

  void add_tap(const A* x, const int64_t* x_offsets, const A* dy, const int64_t* dy_offsets, int64_t count,
               int64_t width, A* sums) const {
    const int64_t tiles = ceil_div(in_, kTileRows);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t c = in_ * tile / tiles, rows = in_ * (tile + 1) / tiles - c;
      if (width == W)
        outer_rows<kTileVectors>(TileHeights(), rows, x + c, x_offsets, dy, dy_offsets, count, sums + c * width);
      else
        outer_rows<1>(TileHeights(), rows, x + c, x_offsets, dy, dy_offsets, count, sums + c * width);
    }
  }

  // sums: [out channel][in channel]
  void add_exchanged(const A* x, const int64_t* x_offsets, const A* dy, const int64_t* dy_offsets, int64_t count,
                     A* sums) const {
    for (int64_t o = 0; o < out_; ++o, sums += columns_) {
      int64_t c = 0;
      for (; c + 2 * L <= columns_; c += 2 * L) outer_row<2>(dy + o, dy_offsets, x + c, x_offsets, count, sums + c);
      if (c < columns_) outer_row<1>(dy + o, dy_offsets, x + c, x_offsets, count, sums + c);
    }
  }

  void add_bias(const A* dy, const Strides4& strides, const Unit& unit, int64_t width, int64_t* offsets,
                A* bias) const {
    const int64_t count = list_all_pixels(core_, unit, strides, offsets);
    for (int64_t v = 0; v < width; v += L) add_pixels(dy + v, offsets, count, bias + 2 * v);
  }

  // Adds the parts in order and stores (O, C, KH, KW), L x L blocks at a time.
  void finish(const A* sums, T* dw, T* dbias) const {
    const int64_t inner = window_.in_channels, taps = window_.taps(), depth = window_.depth();
    const int64_t part_size = group_size_ + bias_size_, strips = ceil_div(out_, L);
    const auto total = [&](const A* from) {
      Vec<A> sum = load(from);
      for (int64_t part = 1; part < parts_; ++part) sum += load(from + part * part_size);
      return sum;
    };
    for (int64_t o = 0; dbias && o < window_.groups * out_; ++o) {
      const int64_t group = o / out_, c = o % out_;
      const A* from = sums + group * parts_ * part_size + group_size_ + c / L * 2 * L + c % L;
      A sum = pixel_sum(from);
      for (int64_t part = 1; part < parts_; ++part) sum += pixel_sum(from + part * part_size);
      dbias[o] = from_float<T>(sum);
    }
    if (exchanged_) return finish_exchanged(sums, dw);
    parallel_for(window_.groups * strips, 1 + 65536 / (depth * L + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / strips, o = i % strips * L, panel = o / W * W;
        const int64_t width = std::min<int64_t>(W, round_up(out_ - panel, L)), count = std::min<int64_t>(L, out_ - o);
        const A* from = sums + group * parts_ * part_size + panel * depth + (o - panel);
        T* to = dw + (group * out_ + o) * depth;
        for (int64_t e = 0; e < depth; e += L) {
          const int64_t rows = std::min<int64_t>(L, depth - e);
          Vec<A> block[L] = {};
          for (int64_t r = 0; r < rows; ++r) block[r] = total(from + ((e + r) % taps * inner + (e + r) / taps) * width);
          transpose<A>(block);
          for (int64_t c = 0; c < count; ++c) {
            A values[L];
            store(values, block[c]);
            for (int64_t r = 0; r < rows; ++r) to[c * depth + e + r] = from_float<T>(values[r]);
          }
        }
      }
    });
  }

  void finish_exchanged(const A* sums, T* dw) const {
    const int64_t taps = window_.taps(), inner = window_.in_channels, part_size = group_size_ + bias_size_;
    for (int64_t group = 0; group < window_.groups; ++group)
      for (int64_t o = 0; o < out_; ++o)
        for (int64_t c = 0; c < inner; ++c)
          for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t k = tap * inner + c;  // in core channels: one tap of all of them, or one patch
            const A* from = sums + group * parts_ * part_size + (k / in_ * out_ + o) * columns_ + k % in_;
            A sum = *from;
            for (int64_t part = 1; part < parts_; ++part) sum += from[part * part_size];
            *dw++ = from_float<T>(sum);
          }
  }

  const T* dy_;
  Strides4 g_;
  const T* x_;
  Strides4 s_;
  bool with_bias_;
  Window window_, core_;
  int64_t in_, out_;  // of the core, per group
  Units units_;
  bool exchanged_, x_in_place_, dy_in_place_;
  Strides4 packed_;
  int64_t columns_, group_size_, bias_size_, parts_, panels_, splits_;
};

}  // namespace

template <class T>
int64_t Conv2d<T>::bwd_weight_scratch(const Conv2dShape&) {
  return 0;
}

template <class T>
void Conv2d<T>::bwd_weight(const T* dy, Strides4 dy_strides, const T* x, Strides4 x_strides, T* dw, T* dbias,
                           const Conv2dShape& d, void*, void*) {
  const Window window = window_of(d);
  if (window.depthwise()) return depthwise_weight_gradient(dy, dy_strides, x, x_strides, window, dw, dbias);
  if (has_pointwise_weights(window))
    return PointwiseWeightGradient<T>(dy, dy_strides, x, x_strides, window).run(dw, dbias);
  if (has_narrow_weights(window) && NarrowWeightGradient<T>(dy, dy_strides, x, x_strides, window).run(dw, dbias))
    return;
  WeightGradient<T>(dy, dy_strides, x, x_strides, dbias != nullptr, window).run(dw, dbias);
}

#define INSTANTIATE(T)                                                \
  template int64_t Conv2d<T>::bwd_weight_scratch(const Conv2dShape&); \
  template void Conv2d<T>::bwd_weight(const T*, Strides4, const T*, Strides4, T*, T*, const Conv2dShape&, void*, void*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(Half)
INSTANTIATE(BFloat16)

}  // namespace pynn::cpu
