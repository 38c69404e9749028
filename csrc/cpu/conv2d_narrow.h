// Correlations with few input or few output channels per group, dense or grouped:
//   out[n, o, i, j] = sum over c, a, b of x[n, c, i * stride - pad + a * dilation, ...] * w[o, c, a, b]
// Vector lanes are pixels (conv2d_planes.h), so no lane is wasted on channels that are not there: heads, small groups,
// stems, and the input gradients of all of them. A unit is a band of rows of one image times a bundle of groups. A
// register tile holds up to four output channels times a few vectors of positions; chunks of the sum over (channel,
// tap) are added up in registers, then in the unit's scratch. Where only a bias is to be added, tiles store what they
// finish: a burst of stores after them would wait for the caches, stores among products do not. With many output
// channels that lie last, lanes are output channels instead. The order of every sum depends on the channels per group
// and the kernel only.
#pragma once
#include <optional>

#include "conv2d_epilogue.h"
#include "conv2d_narrow_tiles.h"
#include "conv2d_planes.h"
#include "conv2d_weights.h"
#include "parallel.h"

namespace pynn::cpu {

// The ends of the pieces of a sum of K products, of at most `limit` each.
inline std::vector<int64_t> piece_ends(int64_t depth, int64_t limit) {
  const int64_t pieces = ceil_div(depth, limit);
  std::vector<int64_t> ends;
  for (int64_t i = 0; i <= pieces; ++i) ends.push_back(pieces ? depth * i / pieces : 0);
  return ends;
}

// Filters of one group for output channels [first, last), as [product][output]; returns the end of what was written.
template <class T, class A>
A* pack_outputs(const T* w, const WeightView& view, const Window& window, int64_t first, int64_t last, int64_t padding,
                A* to) {
  const int64_t kw = window.w.kernel, width = last - first;
  if (window.taps() == 1 && view.c == 1 && padding == 0) {  // a transposition
    transpose_in(w + first * view.o, view.o, window.in_channels, width, to, [=](int64_t c) { return c * width; });
    return to + window.in_channels * width;
  }
  for (int64_t c = 0; c < window.in_channels; ++c)
    for (int64_t t = 0; t < window.taps(); ++t) {
      const T* from = w + c * view.c + t / kw * view.a + t % kw * view.b;
      for (int64_t o = first; o < last; ++o) *to++ = to_float(from[o * view.o]);
      to = std::fill_n(to, padding, A(0));
    }
  return to;
}
template <class T, class A>
void pack_tiles(const T* w, const WeightView& view, const Window& window, A* to) {
  const int64_t out = window.out_channels, tiles = ceil_div(out, kPlaneOutputs);
  for (int64_t tile = 0; tile < tiles; ++tile)
    to = pack_outputs(w, view, window, out * tile / tiles, out * (tile + 1) / tiles, 0, to);
}
template <class T, class A>
void pack_panels(const T* w, const WeightView& view, const Window& window, const std::vector<PixelPanel>& panels,
                 A* to) {
  for (const PixelPanel& p : panels)
    to = pack_outputs(w, view, window, p.first, p.first + p.channels, p.width() - p.channels, to);
}

// Whether lanes of pixels beat lanes of channels, of which up to eight outputs fill half a vector at most.
inline bool is_narrow(const Window& window) {
  if (window.depthwise() || window.h.out * window.w.out < 4 * kLanes<float>) return false;
  const int64_t in = window.in_channels, out = window.out_channels;
  return out <= 8 || in <= 4 || (window.groups > 1 && std::min(in, out) <= 16 && std::max(in, out) <= 32);
}

// The window whose planes a correlation reads, and where its own first tap stands among that window's taps: stride
// phases of one input gradient read the same planes.
struct PlaneWindow {
  Window window;
  int64_t down, across;
};

template <class T>
class NarrowCorrelation {
  using A = accumulate_t<T>;
  static constexpr int L = kLanes<A>;
  static constexpr int64_t kBytes = 192 << 10, kPanel = 32;  // packed input, and output channels finished together
  static constexpr int64_t kPixelWidth = kPixelVectors * L;

 public:
  NarrowCorrelation(const T* x, const Strides4& s, const T* w, const WeightView& view, const Window& window)
      : NarrowCorrelation(x, s, w, view, window, {window, 0, 0}) {}
  NarrowCorrelation(const T* x, const Strides4& s, const T* w, const WeightView& view, const Window& window,
                    const PlaneWindow& read)
      : x_(x),
        s_(s),
        w_(w),
        view_(view),
        window_(window),
        in_(window.in_channels),
        out_(window.out_channels),
        depth_(window.depth()),
        tiles_(ceil_div(out_, kPlaneOutputs)),
        bundle_(s.c == 1 ? std::clamp<int64_t>(kPanel / std::max<int64_t>({in_, out_, 1}), 1, window.groups) : 1),
        rows_(rows_of(read.window, bundle_)),
        most_rows_(read.window.h.out),
        planes_(read.window, rows_),
        pixel_rows_(window),
        in_lines_(PixelRows::fits(window, s)),
        panels_(pixel_panels<A>(out_, L)),
        weights_(window.groups * round_up(out_, L) * depth_),
        // about sqrt(2 K) products: the errors within and between pieces balance at sqrt(K), the tiles are busier with
        // more
        ends_(piece_ends(depth_, std::clamp<int64_t>(int64_t(std::sqrt(2.0 * double(depth_))), 4, 64))) {
    cut(read);
  }

  // What phases have in common, if their planes are best packed once: a window as tall and wide as any of them.
  static std::optional<Window> common(const std::vector<Window>& phases) {
    if (phases.size() < 2) return {};
    Window all = phases[0];
    const auto axes = [&](auto member) {
      Axis& axis = all.*member;
      for (const Window& phase : phases) {
        axis.pad = std::max(axis.pad, (phase.*member).pad);
        axis.out = std::max(axis.out, (phase.*member).out);
      }
      for (const Window& phase : phases) {
        const Axis& a = phase.*member;
        if (a.stride != 1 || a.dilation != 1) return false;
        axis.kernel = std::max(axis.kernel, a.kernel + axis.pad - a.pad);
      }
      return true;
    };
    if (!axes(&Window::h) || !axes(&Window::w) || all.out_channels > kPlaneOutputs || !is_narrow(all)) return {};
    const int64_t size = all.in_channels * Planes(all, rows_of(all, 1)).channel() * int64_t(sizeof(A));
    return size <= 4 * kBytes ? std::optional(all) : std::nullopt;
  }

  // E is what the result is stored as.
  template <class E>
  void run(const Epilogue<E>& epilogue) const {
    const NarrowCorrelation* one = this;
    run(&one, 1, &epilogue);
  }
  // Phases that read the same planes, and what becomes of each.
  template <class E>
  static void run(const NarrowCorrelation* const* phases, int64_t count, const Epilogue<E>* epilogues) {
    const NarrowCorrelation& first = *phases[0];
    const Window& window = first.window_;
    const int64_t rows = first.rows_, bundle = first.bundle_, bands = ceil_div(first.most_rows_, rows);
    // lanes of output channels need no transposing
    const bool pixels = count == 1 && epilogues[0].s.c == 1 && first.out_ >= kPixelWidth;
    for (int64_t f = 0; f < count; ++f) phases[f]->pack_weights(pixels);
    const int64_t bundles = ceil_div(window.groups, bundle), work = window.batch * bands * bundles;
    const int64_t slots = std::min<int64_t>(work, thread_count());
    const int64_t panel = round_up(std::min(kPanel, bundle * first.out_), L);
    const int64_t planes_size = bundle * first.most_channels_ * first.planes_.channel() + 2 * L;
    const int64_t input_size = round_up(pixels && first.in_lines_ ? first.pixel_rows_.size(rows) : planes_size, 16);
    const int64_t sums_size = panel * round_up(first.planes_.positions(rows), L);
    const Buffer<A> scratch(slots * (input_size + 2 * sums_size));
    parallel_for(slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        A* input = scratch.get() + slot * (input_size + 2 * sums_size);
        std::fill_n(input, input_size, A(0));
        for (int64_t i = slot; i < work; i += slots) {
          const int64_t row = i / bundles % bands * rows, group = i % bundles * bundle;
          Band band{i / bundles / bands, row, std::min(rows, first.most_rows_ - row), group,
                    std::min(bundle, window.groups - group)};
          first.pack_band(band, input, pixels);
          for (int64_t f = 0; f < count; ++f) {
            band.rows = std::min(rows, phases[f]->window_.h.out - row);
            if (band.rows > 0)
              phases[f]->run_band(band, input, input + input_size, input + input_size + sums_size, epilogues[f],
                                  pixels);
          }
        }
      }
    });
  }

 private:
  struct Band {
    int64_t image, row, rows, group, groups;
  };
  // Pieces of the sum whose channels are packed together.
  struct Block {
    int64_t piece, pieces, channel, channels;
  };

  // Rows of a band: as many as fit the cache, and enough bands for the threads.
  static int64_t rows_of(const Window& window, int64_t bundle) {
    const Planes one(window, 1);
    const int64_t channels = std::max<int64_t>(1, window.in_channels * bundle);
    const int64_t fit = kBytes / int64_t(sizeof(A)) / channels / one.row() - one.halo();
    const int64_t rows = std::min(std::max(fit, 8 + one.halo()), std::max<int64_t>(1, 2048 / one.pitch()));
    int64_t bands = ceil_div(window.h.out, rows);
    bands = std::max(bands, std::min(ceil_div(8, window.batch * ceil_div(window.groups, bundle)), window.h.out / 8));
    return ceil_div(window.h.out, bands);
  }

  // The pieces of the sum do not depend on the blocks of channels that are packed together.
  void cut(const PlaneWindow& read) {
    const int64_t pieces = int64_t(ends_.size()) - 1, taps = window_.taps();
    const int64_t fit = std::max<int64_t>(1, 2 * kBytes / int64_t(sizeof(A)) / planes_.channel());
    const bool shared = read.window.taps() != taps;
    const bool whole = shared || bundle_ > 1 || out_ > kPanel || out_ >= kPixelWidth || in_ <= fit;
    for (int64_t begin = 0; begin < pieces;) {
      const int64_t channel = ends_[begin] / taps;
      int64_t end = begin + 1;
      while (end < pieces && (whole || ceil_div(ends_[end + 1], taps) - channel <= fit)) ++end;
      const int64_t channels = ceil_div(ends_[end], taps) - channel;
      blocks_.push_back({begin, end - begin, channel, channels});
      most_channels_ = std::max(most_channels_, channels);
      begin = end;
    }
    for (const Block& block : blocks_)
      for (int64_t k = ends_[block.piece]; k < ends_[block.piece + block.pieces]; ++k)
        offsets_.push_back((k / taps - block.channel) * planes_.channel() +
                           planes_.offset(read.down + k % taps / window_.w.kernel, read.across + k % window_.w.kernel));
    for (int64_t k = 0; in_lines_ && k < depth_; ++k)
      line_offsets_.push_back(pixel_rows_.offset(k / taps, k % taps / window_.w.kernel, k % window_.w.kernel));
  }

  // [group][tile][product][output of the tile], where a tile is a panel of whole vectors if lanes are outputs.
  void pack_weights(bool pixels) const {
    for (int64_t g = 0; g < window_.groups; ++g) {
      A* to = weights_.get() + g * round_up(out_, L) * depth_;
      const T* from = w_ + g * view_.group;
      pixels ? pack_panels(from, view_, window_, panels_, to) : pack_tiles(from, view_, window_, to);
    }
  }
  const A* weights(int64_t group, int64_t output) const {
    return weights_.get() + (group * round_up(out_, L) + output) * depth_;
  }

  void pack_block(const Band& band, const Block& block, A* input) const {
    const T* from = x_ + band.image * s_.n + (band.group * in_ + block.channel) * s_.c;
    planes_.pack(from, s_, band.groups * block.channels, band.row, band.rows, input);
  }
  // What tiles read of a band; more than one block is packed when its turn comes.
  void pack_band(const Band& band, A* input, bool pixels) const {
    if (pixels && in_lines_)
      pixel_rows_.pack(x_ + band.image * s_.n, s_, band.row, band.rows, input);
    else if (blocks_.size() == 1)
      pack_block(band, blocks_[0], input);
  }

  template <class E>
  void run_band(const Band& band, A* input, A* sums, A* turned, const Epilogue<E>& epilogue, bool pixels) const {
    const int64_t positions = round_up(planes_.positions(band.rows), L);
    if (pixels && in_lines_)
      return run_pixels(band, input, {0, 0, pixel_rows_.down(), pixel_rows_.across()}, line_offsets_, sums, epilogue);
    if (pixels) return run_pixels(band, input, {0, planes_.channel(), planes_.pitch(), 1}, offsets_, sums, epilogue);
    if (in_rows(epilogue)) return run_rows(band, input, epilogue);
    // One tile at a time stays in the first-level cache, where its channels need not be turned into pixels.
    const bool single = bundle_ == 1 && epilogue.s.c != 1 && blocks_.size() == 1;
    const int64_t step = single ? 1 : bundle_ > 1 ? tiles_ : kPanel / kPlaneOutputs;
    for (int64_t tile = 0; tile < tiles_; tile += step) {
      const int64_t last = std::min(tiles_, tile + step), first = out_ * tile / tiles_;
      const int64_t channels = out_ * last / tiles_ - first;
      if (!depth_) std::fill_n(sums, band.groups * channels * positions, A(0));
      for (const Block& block : blocks_) {
        if (blocks_.size() > 1) pack_block(band, block, input);
        for (int64_t g = 0; g < band.groups; ++g)
          add_block(input + g * in_ * planes_.channel(), block, band.group + g, tile, last, positions,
                    sums + g * channels * positions);
      }
      finish(band, band.group * out_ + first, band.groups * channels, sums, positions, turned, epilogue);
    }
  }

  // Whether tiles may store vectors of a row, without many lanes that two vectors share.
  template <class E>
  bool in_rows(const Epilogue<E>& e) const {
    return e.plain() && e.s.w == 1 && e.width >= L && blocks_.size() == 1 &&
           4 * round_up(e.width, L) <= 5 * planes_.pitch();
  }

  // Lanes are pixels of a row, the last vector of which overlaps the one before it; tiles store what is finished, while
  // the next ones compute.
  template <class E>
  void run_rows(const Band& band, const A* input, const Epilogue<E>& e) const {
    const int64_t across = ceil_div(e.width, L), vectors = band.rows * across;
    std::vector<int64_t> from(vectors), to(vectors);
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t row = v / across, column = std::min(v % across * L, e.width - L);
      from[v] = row * planes_.pitch() + column;
      to[v] = (band.row + row) * e.s.h + column;
    }
    const int64_t runs = ceil_div(vectors, kRowVectors[ceil_div(out_, tiles_) - 1]);
    for (int64_t g = 0; g < band.groups; ++g, input += in_ * planes_.channel())
      for (int64_t tile = 0; tile < tiles_; ++tile) {
        const int64_t o = out_ * tile / tiles_, outputs = out_ * (tile + 1) / tiles_ - o;
        const int64_t channel = (band.group + g) * out_ + o;
        for (int64_t run = 0; run < runs; ++run) {
          const int64_t v = vectors * run / runs, count = vectors * (run + 1) / runs - v;
          row_tile_of<A, E>(outputs, count)(input, from.data() + v, offsets_.data(), weights(band.group + g, o),
                                            ends_.data(), int64_t(ends_.size()) - 1,
                                            e.bias ? e.bias + channel : nullptr,
                                            e.y + band.image * e.s.n + channel * e.s.c, to.data() + v, e.s.c);
        }
      }
  }

  // Lanes are output channels: rows of pixels, `of` apart in the input, stored in place where nothing but a bias is to
  // be added.
  template <class E>
  void run_pixels(const Band& band, const A* input, const Strides4& of, const std::vector<int64_t>& offsets, A* values,
                  const Epilogue<E>& e) const {
    const bool plain = e.plain();
    const int64_t pieces = int64_t(ends_.size()) - 1;
    for (int64_t g = 0; g < band.groups; ++g, input += in_ * of.c)
      for (const PixelPanel& panel : panels_) {
        const int64_t channels = panel.channels, width = panel.width();
        const int64_t columns = ceil_div(e.width, kPixelColumns[panel.vectors - 1]);
        const int64_t channel = (band.group + g) * out_ + panel.first;
        const A *filters = weights(band.group + g, panel.first), *bias = e.bias ? e.bias + channel : nullptr;
        const bool in_place = std::is_same_v<E, A> && plain && channels == width;
        for (int64_t i = 0; i < band.rows; ++i) {
          const int64_t at = band.image * e.s.n + channel + (band.row + i) * e.s.h;
          const int64_t r_at = band.image * e.r.n + channel * e.r.c + (band.row + i) * e.r.h;
          for (int64_t block = 0; block < columns; ++block) {
            const int64_t j = e.width * block / columns, count = e.width * (block + 1) / columns - j;
            const auto tile = pixel_tile_of<A>(count, panel);
            const A* from = input + i * of.h + j * of.w;
            if constexpr (std::is_same_v<E, A>)
              if (in_place) {
                E* to = e.y + at + j * e.s.w;  // its lines come while the products are summed
                for (int64_t p = 0; p < count; ++p)
                  for (int64_t c = 0; c < width; c += L) __builtin_prefetch(to + p * e.s.w + c, 1);
                tile(from, of.w, offsets.data(), filters, ends_.data(), pieces, bias, to, e.s.w);
                continue;
              }
            tile(from, of.w, offsets.data(), filters, ends_.data(), pieces, nullptr, values + j * width, width);
          }
          if (!in_place) finish_pixels(values, width, channels, bias, at, r_at, plain, e);
        }
      }
  }

  // Tiles [tile, last) of a group; sums: [output][position]
  void add_block(const A* input, const Block& block, int64_t group, int64_t tile, int64_t last, int64_t positions,
                 A* sums) const {
    const int64_t vectors = positions / L, most = kPlaneVectors[ceil_div(out_, tiles_) - 1];
    const int64_t runs = ceil_div(vectors, most), start = out_ * tile / tiles_;
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t v = vectors * run / runs, count = vectors * (run + 1) / runs - v;
      for (int64_t t = tile; t < last; ++t) {
        const int64_t o = out_ * t / tiles_, outputs = out_ * (t + 1) / tiles_ - o;
        plane_tile_of<A>(outputs, count)(input + v * L, offsets_.data(), weights(group, o), ends_.data() + block.piece,
                                         block.pieces, nullptr, sums + (o - start) * positions + v * L, positions,
                                         (count - 1) * L, block.piece > 0);
      }
    }
  }

  // Channels [channel, channel + channels) of a band.
  template <class E>
  void finish(const Band& band, int64_t channel, int64_t channels, A* sums, int64_t positions, A* turned,
              const Epilogue<E>& e) const {
    const int64_t at = band.image * e.s.n + band.row * e.s.h + channel * e.s.c;
    const int64_t r_at = band.image * e.r.n + band.row * e.r.h + channel * e.r.c, pitch = planes_.pitch();
    const A* bias = e.bias ? e.bias + channel : nullptr;
    const bool plain = e.plain();
    if (e.s.c != 1 || channels == 1) {
      for (int64_t c = 0; c < channels; ++c) {
        A* values = sums + c * positions;
        if (plain && e.s.w == 1) {
          store_rows(values, bias ? broadcast(bias[c]) : Vec<A>{}, bias, band.rows, e.y + at + c * e.s.c, e);
          continue;
        }
        for (int64_t i = 0; i < band.rows; ++i)
          e.row(values + i * pitch, e.width, bias ? bias + c : nullptr, 0, at + i * e.s.h + c * e.s.c, e.s.w,
                r_at + i * e.r.h + c * e.r.c, e.r.w);
      }
      return;
    }
    const bool dense = e.s.w == channels && (!e.residual || (e.r.c == 1 && e.r.w == channels));
    const bool together = channels < L && dense;  // a row of pixels is one line
    const int64_t stride = together ? channels : round_up(channels, L);
    transpose_in(sums, positions, positions, channels, turned, [=](int64_t p) { return p * stride; });
    for (int64_t i = 0; i < band.rows; ++i) {
      A* values = turned + i * pitch * stride;
      const int64_t row = at + i * e.s.h, r_row = r_at + i * e.r.h;
      if (together) {
        for (int64_t j = 0; bias && j < e.width; ++j)
          for (int64_t c = 0; c < channels; ++c) values[j * channels + c] += bias[c];
        e.row(values, e.width * channels, nullptr, 0, row, 1, r_row, 1);
      } else {
        finish_pixels(values, stride, channels, bias, row, r_row, plain, e);
      }
    }
  }

  // Rows of one channel that only want a bias; the last vector of a row overlaps the one before it.
  template <class E>
  void store_rows(const A* values, Vec<A> bias, bool with_bias, int64_t rows, E* to, const Epilogue<E>& e) const {
    for (int64_t i = 0; i < rows; ++i, values += planes_.pitch(), to += e.s.h) {
      if (e.width < L) {
        const Vec<A> v = load_part(values, e.width, A(0));
        store_part(to, e.width, with_bias ? v + bias : v);
        continue;
      }
      for (int64_t block = 0; block < e.width; block += L) {
        const int64_t j = std::min(block, e.width - L);
        const Vec<A> v = load(values + j);
        __builtin_prefetch(to + e.s.c + j, 1);  // the next channel's row, in another page
        store_compute(to + j, with_bias ? v + bias : v);
      }
    }
  }

  // A row of pixels, `stride` values each.
  template <class E>
  static void finish_pixels(A* values, int64_t stride, int64_t channels, const A* bias, int64_t at, int64_t r_at,
                            bool plain, const Epilogue<E>& e) {
    for (int64_t j = 0; j < e.width; ++j, values += stride, at += e.s.w, r_at += e.r.w) {
      if (plain)
        for (int64_t c = 0; c < channels; c += L) {
          const int64_t count = std::min<int64_t>(L, channels - c);
          const Vec<A> v = load(values + c);
          if (count == L)
            store_compute(e.y + at + c, bias ? v + load(bias + c) : v);
          else
            store_part(e.y + at + c, count, bias ? v + load_part(bias + c, count, A(0)) : v);
        }
      else
        e.line(values, channels, bias, 1, at, 1, r_at, e.r.c);
    }
  }

  const T* x_;
  Strides4 s_;
  const T* w_;
  WeightView view_;
  Window window_;
  int64_t in_, out_, depth_, tiles_;  // per group
  int64_t bundle_, rows_;             // groups and output rows of a band
  int64_t most_rows_;                 // output rows of any correlation that reads these planes
  Planes planes_;
  PixelRows pixel_rows_;
  bool in_lines_;  // whether pixels are read as they lie where lanes are output channels
  std::vector<PixelPanel> panels_;
  Buffer<A> weights_;
  std::vector<int64_t> ends_;                    // of the pieces of a sum
  std::vector<int64_t> offsets_, line_offsets_;  // of each product, from the first channel of its block
  std::vector<Block> blocks_;
  int64_t most_channels_ = 0;  // of a block
};

}  // namespace pynn::cpu
