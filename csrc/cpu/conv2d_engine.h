// One correlation over padded images, the core of the forward pass and of the input gradient:
//   out[n, o, i, j] = sum over c, a, b of x[n, c, i * stride - pad + a * dilation, ...] * w[o, c, a, b]
// A unit is a band of output rows of one image, or several small images, times one group. It packs its input once
// (channels last, padded, compute dtype; or reads it in place), then works through blocks of kBlock pixels: for each
// panel of output channels, sum over chunks of K in registers, add the chunks in the block's scratch, hand the finished
// block to the epilogue. The order of every sum depends on the channel counts and the kernel only.
#pragma once
#include <vector>

#include "conv2d.h"
#include "conv2d_pack.h"
#include "gemm_tile.h"
#include "parallel.h"

namespace pynn::cpu {

// Per group: channels in and out. Pads may be negative (a crop).
struct Window {
  int64_t batch, groups, in_channels, in_height, in_width, out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width, stride_height, stride_width, dilation_height, dilation_width, pad_top, pad_left;
};

// Where to find weight (o, c, a, b) of a group, o and c within the group.
struct WeightView {
  int64_t group, o, c, a, b;
};

// The weights of every group in compute dtype, in the order the tiles read them: panels of kTileWidth output channels
// (the last may be one vector), each [kernel row][kernel column][in channel][lane]; or, for few output channels, one
// plain row [kernel row][kernel column][in channel] per channel; or, depthwise, [kernel row][kernel column][channel].
enum class Form { panels, dots, depthwise };

template <class A> class PackedWeights {
 public:
  template <class T> PackedWeights(const T* w, const WeightView& view, const Window& window)
      : form_(form_of(window)), group_size_(size_of(window)), data_(group_size_ * (form_ == Form::depthwise ? 1 : window.groups)) {
    constexpr int L = kLanes<A>, W = kTileWidth<A>;
    const int64_t taps = window.kernel_height * window.kernel_width, inner = window.in_channels, depth = taps * inner;
    if (form_ == Form::depthwise) {
      const int64_t channels = window.groups * window.out_channels, padded = round_up(channels, L);
      std::fill_n(data_.get(), group_size_, A(0));
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t o = 0; o < channels; ++o)
          data_.get()[t * padded + o] =
              to_float(w[o / window.out_channels * view.group + o % window.out_channels * view.o +
                         t / window.kernel_width * view.a + t % window.kernel_width * view.b]);
      return;
    }
    for (int64_t g = 0; g < window.groups; ++g) {
      A* to = data_.get() + g * group_size_;
      const T* from = w + g * view.group;
      if (form_ == Form::dots) {
        for (int64_t o = 0; o < window.out_channels; ++o)
          for (int64_t t = 0; t < taps; ++t)
            for (int64_t c = 0; c < inner; ++c)
              to[(o * taps + t) * inner + c] = to_float(from[o * view.o + c * view.c + t / window.kernel_width * view.a +
                                                             t % window.kernel_width * view.b]);
        continue;
      }
      for (int64_t o = 0; o < window.out_channels; o += W, to += depth * W)
        pack_panel(from + o * view.o, view, window, std::min<int64_t>(W, window.out_channels - o), to);
    }
  }
  Form form() const { return form_; }
  const A* group(int64_t g) const { return data_.get() + g * group_size_; }

  static Form form_of(const Window& w) {
    if (w.in_channels == 1 && w.groups > 1) return Form::depthwise;
    return w.out_channels <= 4 && w.in_channels * w.kernel_width >= kLanes<A> ? Form::dots : Form::panels;
  }

 private:
  static int64_t size_of(const Window& w) {
    const int64_t taps = w.kernel_height * w.kernel_width;
    if (form_of(w) == Form::depthwise) return taps * round_up(w.groups * w.out_channels, kLanes<A>);
    const int64_t columns = form_of(w) == Form::dots ? w.out_channels : round_up(w.out_channels, kLanes<A>);
    return columns * taps * w.in_channels;
  }

  template <class T> static void pack_panel(const T* from, const WeightView& view, const Window& window, int64_t columns, A* to) {
    constexpr int L = kLanes<A>;
    const int64_t width = round_up(columns, L), inner = window.in_channels, kw = window.kernel_width;
    const int64_t taps = window.kernel_height * kw;
    if (columns < width) std::fill_n(to, taps * inner * width, A(0));
    if (view.b == 1 && view.a == kw && view.c == taps && taps * inner >= L) {
      // A filter is one run of memory, (c, tap) order: square transposes, each vector stored where its tap belongs.
      for (int64_t o = 0; o + L <= columns; o += L)
        transpose_in(from + o * view.o, view.o, taps * inner, L, to + o,
                     [&](int64_t q) { return (q % taps * inner + q / taps) * width; });
      from += columns / L * L * view.o, to += columns / L * L, columns %= L;
    }
    for (int64_t c = 0; c < inner; ++c)
      for (int64_t t = 0; t < taps; ++t) {
        const T* row = from + c * view.c + t / kw * view.a + t % kw * view.b;
        A* target = to + (t * inner + c) * width;
        for (int64_t o = 0; o < columns; ++o) target[o] = to_float(row[o * view.o]);
      }
  }

  Form form_;
  int64_t group_size_;
  Buffer<A> data_;
};

// A part of K summed in registers: `runs` runs of `length` consecutive elements of the packed input.
struct Chunk {
  int64_t from, runs, length, run_stride, weight;
};

// Chunks of about 64 to 128 products: long enough to keep the tile busy, short enough to keep rounding errors small.
inline std::vector<Chunk> chunks_of(const Window& w, int64_t row_stride, int64_t column_stride) {
  const bool joined = w.dilation_width == 1 && column_stride == w.in_channels;  // taps of a kernel row touch
  const int64_t outer = joined ? 1 : w.kernel_height, runs = joined ? w.kernel_height : w.kernel_width;
  const int64_t length = joined ? w.kernel_width * w.in_channels : w.in_channels;
  const int64_t run_stride = joined ? w.dilation_height * row_stride : w.dilation_width * column_stride;
  std::vector<Chunk> chunks;
  if (length == 0) return chunks;
  const int64_t whole = std::max<int64_t>(1, 64 / length), pieces = ceil_div(length, 96);
  for (int64_t a = 0; a < outer; ++a)
    for (int64_t r = 0; r < runs; r += whole)
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t begin = length * piece / pieces, end = length * (piece + 1) / pieces;
        chunks.push_back({a * w.dilation_height * row_stride + r * run_stride + begin, std::min(whole, runs - r),
                          end - begin, run_stride, (a * runs + r) * length + begin});
      }
  return chunks;
}

inline constexpr int64_t kBlock = 8 * kTileRows;  // pixels

// A block of finished sums: pixels [first, first + count) of the rows [row, ...) of images [image, ...), where a pixel
// counts through row_count rows of out_width pixels per image; channels [channel, channel + channels) of all groups.
template <class A> struct Block {
  int64_t image, row, row_count, first, count, channel, channels;
  int64_t stride;  // whole vectors
  A* values;       // [pixel][stride]
  A* spare;        // as large, for the epilogue
};

// How the output rows are cut into units, from shapes only.
struct Units {
  int64_t images, rows, per_image, count;  // images per unit (1 unless rows is a whole image), rows per unit

  Units(const Window& w, int64_t element_size, int64_t channels) {
    const int64_t width = (w.out_width - 1) * w.stride_width + (w.kernel_width - 1) * w.dilation_width + 1;
    const int64_t overlap = (w.kernel_height - 1) * w.dilation_height + 1;
    const int64_t row_bytes = std::max<int64_t>(1, width * channels * element_size);
    const int64_t budget = 192 << 10;
    const int64_t image_bytes = std::max<int64_t>(1, ((w.out_height - 1) * w.stride_height + overlap) * row_bytes);
    const int64_t pixels = w.out_height * w.out_width;
    if (image_bytes <= budget && (w.batch >= 8 || pixels <= 2 * kBlock)) {
      rows = w.out_height;
      images = std::clamp<int64_t>(std::min(2 * kBlock / pixels, budget / image_bytes), 1, std::max<int64_t>(1, w.batch / 4));
    } else {
      images = 1;
      const int64_t fit = (budget / row_bytes - overlap) / w.stride_height + 1;
      const int64_t parts = std::max<int64_t>(ceil_div(w.out_height, std::max<int64_t>(fit, 1)), std::min<int64_t>(ceil_div(8, w.batch), pixels / kBlock));
      rows = ceil_div(w.out_height, std::max<int64_t>(parts, 1));
    }
    per_image = ceil_div(w.out_height, rows);
    count = ceil_div(w.batch, images) * per_image;
  }
};

template <class A> struct Correlation {
  const Window& window;
  const PackedWeights<A>& weights;
  Units units;
  bool in_place;
  int64_t channels;  // of a packed pixel
  int64_t packed_rows, packed_columns;
  Strides4 packed;  // strides of the packed or in-place input
  std::vector<Chunk> chunks;

  template <class T> Correlation(const Window& w, const PackedWeights<A>& packed_weights, const Strides4& s, const T*)
      : window(w),
        weights(packed_weights),
        units(w, sizeof(A), packed_channels()),
        in_place(sizeof(T) == sizeof(A) && weights.form() != Form::depthwise && (s.c == 1 || w.in_channels == 1) && inside()),
        channels(packed_channels()) {
    packed_rows = (units.rows - 1) * w.stride_height + (w.kernel_height - 1) * w.dilation_height + 1;
    packed_columns = (w.out_width - 1) * w.stride_width + (w.kernel_width - 1) * w.dilation_width + 1;
    packed = in_place ? s : Strides4{packed_rows * packed_columns * channels, 1, packed_columns * channels, channels};
    chunks = chunks_of(w, packed.h, packed.w);
  }

  int64_t packed_channels() const {
    return weights.form() == Form::depthwise ? std::min<int64_t>(window.groups * window.out_channels, 4 * kLanes<A>) : window.in_channels;
  }
  // Channels are split over units: groups, or blocks of depthwise channels.
  int64_t splits() const {
    return weights.form() == Form::depthwise ? ceil_div(window.groups * window.out_channels, channels) : window.groups;
  }
  bool inside() const {  // no tap falls outside the image
    const Window& w = window;
    return w.pad_top <= 0 && w.pad_left <= 0 &&
           (w.out_height - 1) * w.stride_height - w.pad_top + (w.kernel_height - 1) * w.dilation_height < w.in_height &&
           (w.out_width - 1) * w.stride_width - w.pad_left + (w.kernel_width - 1) * w.dilation_width < w.in_width;
  }

  static constexpr int64_t block_size() { return 2 * kBlock * 4 * kLanes<A>; }

  template <class T, class Finish> void run(const T* x, const Strides4& s, const Finish& finish) const {
    const int64_t unit_pixels = units.images * units.rows * window.out_width;
    const int64_t input_size = in_place ? 0 : round_up(units.images * packed.n + 4 * kLanes<A>, 16);
    const int64_t slot_size = block_size() + input_size;
    const int64_t slots = std::min<int64_t>(units.count * splits(), torch::stable::get_num_threads());
    const Buffer<A> scratch(slots * slot_size);
    const Buffer<int64_t> offsets(slots * (unit_pixels + kTileRows));
    parallel_for(slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot)
        for (int64_t u = slot; u < units.count * splits(); u += slots) {
          A* block = scratch.get() + slot * slot_size;
          unit(u / splits(), u % splits(), x, s, block, block + block_size(), offsets.get() + slot * (unit_pixels + kTileRows),
               finish);
        }
    });
  }

 private:
  template <class T, class Finish>
  void unit(int64_t index, int64_t split, const T* x, const Strides4& s, A* block, A* input, int64_t* offsets,
            const Finish& finish) const {
    const Window& w = window;
    const bool depthwise = weights.form() == Form::depthwise;
    const int64_t image = index / units.per_image * units.images, row = index % units.per_image * units.rows;
    const int64_t images = std::min(units.images, w.batch - image), rows = std::min(units.rows, w.out_height - row);
    const int64_t top = row * w.stride_height - w.pad_top, first_channel = split * channels;
    const int64_t here = depthwise ? std::min(channels, w.groups * w.out_channels - first_channel) : channels;

    const A* base = input;
    if (in_place) {
      if constexpr (sizeof(T) == sizeof(A)) base = x + image * s.n + first_channel * s.c + top * s.h - w.pad_left * s.w;
    } else {
      const Channels taken{first_channel, here, depthwise ? w.out_channels : 1, channels};
      const int64_t used_rows = (rows - 1) * w.stride_height + (w.kernel_height - 1) * w.dilation_height + 1;
      for (int64_t i = 0; i < images; ++i)
        pack_image<T, A>(x + (image + i) * s.n, s, w.in_height, w.in_width, taken,
                         {top, -w.pad_left, used_rows, packed_columns}, input + i * packed.n);
    }
    const int64_t pixels = images * rows * w.out_width;
    int64_t p = 0;
    for (int64_t n = 0; n < images; ++n)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < w.out_width; ++j)
          offsets[p++] = n * packed.n + i * w.stride_height * packed.h + j * w.stride_width * packed.w;
    for (; p < pixels + kTileRows; ++p) offsets[p] = offsets[pixels - 1];  // the rows that complete the last tile

    Block<A> done{image, row, rows, 0, 0, 0, 0, 0, block, block + block_size() / 2};
    for (done.first = 0; done.first < pixels; done.first += kBlock) {
      done.count = std::min(kBlock, pixels - done.first);
      if (depthwise) {
        done.channel = first_channel, done.channels = here, done.stride = 4 * kLanes<A>;
        depthwise_block(base, offsets + done.first, first_channel, here, done);
        finish(done);
        continue;
      }
      for (int64_t o = 0; o < w.out_channels; o += kTileWidth<A>) {
        done.channel = split * w.out_channels + o;
        done.channels = std::min<int64_t>(kTileWidth<A>, w.out_channels - o);
        done.stride = round_up(done.channels, kLanes<A>);
        dense_block(base, offsets + done.first, weights.group(split), o, done);
        finish(done);
      }
    }
  }

  void dense_block(const A* base, const int64_t* offsets, const A* group, int64_t o, const Block<A>& done) const {
    const int64_t depth = window.kernel_height * window.kernel_width * window.in_channels;
    if (chunks.empty()) std::fill_n(done.values, kBlock * done.stride, A(0));
    for (const Chunk& chunk : chunks) {
      const bool more = &chunk != &chunks.front();
      const A* from = base + chunk.from;
      if (weights.form() == Form::dots) {
        for (int64_t p = 0; p < done.count; p += kDotRows) {
          dot_tile(from, offsets + p, chunk.runs, chunk.length, chunk.run_stride, group + o * depth + chunk.weight, depth,
                   int(done.channels), done.values + p * done.stride, done.stride, more);
        }
        continue;
      }
      const A* b = group + o * depth + chunk.weight * done.stride;
      for (int64_t p = 0; p < done.count; p += kTileRows) {
        A* to = done.values + p * done.stride;
        if (done.stride == kTileWidth<A>)
          multiply_tile<kTileVectors>(from, offsets + p, chunk.runs, chunk.length, chunk.run_stride, b, to, more);
        else
          multiply_tile<1>(from, offsets + p, chunk.runs, chunk.length, chunk.run_stride, b, to, more);
      }
    }
  }

  void depthwise_block(const A* base, const int64_t* offsets, int64_t first, int64_t count, const Block<A>& done) const {
    constexpr int L = kLanes<A>, R = 4;
    const Window& w = window;
    const int64_t padded = round_up(w.groups * w.out_channels, L);
    for (int64_t c = 0; c < count; c += L)
      for (int64_t p = 0; p < done.count; p += R) {
        Vec<A> total[R] = {};
        for (int64_t a = 0; a < w.kernel_height; ++a) {
          const A* filter = weights.group(0) + a * w.kernel_width * padded + first + c;
          const A* from = base + a * w.dilation_height * packed.h + c;
          Vec<A> sum[R] = {};
          for (int64_t b = 0; b < w.kernel_width; ++b, filter += padded, from += w.dilation_width * packed.w) {
            const Vec<A> weight = load(filter);
#pragma GCC unroll 4
            for (int i = 0; i < R; ++i) sum[i] = fma(load(from + offsets[p + i]), weight, sum[i]);
          }
#pragma GCC unroll 4
          for (int i = 0; i < R; ++i) total[i] += sum[i];
        }
        for (int i = 0; i < R; ++i) store(done.values + (p + i) * done.stride + c, total[i]);
      }
  }
};

}  // namespace pynn::cpu
