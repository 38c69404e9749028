// The inner loops of group_norm on the CPU: statistics and elementwise passes over one channel's run of pixels, or over
// a block of channels-last columns. See group_norm.cpp for how they are put together.
#pragma once
#include <algorithm>
#include <cmath>
#include <iterator>
#include <type_traits>

#include "group_norm.h"
#include "group_norm_math.h"
#include "vec_load.h"
#include "vec_math.h"

namespace pynn::cpu::group_norm {

using namespace pynn::group_norm;

inline constexpr int kFlush = 16;
inline constexpr int kMaxVectors = 4;  // vectors in a row of columns
template <class T>
inline constexpr int64_t kColumns = kMaxVectors * kComputeLanes<T>;

// sigmoid(z) and sigmoid(-z), both with a small relative error: neither is taken as 1 minus the other.
template <class V>
struct Sigmoid {
  V plus, minus;
  explicit PYNN_HD Sigmoid(V z) {
    const V e = exp(V(z < 0 ? z : -z)), r = 1 / (e + 1), er = e * r;
    plus = z < 0 ? er : r;
    minus = z < 0 ? r : er;
  }
};
#if defined(__AVX512F__)
// With e = exp(-|z|) = 2^(n / 16) e^r from a table of 16 powers and a cubic in |r| <= ln 2 / 32; 1 / (1 + e) by one
// Newton step. About half the instructions of the general form.
template <>
PYNN_HD Sigmoid<VecFloat>::Sigmoid(VecFloat z) {
  const VecFloat powers = {0x1p0f,        0x1.0b5586p0f, 0x1.172b84p0f, 0x1.2387a6p0f, 0x1.306fep0f,  0x1.3dea64p0f,
                           0x1.4bfdaep0f, 0x1.5ab07ep0f, 0x1.6a09e6p0f, 0x1.7a1148p0f, 0x1.8ace54p0f, 0x1.9c4918p0f,
                           0x1.ae89fap0f, 0x1.c199bep0f, 0x1.d5818ep0f, 0x1.ea4afap0f};
  const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(z));
  const VecFloat x = _mm512_max_ps(broadcast(-104.5f), _mm512_or_ps(z, broadcast(-0.0f)));  // NaN stays NaN
  const float magic = 0x1.8p19f;  // adding it leaves the nearest multiple of 1/16
  const VecFloat shifted = fma(x, broadcast(0x1.715476p0f), broadcast(magic));
  const VecFloat n = shifted - magic;
  const VecFloat r = fma(n, broadcast(0x1.e8082ep-16f), fma(n, broadcast(-0x1.62e8p-1f), x));
  const VecFloat p = fma(r * r, fma(r, broadcast(0x1.555556p-3f), broadcast(0.5f)), r);
  const VecFloat power = _mm512_permutexvar_ps(_mm512_castps_si512(shifted), powers);
  const VecFloat e = _mm512_maskz_scalef_ps(__mmask16(-1), fma(power, p, power), n);  // takes the floor of n
  const VecFloat d = e + 1.0f, guess = _mm512_maskz_rcp14_ps(__mmask16(-1), d);
  const VecFloat inverse = fma(guess, fma(-d, guess, broadcast(1.0f)), guess);
  plus = _mm512_mask_mul_ps(inverse, negative, e, inverse);
  minus = _mm512_mask_mul_ps(inverse, __mmask16(~negative), e, inverse);
}
#endif
template <bool kSilu, class V>
PYNN_HD V activate(V z) {
  if constexpr (!kSilu) return z;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, VecFloat>) return z * Sigmoid<V>(z).plus;
#endif
  const V e = exp(V(z < 0 ? z : -z));
  return (z < 0 ? z * e : z) / (1 + e);  // a division, but one rounding fewer
}
// grad * act'(z)
template <bool kSilu, class V>
PYNN_HD V activate_grad(V grad, V z) {
  if constexpr (!kSilu) return grad;
  const Sigmoid<V> s(z);
  return grad * (s.plus * fma(z, s.minus, V{} + 1));
}

// ---------------------------------------------------------------- contiguous runs: (channel, pixels)

// Calls body(index, whole) for each vector of [0, count); whole is std::false_type for a last, partial one.
template <int kStep, class Body>
PYNN_HD void each_vector(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) body(i, std::true_type{});
  if (i < count) body(i, std::false_type{});
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

template <bool kSilu, class T>
void run_forward(const T* x, T* y, int64_t count, double center, const Affine& affine) {
  using A = accumulate_t<T>;
  const Vec<A> center_v = broadcast(A(center)), scale = broadcast(A(affine.scale)), shift = broadcast(A(affine.shift));
  each_vector<kComputeLanes<T>>(count, [&](int64_t i, auto whole) {
    const Vec<A> v = whole ? load_compute(x + i) : load_part(x + i, count - i, A(0));
    const Vec<A> out = activate<kSilu>(fma(Vec<A>(v - center_v), scale, shift));
    whole ? store_compute(y + i, out) : store_part(y + i, count - i, out);
  });
}

// Sums of dz and dz * (x - center) over one channel. With kKeep, dz stays in dx for the second pass.
template <bool kSilu, bool kKeep, class T>
Sums run_backward_sums(const T* dy, const T* x, T* dx, int64_t count, double center, const Affine& affine) {
  using A = accumulate_t<T>;
  constexpr int kStep = kComputeLanes<T>;
  const Vec<A> center_v = broadcast(A(center)), scale = broadcast(A(affine.scale)), shift = broadcast(A(affine.shift));
  const auto add = [&](int64_t i, auto whole, Vec<A>& first, Vec<A>& second) {
    const Vec<A> v = whole ? load_compute(x + i) : load_part(x + i, count - i, A(center));
    const Vec<A> grad = whole ? load_compute(dy + i) : load_part(dy + i, count - i, A(0));
    const Vec<A> d = v - center_v, dz = activate_grad<kSilu>(grad, fma(d, scale, shift));
    if constexpr (kKeep) whole ? store_compute(dx + i, dz) : store_part(dx + i, count - i, dz);
    first += dz;
    second = fma(dz, d, second);
  };
  Sums total;
  for (int64_t i = 0; i < count;) {
    Vec<A> first0 = {}, first1 = {}, second0 = {}, second1 = {};
    const int64_t end = std::min<int64_t>(count, i + 2 * kFlush * kStep);
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
    total.first += add_lanes(first0 + first1);
    total.second += add_lanes(second0 + second1);
  }
  return total;
}

template <bool kSilu, bool kKeep, class T>
void run_backward(const T* dy, const T* x, T* dx, int64_t count, double center, const Affine& forward,
                  const Affine& backward) {
  using A = accumulate_t<T>;
  const Vec<A> center_v = broadcast(A(center)), scale = broadcast(A(forward.scale)),
               shift = broadcast(A(forward.shift));
  const Vec<A> b = broadcast(A(backward.scale)), k = broadcast(A(backward.shift));
  const T* from = kKeep ? dx : dy;
  each_vector<kComputeLanes<T>>(count, [&](int64_t i, auto whole) {
    const Vec<A> v = whole ? load_compute(x + i) : load_part(x + i, count - i, A(0));
    Vec<A> dz = whole ? load_compute(from + i) : load_part(from + i, count - i, A(0));
    const Vec<A> d = v - center_v;
    if constexpr (!kKeep) dz = activate_grad<kSilu>(dz, fma(d, scale, shift));
    const Vec<A> out = fma(scale, dz, fma(b, d, k));
    whole ? store_compute(dx + i, out) : store_part(dx + i, count - i, out);
  });
}

// ---------------------------------------------------------------- channels-last blocks: rows of `count` <= kColumns
// channels

// Coefficients of each column, as the vector loops read them. Lanes past the last column stay 0.
template <class T>
struct Columns {
  using A = accumulate_t<T>;
  A center[kColumns<T>], scale[kColumns<T>], shift[kColumns<T>], slope[kColumns<T>], constant[kColumns<T>];

  explicit Columns(int64_t count) {
    const int64_t last = (count - 1) / kComputeLanes<T> * kComputeLanes<T>;
    for (A* values : {center, scale, shift, slope, constant}) store(values + last, Vec<A>{});
  }
  void forward(int64_t c, const GroupStats& s, const Affine& affine) {
    center[c] = A(s.center), scale[c] = A(affine.scale), shift[c] = A(affine.shift);
  }
  void backward(int64_t c, const Affine& affine) { slope[c] = A(affine.scale), constant[c] = A(affine.shift); }
};

template <class T>
struct ColumnSums {
  double first[kColumns<T>] = {}, second[kColumns<T>] = {};
};

// Calls body(std::integral_constant<int, vectors>) for the number of vectors that hold `count` columns.
template <class T, class Body>
PYNN_HD void with_vectors(int64_t count, const Body& body) {
  switch ((count + kComputeLanes<T> - 1) / kComputeLanes<T>) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 3:
      return body(std::integral_constant<int, 3>{});
    default:
      return body(std::integral_constant<int, 4>{});
  }
}

// One row of columns in registers.
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
};

template <class V>
PYNN_HD void add_to(double* sums, V v) {
  std::remove_reference_t<decltype(v[0])> lanes[sizeof(v) / sizeof(v[0])];
  store(lanes, v);
  for (size_t i = 0; i < std::size(lanes); ++i) sums[i] += lanes[i];
}

// Walks the rows in pieces of 2 * kFlush; each(row, first, second) adds to two rows of running sums in registers.
template <class T, int kVectors, class Each>
void sum_rows(int64_t rows, ColumnSums<T>& sums, const Each& each) {
  using A = accumulate_t<T>;
  constexpr int kStep = kComputeLanes<T>, kUnroll = kVectors < 3 ? 2 : 1;
  for (int64_t start = 0; start < rows; start += kUnroll * kFlush) {
    const int64_t end = std::min<int64_t>(rows, start + kUnroll * kFlush);
    Vec<A> first[kUnroll][kVectors] = {}, second[kUnroll][kVectors] = {};
    int64_t r = start;
    for (; r + kUnroll <= end; r += kUnroll)
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) each(r + u, first[u], second[u]);
    for (; r < end; ++r) each(r, first[0], second[0]);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      if constexpr (kUnroll == 2) first[0][j] += first[1][j], second[0][j] += second[1][j];
      add_to(sums.first + j * kStep, first[0][j]);
      add_to(sums.second + j * kStep, second[0][j]);
    }
  }
}

// A block of columns in a (pixels, channels) sample.
template <class T, int kVectors>
struct Block {
  using A = accumulate_t<T>;
  using R = Row<T, kVectors>;
  int64_t rows, stride, tail;

  Block(const GroupNormShape& shape, int64_t columns)
      : rows(shape.pixels), stride(shape.channels()), tail(columns - (kVectors - 1) * kComputeLanes<T>) {}

  template <bool kSecond>
  void moments(const T* x, const Columns<T>& c, ColumnSums<T>& sums) const {
    const R center = R::coefficients(c.center);
    sum_rows<T, kVectors>(rows, sums, [&](int64_t r, Vec<A>* first, Vec<A>* second) {
      const R row = R::read(x + r * stride, tail);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const Vec<A> d = row.v[j] - center.v[j];
        first[j] += d;
        if constexpr (kSecond) second[j] = fma(d, d, second[j]);
      }
    });
  }

  template <bool kSilu>
  void forward(const T* x, T* y, const Columns<T>& c) const {
    const R center = R::coefficients(c.center), scale = R::coefficients(c.scale), shift = R::coefficients(c.shift);
    for (int64_t r = 0; r < rows; ++r) {
      R row = R::read(x + r * stride, tail);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j)
        row.v[j] = activate<kSilu>(fma(Vec<A>(row.v[j] - center.v[j]), scale.v[j], shift.v[j]));
      row.write(y + r * stride, tail);
    }
  }

  template <bool kSilu, bool kKeep>
  void backward_sums(const T* dy, const T* x, T* dx, const Columns<T>& c, ColumnSums<T>& sums) const {
    const R center = R::coefficients(c.center), scale = R::coefficients(c.scale), shift = R::coefficients(c.shift);
    sum_rows<T, kVectors>(rows, sums, [&](int64_t r, Vec<A>* first, Vec<A>* second) {
      const R row = R::read(x + r * stride, tail);
      R dz = R::read(dy + r * stride, tail);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const Vec<A> d = row.v[j] - center.v[j];
        dz.v[j] = activate_grad<kSilu>(dz.v[j], fma(d, scale.v[j], shift.v[j]));
        first[j] += dz.v[j];
        second[j] = fma(dz.v[j], d, second[j]);
      }
      if constexpr (kKeep) dz.write(dx + r * stride, tail);
    });
  }

  template <bool kSilu, bool kKeep>
  void backward(const T* dy, const T* x, T* dx, const Columns<T>& c) const {
    const R center = R::coefficients(c.center), scale = R::coefficients(c.scale), shift = R::coefficients(c.shift);
    const R b = R::coefficients(c.slope), k = R::coefficients(c.constant);
    for (int64_t r = 0; r < rows; ++r) {
      R row = R::read(x + r * stride, tail);
      const R dz = R::read((kKeep ? dx : dy) + r * stride, tail);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const Vec<A> d = row.v[j] - center.v[j];
        Vec<A> grad = dz.v[j];
        if constexpr (!kKeep) grad = activate_grad<kSilu>(grad, fma(d, scale.v[j], shift.v[j]));
        row.v[j] = fma(scale.v[j], grad, fma(b.v[j], d, k.v[j]));
      }
      row.write(dx + r * stride, tail);
    }
  }
};

}  // namespace pynn::cpu::group_norm
