// The matrix products of recurrent layers: register tiles, packed panels of weights, and sums in one order.
//
// A panel is a few vectors wide: up to 24 accumulators stand in registers, rows x vectors. Every element is a sum over
// k in chains of at most kChain fused multiply-adds, each chain started at 0 and added to what was there before. The
// chains depend on the depth of the product alone, so neither the height of a tile nor the number of rows, nor the
// path by which weights come - packed panels, or read where they lie - touches a bit of the result.
#pragma once
#include <algorithm>
#include <array>
#include <utility>

#include "vec_load.h"

namespace pynn::cpu::recurrent {

inline constexpr int64_t kChain = 64;
inline constexpr int kPanelVectors = 4;
template <class A>
inline constexpr int64_t kPanelWidth = kPanelVectors * kLanes<A>;
template <int NV>
inline constexpr int kTileHeight = (kVectorRegisters == 32 ? 24 : 9) / NV;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The left operand of a product: element (r, k) is base[r * stride + k / run * run_stride + k % run].
template <class A>
struct LeftRows {
  const A* base;
  int64_t stride, run, run_stride;
};

// c[i * c_stride + :] (+)= sum over runs r, k < length of a[r * run_stride + i * a_row + k * a_step] * b[k * b_step +
// :] for MR rows of NV vectors; b goes on from run to run.
template <int MR, int NV, bool kAdd, class A>
[[gnu::noinline]] void multiply_tile(const A* a, int64_t a_row, int64_t a_step, int64_t runs, int64_t length,
                                     int64_t run_stride, const A* b, int64_t b_step, A* c, int64_t c_stride) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[MR][NV] = {};
  for (; runs > 0; --runs, a += run_stride) {
    const A *from = a, *const end = a + length * a_step;
    for (; from != end; from += a_step, b += b_step) {
      Vec<A> column[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) column[v] = load(b + v * L);
      __builtin_prefetch(b + 16 * NV * L);
      __builtin_prefetch(b + 17 * NV * L - L);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const Vec<A> value = broadcast(from[i * a_row]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[i][v] = fma(value, column[v], sum[i][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      A* to = c + i * c_stride + v * L;
      store(to, kAdd ? load(to) + sum[i][v] : sum[i][v]);
    }
  }
}

template <int NV, bool kAdd, class A, int... I>
inline constexpr auto make_tiles(std::integer_sequence<int, I...>) {
  return std::array<decltype(&multiply_tile<1, NV, kAdd, A>), sizeof...(I)>{&multiply_tile<I + 1, NV, kAdd, A>...};
}
// The tiles of 1, 2, ... rows.
template <int NV, bool kAdd, class A>
inline constexpr auto kTiles = make_tiles<NV, kAdd, A>(std::make_integer_sequence<int, kTileHeight<NV>>{});

// Calls body(first, height) for tiles of about the same height.
template <int NV, class Body>
inline void each_tile(int64_t rows, const Body& body) {
  const int64_t tiles = ceil_div(rows, kTileHeight<NV>);
  for (int64_t t = 0, first = 0; t < tiles; ++t) {
    const int64_t height = rows / tiles + (t < rows % tiles);
    body(first, height);
    first += height;
  }
}

// The longest chain of a product whose left rows come in such runs: whole runs, or parts of one.
constexpr int64_t chain_of(int64_t run) { return run > 0 && run <= kChain ? kChain / run * run : kChain; }

// One panel: c[r * c_stride + :] += sum over k < depth of a(r, k) * b[k * NV * L + :] for `rows` rows, where
// block(k, count) gives the rows k to k + count of b.
template <int NV, class A, class Block>
void multiply_blocks(const LeftRows<A>& a, int64_t depth, const Block& block, int64_t rows, A* c, int64_t c_stride) {
  const int64_t chain = chain_of(a.run), width = NV * kLanes<A>;
  for (int64_t k = 0; k < depth; k += chain) {
    const int64_t count = std::min(chain, depth - k), length = a.run <= kChain ? a.run : count;
    const A* const from = a.base + (a.run <= kChain ? k / a.run * a.run_stride : k);
    const A* const b = block(k, count);
    each_tile<NV>(rows, [&](int64_t first, int64_t height) {
      const A* const left = from + first * a.stride;
      A* const to = c + first * c_stride;
      kTiles<NV, true, A>[height - 1](left, a.stride, 1, count / length, length, a.run_stride, b, width, to, c_stride);
    });
  }
}
template <int NV, class A>
void multiply(const LeftRows<A>& a, int64_t depth, const A* b, int64_t rows, A* c, int64_t c_stride) {
  const auto block = [&](int64_t k, int64_t) { return b + k * NV * kLanes<A>; };
  multiply_blocks<NV>(a, depth, block, rows, c, c_stride);
}

// a0 b0 a1 b1 ... of the low or the high halves.
template <class V, int... I>
PYNN_HD V interleave(V a, V b, int first, std::integer_sequence<int, I...>) {
  constexpr int half = sizeof...(I) / 2;
  return first ? __builtin_shufflevector(a, b, (half + I / 2 + (I & 1) * 2 * half)...)
               : __builtin_shufflevector(a, b, (I / 2 + (I & 1) * 2 * half)...);
}
// L vectors of L lanes, in place.
template <class A>
PYNN_HD void transpose(Vec<A> (&x)[kLanes<A>]) {
  constexpr int L = kLanes<A>;
  constexpr auto lanes = std::make_integer_sequence<int, L>{};
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
    Vec<A> y[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      y[2 * i] = interleave(x[i], x[i + L / 2], 0, lanes);
      y[2 * i + 1] = interleave(x[i], x[i + L / 2], 1, lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) x[i] = y[i];
  }
}

template <class T>
PYNN_HD Vec<accumulate_t<T>> load_some(const T* from, int64_t count) {
  if (count >= kComputeLanes<T>) [[likely]]
    return load_compute(from);
  return load_part(from, count, accumulate_t<T>(0));
}
template <class T>
PYNN_HD void store_some(T* to, int64_t count, Vec<accumulate_t<T>> v) {
  if (count >= kComputeLanes<T>) [[likely]]
    store_compute(to, v);
  else
    store_part(to, count, v);
}

// Which rows of a weight matrix are the columns of a panel: vector v holds rows first[v] to first[v] + count[v].
struct PanelRows {
  int64_t first[kPanelVectors], count[kPanelVectors];
};

#if defined(__AVX512F__)
// Columns k to k + 16 of 16 whole rows, as vectors over the rows. Each load takes two rows' halves, so that three
// rounds of shuffles are left instead of four, and none of them crosses more than it must.
PYNN_HD void load_square(const float* w, int64_t depth, VecFloat (&x)[16]) {
  constexpr __mmask16 all = __mmask16(-1);
  constexpr __mmask8 pairs = __mmask8(-1);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    VecFloat rows[8], two[8], four[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const float* from = w + (i % 4 + i / 4 * 8) * depth + half * 8;
      rows[i] = _mm512_maskz_insertf32x8(all, _mm512_castps256_ps512(_mm256_loadu_ps(from)),
                                         _mm256_loadu_ps(from + 4 * depth), 1);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      two[i] = _mm512_maskz_unpacklo_ps(all, rows[i], rows[i + 1]);
      two[i + 1] = _mm512_maskz_unpackhi_ps(all, rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(two[i / 2 * 4 + i % 2]), b = _mm512_castps_pd(two[i / 2 * 4 + i % 2 + 2]);
      four[i / 2 * 4 + i % 2 * 2] = _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(pairs, a, b));
      four[i / 2 * 4 + i % 2 * 2 + 1] = _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(pairs, a, b));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[half * 8 + i] = _mm512_maskz_shuffle_f32x4(all, four[i], four[4 + i], 0x88);
      x[half * 8 + 4 + i] = _mm512_maskz_shuffle_f32x4(all, four[i], four[4 + i], 0xdd);
    }
  }
}
#endif
template <class T>
PYNN_HD void load_square(const T* w, int64_t depth, Vec<accumulate_t<T>> (&x)[kComputeLanes<T>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kComputeLanes<T>; ++i) x[i] = load_compute(w + i * depth);
  transpose<accumulate_t<T>>(x);
}

// Columns k to k + L of `count` rows, as vectors over the rows; 0 outside.
template <class T>
PYNN_HD void load_transposed(const T* w, int64_t depth, int64_t count, int64_t k,
                             Vec<accumulate_t<T>> (&x)[kComputeLanes<T>]) {
  constexpr int L = kComputeLanes<T>;
  if (count >= L && k + L <= depth) [[likely]]
    return load_square(w + k, depth, x);
  for (int i = 0; i < L; ++i) x[i] = i < count ? load_some(w + i * depth + k, depth - k) : Vec<accumulate_t<T>>{};
  transpose<accumulate_t<T>>(x);
}

// Rows begin to end of a panel of the transpose of w, (rows, depth): to[k - begin][v * L + lane] = w[first[v] +
// lane][k]. One vector after the other, so that the memory sees few streams.
template <int NV, class T>
[[gnu::noinline]] void pack_transposed(const T* w, int64_t depth, const PanelRows& rows, int64_t begin, int64_t end,
                                       accumulate_t<T>* to) {
  constexpr int L = kComputeLanes<T>;
  for (int v = 0; v < NV; ++v) {
    const T* const from = w + rows.first[v] * depth;
    accumulate_t<T>* place = to + v * L;
    for (int64_t k = begin; k < end; k += L, place += L * NV * L) {
      Vec<accumulate_t<T>> x[L];
      load_transposed(from, depth, rows.count[v], k, x);
      if (k + L <= end) [[likely]] {
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) store(place + j * NV * L, x[j]);
      } else {
        for (int64_t j = 0; j < end - k; ++j) store(place + j * NV * L, x[j]);
      }
    }
  }
}

// multiply() with a panel of the transpose of w that is packed chain by chain, as it is used.
template <int NV, class T, class A = accumulate_t<T>>
[[gnu::noinline]] void multiply_transposed(const LeftRows<A>& a, int64_t depth, const T* w, const PanelRows& columns,
                                           int64_t rows, A* c, int64_t c_stride) {
  alignas(64) A packed[kChain * NV * kLanes<A>];
  const auto block = [&](int64_t k, int64_t count) -> const A* {
    pack_transposed<NV>(w, depth, columns, k, k + count, packed);
    return packed;
  };
  multiply_blocks<NV>(a, depth, block, rows, c, c_stride);
}

// The product of multiply() with weights where they lie, for MR rows: faster than packing what is used once. One vector
// after the other, so that the memory sees few streams.
template <int NV, int MR, class T, class A = accumulate_t<T>>
[[gnu::noinline]] void multiply_in_place(const A* a, int64_t a_stride, int64_t depth, const T* w, const PanelRows& rows,
                                         A* c, int64_t c_stride) {
  constexpr int L = kLanes<A>;
  for (int v = 0; v < NV; ++v, c += L) {
    const T* const from = w + rows.first[v] * depth;
    for (int64_t begin = 0; begin < depth; begin += kChain) {
      Vec<A> sum[MR] = {};
      const int64_t end = std::min(begin + kChain, depth);
      for (int64_t k = begin; k < end; k += L) {
        Vec<A> x[L];
        load_transposed(from, depth, rows.count[v], k, x);
        if (k + L <= end) [[likely]] {
#pragma GCC unroll 16
          for (int j = 0; j < L; ++j)
            for (int i = 0; i < MR; ++i) sum[i] = fma(broadcast(a[i * a_stride + k + j]), x[j], sum[i]);
        } else {
          for (int j = 0; j < end - k; ++j)
            for (int i = 0; i < MR; ++i) sum[i] = fma(broadcast(a[i * a_stride + k + j]), x[j], sum[i]);
        }
      }
      for (int i = 0; i < MR; ++i) store(c + i * c_stride, load(c + i * c_stride) + sum[i]);
    }
  }
}

// A panel of w, (depth, columns), itself: to[:] = w[k][first ...] for `count` columns, 0 after them.
template <class T>
PYNN_HD void pack_row(const T* from, int64_t count, accumulate_t<T>* to) {
  constexpr int L = kComputeLanes<T>;
  for (int v = 0; v < kPanelVectors; ++v)
    store(to + v * L, count > v * L ? load_some(from + v * L, count - v * L) : Vec<accumulate_t<T>>{});
}

// Converts `count` values, and fills with 0 up to a whole number of vectors.
template <class T>
PYNN_HD void convert(const T* from, int64_t count, accumulate_t<T>* to) {
  constexpr int L = kComputeLanes<T>;
  for (int64_t i = 0; i < count; i += L) store(to + i, load_some(from + i, count - i));
}

}  // namespace pynn::cpu::recurrent
