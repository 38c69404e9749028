// The inner loops of group_norm on the CPU: statistics and elementwise passes over one channel's run of pixels, or over
// a block of channels-last columns. See group_norm.cpp for how they are put together.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "group_norm.h"
#include "group_norm_math.h"
#include "silu.h"
#include "vec_load.h"

namespace pynn::cpu::group_norm {

using namespace pynn::group_norm;

inline constexpr int kFlush = 16;
template <class T>
inline constexpr int64_t kColumns = 32 * kComputeLanes<T>;  // channels whose coefficients are laid out at a time

// ---------------------------------------------------------------- contiguous runs: (channel, pixels)

// Calls body(index, whole) for each vector of [0, count); whole is std::false_type for a last, partial one.
template <int kStep, class Body>
PYNN_HD void each_vector(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) body(i, std::true_type{});
  if (i < count) body(i, std::false_type{});
}

// A value near the mean of the data, from the mean and the mean square of a sample: 0 unless the mean is large, and of
// 5 bits, so that differences and squares of small integers are exact.
template <class A>
A guess_center(double mean, double square) {
  using Bits = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
  if (16 * mean * mean < square) return 0;
  return bit_cast<A>(bit_cast<Bits>(A(mean)) & (~Bits(0) << (std::numeric_limits<A>::digits - 5)));
}

// The same for a run; the sample is four vectors spread over it.
template <class T>
accumulate_t<T> run_center(const T* x, int64_t count) {
  using A = accumulate_t<T>;
  constexpr int64_t kStep = kComputeLanes<T>;
  if (count < 4 * kStep) return A(to_float(x[count / 2]));
  Vec<A> sum = {}, square = {};
  for (int64_t i = 0; i < 4; ++i) {
    const Vec<A> v = load_compute(x + (count - kStep) * i / 3);
    sum += v;
    square = fma(v, v, square);
  }
  return guess_center<A>(add_lanes(sum) / double(4 * kStep), add_lanes(square) / double(4 * kStep));
}

// Sums of x - center and, for kSecond, of its square.
template <bool kSecond, class T>
Sums run_moments(const T* x, int64_t count, accumulate_t<T> center) {
  using A = accumulate_t<T>;
  constexpr int kUnroll = 4, kStep = kComputeLanes<T>;
  const Vec<A> center_v = broadcast(center);
  Sums total;
  for (int64_t i = 0; i < count;) {
    Vec<A> first[kUnroll] = {}, second[kUnroll] = {};
    const int64_t end = std::min(count, i + int64_t(kFlush) * kUnroll * kStep);
    for (; i + kUnroll * kStep <= end; i += kUnroll * kStep)
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        const Vec<A> d = load_compute(x + i + u * kStep) - center_v;
        first[u] += d;
        if constexpr (kSecond) second[u] = fma(d, d, second[u]);
      }
    for (int u = 0; i < end; i += kStep, ++u) {
      const Vec<A> d = (end - i >= kStep ? load_compute(x + i) : load_part(x + i, end - i, center)) - center_v;
      first[u] += d;
      if constexpr (kSecond) second[u] = fma(d, d, second[u]);
    }
    i = end;
    total.first += add_lanes((first[0] + first[1]) + (first[2] + first[3]));
    if constexpr (kSecond) total.second += add_lanes((second[0] + second[1]) + (second[2] + second[3]));
  }
  return total;
}

// A run of one channel of `pixels` elements after the other, with a scale and a shift for each.
template <bool kSilu, class T, class A = accumulate_t<T>>
void run_forward(const T* x, T* y, int64_t channels, int64_t pixels, A center, const A* scales, const A* shifts) {
  const Vec<A> center_v = broadcast(center);
  for (int64_t c = 0; c < channels; ++c, x += pixels, y += pixels) {
    const Vec<A> scale = broadcast(scales[c]), shift = broadcast(shifts[c]);
    each_vector<kComputeLanes<T>>(pixels, [&](int64_t i, auto whole) {
      const Vec<A> v = whole ? load_compute(x + i) : load_part(x + i, pixels - i, A(0));
      const Vec<A> out = activate<kSilu>(fma(Vec<A>(v - center_v), scale, shift));
      whole ? store_compute(y + i, out) : store_part(y + i, pixels - i, out);
    });
  }
}

// Sums of dz and dz * (x - center) of each channel. With kKeep, dz stays in dx for the second pass. Lanes are added up
// for several channels at a time: one after the other, they would wait for each other.
template <bool kSilu, bool kKeep, class T, class A = accumulate_t<T>>
void run_backward_sums(const T* dy, const T* x, T* dx, int64_t channels, int64_t pixels, A center, const A* scales,
                       const A* shifts, double* sum_dz, double* sum_dzx) {
  constexpr int64_t kStep = kComputeLanes<T>, kTogether = 16;
  const Vec<A> center_v = broadcast(center);
  for (int64_t block = 0; block < channels; block += kTogether) {
    const int64_t count = std::min(kTogether, channels - block);
    VecDouble lanes[kTogether][2];
    for (int64_t c = 0; c < count; ++c, dy += pixels, x += pixels, dx += pixels) {
      const Vec<A> scale = broadcast(scales[block + c]), shift = broadcast(shifts[block + c]);
      const auto add = [&](int64_t i, auto whole, Vec<A>& first, Vec<A>& second) {
        const Vec<A> v = whole ? load_compute(x + i) : load_part(x + i, pixels - i, center);
        const Vec<A> grad = whole ? load_compute(dy + i) : load_part(dy + i, pixels - i, A(0));
        const Vec<A> d = v - center_v, dz = activate_grad<kSilu>(grad, fma(d, scale, shift));
        if constexpr (kKeep) whole ? store_compute(dx + i, dz) : store_part(dx + i, pixels - i, dz);
        first += dz;
        second = fma(dz, d, second);
      };
      VecDouble total[2] = {};
      for (int64_t i = 0; i < pixels;) {
        Vec<A> first0 = {}, first1 = {}, second0 = {}, second1 = {};
        const int64_t end = std::min<int64_t>(pixels, i + 2 * kFlush * kStep);
        for (; i + 2 * kStep <= end; i += 2 * kStep) {
          add(i, std::true_type{}, first0, second0);
          add(i + kStep, std::true_type{}, first1, second1);
        }
        if (i + kStep <= end) {
          add(i, std::true_type{}, first0, second0);
          i += kStep;
        }
        if (i < end) {
          add(i, std::false_type{}, first1, second1);
          i = end;
        }
        total[0] += fold(Vec<A>(first0 + first1)), total[1] += fold(Vec<A>(second0 + second1));
      }
      lanes[c][0] = total[0], lanes[c][1] = total[1];
    }
    for (int64_t c = 0; c < count; ++c) {
      sum_dz[block + c] = add_lanes(lanes[c][0]);
      sum_dzx[block + c] = add_lanes(lanes[c][1]);
    }
  }
}

template <bool kSilu, bool kKeep, class T, class A = accumulate_t<T>>
void run_backward(const T* dy, const T* x, T* dx, int64_t channels, int64_t pixels, A center, const A* scales,
                  const A* shifts, const Affine& back) {
  const Vec<A> center_v = broadcast(center), slope = broadcast(A(back.scale)), constant = broadcast(A(back.shift));
  const T* from = kKeep ? dx : dy;
  for (int64_t c = 0; c < channels; ++c, from += pixels, x += pixels, dx += pixels) {
    const Vec<A> scale = broadcast(scales[c]), shift = broadcast(shifts[c]);
    each_vector<kComputeLanes<T>>(pixels, [&](int64_t i, auto whole) {
      const Vec<A> v = whole ? load_compute(x + i) : load_part(x + i, pixels - i, A(0));
      Vec<A> dz = whole ? load_compute(from + i) : load_part(from + i, pixels - i, A(0));
      const Vec<A> d = v - center_v;
      if constexpr (!kKeep) dz = activate_grad<kSilu>(dz, fma(d, scale, shift));
      const Vec<A> out = fma(scale, dz, fma(slope, d, constant));
      whole ? store_compute(dx + i, out) : store_part(dx + i, pixels - i, out);
    });
  }
}

// ---------------------------------------------------------------- channels-last blocks

// Coefficients of up to kColumns channels, as the vector loops read them. Lanes past the last channel stay 0.
template <class T>
struct Columns {
  using A = accumulate_t<T>;
  A center[kColumns<T>], scale[kColumns<T>], shift[kColumns<T>], slope[kColumns<T>], constant[kColumns<T>];

  explicit Columns(int64_t count) {
    const int64_t last = (count - 1) / kComputeLanes<T> * kComputeLanes<T>;
    for (A* values : {center, scale, shift, slope, constant}) store(values + last, Vec<A>{});
  }
};

// Two sums for each of up to kColumns channels, or groups.
template <class T>
struct ColumnSums {
  double first[kColumns<T>], second[kColumns<T>];

  explicit ColumnSums(int64_t count) { reset(count); }
  void reset(int64_t count) {
    const int64_t whole = (count + kComputeLanes<T> - 1) / kComputeLanes<T> * kComputeLanes<T>;
    for (double* values : {first, second}) std::fill_n(values, whole, 0.0);
  }
  Sums operator[](int64_t i) const { return {first[i], second[i]}; }
  void add(int64_t i, const Sums& s) { first[i] += s.first, second[i] += s.second; }
};

// A strip of channels in registers: up to kVectors vectors, the last of which may be partial.
template <class T, int kVectors>
struct Row {
  using A = accumulate_t<T>;
  Vec<A> v[kVectors];

  static constexpr int kStep = kComputeLanes<T>;
  static PYNN_HD Row coefficients(const A* from) {
    Row row;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) row.v[j] = load(from + j * kStep);
    return row;
  }
  static PYNN_HD Row read(const T* from, int64_t tail) {
    Row row;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors - 1; ++j) row.v[j] = load_compute(from + j * kStep);
    const T* last = from + (kVectors - 1) * kStep;
    row.v[kVectors - 1] = tail == kStep ? load_compute(last) : load_part(last, tail, A(0));
    return row;
  }
  PYNN_HD void write(T* to, int64_t tail) const {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors - 1; ++j) store_compute(to + j * kStep, v[j]);
    T* last = to + (kVectors - 1) * kStep;
    tail == kStep ? store_compute(last, v[kVectors - 1]) : store_part(last, tail, v[kVectors - 1]);
  }
  static PYNN_HD void prefetch(const T* from) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) __builtin_prefetch(from + j * kStep);
  }
};

template <class V>
PYNN_HD void add_to(double* sums, V v) {
  constexpr int kCount = sizeof(v) / sizeof(v[0]);
  typedef double Wide __attribute__((vector_size(8 * kCount)));
  Wide total;
  memcpy(&total, sums, sizeof(total));
  total += __builtin_convertvector(v, Wide);
  memcpy(sums, &total, sizeof(total));
}

// Up to kColumns channels of a (pixels, channels) sample, walked in tiles of kTile rows by a strip of kStrip vectors:
// a tile stays in the first-level cache, memory is read nearly in order, and running sums stay in registers.
template <class T>
struct Block {
  using A = accumulate_t<T>;
  static constexpr int kStep = kComputeLanes<T>, kTile = 2 * kFlush;
  int64_t rows, stride, columns;

  Block(const GroupNormShape& shape, int64_t count) : rows(shape.pixels), stride(shape.channels()), columns(count) {}

  // Calls body(std::integral_constant<int, vectors>, column, tail, first row, last row) for each strip of each tile.
  template <int kStrip, class Body>
  void each_strip(const Body& body) const {
    for (int64_t row = 0; row < rows; row += kTile) {
      const int64_t end = std::min<int64_t>(rows, row + kTile);
      int64_t c = 0;
      for (; c + kStrip * kStep <= columns; c += kStrip * kStep)
        body(std::integral_constant<int, kStrip>{}, c, kStep, row, end);
      if (c == columns) continue;
      const int64_t vectors = (columns - c + kStep - 1) / kStep, tail = columns - c - (vectors - 1) * kStep;
      if (kStrip > 2 && vectors == 4) body(std::integral_constant<int, std::min(kStrip, 4)>{}, c, tail, row, end);
      if (kStrip > 2 && vectors == 3) body(std::integral_constant<int, std::min(kStrip, 3)>{}, c, tail, row, end);
      if (vectors == 2) body(std::integral_constant<int, 2>{}, c, tail, row, end);
      if (vectors == 1) body(std::integral_constant<int, 1>{}, c, tail, row, end);
    }
  }

  // each(r, first, second) adds row r of a strip to running sums.
  template <int kVectors, class Each>
  static void sum_rows(int64_t begin, int64_t end, double* first_sums, double* second_sums, const Each& each) {
    constexpr int kUnroll = 2;  // of kFlush rows each
    Vec<A> first[kUnroll][kVectors] = {}, second[kUnroll][kVectors] = {};
    int64_t r = begin;
    for (; r + kUnroll <= end; r += kUnroll)
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) each(r + u, first[u], second[u]);
    for (; r < end; ++r) each(r, first[0], second[0]);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      add_to(first_sums + j * kStep, first[0][j] + first[1][j]);
      add_to(second_sums + j * kStep, second[0][j] + second[1][j]);
    }
  }

  // Sums of x - center and, for kSecond, of its square.
  template <bool kSecond>
  void moments(const T* x, const A* centers, ColumnSums<T>& sums) const {
    each_strip<4>([&](auto vectors, int64_t c, int64_t tail, int64_t begin, int64_t end) {
      constexpr int V = vectors;
      using R = Row<T, V>;
      const R center = R::coefficients(centers + c);
      sum_rows<V>(begin, end, sums.first + c, sums.second + c, [&](int64_t r, Vec<A>* first, Vec<A>* second) {
        const T* from = x + r * stride + c;
        R::prefetch(from + kTile * stride);
        const R row = R::read(from, tail);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
          const Vec<A> d = row.v[j] - center.v[j];
          first[j] += d;
          if constexpr (kSecond) second[j] = fma(d, d, second[j]);
        }
      });
    });
  }

  template <bool kSilu>
  void forward(const T* x, T* y, const Columns<T>& k) const {
    each_strip<kSilu ? 2 : 4>([&](auto vectors, int64_t c, int64_t tail, int64_t begin, int64_t end) {
      constexpr int V = vectors;
      using R = Row<T, V>;
      const R center = R::coefficients(k.center + c), scale = R::coefficients(k.scale + c),
              shift = R::coefficients(k.shift + c);
      for (int64_t r = begin; r < end; ++r) {
        R row = R::read(x + r * stride + c, tail);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j)
          row.v[j] = activate<kSilu>(fma(Vec<A>(row.v[j] - center.v[j]), scale.v[j], shift.v[j]));
        row.write(y + r * stride + c, tail);
      }
    });
  }

  // Sums of dz and dz * (x - center). With kKeep, dz stays in dx for the second pass.
  template <bool kSilu, bool kKeep>
  void backward_sums(const T* dy, const T* x, T* dx, const Columns<T>& k, ColumnSums<T>& sums) const {
    each_strip<2>([&](auto vectors, int64_t c, int64_t tail, int64_t begin, int64_t end) {
      constexpr int V = vectors;
      using R = Row<T, V>;
      const R center = R::coefficients(k.center + c), scale = R::coefficients(k.scale + c),
              shift = R::coefficients(k.shift + c);
      sum_rows<V>(begin, end, sums.first + c, sums.second + c, [&](int64_t r, Vec<A>* first, Vec<A>* second) {
        const int64_t at = r * stride + c;
        R::prefetch(x + at + kTile * stride);
        R::prefetch(dy + at + kTile * stride);
        const R row = R::read(x + at, tail);
        R dz = R::read(dy + at, tail);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
          const Vec<A> d = row.v[j] - center.v[j];
          if constexpr (kSilu) dz.v[j] = activate_grad<kSilu>(dz.v[j], fma(d, scale.v[j], shift.v[j]));
          first[j] += dz.v[j];
          second[j] = fma(dz.v[j], d, second[j]);
        }
        if constexpr (kKeep) dz.write(dx + at, tail);
      });
    });
  }

  template <bool kSilu, bool kKeep>
  void backward(const T* dy, const T* x, T* dx, const Columns<T>& k) const {
    each_strip<2>([&](auto vectors, int64_t c, int64_t tail, int64_t begin, int64_t end) {
      constexpr int V = vectors;
      using R = Row<T, V>;
      const R center = R::coefficients(k.center + c), scale = R::coefficients(k.scale + c),
              shift = R::coefficients(k.shift + c), slope = R::coefficients(k.slope + c),
              constant = R::coefficients(k.constant + c);
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = r * stride + c;
        R row = R::read(x + at, tail);
        const R dz = R::read((kKeep ? dx : dy) + at, tail);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
          const Vec<A> d = row.v[j] - center.v[j];
          Vec<A> grad = dz.v[j];
          if constexpr (!kKeep) grad = activate_grad<kSilu>(grad, fma(d, scale.v[j], shift.v[j]));
          row.v[j] = fma(scale.v[j], grad, fma(slope.v[j], d, constant.v[j]));
        }
        row.write(dx + at, tail);
      }
    });
  }
};

}  // namespace pynn::cpu::group_norm
