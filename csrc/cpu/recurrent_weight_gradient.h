// Sums over the rows of a chunk: the gradients of weights and biases.
#pragma once
#include "recurrent_tile.h"

namespace pynn::cpu::recurrent {

// to[:] += the sum of `rows` rows of a panel.
template <class A>
inline void add_rows(const A* from, int64_t rows, A* to) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[kPanelVectors] = {};
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < kPanelVectors; ++v) sum[v] = sum[v] + load(from + (r * kPanelVectors + v) * L);
  for (int v = 0; v < kPanelVectors; ++v) store(to + v * L, load(to + v * L) + sum[v]);
}

// to[column][:] += sum over r of left[column / L][r][column % L] * right[r][:], for a panel `right`.
template <int NV, class A>
inline void add_outer(const A* left, int64_t capacity, int64_t columns, const A* right, int64_t rows, A* to) {
  constexpr int64_t L = kLanes<A>;
  for (int64_t column = 0; column < columns; column += L)
    multiply_outer<NV>(left + column * capacity, std::min(L, columns - column), right, kPanelWidth<A>, rows,
                       to + column * NV * L);
}

// to[(first[v] + lane) * stride + column] = from[column][v * L + lane]
template <int NV, class T>
[[gnu::noinline]] void put_transposed(const accumulate_t<T>* from, int64_t columns, const PanelRows& rows, T* to,
                                      int64_t stride) {
  constexpr int L = kComputeLanes<T>;
  for (int64_t column = 0; column < columns; column += L)
    for (int v = 0; v < NV && rows.count[v] > 0; ++v) {
      Vec<accumulate_t<T>> x[L];
      for (int64_t j = 0; j < L; ++j)
        x[j] = column + j < columns ? load(from + ((column + j) * NV + v) * L) : Vec<accumulate_t<T>>{};
      transpose<accumulate_t<T>>(x);
      for (int64_t i = 0; i < rows.count[v]; ++i)
        store_some(to + (rows.first[v] + i) * stride + column, columns - column, x[i]);
    }
}

}  // namespace pynn::cpu::recurrent
