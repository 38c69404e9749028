// One correlation, the core of the forward pass and of the input gradient:
//   out[n, o, i, j] = sum over c, a, b of x[n, c, i * stride - pad + a * dilation, ...] * w[o, c, a, b]
// A unit is a few images, or a band of rows of one image, times one group. It reads its input in place when that is
// channels last in the compute dtype, otherwise it packs it once. Output pixels are sorted by the set of filter taps
// that fall inside the image, so no tile ever multiplies padding. For each panel of output channels, chunks of the sum
// are added up in registers, then in the unit's scratch; a finished panel goes to the epilogue. The order of every sum
// depends on the channel counts, the kernel and the pixel's taps only.
#pragma once
#include <cmath>

#include "conv2d_geometry.h"
#include "conv2d_padding.h"
#include "conv2d_weights.h"
#include "gemm_tile.h"
#include "parallel.h"

namespace pynn::cpu {

// A part of K that one tile sums in registers, relative to a pixel's first tap.
struct Chunk {
  int64_t from;
  Runs runs;
  int64_t weight;
};

// Chunks of sqrt(8 K) products, of sqrt(4 K) for short sums, within 16 to 64: long enough to keep the tile busy, and
// about where the rounding errors within and between chunks balance. A sum is never left in one piece.
inline std::vector<Chunk> chunks_of(Form form, const Window& window, const Span& rows, const Span& columns,
                                    int64_t row_stride, int64_t column_stride) {
  const int64_t channels = window.in_channels, kernel_width = window.w.kernel;
  const bool joined = window.joined();
  const int64_t outer = joined ? 1 : rows.taps, runs = joined ? rows.taps : columns.taps;
  const int64_t length = joined ? columns.taps * channels : channels;
  const int64_t run_stride = joined ? window.h.dilation * row_stride : window.w.dilation * column_stride;
  const int64_t weight_stride = joined ? kernel_width * channels : channels;
  std::vector<Chunk> chunks;
  if (length == 0) return chunks;
  const double depth = double(window.depth());
  const int64_t limit = std::clamp<int64_t>(int64_t(std::sqrt((depth < 256 ? 4.0 : 8.0) * depth)), 16, 64);
  const bool dots = form == Form::dots;  // the lanes of a dot product are short sums already
  const int64_t together = dots ? runs : std::max<int64_t>(1, limit / length);
  const bool single = outer == 1 && runs <= together && length > 4;
  const int64_t pieces = dots ? 1 : std::max<int64_t>(ceil_div(length, limit), single ? 2 : 1);
  for (int64_t a = 0; a < outer; ++a)
    for (int64_t r = 0; r < runs; r += together)
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t begin = length * piece / pieces, end = length * (piece + 1) / pieces;
        const int64_t weight = ((rows.tap + a) * kernel_width + columns.tap) * channels + r * weight_stride + begin;
        chunks.push_back({a * window.h.dilation * row_stride + r * run_stride + begin,
                          {std::min(together, runs - r), end - begin, run_stride, weight_stride},
                          weight});
      }
  return chunks;
}

template <class T>
class Correlation {
  using A = accumulate_t<T>;
  static constexpr int L = kLanes<A>, W = kTileWidth<A>;
  static constexpr int64_t kBlock = 8 * kTileRows;  // pixels that share a chunk of weights in the first-level cache

 public:
  Correlation(const T* x, const Strides4& s, const Window& window, const PackedWeights<A>& weights)
      : x_(x),
        s_(s),
        window_(window),
        core_(window.core()),
        weights_(weights),
        channels_(core_.in_channels),
        units_(core_, channels_ * sizeof(A)),
        rows_(spans_of(core_.h)),
        columns_(spans_of(core_.w)) {
    in_place_ = sizeof(T) == sizeof(A) && !window.patches() && !window.bordered() && (s.c == 1 || channels_ == 1) &&
                (s.w == channels_ || !core_.joined() || core_.w.kernel == 1);
    const int64_t width = core_.w.in;
    read_with(
        in_place_ ? s : Strides4{most_input_rows(core_, units_) * width * channels_, 1, width * channels_, channels_});
  }

  // The strides of the input that sum_unit reads.
  void read_with(const Strides4& packed) {
    packed_ = packed;
    chunks_.clear();
    for (const Span& rows : rows_)
      for (const Span& columns : columns_)
        chunks_.push_back(chunks_of(weights_.form(), core_, rows, columns, packed_.h, packed_.w));
  }

  // The sums of one group over a unit, whose first input row is at base: sums[panel][pixel][lane].
  void sum_unit(const Unit& unit, const A* base, int64_t group, const Layout& layout, int64_t pixels, int64_t* lists,
                A* sums) const {
    int64_t *offsets = lists, *places = lists + unit.images * unit.rows * core_.w.out + kDotRows;
    const std::vector<int64_t> classes = sort_pixels(unit, layout, offsets, places);
    for (int64_t o = 0; o < core_.out_channels; o += W)
      sum_panel(classes, base, offsets, places, group, o, sums + o * pixels);
  }

  // finish(panel) is called once for every unit and panel.
  template <class Finish>
  void run(const Finish& finish) const {
    const int64_t splits = window_.groups, work = units_.count * splits,
                  slots = std::min<int64_t>(work, thread_count());
    const int64_t pixels = units_.images * units_.rows * core_.w.out;
    const int64_t input_size = in_place_ ? 0 : round_up(units_.images * packed_.n + 4 * L, 16);
    const int64_t slot_size = input_size + pixels * W;
    const Buffer<A> scratch(slots * slot_size);
    const Buffer<int64_t> lists(slots * 2 * (pixels + kDotRows));
    parallel_for(slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot)
        for (int64_t i = slot; i < work; i += slots) {
          A* input = scratch.get() + slot * slot_size;
          int64_t* offsets = lists.get() + slot * 2 * (pixels + kDotRows);
          run_unit(Unit(core_, units_, i / splits), i % splits, input, input + input_size, offsets,
                   offsets + pixels + kDotRows, finish);
        }
    });
  }

 private:
  template <class Finish>
  void run_unit(const Unit& unit, int64_t split, A* input, A* sums, int64_t* offsets, int64_t* places,
                const Finish& finish) const {
    const int64_t first = split * channels_;
    const A* base = input;
    if (in_place_) {
      if constexpr (sizeof(T) == sizeof(A)) base = x_ + unit.image * s_.n + first * s_.c + unit.in_row * s_.h;
    } else if (window_.patches()) {
      pack_any_patches<T, A>(x_ + split * window_.in_channels * s_.c, s_, window_, unit, input);
    } else {
      const Part part{unit.in_row, unit.in_rows, core_.w.in, first, channels_, channels_};
      for (int64_t n = 0; n < unit.images; ++n)
        pack_part<T, A>(x_ + (unit.image + n) * s_.n, s_, window_, part, input + n * packed_.n);
    }
    const int64_t width = core_.w.out;
    const std::vector<int64_t> classes =
        sort_pixels(unit, {unit.rows * width, width, 1, -unit.row * width}, offsets, places);
    for (int64_t o = 0; o < core_.out_channels; o += W) {
      const int64_t channels = sum_panel(classes, base, offsets, places, split, o, sums);
      finish(Panel<A>{unit, split * core_.out_channels + o, channels, sums, round_up(channels, L)});
    }
  }

  // The panel of output channels from o on; returns their number.
  int64_t sum_panel(const std::vector<int64_t>& classes, const A* base, const int64_t* offsets, const int64_t* places,
                    int64_t group, int64_t o, A* sums) const {
    const int64_t channels = std::min<int64_t>(W, core_.out_channels - o), width = round_up(channels, L);
    for (size_t k = 0; k + 1 < classes.size(); ++k)
      dense_class(chunks_[k], base, offsets, places, classes[k], classes[k + 1],
                  weights_.group(group) + o * core_.depth(), channels, width, sums);
    return channels;
  }

  // Lists the pixels of a unit class by class: where their first tap is, and their place in the layout. Returns the
  // class boundaries, one class for each pair of spans.
  std::vector<int64_t> sort_pixels(const Unit& unit, const Layout& layout, int64_t* offsets, int64_t* places) const {
    std::vector<int64_t> boundaries{0};
    int64_t p = 0;
    for (const Span& rows : rows_)
      for (const Span& columns : columns_) {
        const int64_t begin = std::max(rows.first, unit.row), end = std::min(rows.last, unit.row + unit.rows);
        for (int64_t n = 0; n < unit.images; ++n)
          for (int64_t i = begin; i < end; ++i) {
            const int64_t at = n * packed_.n + (core_.h.input(i, rows.tap) - unit.in_row) * packed_.h;
            const int64_t place = layout(n, i, 0);
            for (int64_t j = columns.first; j < columns.last; ++j, ++p) {
              offsets[p] = at + core_.w.input(j, columns.tap) * packed_.w;
              places[p] = place + j * layout.column;
            }
          }
        boundaries.push_back(p);
      }
    return boundaries;
  }

  void dense_class(const std::vector<Chunk>& chunks, const A* base, const int64_t* offsets, const int64_t* places,
                   int64_t first, int64_t last, const A* weights, int64_t channels, int64_t width, A* sums) const {
    if (chunks.empty())
      for (int64_t p = first; p < last; ++p) std::fill_n(sums + places[p] * width, width, A(0));
    for (int64_t block = first; block < last; block += kBlock) {
      const int64_t count = std::min(kBlock, last - block), tiles = ceil_div(count, kTileRows);
      for (const Chunk& chunk : chunks) {
        const bool more = &chunk != &chunks.front();
        const A* from = base + chunk.from;
        if (weights_.form() == Form::dots) {
          dots(chunk, from, offsets + block, places + block, count, weights + chunk.weight, channels, width, sums,
               more);
          continue;
        }
        const A* b = weights + chunk.weight * width;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t p = block + count * tile / tiles, rows = block + count * (tile + 1) / tiles - p;
          if (width == W)
            multiply_rows<kTileVectors>(TileHeights(), rows, from, offsets + p, chunk.runs, b, sums, places + p, more);
          else
            multiply_rows<1>(TileHeights(), rows, from, offsets + p, chunk.runs, b, sums, places + p, more);
        }
      }
    }
  }

  void dots(const Chunk& chunk, const A* from, const int64_t* offsets, const int64_t* places, int64_t count,
            const A* weights, int64_t channels, int64_t width, A* sums, bool more) const {
    for (int64_t p = 0; p < count; p += kDotRows) {
      int64_t four[kDotRows];
      for (int64_t i = 0; i < kDotRows; ++i) four[i] = offsets[std::min(p + i, count - 1)];
      dot_tile(std::min<int64_t>(kDotRows, count - p), from, four, chunk.runs, weights, core_.depth(), channels, sums,
               places + p, width, more);
    }
  }

  const T* x_;
  Strides4 s_;
  Window window_, core_;
  const PackedWeights<A>& weights_;
  bool in_place_;
  int64_t channels_;  // of a packed pixel
  Units units_;
  std::vector<Span> rows_, columns_;
  Strides4 packed_;                         // strides of the packed or in-place input
  std::vector<std::vector<Chunk>> chunks_;  // for each pair of spans
};

}  // namespace pynn::cpu
