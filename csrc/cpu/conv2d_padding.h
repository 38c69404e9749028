// Images that their own pixels continue (reflect, replicate, circular). A correlation with such a border runs on a
// virtual image of the padded size with no padding of its own: the border is there only in the packed copy of a unit,
// and in the gradient of one chunk of images, which is folded back before it is rounded.
#pragma once
#include <cstring>

#include "conv2d_geometry.h"

namespace pynn::cpu {

// Copies a part of a virtual image into to[row][column][channel].
template <class T, class A>
void pack_bordered(const T* image, const Strides4& s, const Window& window, const Part& part, A* to) {
  const Axis &h = window.h, &w = window.w;
  const int64_t pixel = part.pixel, pitch = part.width * pixel, inner = w.border.size * pixel;
  for (int64_t r = 0, run; r < part.rows; r += run, to += run * pitch) {
    const int64_t source = h.source(part.row + r);
    for (run = 1; r + run < part.rows && h.source(part.row + r + run) == source + run;) ++run;
    // Rows of the image come in one piece, to the end of their space, and are then spread.
    A* dense = to + run * (pitch - inner);
    pack_image<T, A>(image, s, {source, run, w.border.size, part.first, part.channels, pixel}, dense);
    for (int64_t i = 0; i < run; ++i) {
      A* row = to + i * pitch + w.border.before * pixel;
      std::memmove(row, dense + i * inner, size_t(inner) * sizeof(A));
      const auto continue_to = [&](int64_t j) {
        std::copy_n(row + w.source(j) * pixel, part.channels, row + (j - w.border.before) * pixel);
      };
      for (int64_t j = 0; j < w.border.before; ++j) continue_to(j);
      for (int64_t j = w.border.before + w.border.size; j < w.in; ++j) continue_to(j);
    }
  }
}

// pack_patches for a virtual image.
template <class T, class A>
void pack_bordered_patches(const T* x, const Strides4& s, const Window& window, const Unit& unit, A* to) {
  const Axis &h = window.h, &w = window.w;
  const int64_t depth = window.depth();
  std::vector<int64_t> columns(w.kernel * w.out);
  for (int64_t b = 0; b < w.kernel; ++b)
    for (int64_t j = 0; j < w.out; ++j) columns[b * w.out + j] = w.source(w.input(j, b)) * s.w;
  for (int64_t n = unit.image; n < unit.image + unit.images; ++n)
    for (int64_t i = unit.row; i < unit.row + unit.rows; ++i, to += w.out * depth)
      for (int64_t a = 0; a < h.kernel; ++a)
        for (int64_t b = 0; b < w.kernel; ++b)
          for (int64_t c = 0; c < window.in_channels; ++c) {
            const T* from = x + n * s.n + c * s.c + h.source(h.input(i, a)) * s.h;
            A* line = to + (a * w.kernel + b) * window.in_channels + c;
            for (int64_t j = 0; j < w.out; ++j) line[j * depth] = to_float(from[columns[b * w.out + j]]);
          }
}

// Images and patches in the compute type, whatever the border.
template <class T, class A>
void pack_part(const T* image, const Strides4& s, const Window& window, const Part& part, A* to) {
  window.bordered() ? pack_bordered(image, s, window, part, to) : pack_image(image, s, part, to);
}
template <class T, class A>
void pack_any_patches(const T* x, const Strides4& s, const Window& window, const Unit& unit, A* to) {
  window.bordered() ? pack_bordered_patches(x, s, window, unit, to) : pack_patches(x, s, window, unit, to);
}

// Adds the border of a virtual image, values[row][column][pixel], to the pixels it continues: `count` channels, whole
// vectors.
template <class A>
void fold_border(const Axis& h, const Axis& w, A* values, int64_t pixel, int64_t count) {
  const int64_t pitch = w.in * pixel;
  const auto add = [=](A* to, const A* from) {
    for (int64_t c = 0; c < count; c += kLanes<A>) store(to + c, load(to + c) + load(from + c));
  };
  const auto each_outside = [](const Axis& axis, const auto& visit) {
    for (int64_t i = 0; i < axis.border.before; ++i) visit(i);
    for (int64_t i = axis.border.before + axis.border.size; i < axis.in; ++i) visit(i);
  };
  for (int64_t r = 0; r < h.in; ++r)
    each_outside(w, [&](int64_t j) {
      A* row = values + r * pitch;
      add(row + (w.border.before + w.source(j)) * pixel, row + j * pixel);
    });
  each_outside(h, [&](int64_t r) {
    A* to = values + (h.border.before + h.source(r)) * pitch + w.border.before * pixel;
    const A* from = values + r * pitch + w.border.before * pixel;
    for (int64_t j = 0; j < w.border.size; ++j) add(to + j * pixel, from + j * pixel);
  });
}

}  // namespace pynn::cpu
