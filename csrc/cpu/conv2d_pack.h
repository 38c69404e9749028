// Moving convolution operands between their own layout and dtype and the compute form: dense, channels last, padded
// with zeros, fp32 (fp64 for fp64).
#pragma once
#include <algorithm>
#include <cstdlib>
#include <new>

#include "conv2d.h"
#include "divide.h"
#include "vec_load.h"
#include "vec_transpose.h"

namespace pynn::cpu {

// Uninitialised scratch on a cache-line boundary.
template <class E>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<E*>(std::aligned_alloc(64, size_t(round_up(std::max<int64_t>(count, 1) * sizeof(E), 64))))) {
    if (!data_) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  E* get() const { return data_; }

 private:
  E* data_;
};

// to[0:count] = from[0:count], in the compute type. The last vector overlaps the one before it.
template <class T, class A>
PYNN_HD void copy_converted(const T* from, int64_t count, A* to) {
  if (count < kLanes<A>) return store_part(to, count, load_part(from, count, A(0)));
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const int64_t at = std::min(i, count - kLanes<A>);
    store(to + at, load_compute(from + at));
  }
}

// to[i] = from[2 * i] for i < count; memory past the last of them is not read.
template <class T, class A>
PYNN_HD void copy_every_second(const T* from, int64_t count, A* to) {
  constexpr int L = kLanes<A>;
  if (count < L) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[2 * i]);
    return;
  }
  typename ShuffleIndex<A>::type index;
  for (int p = 0; p < L; ++p) index[p] = 2 * p + (p >= L / 2);  // the second vector begins one element early
  for (int64_t i = 0; i < count; i += L) {
    const int64_t at = std::min(i, count - L);
    store(to + at, __builtin_shuffle(load_compute(from + 2 * at), load_compute(from + 2 * at + L - 1), index));
  }
}

// to[i] = from[i * step] for i < count; the row that is read next, often in another page, is at from + next.
template <class T, class A>
void copy_row(const T* from, int64_t step, int64_t count, A* to, int64_t next) {
  for (int64_t i = 0; i < count * step; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + next + i);
  if (step == 1) return copy_converted(from, count, to);
  if (step == 2) return copy_every_second(from, count, to);
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i * step]);
}

// to[place(p) + c] = from[c * stride + p] for p < count, c < channels.
template <class T, class A, class Place>
void transpose_in(const T* from, int64_t stride, int64_t count, int64_t channels, A* to, const Place& place) {
  constexpr int L = kLanes<A>;
  const int64_t whole = count < L ? 0 : channels / L * L;
  for (int64_t c = 0; c < whole; c += L)
    for (int64_t block = 0; block < count; block += L) {
      const int64_t p = std::min(block, count - L);
      Vec<A> rows[L];
      for (int i = 0; i < L; ++i) {
        rows[i] = load_compute(from + (c + i) * stride + p);
        __builtin_prefetch(from + (c + i + L) * stride + p);  // sixteen short streams are too many for the hardware
      }
      transpose<A>(rows);
      for (int i = 0; i < L; ++i) store(to + place(p + i) + c, rows[i]);
    }
  for (int64_t c = whole; c < channels; ++c)
    for (int64_t p = 0; p < count; ++p) to[place(p) + c] = to_float(from[c * stride + p]);
}

// to[c * stride + p] = from[p * from_stride + c] for p < count, c < channels.
template <class A>
void transpose_out(const A* from, int64_t from_stride, int64_t count, int64_t channels, A* to, int64_t stride) {
  constexpr int L = kLanes<A>;
  const int64_t whole = count < L ? 0 : channels / L * L;
  for (int64_t c = 0; c < whole; c += L)
    for (int64_t block = 0; block < count; block += L) {
      const int64_t p = std::min(block, count - L);
      Vec<A> rows[L];
      for (int i = 0; i < L; ++i) rows[i] = load(from + (p + i) * from_stride + c);
      transpose<A>(rows);
      for (int i = 0; i < L; ++i) store(to + (c + i) * stride + p, rows[i]);
    }
  for (int64_t c = whole; c < channels; ++c)
    for (int64_t p = 0; p < count; ++p) to[c * stride + p] = from[p * from_stride + c];
}

// The part of an image that a copy takes: rows [row, row + rows) of `width` pixels, channels [first, first + channels);
// a pixel of the copy takes `pixel` elements.
struct Part {
  int64_t row, rows, width, first, channels, pixel;
};

// Copies a part of an image into to[row][column][channel].
template <class T, class A>
void pack_image(const T* image, const Strides4& s, const Part& part, A* to) {
  const int64_t rows = part.rows, columns = part.width, count = part.channels, pixel = part.pixel;
  const int64_t row_size = columns * pixel;
  const T* from = image + part.row * s.h + part.first * s.c;
  if (s.c == 1) {
    const bool dense = s.w == count && pixel == count;  // pixels follow each other in memory
    const int64_t runs = dense ? 1 : columns, length = dense ? columns * count : count;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t q = 0; q < runs; ++q)
        copy_converted(from + r * s.h + q * s.w, length, to + r * row_size + q * pixel);
  } else if (s.w == 1 && s.h == columns) {  // rows touch: one run of pixels
    transpose_in(from, s.c, rows * columns, count, to, [=](int64_t p) { return p * pixel; });
  } else if (s.w == 1) {
    for (int64_t r = 0; r < rows; ++r)
      transpose_in(from + r * s.h, s.c, columns, count, to + r * row_size, [=](int64_t p) { return p * pixel; });
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t q = 0; q < columns; ++q)
        for (int64_t c = 0; c < count; ++c)
          to[r * row_size + q * pixel + c] = to_float(from[c * s.c + r * s.h + q * s.w]);
  }
}

}  // namespace pynn::cpu
