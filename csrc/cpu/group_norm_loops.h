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
#include "vec_transpose.h"

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

// Two sums whose lanes are still to be added up.
struct LaneSums {
  VecDouble first = {}, second = {};
};

// Sums of x - center and, for kSecond, of its square.
template <bool kSecond, class T>
LaneSums run_moments(const T* x, int64_t count, accumulate_t<T> center) {
  using A = accumulate_t<T>;
  constexpr int kUnroll = 4, kStep = kComputeLanes<T>;
  const Vec<A> center_v = broadcast(center);
  LaneSums total;
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
    total.first += fold(Vec<A>((first[0] + first[1]) + (first[2] + first[3])));
    if constexpr (kSecond) total.second += fold(Vec<A>((second[0] + second[1]) + (second[2] + second[3])));
  }
  return total;
}

// Adds up the lanes of lanes(0) .. lanes(count - 1), as many at a time as a vector has lanes: one after the other, the
// additions would wait for each other. Writes whole vectors of sums.
template <class Lanes>
void add_lanes_of(int64_t count, double* first, double* second, const Lanes& lanes) {
  constexpr int64_t kTogether = kLanes<double>;
  for (int64_t i = 0; i < count; i += kTogether) {
    VecDouble rows[2][kTogether];
    for (int64_t j = 0; j < kTogether; ++j) {
      const LaneSums sums = i + j < count ? lanes(i + j) : LaneSums{};
      rows[0][j] = sums.first, rows[1][j] = sums.second;
    }
    store(first + i, add_rows(rows[0]));
    store(second + i, add_rows(rows[1]));
  }
}

// What the elements of up to kColumns channels are computed with. Lanes past the last channel are 0.
template <class T>
struct Coefficients {
  using A = accumulate_t<T>;
  A center[kColumns<T>], scale[kColumns<T>], shift[kColumns<T>], slope[kColumns<T>], constant[kColumns<T>];
  double delta[kColumns<T>], rstd[kColumns<T>];  // the statistics of each channel's group

  explicit Coefficients(int64_t channels) {
    const int64_t last = (channels - 1) / kComputeLanes<T> * kComputeLanes<T>;
    for (A* values : {center, scale, shift, slope, constant}) store(values + last, Vec<A>{});
  }
};

// A run of one channel of `pixels` elements after the other.
template <bool kSilu, bool kStream, class T>
void run_forward(const T* x, T* y, int64_t channels, int64_t pixels, const Coefficients<T>& k) {
  using A = accumulate_t<T>;
  for (int64_t c = 0; c < channels; ++c, x += pixels, y += pixels) {
    const Vec<A> center = broadcast(k.center[c]), scale = broadcast(k.scale[c]), shift = broadcast(k.shift[c]);
    each_vector<kComputeLanes<T>>(pixels, [&](int64_t i, auto whole) {
      const Vec<A> v = whole ? load_compute(x + i) : load_part(x + i, pixels - i, A(0));
      const Vec<A> out = activate<kSilu>(fma(Vec<A>(v - center), scale, shift));
      if constexpr (kStream) return stream_compute(y + i, out);
      whole ? store_compute(y + i, out) : store_part(y + i, pixels - i, out);
    });
  }
}

// Sums of dz and dz * (x - center) of each channel. With kKeep, dz is kept for the second pass.
template <bool kSilu, bool kKeep, class T, class A = accumulate_t<T>>
void run_backward_sums(const T* dy, const T* x, A* kept, int64_t channels, int64_t pixels, const Coefficients<T>& k,
                       double* sum_dz, double* sum_dzx) {
  constexpr int64_t kStep = kComputeLanes<T>;
  add_lanes_of(channels, sum_dz, sum_dzx, [&](int64_t c) __attribute__((always_inline)) {
    const Vec<A> center = broadcast(k.center[c]), scale = broadcast(k.scale[c]), shift = broadcast(k.shift[c]);
    const T *const from = x + c * pixels, *const grads = dy + c * pixels;
    const auto add = [&](int64_t i, auto whole, Vec<A>& first, Vec<A>& second) {
      const Vec<A> v = whole ? load_compute(from + i) : load_part(from + i, pixels - i, k.center[c]);
      const Vec<A> grad = whole ? load_compute(grads + i) : load_part(grads + i, pixels - i, A(0));
      const Vec<A> d = v - center, dz = activate_grad<kSilu>(grad, fma(d, scale, shift));
      if constexpr (kKeep) whole ? store(kept + c * pixels + i, dz) : store_part(kept + c * pixels + i, pixels - i, dz);
      first += dz;
      second = fma(dz, d, second);
    };
    LaneSums total;
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
      total.first += fold(Vec<A>(first0 + first1)), total.second += fold(Vec<A>(second0 + second1));
    }
    return total;
  });
}

template <bool kSilu, bool kKeep, bool kStream, class T, class A = accumulate_t<T>>
void run_backward(const T* dy, const T* x, const A* kept, T* dx, int64_t channels, int64_t pixels,
                  const Coefficients<T>& k) {
  for (int64_t c = 0; c < channels; ++c, dy += pixels, kept += pixels, x += pixels, dx += pixels) {
    const Vec<A> center = broadcast(k.center[c]), scale = broadcast(k.scale[c]), shift = broadcast(k.shift[c]),
                 slope = broadcast(k.slope[c]), constant = broadcast(k.constant[c]);
    const auto read = [&](const auto* from, int64_t i, auto whole) {
      return whole ? load_compute(from + i) : load_part(from + i, pixels - i, A(0));
    };
    each_vector<kComputeLanes<T>>(pixels, [&](int64_t i, auto whole) {
      const Vec<A> d = read(x, i, whole) - center;
      Vec<A> dz;
      if constexpr (kKeep) dz = read(kept, i, whole);
      if constexpr (!kKeep) dz = activate_grad<kSilu>(read(dy, i, whole), fma(d, scale, shift));
      const Vec<A> out = fma(scale, dz, fma(slope, d, constant));
      if constexpr (kStream) return stream_compute(dx + i, out);
      whole ? store_compute(dx + i, out) : store_part(dx + i, pixels - i, out);
    });
  }
}

// ---------------------------------------------------------------- channels-last blocks

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

  template <class Other>
  static PYNN_HD Row of(const Row<Other, kVectors>& other) {
    Row row;
    memcpy(row.v, other.v, sizeof(row.v));
    return row;
  }

  static constexpr int kStep = kComputeLanes<T>;
  static PYNN_HD Row coefficients(const A* from) {
    Row row;
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) row.v[j] = load(from + j * kStep);
    return row;
  }
  static PYNN_HD Row read(const T* from, int64_t tail) {
    Row row;
#pragma GCC unroll 8
    for (int j = 0; j < kVectors - 1; ++j) row.v[j] = load_compute(from + j * kStep);
    const T* last = from + (kVectors - 1) * kStep;
    row.v[kVectors - 1] = tail == kStep ? load_compute(last) : load_part(last, tail, A(0));
    return row;
  }
  template <bool kStream>
  PYNN_HD void write(T* to, int64_t tail) const {
    if constexpr (kStream) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) stream_compute(to + j * kStep, v[j]);
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors - 1; ++j) store_compute(to + j * kStep, v[j]);
      T* last = to + (kVectors - 1) * kStep;
      tail == kStep ? store_compute(last, v[kVectors - 1]) : store_part(last, tail, v[kVectors - 1]);
    }
  }
  template <bool kToWrite = false>
  static PYNN_HD void prefetch(const T* from) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) __builtin_prefetch(from + j * kStep, kToWrite);
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
  static constexpr int kWide = kVectorRegisters == 32 ? 8 : 4;  // vectors of a strip that needs few registers for each
  int64_t rows, stride, columns;

  Block(const GroupNormShape& shape, int64_t count) : rows(shape.pixels), stride(shape.channels()), columns(count) {}

  // Calls body(std::integral_constant<int, vectors>, column, tail, first row, last row) for each strip of each tile.
  template <int kStrip, class Body>
  void each_strip(int64_t tile, const Body& body) const {
    for (int64_t row = 0; row < rows; row += tile) strips<kStrip>(0, row, std::min(rows, row + tile), body);
  }
  // From column c on: strips of kStrip vectors, then of half as many; the last may be partial.
  template <int kStrip, class Body>
  PYNN_HD void strips(int64_t c, int64_t begin, int64_t end, const Body& body) const {
    for (; c + kStrip * kStep <= columns; c += kStrip * kStep)
      body(std::integral_constant<int, kStrip>{}, c, int64_t(kStep), begin, end);
    if (c == columns) return;
    if constexpr (kStrip > 1) return strips<kStrip / 2>(c, begin, end, body);
    body(std::integral_constant<int, 1>{}, c, columns - c, begin, end);
  }

  // What a strip of kVectors at column c prefetches while it is at row r of the tile that begins at `begin`: the next
  // tile, in the order of memory if it has no gaps.
  template <int kVectors>
  PYNN_HD int64_t ahead(int64_t tile, int64_t begin, int64_t r, int64_t c) const {
    if (columns < stride) return (r + tile) * stride + c;
    return (begin + tile) * stride + c * tile + (r - begin) * kVectors * kStep;
  }

  // each(r, first, second) adds row r of a strip to running sums; kUnroll rows of at most kFlush tiles are summed side
  // by side, the same for a strip of any width, since where a column is depends on the number of threads.
  template <int kVectors, int kUnroll, class Each>
  static void sum_rows(int64_t begin, int64_t end, double* first_sums, double* second_sums, const Each& each) {
    Vec<A> first[kUnroll][kVectors] = {}, second[kUnroll][kVectors] = {};
    int64_t r = begin;
    for (; r + kUnroll <= end; r += kUnroll)
#pragma GCC unroll 2
      for (int u = 0; u < kUnroll; ++u) each(r + u, first[u], second[u]);
    for (; r < end; ++r) each(r, first[0], second[0]);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      if constexpr (kUnroll == 2) first[0][j] += first[1][j], second[0][j] += second[1][j];
      add_to(first_sums + j * kStep, first[0][j]);
      add_to(second_sums + j * kStep, second[0][j]);
    }
  }

  // Sums of x - center and, for kSecond, of its square.
  template <bool kSecond>
  void moments(const T* x, const A* centers, ColumnSums<T>& sums) const {
    each_strip<kWide>(kFlush, [&](auto vectors, int64_t c, int64_t tail, int64_t begin, int64_t end) {
      constexpr int V = vectors;
      using R = Row<T, V>;
      const R center = R::coefficients(centers + c);
      sum_rows<V, 1>(begin, end, sums.first + c, sums.second + c, [&](int64_t r, Vec<A>* first, Vec<A>* second) {
        const T* from = x + r * stride + c;
        R::prefetch(from + kFlush * stride);
        const R row = R::read(from, tail);
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) {
          const Vec<A> d = row.v[j] - center.v[j];
          first[j] += d;
          if constexpr (kSecond) second[j] = fma(d, d, second[j]);
        }
      });
    });
  }

  template <bool kSilu, bool kStream>
  void forward(const T* x, T* y, const Coefficients<T>& k) const {
    each_strip<kSilu ? 2 : kWide>(kTile, [&](auto vectors, int64_t c, int64_t tail, int64_t begin, int64_t end) {
      constexpr int V = vectors;
      using R = Row<T, V>;
      const R center = R::coefficients(k.center + c), scale = R::coefficients(k.scale + c),
              shift = R::coefficients(k.shift + c);
      for (int64_t r = begin; r < end; ++r) {
        R row = R::read(x + r * stride + c, tail);
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j)
          row.v[j] = activate<kSilu>(fma(Vec<A>(row.v[j] - center.v[j]), scale.v[j], shift.v[j]));
        row.template write<kStream>(y + r * stride + c, tail);
      }
    });
  }

  // Sums of dz and dz * (x - center). With kKeep, dz is kept for the second pass.
  template <bool kSilu, bool kKeep>
  void backward_sums(const T* dy, const T* x, A* kept, int64_t kept_stride, const Coefficients<T>& k,
                     ColumnSums<T>& sums) const {
    each_strip<2>(kTile, [&](auto vectors, int64_t c, int64_t tail, int64_t begin, int64_t end) {
      constexpr int V = vectors;
      using R = Row<T, V>;
      const R center = R::coefficients(k.center + c), scale = R::coefficients(k.scale + c),
              shift = R::coefficients(k.shift + c);
      sum_rows<V, 2>(begin, end, sums.first + c, sums.second + c, [&](int64_t r, Vec<A>* first, Vec<A>* second) {
        const int64_t at = r * stride + c;
        R::prefetch(x + ahead<V>(kTile, begin, r, c));
        R::prefetch(dy + ahead<V>(kTile, begin, r, c));
        const R row = R::read(x + at, tail);
        auto dz = Row<A, V>::of(R::read(dy + at, tail));
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) {
          const Vec<A> d = row.v[j] - center.v[j];
          if constexpr (kSilu) dz.v[j] = activate_grad<kSilu>(dz.v[j], fma(d, scale.v[j], shift.v[j]));
          first[j] += dz.v[j];
          second[j] = fma(dz.v[j], d, second[j]);
        }
        if constexpr (kKeep && std::is_same_v<T, A>) R::template prefetch<true>(kept + ahead<V>(kTile, begin, r, c));
        if constexpr (kKeep) dz.template write<false>(kept + r * kept_stride + c, tail);
      });
    });
  }

  template <bool kSilu, bool kKeep, bool kStream>
  void backward(const T* dy, const T* x, const A* kept, int64_t kept_stride, T* dx, const Coefficients<T>& k) const {
    each_strip<2>(kTile, [&](auto vectors, int64_t c, int64_t tail, int64_t begin, int64_t end) {
      constexpr int V = vectors;
      using R = Row<T, V>;
      const R center = R::coefficients(k.center + c), scale = R::coefficients(k.scale + c),
              shift = R::coefficients(k.shift + c), slope = R::coefficients(k.slope + c),
              constant = R::coefficients(k.constant + c);
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = r * stride + c;
        R row = R::read(x + at, tail);
        Row<A, V> dz;
        if constexpr (kKeep) dz = Row<A, V>::read(kept + r * kept_stride + c, tail);
        if constexpr (!kKeep) dz = Row<A, V>::of(R::read(dy + at, tail));
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) {
          const Vec<A> d = row.v[j] - center.v[j];
          Vec<A> grad = dz.v[j];
          if constexpr (!kKeep) grad = activate_grad<kSilu>(grad, fma(d, scale.v[j], shift.v[j]));
          row.v[j] = fma(scale.v[j], grad, fma(slope.v[j], d, constant.v[j]));
        }
        row.template write<kStream>(dx + at, tail);
      }
    });
  }
};

}  // namespace pynn::cpu::group_norm
