// conv2d weight and bias gradient for the CPU: dw[o, c, a, b] = sum over n, i, j of dy[n, o, i, j] * x[n, c, i', j'].
// Register tiles hold (kernel row: taps x in channels) x (out channels) and run over the pixels of a block of packed
// images, one block after another, so that both operands stay in cache. With few out channels the roles of the
// operands are exchanged. Images are dealt to a fixed number of parts, each with its own sums; the parts are added in
// order at the end, so the result does not depend on the number of threads.
#include "conv2d_engine.h"

namespace pynn::cpu {
namespace {

template <class T> class WeightGradient {
  using A = accumulate_t<T>;
  static constexpr int L = kLanes<A>;

 public:
  WeightGradient(const T* dy, const Strides4& g, const T* x, const Strides4& s, bool with_bias, const Conv2dShape& d)
      : dy_(dy), g_(g), x_(x), s_(s), with_bias_(with_bias), d_(d), in_(d.in_channels / d.groups),
        out_(d.out_channels / d.groups),
        window_{d.batch, 1, in_, d.in_height, d.in_width, out_, d.out_height, d.out_width, d.kernel_height, d.kernel_width,
                d.stride_height, d.stride_width, d.dilation_height, d.dilation_width, d.pad_top, d.pad_left},
        units_(window_, sizeof(A), in_) {
    const Window& w = window_;
    exchanged_ = out_ <= 4 && in_ * w.kernel_width >= L;
    x_in_place_ = sizeof(T) == sizeof(A) && s.c == 1 && inside() && (!exchanged_ || in_ % L == 0);
    dy_in_place_ = sizeof(T) == sizeof(A) && g.c == 1 && !exchanged_ && out_ % L == 0;
    packed_rows_ = (units_.rows - 1) * w.stride_height + (w.kernel_height - 1) * w.dilation_height + 1;
    packed_columns_ = (w.out_width - 1) * w.stride_width + (w.kernel_width - 1) * w.dilation_width + 1;
    packed_ = x_in_place_ ? s : Strides4{packed_rows_ * packed_columns_ * in_, 1, packed_columns_ * in_, in_};
    const bool joined = w.dilation_width == 1 && packed_.w == in_;
    runs_ = joined ? w.kernel_height : w.kernel_height * w.kernel_width;
    length_ = joined ? w.kernel_width * in_ : in_;
    columns_ = round_up(exchanged_ ? length_ : out_, L);
    group_size_ = (exchanged_ ? runs_ * out_ : runs_ * length_) * columns_;
    bias_size_ = round_up(out_, L);

    int64_t parts = 1;
    while (parts < 8 && parts * 2 <= units_.count && parts * 2 * d.groups * group_size_ <= 1 << 19) parts *= 2;
    parts_ = parts;
    panels_ = exchanged_ ? 1 : ceil_div(out_, kTileWidth<A>);
    splits_ = std::min(panels_, ceil_div(8, parts_ * d.groups));
  }

  void run(T* dw, T* dbias) const {
    const int64_t work = d_.groups * parts_ * splits_, slots = std::min<int64_t>(work, torch::stable::get_num_threads());
    const int64_t pixels = units_.images * units_.rows * d_.out_width;
    const int64_t x_size = x_in_place_ ? 0 : round_up(units_.images * packed_.n + 4 * L, 16);
    const int64_t dy_size = dy_in_place_ ? 0 : round_up(pixels * round_up(out_, L), 16);
    const Buffer<A> sums(d_.groups * parts_ * (group_size_ + bias_size_)), scratch(slots * (x_size + dy_size));
    const Buffer<int64_t> offsets(slots * 2 * pixels);
    parallel_for(slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot)
        for (int64_t i = slot; i < work; i += slots) {
          const int64_t part = i / splits_ % parts_, group = i / splits_ / parts_, split = i % splits_;
          A* to = sums.get() + (group * parts_ + part) * (group_size_ + bias_size_);
          A* packed_x = scratch.get() + slot * (x_size + dy_size);
          int64_t* x_offsets = offsets.get() + slot * 2 * pixels;
          sum_part(group, part, panels_ * split / splits_, panels_ * (split + 1) / splits_, to, packed_x,
                   packed_x + x_size, x_offsets, x_offsets + pixels);
        }
    });
    finish(sums.get(), dw, dbias);
  }

 private:
  bool inside() const {
    const Window& w = window_;
    return w.pad_top <= 0 && w.pad_left <= 0 &&
           (w.out_height - 1) * w.stride_height - w.pad_top + (w.kernel_height - 1) * w.dilation_height < w.in_height &&
           (w.out_width - 1) * w.stride_width - w.pad_left + (w.kernel_width - 1) * w.dilation_width < w.in_width;
  }

  // Panels [first, last) of out channels, over the part's share of the units.
  void sum_part(int64_t group, int64_t part, int64_t first, int64_t last, A* sums, A* packed_x, A* packed_dy,
                int64_t* x_offsets, int64_t* dy_offsets) const {
    const Window& w = window_;
    constexpr int W = kTileWidth<A>;
    const int64_t begin = first * W, end = std::min(last * W, out_);  // out channels
    A* bias = sums + group_size_;
    if (exchanged_) {
      std::fill_n(sums, group_size_, A(0));
    } else {
      for (int64_t o = begin; o < end; o += W)  // panels are apart: [panel][run][tap, in channel][lane]
        std::fill_n(sums + o * runs_ * length_, runs_ * length_ * panel_width(o), A(0));
    }
    std::fill(bias + begin, bias + round_up(end, L), A(0));
    for (int64_t u = units_.count * part / parts_; u < units_.count * (part + 1) / parts_; ++u) {
      const int64_t image = u / units_.per_image * units_.images, row = u % units_.per_image * units_.rows;
      const int64_t images = std::min(units_.images, w.batch - image), rows = std::min(units_.rows, w.out_height - row);
      const int64_t pixels = images * rows * w.out_width, top = row * w.stride_height - w.pad_top;
      const A *x = packed_x, *dy = packed_dy;
      if (x_in_place_) {
        if constexpr (sizeof(T) == sizeof(A)) x = x_ + image * s_.n + group * in_ + top * s_.h - w.pad_left * s_.w;
      } else {
        const int64_t used_rows = (rows - 1) * w.stride_height + (w.kernel_height - 1) * w.dilation_height + 1;
        for (int64_t n = 0; n < images; ++n)
          pack_image<T, A>(x_ + (image + n) * s_.n, s_, w.in_height, w.in_width, {group * in_, in_, 1, in_},
                           {top, -w.pad_left, used_rows, packed_columns_}, packed_x + n * packed_.n);
      }
      // dy: in place, or [panel][pixel][lane]
      const T* dy_from = dy_ + image * g_.n + group * out_ * g_.c + row * g_.h;
      if (dy_in_place_) {
        if constexpr (sizeof(T) == sizeof(A)) dy = dy_from;
      } else {
        for (int64_t o = begin; o < end; o += W)
          for (int64_t n = 0; n < images; ++n)
            pack_image<T, A>(dy_from + n * g_.n, g_, rows, w.out_width, {o, std::min<int64_t>(W, end - o), 1, panel_width(o)},
                             {0, 0, rows, w.out_width}, packed_dy + o * pixels + n * rows * w.out_width * panel_width(o));
      }
      int64_t p = 0;
      for (int64_t n = 0; n < images; ++n)
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < w.out_width; ++j)
            x_offsets[p++] = n * packed_.n + i * w.stride_height * packed_.h + j * w.stride_width * packed_.w;

      for (int64_t o = begin; o < end; o += W) {
        const int64_t width = panel_width(o);
        const A* panel = dy_in_place_ ? dy + o : dy + o * pixels;
        p = 0;
        for (int64_t n = 0; n < images; ++n)
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < w.out_width; ++j, ++p)
              dy_offsets[p] = dy_in_place_ ? n * g_.n + i * g_.h + j * g_.w : p * width;
        // Sums over 64 to 128 pixels in registers keep rounding errors small.
        const int64_t pieces = ceil_div(pixels, 128);
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const int64_t at = pixels * piece / pieces, count = pixels * (piece + 1) / pieces - at;
          if (with_bias_) add_bias(panel, dy_offsets + at, count, width, bias + o);
          if (exchanged_)
            add_exchanged(x, x_offsets + at, panel, dy_offsets + at, count, sums);
          else
            add_panel(x, x_offsets + at, panel, dy_offsets + at, count, width, sums + o * runs_ * length_);
        }
      }
    }
  }

  int64_t panel_width(int64_t o) const { return std::min<int64_t>(kTileWidth<A>, round_up(out_ - o, L)); }

  int64_t run_offset(int64_t run) const {
    if (runs_ == window_.kernel_height) return run * window_.dilation_height * packed_.h;
    return run / window_.kernel_width * window_.dilation_height * packed_.h +
           run % window_.kernel_width * window_.dilation_width * packed_.w;
  }

  void add_panel(const A* x, const int64_t* x_offsets, const A* dy, const int64_t* dy_offsets, int64_t count, int64_t width,
                 A* sums) const {
    const int64_t tiles = ceil_div(length_, kTileRows);
    for (int64_t run = 0; run < runs_; ++run)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t m = length_ * tile / tiles, rows = length_ * (tile + 1) / tiles - m;
        const A* from = x + run_offset(run) + m;
        A* to = sums + (run * length_ + m) * width;
        if (width == kTileWidth<A>)
          outer_tile_of<kTileVectors>(rows, from, x_offsets, dy, dy_offsets, count, to, width);
        else
          outer_tile_of<1>(rows, from, x_offsets, dy, dy_offsets, count, to, width);
      }
  }

  // [run][out channel][tap, in channel]
  void add_exchanged(const A* x, const int64_t* x_offsets, const A* dy, const int64_t* dy_offsets, int64_t count,
                     A* sums) const {
    for (int64_t run = 0; run < runs_; ++run) {
      const A* from = x + run_offset(run);
      A* to = sums + run * out_ * columns_;
      int64_t m = 0;
      for (; m + 4 * L <= columns_; m += 4 * L)
        outer_tile_of<4, 4>(out_, dy, dy_offsets, from + m, x_offsets, count, to + m, columns_);
      for (; m < columns_; m += L)
        outer_tile_of<1, 4>(out_, dy, dy_offsets, from + m, x_offsets, count, to + m, columns_);
    }
  }

  static void add_bias(const A* dy, const int64_t* dy_offsets, int64_t count, int64_t width, A* bias) {
    for (int64_t v = 0; v < width; v += L) {
      Vec<A> sum{};
      for (int64_t p = 0; p < count; ++p) sum += load(dy + dy_offsets[p] + v);
      store(bias + v, load(bias + v) + sum);
    }
  }

  // Adds the parts in order and stores (O, C, KH, KW), L x L blocks at a time.
  void finish(const A* sums, T* dw, T* dbias) const {
    const int64_t taps = window_.kernel_height * window_.kernel_width, depth = taps * in_;
    const int64_t part_size = group_size_ + bias_size_, strips = ceil_div(out_, L);
    const auto total = [&](const A* from) {
      Vec<A> sum = load(from);
      for (int64_t part = 1; part < parts_; ++part) sum += load(from + part * part_size);
      return sum;
    };
    for (int64_t group = 0; dbias && group < d_.groups; ++group)
      for (int64_t o = 0; o < out_; o += L) {
        A values[L];
        store(values, total(sums + group * parts_ * part_size + group_size_ + o));
        for (int64_t i = 0; i < std::min<int64_t>(L, out_ - o); ++i) dbias[group * out_ + o + i] = from_float<T>(values[i]);
      }
    if (exchanged_) return finish_exchanged(sums, dw);
    parallel_for(d_.groups * strips, 1 + 65536 / (depth * L + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / strips, o = i % strips * L, panel = o / kTileWidth<A> * kTileWidth<A>;
        const int64_t width = panel_width(panel), count = std::min<int64_t>(L, out_ - o);
        const A* from = sums + group * parts_ * part_size + panel * depth + (o - panel);
        T* to = dw + (group * out_ + o) * depth;
        for (int64_t e = 0; e < depth; e += L) {
          const int64_t rows = std::min<int64_t>(L, depth - e);
          Vec<A> block[L] = {};
          for (int64_t r = 0; r < rows; ++r) block[r] = total(from + ((e + r) % taps * in_ + (e + r) / taps) * width);
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
    const int64_t taps = window_.kernel_height * window_.kernel_width, part_size = group_size_ + bias_size_;
    for (int64_t group = 0; group < d_.groups; ++group)
      for (int64_t o = 0; o < out_; ++o)
        for (int64_t tap = 0; tap < taps; ++tap)
          for (int64_t c = 0; c < in_; ++c) {
            const int64_t k = tap * in_ + c;
            const A* from = sums + group * parts_ * part_size + (k / length_ * out_ + o) * columns_ + k % length_;
            A sum = *from;
            for (int64_t part = 1; part < parts_; ++part) sum += from[part * part_size];
            dw[((group * out_ + o) * in_ + c) * taps + tap] = from_float<T>(sum);
          }
  }

  const T* dy_;
  Strides4 g_;
  const T* x_;
  Strides4 s_;
  bool with_bias_;
  const Conv2dShape& d_;
  int64_t in_, out_;
  Window window_;  // of one group
  Units units_;
  bool exchanged_, x_in_place_, dy_in_place_;
  int64_t packed_rows_, packed_columns_;
  Strides4 packed_;
  int64_t runs_, length_, columns_, group_size_, bias_size_, parts_, panels_, splits_;
};

}  // namespace

template <class T>
void conv2d_bwd_weight(const T* dy, Strides4 dy_strides, const T* x, Strides4 x_strides, T* dw, T* dbias,
                       const Conv2dShape& shape, void*) {
  WeightGradient<T>(dy, dy_strides, x, x_strides, dbias != nullptr, shape).run(dw, dbias);
}

#define INSTANTIATE(T) \
  template void conv2d_bwd_weight(const T*, Strides4, const T*, Strides4, T*, T*, const Conv2dShape&, void*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(Half)
INSTANTIATE(BFloat16)

}  // namespace pynn::cpu
