// Products with weights whose rows lie along the sum: what the forward pass multiplies with.
//
// A vector of such weights where they lie holds consecutive k's. So that no path has to turn all of them, an element is
// a sum over k in blocks of kBlock, and in a block one chain for each residue of k modulo kResidues, one after the
// other: vectors of kResidues k's of several rows are multiplied as they come, at the speed of memory, and packed
// panels have the rows of a chain together.
#pragma once
#include "recurrent_tile.h"
#include "vec_transpose.h"

namespace pynn::cpu::recurrent {

template <class A>
inline constexpr int kResidues = kLanes<A> < 4 ? kLanes<A> : 4;
template <class A>
inline constexpr int64_t kBlock = kChain * kResidues<A>;

// Rows of a packed panel: chains are of one length.
template <class A>
constexpr int64_t packed_depth(int64_t depth) {
  return round_up(depth, kResidues<A>);
}

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

// Rows k to k + count, a block, of a panel of the transpose of w, (rows, depth): vector v of a row are the rows
// first[v] and on of w. One vector after the other, so that the memory sees few streams.
template <int NV, class T>
[[gnu::noinline]] void pack_block(const T* w, int64_t depth, const PanelRows& rows, int64_t k, int64_t count,
                                  accumulate_t<T>* to, Ahead& ahead) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>, S = kResidues<A>;
  const int64_t length = ceil_div(count, S), step = NV * L;
  for (int v = 0; v < NV; ++v) {
    const T* const from = w + rows.first[v] * depth;
    A* place = to + v * L;
    for (int64_t i = 0; i < length; i += L / S, place += L / S * step) {
      Vec<A> x[L];
      ahead.lines<kSquareLines<T>>();
      load_transposed(from, depth, rows.count[v], k + i * S, x);
      if (i + L / S <= length) [[likely]] {
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) store(place + (j % S * length + j / S) * step, x[j]);
      } else {
        for (int64_t j = 0; j < (length - i) * S; ++j) store(place + (j % S * length + j / S) * step, x[j]);
      }
    }
  }
}

// A whole panel, packed_depth rows.
template <int NV, class T>
void pack_rows(const T* w, int64_t depth, const PanelRows& rows, accumulate_t<T>* to, Ahead ahead = {}) {
  using A = accumulate_t<T>;
  for (int64_t k = 0; k < depth; k += kBlock<A>)
    pack_block<NV>(w, depth, rows, k, std::min(kBlock<A>, depth - k), to + k * NV * kLanes<A>, ahead);
}

// c[r * c_stride + :] += sum over k < depth of a[r * a_stride + k] * the panel's row k, for `rows` rows of a that are
// filled with 0 up to whole vectors; block(k, count) gives the packed rows k to k + count.
template <int NV, class Op, class A, class Block>
void multiply_packed_blocks(const A* a, int64_t a_stride, int64_t depth, const Block& block, int64_t rows, A* c,
                            int64_t c_stride, NextPanel<A> next) {
  constexpr int S = kResidues<A>, width = NV * kLanes<A>;
  const int64_t highest = tile_height<NV>(rows, depth);
  for (int64_t k = 0; k < depth; k += kBlock<A>) {
    const int64_t count = std::min(kBlock<A>, depth - k), length = ceil_div(count, S);
    const A* b = block(k, count);
    next.begin(length * NV, ceil_div(rows, highest));
    for (int r = 0; r < S; ++r, b += length * width)
      each_tile(rows, highest, [&](int64_t first, int64_t height) {
        next.lines();
        const A* const left = a + first * a_stride + k + r;
        A* const to = c + first * c_stride;
        kTiles<NV, true, A, Op>[height - 1](left, a_stride, S, 1, length, 0, b, width, to, c_stride);
      });
  }
}
template <int NV, class Op = MultiplyAdd, class A>
void multiply_packed(const A* a, int64_t a_stride, int64_t depth, const A* packed, int64_t rows, A* c,
                     int64_t c_stride) {
  constexpr int64_t width = NV * kLanes<A>;
  const auto block = [&](int64_t k, int64_t) { return packed + k * width; };
  const NextPanel<A> next(packed + packed_depth<A>(depth) * width, rows);
  multiply_packed_blocks<NV, Op>(a, a_stride, depth, block, rows, c, c_stride, next);
}
// With a panel that is packed block by block, as it is used.
template <int NV, class Op, class T, class A = accumulate_t<T>>
[[gnu::noinline]] void multiply_and_pack(const A* a, int64_t a_stride, int64_t depth, const T* w,
                                         const PanelRows& columns, int64_t rows, A* c, int64_t c_stride, Ahead ahead) {
  alignas(64) A packed[kBlock<A> * NV * kLanes<A>];
  const auto block = [&](int64_t k, int64_t count) -> const A* {
    pack_block<NV>(w, depth, columns, k, count, packed, ahead);
    return packed;
  };
  multiply_packed_blocks<NV, Op>(a, a_stride, depth, block, rows, c, c_stride, NextPanel<A>(nullptr, rows));
}

// Vectors of kResidues columns of some rows: lane i * kResidues + r of x[q] is column q * kResidues + r of row i; 0
// past `count` rows or `columns` columns.
template <class T, class A = accumulate_t<T>>
PYNN_HD void load_residues(const T* w, int64_t depth, int64_t count, int64_t columns,
                           Vec<A> (&x)[kLanes<A> / kResidues<A>]) {
  constexpr int kRows = kLanes<A> / kResidues<A>;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    if (count >= kRows && columns >= kLanes<A>) [[likely]] {
      constexpr __mmask16 all = __mmask16(-1);
      const auto halves = [](const float* low, const float* high) {
        return _mm512_maskz_insertf32x8(all, _mm512_castps256_ps512(_mm256_loadu_ps(low)), _mm256_loadu_ps(high), 1);
      };
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {  // eight columns
        const float* const from = w + h * 8;
        const VecFloat a = halves(from, from + depth), b = halves(from + 2 * depth, from + 3 * depth);
        x[2 * h] = _mm512_maskz_shuffle_f32x4(all, a, b, 0x88);
        x[2 * h + 1] = _mm512_maskz_shuffle_f32x4(all, a, b, 0xdd);
      }
      return;
    }
#endif
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) x[i] = i < count ? load_some(w + i * depth, columns) : Vec<A>{};
  transpose<A, kResidues<A>>(x);
}

// kResidues values, over and over.
template <class A>
PYNN_HD Vec<A> repeat_residues(const A* from) {
  Vec<A> v;
  for (int i = 0; i < kLanes<A>; i += kResidues<A>)
    memcpy(reinterpret_cast<char*>(&v) + i * sizeof(A), from, kResidues<A> * sizeof(A));
  return v;
}
#if defined(__AVX512F__)
template <>
PYNN_HD VecFloat repeat_residues(const float* from) {
  return _mm512_maskz_broadcast_f32x4(__mmask16(-1), _mm_loadu_ps(from));
}
template <>
PYNN_HD VecDouble repeat_residues(const double* from) {
  return _mm512_maskz_broadcast_f64x4(__mmask8(-1), _mm256_loadu_pd(from));
}
#elif defined(__AVX__)
template <>
PYNN_HD VecFloat repeat_residues(const float* from) {
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(from));
}
#endif

// The sums of the residues, for kLanes rows, added to c: sum[g] holds those of kLanes / kResidues rows, row by row.
template <class A>
PYNN_HD void add_residues(const Vec<A> (&sum)[kResidues<A>], A* c) {
  Vec<A> total = load(c);
  if constexpr (kResidues<A> == 4) {
    const Vec<A> even[] = {every_second<0, A>(sum[0], sum[1]), every_second<0, A>(sum[2], sum[3])};
    const Vec<A> odd[] = {every_second<1, A>(sum[0], sum[1]), every_second<1, A>(sum[2], sum[3])};
    total = total + every_second<0, A>(even[0], even[1]);
    total = total + every_second<0, A>(odd[0], odd[1]);
    total = total + every_second<1, A>(even[0], even[1]);
    total = total + every_second<1, A>(odd[0], odd[1]);
  } else {
    static_assert(kResidues<A> == 2);
    total = total + every_second<0, A>(sum[0], sum[1]);
    total = total + every_second<1, A>(sum[0], sum[1]);
  }
  store(c, total);
}

// With weights where they lie, for MR rows: faster than packing what is used once.
template <int NV, int MR, class Op, class T, class A = accumulate_t<T>>
[[gnu::noinline]] void multiply_in_place(const A* a, int64_t a_stride, int64_t depth, const T* w, const PanelRows& rows,
                                         A* c, int64_t c_stride, Ahead ahead) {
  constexpr int L = kLanes<A>, S = kResidues<A>, kRows = L / S;
  for (int v = 0; v < NV; ++v, c += L) {
    const T* const from = w + rows.first[v] * depth;
    for (int64_t begin = 0; begin < depth; begin += kBlock<A>) {
      Vec<A> sum[MR][S] = {};
      for (int64_t k = begin, end = std::min(begin + kBlock<A>, depth); k < end; k += L) {
        Vec<A> left[MR][kRows];
#pragma GCC unroll 2
        for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
          for (int q = 0; q < kRows; ++q) left[i][q] = repeat_residues(a + i * a_stride + k + q * S);
#pragma GCC unroll 4
        for (int g = 0; g < S; ++g) {
          Vec<A> x[kRows];
          ahead.lines<std::max<int64_t>(1, kSquareLines<T> / S)>();
          load_residues(from + g * kRows * depth + k, depth, rows.count[v] - g * kRows, depth - k, x);
#pragma GCC unroll 4
          for (int q = 0; q < kRows; ++q)
#pragma GCC unroll 2
            for (int i = 0; i < MR; ++i) sum[i][g] = Op::add(left[i][q], x[q], sum[i][g]);
        }
      }
      for (int i = 0; i < MR; ++i) add_residues<A>(sum[i], c + i * c_stride);
    }
  }
}

}  // namespace pynn::cpu::recurrent
