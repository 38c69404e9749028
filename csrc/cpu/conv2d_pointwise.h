// Correlations with 1 x 1 filters, of one group:
//   out[n, o, i, j] = sum over c of x[n, c, i * stride, j * stride] * w[o, c]
// So little is done with each element that moving it is what costs: operands in the compute type are read where they
// are, and sums that only want a bias are stored where they belong. Where the channels of the output are innermost,
// lanes are output channels, in vectors as short as there are channels; elsewhere lanes are pixels. A unit is a band of
// rows of one image. The order of every sum depends on the number of input channels only.
#pragma once
#include "conv2d_narrow.h"

namespace pynn::cpu {

// Whether a correlation is one of those; no filter at all gives zeros.
inline bool is_pointwise(const Window& window) {
  const auto inside = [](const Axis& axis) {
    return axis.kernel == 0 || (axis.pad == 0 && axis.input(axis.out - 1, 0) < axis.in);
  };
  return window.taps() <= 1 && window.groups == 1 && !window.bordered() && inside(window.h) && inside(window.w) &&
         window.out_channels >= 4 && window.h.out * window.w.out >= 2 * kLanes<float>;
}

template <class T>
class PointwiseCorrelation {
  using A = accumulate_t<T>;
  static constexpr int L = kLanes<A>;
  static constexpr int64_t kElements = 6144, kLeast = 128, kMost = 2048;  // of the input, pixels of a unit
  static constexpr int64_t kLine = 96, kAhead = 32;  // pixels whose sums wait for the epilogue, that are prefetched
  // Channels of some vectors of pixels that fit into the first cache; bytes of weights, and of the pixels that take
  // turns with a panel of more, that fit into the second.
  static constexpr int64_t kChannels = 128, kWeights = 512 << 10, kTurns = 256 << 10;

 public:
  PointwiseCorrelation(const T* x, const Strides4& s, const T* w, const WeightView& view, const Window& window)
      : x_(x),
        s_{s.n, s.c, s.h * window.h.stride, s.w * window.w.stride},
        w_(w),
        view_(view),
        window_(window),
        in_(window.depth()),
        out_(window.out_channels),
        width_(window.w.out),
        tiles_(ceil_div(out_, kPlaneOutputs)),
        rows_(rows_of(window)),
        planes_(window, rows_),
        // as in conv2d_engine.h; five products or fewer are as exact in one piece
        piece_(std::clamp<int64_t>(int64_t(std::sqrt(4.0 * double(in_))), 5, 64)),
        ends_(piece_ends(in_, piece_)),
        panels_(pixel_panels<A>(out_, 4)),
        padded_(panels_.back().first + panels_.back().width()),
        weights_(padded_ * in_) {}

  // E is what the result is stored as.
  template <class E>
  void run(const Epilogue<E>& e) const {
    const bool pixels = e.s.c == 1;
    const bool joined = e.s.h == width_ * e.s.w && (!e.residual || e.r.h == width_ * e.r.w);
    const bool in_place = std::is_same_v<E, A> && e.plain() &&
                          (pixels ? padded_ == out_ : e.s.w == 1 && joined && least_positions() >= L);
    const bool direct = std::is_same_v<T, A> && (pixels || (s_.w == 1 && s_.h == width_ && least_positions() >= L));
    const int64_t step = direct ? s_.c : pixels ? 1 : planes_.channel();
    std::vector<int64_t> offsets;
    for (int64_t c = 0; c < in_; ++c) offsets.push_back(c * step);
    pixels ? pack_panels(w_, view_, window_, panels_, weights_.get()) : pack_tiles(w_, view_, window_, weights_.get());

    const int64_t bands = ceil_div(window_.h.out, rows_), work = window_.batch * bands, positions = rows_ * width_;
    const int64_t slots = std::min<int64_t>(work, thread_count());
    const int64_t input_size = direct ? 0 : round_up(in_ * (pixels ? positions : planes_.channel()) + 2 * L, 16);
    const int64_t sums_size = in_place ? 0
                              : pixels ? kLine * padded_ + L
                                       : ceil_div(out_ * tiles_together(), tiles_) * round_up(positions, L);
    const Buffer<A> scratch(slots * (input_size + round_up(sums_size, 16)));
    parallel_for(slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        A* input = scratch.get() + slot * (input_size + round_up(sums_size, 16));
        std::fill_n(input, pixels ? 0 : input_size, A(0));
        for (int64_t i = slot; i < work; i += slots) {
          const int64_t row = i % bands * rows_;
          const Band band{i / bands, row, std::min(rows_, window_.h.out - row)};
          const A* from = input_of(band, direct, pixels, input);
          if (pixels)
            run_pixels(band, from, direct ? s_ : Strides4{0, 1, width_ * in_, in_}, offsets.data(), joined, in_place,
                       input + input_size, e);
          else
            run_planes(band, from, offsets.data(), in_place, joined, input + input_size, e);
        }
      }
    });
  }

 private:
  struct Band {
    int64_t image, row, rows;
  };

  static int64_t rows_of(const Window& window) {
    const int64_t pixels = std::clamp(kElements / std::max<int64_t>(window.in_channels, 1), kLeast, kMost);
    const int64_t height = window.h.out, width = window.w.out;
    int64_t bands = ceil_div(height, std::max<int64_t>(1, pixels / width));
    bands = std::max(bands, std::min(ceil_div(8, window.batch), height / 8));
    const auto vectors = [&](int64_t rows) {  // of all pixels
      return height / rows * ceil_div(rows * width, L) + ceil_div(height % rows * width, L);
    };
    int64_t best = ceil_div(height, bands);
    for (int64_t rows = std::min(height, 2 * best), least = best / 2; rows > least; --rows)
      if (vectors(rows) < vectors(best)) best = rows;
    return best;
  }
  // Tiles of outputs that are summed before the next ones where lanes are pixels.
  int64_t tiles_together() const { return in_ > kChannels ? tiles_ : 1; }
  int64_t least_positions() const {
    return std::min(rows_, window_.h.out - (ceil_div(window_.h.out, rows_) - 1) * rows_) * width_;
  }

  // Where channel 0 of a band's first pixel is, in x or in a copy: planes, or pixels with all of their channels.
  const A* input_of(const Band& band, bool direct, bool pixels, A* copy) const {
    const T* from = x_ + band.image * s_.n;
    if (in_ == 0) return copy;
    if constexpr (std::is_same_v<T, A>)
      if (direct) return from + band.row * s_.h;
    if (pixels) {
      pack_image<T, A>(from, s_, {band.row, band.rows, width_, 0, in_, in_}, copy);
    } else {
      const Strides4 s{s_.n, s_.c, s_.h / window_.h.stride, s_.w / window_.w.stride};
      planes_.pack(from, s, in_, band.row, band.rows, copy);
    }
    return copy;
  }

  template <class E>
  void run_planes(const Band& band, const A* input, const int64_t* offsets, bool in_place, bool joined, A* sums,
                  const Epilogue<E>& e) const {
    const int64_t positions = band.rows * width_, stride = round_up(positions, L);
    const int64_t y = band.image * e.s.n + band.row * e.s.h, r = band.image * e.r.n + band.row * e.r.h;
    for (int64_t tile = 0; tile < tiles_; tile += tiles_together()) {
      const int64_t end = tile + tiles_together(), first = out_ * tile / tiles_, last = out_ * end / tiles_;
      if constexpr (std::is_same_v<E, A>)
        if (in_place) {
          sum_planes(tile, end, input, offsets, positions, e.bias, e.y + y + first * e.s.c, e.s.c);
          continue;
        }
      sum_planes(tile, end, input, offsets, positions, e.bias, sums, stride);
      for (int64_t o = first; o < last; ++o)
        for (int64_t i = 0; i < (joined ? 1 : band.rows); ++i)
          e.row(sums + (o - first) * stride + i * width_, joined ? positions : width_, nullptr, 0,
                y + o * e.s.c + i * e.s.h, e.s.w, r + o * e.r.c + i * e.r.h, e.r.w);
    }
  }

  // The sums of tiles [tile, end) of outputs. Of many channels a part at a time, which stays in the first cache for
  // all of the tiles. A last vector that overlaps is never alone in its run, so what it adds to is not yet changed.
  void sum_planes(int64_t tile, int64_t end, const A* x, const int64_t* offsets, int64_t positions, const A* bias,
                  A* to, int64_t stride) const {
    const int64_t vectors = ceil_div(positions, L), most = kPlaneVectors[ceil_div(out_, tiles_) - 1];
    const int64_t runs = ceil_div(vectors, most), start = out_ * tile / tiles_;
    const int64_t pieces = int64_t(ends_.size()) - 1, step = std::max<int64_t>(1, kChannels / piece_);
    for (int64_t piece = 0; piece < std::max<int64_t>(pieces, 1); piece += step) {
      const int64_t count = std::min(step, pieces - piece);
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t v = vectors * run / runs, width = vectors * (run + 1) / runs - v, at = v * L;
        const int64_t last = positions < L ? 0 : std::min((width - 1) * L, positions - L - at);
        for (int64_t t = tile; t < end; ++t) {
          const int64_t first = out_ * t / tiles_, outputs = out_ * (t + 1) / tiles_ - first;
          plane_tile_of<A>(outputs, width)(x + at, offsets, weights_.get() + first * in_, ends_.data() + piece, count,
                                           bias && piece + count == pieces ? bias + first : nullptr,
                                           to + (first - start) * stride + at, stride, last, piece > 0);
        }
      }
    }
  }

  template <class E>
  void run_pixels(const Band& band, const A* input, const Strides4& x, const int64_t* offsets, bool joined,
                  bool in_place, A* values, const Epilogue<E>& e) const {
    const bool line = joined && x.h == width_ * x.w;  // rows follow each other everywhere
    const int64_t rows = line ? 1 : band.rows, width = line ? band.rows * width_ : width_;
    for (int64_t i = 0; i < rows; ++i, input += x.h) {
      const int64_t y = band.image * e.s.n + (band.row + i) * e.s.h, r = band.image * e.r.n + (band.row + i) * e.r.h;
      if constexpr (std::is_same_v<E, A>)
        if (in_place) {
          sum_pixels(input, input + x.h, x.w, offsets, width, e.bias, e.y + y, e.s.w);
          continue;
        }
      for (int64_t j = 0; j < width; j += kLine) {
        const int64_t count = std::min(kLine, width - j);
        const A* from = input + j * x.w;
        sum_pixels(from, j + count < width ? from + count * x.w : input + x.h, x.w, offsets, count,
                   padded_ == out_ ? e.bias : nullptr, values, padded_);
        finish_pixels(values, count, y + j * e.s.w, r + j * e.r.w, e);
      }
    }
  }

  // `width` pixels of all panels; those at `next` follow. Whole pixels are written, block by block, unless it is the
  // weights that are too many to be read again for each block.
  void sum_pixels(const A* x, const A* next, int64_t step, const int64_t* offsets, int64_t width, const A* bias, A* to,
                  int64_t stride) const {
    const int64_t blocks = ceil_div(width, kPixelColumns[panels_[0].vectors - 1]), bytes = in_ * int64_t(sizeof(A));
    const int64_t turn =
        padded_ * bytes <= kWeights ? 1 : std::max<int64_t>(1, kTurns / (bytes * ceil_div(width, blocks)));
    for (int64_t first = 0; first < blocks; first += turn)
      for (const PixelPanel& panel : panels_)
        for (int64_t block = first; block < std::min(blocks, first + turn); ++block) {
          const int64_t j = width * block / blocks, count = width * (block + 1) / blocks - j;
          if (panel.first == 0) prefetch_pixels(x, next, step, offsets, width, j, count);
          pixel_tile_of<A>(count, panel)(x + j * step, step, offsets, weights_.get() + panel.first * in_, ends_.data(),
                                         int64_t(ends_.size()) - 1, bias ? bias + panel.first : nullptr,
                                         to + j * stride + panel.first, stride);
        }
  }
  // What comes after pixels [j, j + count): the hardware follows neither strides nor many short streams.
  void prefetch_pixels(const A* x, const A* next, int64_t step, const int64_t* offsets, int64_t width, int64_t j,
                       int64_t count) const {
    if (in_ < 2 || offsets[1] != 1) return;
    for (int64_t p = j + kAhead; p < j + kAhead + count; ++p)
      for (int64_t c = 0; c < in_; c += 64 / int64_t(sizeof(A)))
        __builtin_prefetch((p < width ? x : next - width * step) + p * step + c);
  }

  // Pixels of a row, with their bias unless the last panel is not full.
  template <class E>
  void finish_pixels(A* values, int64_t count, int64_t at, int64_t r_at, const Epilogue<E>& e) const {
    if (padded_ == out_ && e.s.w == out_ && (!e.residual || (e.r.c == 1 && e.r.w == out_)))
      return e.row(values, count * out_, nullptr, 0, at, 1, r_at, 1);
    for (int64_t j = 0; j < count; ++j, values += padded_, at += e.s.w, r_at += e.r.w)
      e.row(values, out_, padded_ == out_ ? nullptr : e.bias, 1, at, 1, r_at, e.r.c);
  }

  const T* x_;
  Strides4 s_;  // from one output pixel to the next
  const T* w_;
  WeightView view_;
  Window window_;
  int64_t in_, out_, width_, tiles_, rows_;  // rows of a unit
  Planes planes_;
  int64_t piece_;              // most products of a piece of a sum
  std::vector<int64_t> ends_;  // of the pieces
  std::vector<PixelPanel> panels_;
  int64_t padded_;  // output channels and lanes without one
  Buffer<A> weights_;
};

}  // namespace pynn::cpu
