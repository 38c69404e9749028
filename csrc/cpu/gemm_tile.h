// Register tiles of small matrix products: the inner loops of the convolution kernels. Rows come through offsets,
// columns are vectors; every element is summed in the same order whatever the position or the height of its tile.
#pragma once
#include <utility>

#include "vec.h"

namespace pynn::cpu {

inline constexpr int kTileRows = kVectorRegisters == 32 ? 12 : 6;
inline constexpr int kTileVectors = 2;
template <class A>
inline constexpr int kTileWidth = kTileVectors * kLanes<A>;

// A part of a sum: `runs` runs of `length` consecutive elements of a row, run_stride apart. The matching rows of b are
// consecutive within a run and b_stride rows apart from run to run.
struct Runs {
  int64_t runs, length, run_stride, b_stride;
};

// c[places[i]][:] (+)= sum over r, k of base[offsets[i] + r * run_stride + k] * b[r * b_stride + k][:]
// for MR rows i of NV vectors. Rows of b and c have NV vectors.
template <int MR, int NV, class A>
[[gnu::noinline]] void multiply_tile(const A* base, const int64_t* offsets, const Runs& s, const A* b, A* c,
                                     const int64_t* places, bool accumulate) {
  constexpr int L = kLanes<A>;
  const A* a[MR];
  for (int i = 0; i < MR; ++i) a[i] = base + offsets[i];
  Vec<A> sum[MR][NV] = {};
  for (int64_t r = 0; r < s.runs; ++r, b += s.b_stride * NV * L) {
    const A* row = b;
    for (int64_t k = 0; k < s.length; ++k, row += NV * L) {
      Vec<A> column[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) column[v] = load(row + v * L);
#pragma GCC unroll 12
      for (int i = 0; i < MR; ++i) {
        const Vec<A> value = broadcast(a[i][k]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[i][v] = fma(value, column[v], sum[i][v]);
      }
    }
    for (int i = 0; i < MR; ++i) a[i] += s.run_stride;
  }
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i) {
    A* to = c + places[i] * NV * L;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(to + v * L, accumulate ? load(to + v * L) + sum[i][v] : sum[i][v]);
  }
}

// c[i][:] += sum over p < count of a[a_offsets[p] + i] * b[b_offsets[p]][:] for MR rows i of NV vectors.
template <int MR, int NV, class A>
[[gnu::noinline]] void outer_tile(const A* a, const int64_t* a_offsets, const A* b, const int64_t* b_offsets,
                                  int64_t count, A* c) {
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
    for (int v = 0; v < NV; ++v) store(c + (i * NV + v) * L, load(c + (i * NV + v) * L) + sum[i][v]);
  }
}

// The same tiles with the number of rows, 1 to kTileRows, chosen at run time.
template <int NV, class A, int... I>
inline void multiply_rows(std::integer_sequence<int, I...>, int64_t rows, const A* base, const int64_t* offsets,
                          const Runs& s, const A* b, A* c, const int64_t* places, bool accumulate) {
  static constexpr decltype(&multiply_tile<1, NV, A>) kTiles[] = {&multiply_tile<I + 1, NV, A>...};
  kTiles[rows - 1](base, offsets, s, b, c, places, accumulate);
}
template <int NV, class A, int... I>
inline void outer_rows(std::integer_sequence<int, I...>, int64_t rows, const A* a, const int64_t* a_offsets, const A* b,
                       const int64_t* b_offsets, int64_t count, A* c) {
  static constexpr decltype(&outer_tile<1, NV, A>) kTiles[] = {&outer_tile<I + 1, NV, A>...};
  kTiles[rows - 1](a, a_offsets, b, b_offsets, count, c);
}
using TileHeights = std::make_integer_sequence<int, kTileRows>;

// The sum of a vector's lanes, always in the same order.
template <class A>
inline A sum_lanes(Vec<A> v) {
  A lane[kLanes<A>];
  store(lane, v);
#pragma GCC unroll 4
  for (int half = kLanes<A> / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

inline constexpr int kDotRows = 4;

// Few columns: c[places[i]][j] (+)= the dot product of row i with column j < columns, vectorised along the sum, for
// `rows` rows; kDotRows offsets are read. Columns of b are b_size elements apart, rows of c are c_stride.
template <class A>
[[gnu::noinline]] void dot_tile(int64_t rows, const A* base, const int64_t* offsets, const Runs& s, const A* b,
                                int64_t b_size, int64_t columns, A* c, const int64_t* places, int64_t c_stride,
                                bool accumulate) {
  constexpr int L = kLanes<A>;
  for (int64_t j = 0; j < columns; ++j, b += b_size) {
    Vec<A> sum[kDotRows] = {};
    A tail[kDotRows] = {};
    for (int64_t r = 0; r < s.runs; ++r) {
      const A *column = b + r * s.b_stride, *from = base + r * s.run_stride;
      int64_t k = 0;
      for (; k + L <= s.length; k += L) {
        const Vec<A> weight = load(column + k);
#pragma GCC unroll 4
        for (int i = 0; i < kDotRows; ++i) sum[i] = fma(load(from + offsets[i] + k), weight, sum[i]);
      }
      for (; k < s.length; ++k)
        for (int i = 0; i < kDotRows; ++i) tail[i] += from[offsets[i] + k] * column[k];
    }
    for (int64_t i = 0; i < rows; ++i) {
      const A total = sum_lanes<A>(sum[i]) + tail[i];
      A* to = c + places[i] * c_stride + j;
      *to = accumulate ? *to + total : total;
    }
  }
}

// c[:] += sum over p < count of a[a_offsets[p]] * b[b_offsets[p]][:], NV vectors, four pixels in flight.
template <int NV, class A>
[[gnu::noinline]] void outer_row(const A* a, const int64_t* a_offsets, const A* b, const int64_t* b_offsets,
                                 int64_t count, A* c) {
  constexpr int L = kLanes<A>, U = 4;
  Vec<A> sum[U][NV] = {};
  const auto add = [&](int u, int64_t p) {
    const Vec<A> value = broadcast(a[a_offsets[p]]);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[u][v] = fma(value, load(b + b_offsets[p] + v * L), sum[u][v]);
  };
  int64_t p = 0;
  for (; p + U <= count; p += U) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) add(u, p + u);
  }
  for (; p < count; ++p) add(0, p);
  for (int v = 0; v < NV; ++v) {
    const Vec<A> total = (sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v]);
    store(c + v * L, load(c + v * L) + total);
  }
}

}  // namespace pynn::cpu
