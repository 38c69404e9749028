// Register tiles of small matrix products: the inner loops of the convolution kernels. Rows come through pointers or
// offsets, columns are vectors; every element is summed in the same order whatever the position of its tile.
#pragma once
#include "vec.h"

namespace pynn::cpu {

inline constexpr int kTileRows = kVectorRegisters == 32 ? 12 : 6;
inline constexpr int kTileVectors = 2;
template <class A> inline constexpr int kTileWidth = kTileVectors * kLanes<A>;

// c[i][:] (+)= sum over r < runs, k < length of base[offsets[i] + r * run_stride + k] * b[r * length + k][:]
// for kTileRows rows i of NV vectors. c has NV vectors per row.
template <int NV, class A>
[[gnu::noinline]] void multiply_tile(const A* base, const int64_t* offsets, int64_t runs, int64_t length,
                                     int64_t run_stride, const A* b, A* c, bool accumulate) {
  constexpr int L = kLanes<A>;
  const A* a[kTileRows];
  for (int i = 0; i < kTileRows; ++i) a[i] = base + offsets[i];
  Vec<A> sum[kTileRows][NV] = {};
  for (int64_t r = 0; r < runs; ++r) {
    for (int64_t k = 0; k < length; ++k, b += NV * L) {
      Vec<A> column[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) column[v] = load(b + v * L);
#pragma GCC unroll 12
      for (int i = 0; i < kTileRows; ++i) {
        const Vec<A> row = broadcast(a[i][k]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[i][v] = fma(row, column[v], sum[i][v]);
      }
    }
    for (int i = 0; i < kTileRows; ++i) a[i] += run_stride;
  }
#pragma GCC unroll 12
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      A* to = c + (i * NV + v) * L;
      store(to, accumulate ? load(to) + sum[i][v] : sum[i][v]);
    }
  }
}

// c[i][:] += sum over p < count of a[a_offsets[p] + i] * b[b_offsets[p]][:] for MR rows i of NV vectors, c_stride apart.
template <int MR, int NV, class A>
[[gnu::noinline]] void outer_tile(const A* a, const int64_t* a_offsets, const A* b, const int64_t* b_offsets,
                                  int64_t count, A* c, int64_t c_stride) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[MR][NV] = {};
  for (int64_t p = 0; p < count; ++p) {
    const A *row = a + a_offsets[p], *columns = b + b_offsets[p];
    Vec<A> column[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) column[v] = load(columns + v * L);
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
      const Vec<A> value = broadcast(row[i]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[i][v] = fma(value, column[v], sum[i][v]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      A* to = c + i * c_stride + v * L;
      store(to, load(to) + sum[i][v]);
    }
  }
}

// outer_tile with the number of rows, at most kTileRows, chosen at run time.
template <int NV, int MR = kTileRows, class A>
void outer_tile_of(int64_t rows, const A* a, const int64_t* a_offsets, const A* b, const int64_t* b_offsets, int64_t count,
                   A* c, int64_t c_stride) {
  if (rows == MR) return outer_tile<MR, NV>(a, a_offsets, b, b_offsets, count, c, c_stride);
  if constexpr (MR > 1) outer_tile_of<NV, MR - 1>(rows, a, a_offsets, b, b_offsets, count, c, c_stride);
}

// The sum of a vector's lanes, always in the same order.
template <class A> inline A sum_lanes(Vec<A> v) {
  A lane[kLanes<A>];
  store(lane, v);
#pragma GCC unroll 4
  for (int half = kLanes<A> / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// Few columns: c[i][j] = sum over r, k of base[offsets[i] + r * run_stride + k] * b[j][r * length + k] for 4 rows i and
// `columns` columns j, vectorised along k. c has c_stride elements per row, b has b_stride per column.
inline constexpr int kDotRows = 4;
template <class A>
[[gnu::noinline]] void dot_tile(const A* base, const int64_t* offsets, int64_t runs, int64_t length, int64_t run_stride,
                                const A* b, int64_t b_stride, int columns, A* c, int64_t c_stride, bool accumulate) {
  constexpr int L = kLanes<A>;
  for (int j = 0; j < columns; ++j, b += b_stride) {
    Vec<A> sum[kDotRows] = {};
    A tail[kDotRows] = {};
    for (int64_t r = 0; r < runs; ++r) {
      int64_t k = 0;
      const A* column = b + r * length;
      for (; k + L <= length; k += L) {
        const Vec<A> weight = load(column + k);
#pragma GCC unroll 4
        for (int i = 0; i < kDotRows; ++i)
          sum[i] = fma(load(base + offsets[i] + r * run_stride + k), weight, sum[i]);
      }
      for (; k < length; ++k)
        for (int i = 0; i < kDotRows; ++i) tail[i] += base[offsets[i] + r * run_stride + k] * column[k];
    }
    for (int i = 0; i < kDotRows; ++i) {
      const A total = sum_lanes<A>(sum[i]) + tail[i];
      c[i * c_stride + j] = accumulate ? c[i * c_stride + j] + total : total;
    }
  }
}

}  // namespace pynn::cpu
