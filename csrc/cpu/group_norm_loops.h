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

inline constexpr int kPack = 4;  // vectors that are computed side by side

// Calls body(std::integral_constant<int, vectors>, index, tail) for the vectors of [0, count), up to kPack at a time;
// tail: elements of the last of them.
template <int kStep, class Body>
PYNN_HD void each_pack(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kPack * kStep <= count; i += kPack * kStep) body(std::integral_constant<int, kPack>{}, i, int64_t(kStep));
  if (i == count) return;
  const int64_t vectors = (count - i + kStep - 1) / kStep, tail = count - i - (vectors - 1) * kStep;
  if (vectors == 1) return body(std::integral_constant<int, 1>{}, i, tail);
  if (vectors == 2) return body(std::integral_constant<int, 2>{}, i, tail);
  if (vectors == 3) return body(std::integral_constant<int, 3>{}, i, tail);
  body(std::integral_constant<int, 4>{}, i, tail);
}

// One vector of `count` elements, where kWhole all its lanes.
template <bool kWhole, class T>
PYNN_HD Vec<accumulate_t<T>> read_run(const T* from, int64_t count, accumulate_t<T> fill) {
  return kWhole ? load_compute(from) : load_part(from, count, fill);
}
template <bool kWhole, class T>
PYNN_HD void write_run(T* to, int64_t count, Vec<accumulate_t<T>> v) {
  kWhole ? store_compute(to, v) : store_part(to, count, v);
}

template <class T, int N>
PYNN_HD void read_pack(Vec<accumulate_t<T>> (&to)[N], const T* from, int64_t tail, accumulate_t<T> fill) {
  constexpr int kStep = kComputeLanes<T>;
#pragma GCC unroll 8
  for (int u = 0; u < N - 1; ++u) to[u] = load_compute(from + u * kStep);
  const T* last = from + (N - 1) * kStep;
  to[N - 1] = tail == kStep ? load_compute(last) : load_part(last, tail, fill);
}
template <bool kStream, class T, int N>
PYNN_HD void write_pack(T* to, int64_t tail, const Vec<accumulate_t<T>> (&from)[N]) {
  constexpr int kStep = kComputeLanes<T>;
  if constexpr (kStream) {
#pragma GCC unroll 8
    for (int u = 0; u < N; ++u) stream_compute(to + u * kStep, from[u]);
  } else {
#pragma GCC unroll 8
    for (int u = 0; u < N - 1; ++u) store_compute(to + u * kStep, from[u]);
    T* last = to + (N - 1) * kStep;
    tail == kStep ? store_compute(last, from[N - 1]) : store_part(last, tail, from[N - 1]);
  }
}

// Two sums whose lanes are still to be added up.
struct LaneSums {
  VecDouble first = {}, second = {};
};

// Sums of x - center and, for kSecond, of its square.
template <bool kSecond, class T>
PYNN_HD LaneSums run_moments(const T* x, int64_t count, accumulate_t<T> center) {
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
  static constexpr int64_t kRoom = kColumns<T> + kComputeLanes<T>;  // a last vector may begin at the last column
  A center[kRoom], scale[kRoom], shift[kRoom], slope[kRoom], constant[kRoom];
  double delta[kRoom], rstd[kRoom];  // the statistics of each channel's group

  explicit Coefficients(int64_t channels) {
    const int64_t last = (channels - 1) / kComputeLanes<T> * kComputeLanes<T>;
    for (A* values : {center, scale, shift, slope, constant}) store(values + last, Vec<A>{});
  }
};

// Calls body(std::integral_constant<int, N>, c) for N channels from c on, up to kPack at a time.
template <class Body>
PYNN_HD void each_few(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kPack <= channels; c += kPack) body(std::integral_constant<int, kPack>{}, c);
  for (; c < channels; ++c) body(std::integral_constant<int, 1>{}, c);
}

// run_forward of channels of up to one vector: those of several channels are computed side by side.
template <bool kSilu, bool kWhole, class T>
void short_forward(const T* x, T* y, int64_t channels, int64_t pixels, const Coefficients<T>& k) {
  using A = accumulate_t<T>;
  each_few(channels, [&](auto count, int64_t c) __attribute__((always_inline)) {
    constexpr int N = count;
    Vec<A> v[N];
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u)
      v[u] = fma(Vec<A>(read_run<kWhole>(x + (c + u) * pixels, pixels, A(0)) - broadcast(k.center[c + u])),
                 broadcast(k.scale[c + u]), broadcast(k.shift[c + u]));
    activate<kSilu>(v);
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) write_run<kWhole>(y + (c + u) * pixels, pixels, v[u]);
  });
}

// Writes a value to the columns from begin to end, and up to a vector beyond.
template <class A>
PYNN_HD void fill_columns(A* columns, int64_t begin, int64_t end, A value) {
  for (int64_t j = begin; j < end; j += kLanes<A>) store(columns + j, broadcast(value));
}

// A run of one channel of `pixels` elements after the other. While a SiLU is computed and y goes past the caches, what
// follows `ahead` elements later, the next task's x, comes from memory; without one, memory has enough to do.
template <bool kSilu, bool kStream, class T>
void run_forward(const T* x, T* y, int64_t channels, int64_t pixels, const Coefficients<T>& k, int64_t ahead) {
  using A = accumulate_t<T>;
  if (!kStream && pixels == kComputeLanes<T>) return short_forward<kSilu, true>(x, y, channels, pixels, k);
  if (!kStream && pixels < kComputeLanes<T>) return short_forward<kSilu, false>(x, y, channels, pixels, k);
  for (int64_t c = 0; c < channels; ++c, x += pixels, y += pixels) {
    const Vec<A> center = broadcast(k.center[c]), scale = broadcast(k.scale[c]), shift = broadcast(k.shift[c]);
    each_pack<kComputeLanes<T>>(pixels, [&](auto vectors, int64_t i, int64_t tail) __attribute__((always_inline)) {
      constexpr int V = vectors;
      Vec<A> v[V];
      if constexpr (kSilu && kStream) {
#pragma GCC unroll 4
        for (int u = 0; u < V; ++u) __builtin_prefetch(x + i + ahead + u * kComputeLanes<T>, 0, 2);
      }
      read_pack(v, x + i, tail, A(0));
#pragma GCC unroll 4
      for (Vec<A>& z : v) z = fma(Vec<A>(z - center), scale, shift);
      activate<kSilu>(v);
      write_pack<kStream>(y + i, tail, v);
    });
  }
}

// The sum of N vectors, of a balanced tree.
template <int N, class V>
PYNN_HD V sum_of(const V* values) {
  if constexpr (N == 1)
    return values[0];
  else
    return sum_of<(N + 1) / 2>(values) + sum_of<N / 2>(values + (N + 1) / 2);
}

// run_backward_sums of channels of V vectors, of which kWhole the last too: those of several channels are computed side
// by side, and nothing waits in memory.
template <bool kSilu, bool kKeep, int V, bool kWhole, class T, class A = accumulate_t<T>>
void short_backward_sums(const T* dy, const T* x, A* kept, int64_t channels, int64_t pixels, const Coefficients<T>& k,
                         double* sum_dz, double* sum_dzx) {
  constexpr int kStep = kComputeLanes<T>, kTogether = kLanes<double>, N = std::min(std::max(1, kPack / V), kTogether);
  const int64_t tail = pixels - (V - 1) * kStep;
  for (int64_t first = 0; first < channels; first += kTogether) {
    VecDouble rows[2][kTogether];
#pragma GCC unroll 8
    for (int j = 0; j < kTogether; j += N) {
      Vec<A> d[N * V], z[N * V], dz[N * V];
      int64_t at[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const int64_t c = std::min<int64_t>(first + j + n, channels - 1);  // past the last one that one again
        at[n] = c * pixels;
        const Vec<A> center = broadcast(k.center[c]), scale = broadcast(k.scale[c]), shift = broadcast(k.shift[c]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const int64_t i = at[n] + v * kStep;
          const int u = n * V + v;
          d[u] = (v < V - 1 ? load_compute(x + i) : read_run<kWhole>(x + i, tail, k.center[c])) - center;
          dz[u] = v < V - 1 ? load_compute(dy + i) : read_run<kWhole>(dy + i, tail, A(0));
          z[u] = fma(d[u], scale, shift);
        }
      }
      activate_grad<kSilu>(dz, z);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        Vec<A> products[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const int u = n * V + v;
          products[v] = dz[u] * d[u];
          if constexpr (kKeep)
            v < V - 1 ? store(kept + at[n] + v * kStep, dz[u])
                      : write_run<kWhole>(kept + at[n] + v * kStep, tail, dz[u]);
        }
        rows[0][j + n] = fold(sum_of<V>(dz + n * V)), rows[1][j + n] = fold(sum_of<V>(products));
      }
    }
    store(sum_dz + first, add_rows(rows[0]));
    store(sum_dzx + first, add_rows(rows[1]));
  }
}
template <bool kSilu, bool kKeep, int V, class T, class A = accumulate_t<T>>
void short_backward_sums(const T* dy, const T* x, A* kept, int64_t channels, int64_t pixels, const Coefficients<T>& k,
                         double* sum_dz, double* sum_dzx) {
  if (pixels == V * kComputeLanes<T>)
    return short_backward_sums<kSilu, kKeep, V, true>(dy, x, kept, channels, pixels, k, sum_dz, sum_dzx);
  if constexpr (V > 1)
    if (pixels <= (V - 1) * kComputeLanes<T>)
      return short_backward_sums<kSilu, kKeep, V - 1>(dy, x, kept, channels, pixels, k, sum_dz, sum_dzx);
  short_backward_sums<kSilu, kKeep, V, false>(dy, x, kept, channels, pixels, k, sum_dz, sum_dzx);
}

// Sums of dz and dz * (x - center) of each channel. With kKeep, dz is kept for the second pass.
template <bool kSilu, bool kKeep, class T, class A = accumulate_t<T>>
void run_backward_sums(const T* dy, const T* x, A* kept, int64_t channels, int64_t pixels, const Coefficients<T>& k,
                       double* sum_dz, double* sum_dzx) {
  constexpr int64_t kStep = kComputeLanes<T>;
  if (pixels <= kPack * kStep)
    return short_backward_sums<kSilu, kKeep, kPack>(dy, x, kept, channels, pixels, k, sum_dz, sum_dzx);
  add_lanes_of(channels, sum_dz, sum_dzx, [&](int64_t c) __attribute__((always_inline)) {
    const Vec<A> center = broadcast(k.center[c]), scale = broadcast(k.scale[c]), shift = broadcast(k.shift[c]);
    const T *const from = x + c * pixels, *const grads = dy + c * pixels;
    LaneSums total;
    for (int64_t begin = 0; begin < pixels; begin += 2 * kFlush * kStep) {
      Vec<A> first0 = {}, first1 = {}, second0 = {}, second1 = {};
      const auto add = [&](auto vectors, int64_t i, int64_t tail) __attribute__((always_inline)) {
        constexpr int V = vectors;
        Vec<A> d[V], z[V], dz[V];
        i += begin;
        read_pack(d, from + i, tail, k.center[c]);
        read_pack(dz, grads + i, tail, A(0));
#pragma GCC unroll 4
        for (int u = 0; u < V; ++u) d[u] -= center, z[u] = fma(d[u], scale, shift);
        activate_grad<kSilu>(dz, z);
        if constexpr (kKeep) write_pack<false>(kept + c * pixels + i, tail, dz);
        first0 += dz[0], second0 = fma(dz[0], d[0], second0);
        if constexpr (V > 1) first1 += dz[1], second1 = fma(dz[1], d[1], second1);
        if constexpr (V > 2) first0 += dz[2], second0 = fma(dz[2], d[2], second0);
        if constexpr (V > 3) first1 += dz[3], second1 = fma(dz[3], d[3], second1);
      };
      each_pack<kStep>(std::min<int64_t>(pixels - begin, 2 * kFlush * kStep), add);
      total.first += fold(Vec<A>(first0 + first1)), total.second += fold(Vec<A>(second0 + second1));
    }
    return total;
  });
}

// run_backward of channels of one whole vector.
template <class T, class A>
void short_backward(const A* dz, const T* x, T* dx, int64_t channels, const Coefficients<T>& k) {
  constexpr int kStep = kComputeLanes<T>;
  for (int64_t c = 0; c < channels; ++c, dz += kStep, x += kStep, dx += kStep)
    store_compute(dx, fma(broadcast(k.scale[c]), load_compute(dz),
                          fma(broadcast(k.slope[c]), Vec<accumulate_t<T>>(load_compute(x) - broadcast(k.center[c])),
                              broadcast(k.constant[c]))));
}

template <bool kSilu, bool kKeep, bool kStream, class T, class A = accumulate_t<T>>
void run_backward(const T* dy, const T* x, const A* kept, T* dx, int64_t channels, int64_t pixels,
                  const Coefficients<T>& k) {
  if constexpr (!kStream && (kKeep || !kSilu))
    if (pixels == kComputeLanes<T>) {
      if constexpr (kKeep) return short_backward(kept, x, dx, channels, k);
      if constexpr (!kKeep) return short_backward(dy, x, dx, channels, k);
    }
  for (int64_t c = 0; c < channels; ++c, dy += pixels, kept += pixels, x += pixels, dx += pixels) {
    const Vec<A> center = broadcast(k.center[c]), scale = broadcast(k.scale[c]), shift = broadcast(k.shift[c]),
                 slope = broadcast(k.slope[c]), constant = broadcast(k.constant[c]);
    each_pack<kComputeLanes<T>>(pixels, [&](auto vectors, int64_t i, int64_t tail) __attribute__((always_inline)) {
      constexpr int V = vectors;
      Vec<A> d[V], dz[V];
      read_pack(d, x + i, tail, A(0));
      if constexpr (kKeep) read_pack(dz, kept + i, tail, A(0));
      if constexpr (!kKeep) read_pack(dz, dy + i, tail, A(0));
#pragma GCC unroll 4
      for (Vec<A>& v : d) v -= center;
      if constexpr (kSilu && !kKeep) {
        Vec<A> z[V];
        for (int u = 0; u < V; ++u) z[u] = fma(d[u], scale, shift);
        activate_grad<kSilu>(dz, z);
      }
#pragma GCC unroll 4
      for (int u = 0; u < V; ++u) dz[u] = fma(scale, dz[u], fma(slope, d[u], constant));
      write_pack<kStream>(dx + i, tail, dz);
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
    read_pack(row.v, from, tail, A(0));
    return row;
  }
  template <bool kStream>
  PYNN_HD void write(T* to, int64_t tail) const {
    write_pack<kStream>(to, tail, v);
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
        for (int j = 0; j < V; ++j) row.v[j] = fma(Vec<A>(row.v[j] - center.v[j]), scale.v[j], shift.v[j]);
        activate<kSilu>(row.v);
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
        Vec<A> d[V], z[V];
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) d[j] = row.v[j] - center.v[j], z[j] = fma(d[j], scale.v[j], shift.v[j]);
        activate_grad<kSilu>(dz.v, z);
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) first[j] += dz.v[j], second[j] = fma(dz.v[j], d[j], second[j]);
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
        Vec<A> d[V], z[V];
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) d[j] = row.v[j] - center.v[j], z[j] = fma(d[j], scale.v[j], shift.v[j]);
        if constexpr (!kKeep) activate_grad<kSilu>(dz.v, z);
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) row.v[j] = fma(scale.v[j], dz.v[j], fma(slope.v[j], d[j], constant.v[j]));
        row.template write<kStream>(dx + at, tail);
      }
    });
  }
};

}  // namespace pynn::cpu::group_norm
