// The shape of one correlation and how it is cut: which filter taps an output position meets, and units of work.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "conv2d.h"
#include "conv2d_pack.h"

namespace pynn::cpu {

// The image within a virtual one that its own pixels continue; `size` pixels after `before` of the border.
struct Border {
  PaddingMode mode;  // zeros: there is no virtual image
  int64_t before, size;
};

// One axis of a correlation: output position i meets input position i * stride - pad + tap * dilation. The pad may be
// negative (a crop).
struct Axis {
  int64_t in, out, kernel, stride, dilation, pad;
  Border border{PaddingMode::zeros, 0, 0};  // `in` counts it, and pad is 0

  int64_t input(int64_t i, int64_t tap) const { return i * stride - pad + tap * dilation; }

  // The pixel of the image that stands at a position of the virtual one.
  int64_t source(int64_t position) const {
    const int64_t p = position - border.before, size = border.size;
    if (p >= 0 && p < size) return p;
    if (border.mode == PaddingMode::reflect) return p < 0 ? -p : 2 * (size - 1) - p;
    if (border.mode == PaddingMode::replicate) return p < 0 ? 0 : size - 1;
    return p < 0 ? p + size : p - size;
  }
};

// Output positions [first, last) that meet the same taps [tap, tap + taps) inside the image.
struct Span {
  int64_t first, last, tap, taps;
};

inline std::vector<Span> spans_of(const Axis& axis) {
  std::vector<Span> spans;
  for (int64_t i = 0; i < axis.out; ++i) {
    const int64_t at = axis.input(i, 0);
    const int64_t begin = at >= 0 ? 0 : std::min(axis.kernel, ceil_div(-at, axis.dilation));
    const int64_t end = at >= axis.in ? 0 : std::min(axis.kernel, (axis.in - 1 - at) / axis.dilation + 1);
    const Span span{i, i + 1, begin, std::max<int64_t>(0, end - begin)};
    if (!spans.empty() && spans.back().taps == span.taps && (span.taps == 0 || spans.back().tap == begin))
      spans.back().last = i + 1;
    else
      spans.push_back(span);
  }
  return spans;
}

// The output positions [first, last) whose input position for one tap is inside the image.
inline Span span_of_tap(const Axis& axis, int64_t tap) {
  const int64_t at = axis.input(0, tap);
  const int64_t first = at >= 0 ? 0 : std::min(axis.out, ceil_div(-at, axis.stride));
  const int64_t last = at >= axis.in ? 0 : std::min(axis.out, (axis.in - 1 - at) / axis.stride + 1);
  return {first, std::max(first, last), tap, 1};
}

// Channels are per group.
struct Window {
  int64_t batch, groups, in_channels, out_channels;
  Axis h, w;

  int64_t taps() const { return h.kernel * w.kernel; }
  int64_t depth() const { return taps() * in_channels; }
  // Few input channels: every pixel gets its whole patch as one row, zeros where the filter leaves the image.
  bool patches() const {
    return in_channels > 0 && in_channels <= 4 && taps() > 1 && !(in_channels == 1 && groups > 1);
  }
  bool depthwise() const { return in_channels == 1 && groups > 1; }
  bool bordered() const { return h.border.mode != PaddingMode::zeros; }
  // The taps of a kernel row lie side by side in a dense image: they are one run of memory.
  bool joined() const { return w.dilation == 1 || w.kernel == 1; }
  // What the tiles compute: the window itself, or a 1 x 1 correlation of patches.
  Window core() const {
    if (!patches()) return *this;
    return {batch, groups, depth(), out_channels, {h.out, h.out, 1, 1, 1, 0}, {w.out, w.out, 1, 1, 1, 0}};
  }
};

// The correlation that a forward pass is.
inline Window window_of(const Conv2dShape& d) {
  const bool padded = d.pad_top || d.pad_left || d.pad_bottom || d.pad_right;
  const bool bordered = padded && d.padding_mode != PaddingMode::zeros;
  const auto axis = [&](int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t dilation, int64_t before,
                        int64_t after) {
    return bordered ? Axis{in + before + after, out, kernel, stride, dilation, 0, {d.padding_mode, before, in}}
                    : Axis{in, out, kernel, stride, dilation, before};
  };
  return {d.batch,
          d.groups,
          d.in_channels / d.groups,
          d.out_channels / d.groups,
          axis(d.in_height, d.out_height, d.kernel_height, d.stride_height, d.dilation_height, d.pad_top, d.pad_bottom),
          axis(d.in_width, d.out_width, d.kernel_width, d.stride_width, d.dilation_width, d.pad_left, d.pad_right)};
}

// How the output is cut, from shapes only: a unit is `images` whole images, or a band of `rows` rows of one image.
struct Units {
  int64_t images, rows, per_image, count;

  Units(const Window& window, int64_t pixel_bytes) {
    constexpr int64_t kBytes = 256 << 10, kPixels = 1024;  // input, and output pixels, of a unit
    const Axis &h = window.h, &w = window.w;
    const int64_t row_bytes = std::max<int64_t>(1, std::max(w.in, w.out) * pixel_bytes), pixels = h.out * w.out;
    const int64_t image_bytes = std::max<int64_t>(1, h.in * row_bytes);
    int64_t bands = std::max(ceil_div(image_bytes, kBytes), ceil_div(pixels, kPixels));
    bands = std::max(bands, std::min(ceil_div(8, window.batch), pixels / 64));  // a few units for the threads
    bands = std::clamp<int64_t>(bands, 1, h.out);
    rows = ceil_div(h.out, bands);
    per_image = ceil_div(h.out, rows);
    images = 1;
    if (per_image == 1) {
      const int64_t fit =
          std::clamp<int64_t>(std::min(kBytes / image_bytes, kPixels / pixels), 1, ceil_div(window.batch, 4));
      images = ceil_div(window.batch, std::min(window.batch, round_up(ceil_div(window.batch, fit), 4)));
    }
    count = ceil_div(window.batch, images) * per_image;
  }
};

// One unit: images [image, image + images), output rows [row, row + rows), and the input rows it reads.
struct Unit {
  int64_t image, images, row, rows, in_row, in_rows;

  Unit(const Window& window, const Units& units, int64_t index) {
    const Axis& h = window.h;
    image = index / units.per_image * units.images;
    images = std::min(units.images, window.batch - image);
    row = index % units.per_image * units.rows;
    rows = std::min(units.rows, h.out - row);
    in_row = std::clamp<int64_t>(h.input(row, 0), 0, h.in);
    in_rows = std::clamp<int64_t>(h.input(row + rows - 1, h.kernel - 1) + 1, in_row, h.in) - in_row;
  }
  Unit(int64_t image, int64_t row) : Unit(image, 1, row, 1) {}
  Unit(int64_t image, int64_t images, int64_t row, int64_t rows, int64_t in_row = 0, int64_t in_rows = 0)
      : image(image), images(images), row(row), rows(rows), in_row(in_row), in_rows(in_rows) {}
};

// Where the pixels of a correlation lie among those of a unit: (image, i, j) at image * of_image + i * row + j * column
// + first.
struct Layout {
  int64_t image, row, column, first;

  int64_t operator()(int64_t n, int64_t i, int64_t j) const { return n * image + i * row + j * column + first; }
};

// A finished panel: all pixels of a unit in raster order, channels [channel, channel + channels) of all groups.
template <class A>
struct Panel {
  const Unit& unit;
  int64_t channel, channels;
  A* values;       // [pixel][stride]
  int64_t stride;  // whole vectors
};

// The most input rows any unit reads.
inline int64_t most_input_rows(const Window& window, const Units& units) {
  return std::min(window.h.in, (units.rows - 1) * window.h.stride +
                                   std::max<int64_t>(window.h.kernel - 1, 0) * window.h.dilation + 1);
}

// Copies the patches of a unit's pixels: to[image][row][column][tap, channel].
template <class T, class A>
void pack_patches(const T* x, const Strides4& s, const Window& window, const Unit& unit, A* to) {
  const Axis &h = window.h, &w = window.w;
  const int64_t depth = window.depth(), pixels = unit.rows * w.out;
  for (int64_t n = 0; n < unit.images; ++n, to += pixels * depth)
    for (int64_t a = 0; a < h.kernel; ++a)
      for (int64_t b = 0; b < w.kernel; ++b) {
        const Span rows = span_of_tap(h, a), columns = span_of_tap(w, b);
        for (int64_t c = 0; c < window.in_channels; ++c)
          for (int64_t i = unit.row; i < unit.row + unit.rows; ++i) {
            A* line = to + (i - unit.row) * w.out * depth + (a * w.kernel + b) * window.in_channels + c;
            const bool inside = i >= rows.first && i < rows.last;
            const int64_t first = inside ? columns.first : w.out, last = inside ? columns.last : w.out;
            const T* from = x + (unit.image + n) * s.n + c * s.c +
                            (inside ? h.input(i, a) * s.h + w.input(first < last ? first : 0, b) * s.w : 0);
            for (int64_t j = 0; j < first; ++j) line[j * depth] = 0;
            for (int64_t j = first; j < last; ++j) line[j * depth] = to_float(from[(j - first) * w.stride * s.w]);
            for (int64_t j = last; j < w.out; ++j) line[j * depth] = 0;
          }
      }
}

// Lists the pixels of a unit whose tap (a, b) is inside the image: offsets in x, from the unit's first input row, and
// in dy, from its first output row. Returns their number.
inline int64_t list_pixels(const Window& window, const Unit& unit, int64_t a, int64_t b, const Strides4& x,
                           const Strides4& dy, int64_t* x_offsets, int64_t* dy_offsets) {
  const Span rows = span_of_tap(window.h, a), columns = span_of_tap(window.w, b);
  const int64_t begin = std::max(rows.first, unit.row), end = std::min(rows.last, unit.row + unit.rows);
  int64_t p = 0;
  for (int64_t n = 0; n < unit.images; ++n)
    for (int64_t i = begin; i < end; ++i) {
      const int64_t x_row = n * x.n + (window.h.input(i, a) - unit.in_row) * x.h,
                    dy_row = n * dy.n + (i - unit.row) * dy.h;
      for (int64_t j = columns.first; j < columns.last; ++j, ++p) {
        x_offsets[p] = x_row + window.w.input(j, b) * x.w;
        dy_offsets[p] = dy_row + j * dy.w;
      }
    }
  return p;
}

inline int64_t list_all_pixels(const Window& window, const Unit& unit, const Strides4& dy, int64_t* offsets) {
  int64_t p = 0;
  for (int64_t n = 0; n < unit.images; ++n)
    for (int64_t i = 0; i < unit.rows; ++i)
      for (int64_t j = 0; j < window.w.out; ++j) offsets[p++] = n * dy.n + i * dy.h + j * dy.w;
  return p;
}

// sum[:] += one vector of every pixel, with the rounding errors collected in sum[lanes:].
template <class A>
void add_pixels(const A* dy, const int64_t* offsets, int64_t count, A* sum) {
  Vec<A> total = load(sum), error = load(sum + kLanes<A>);
  for (int64_t p = 0; p < count; ++p) {
    const Vec<A> value = load(dy + offsets[p]), next = total + value, taken = next - total;
    error += (total - (next - taken)) + (value - taken);
    total = next;
  }
  store(sum, total);
  store(sum + kLanes<A>, error);
}

// The result of add_pixels; the error of an infinite sum is NaN and does not count.
template <class A>
A pixel_sum(const A* sum) {
  return std::isfinite(*sum) ? *sum + sum[kLanes<A>] : *sum;
}

}  // namespace pynn::cpu
