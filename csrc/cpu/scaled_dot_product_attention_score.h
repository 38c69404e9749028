// Scores of a single query, along the rows of the keys as they lie in memory: for queries so few that packing the keys
// for register tiles does not pay.
#pragma once
#include <algorithm>

#include "scaled_dot_product_attention_tile.h"

namespace pynn::cpu::attention {

// From so many queries of a key head on, packing the keys pays.
inline constexpr int64_t kFewQueries = 8;
inline bool has_few_queries(const AttentionShape& shape) { return shape.queries * shape.group <= kFewQueries; }

// One vector of sums: lane i is the sum of the lanes of v[i]. Halves the number of vectors kLanes -> 1.
template <class F>
PYNN_HD Vec<F> sum_each(Vec<F>* v) {
#pragma GCC unroll 4
  for (int half = kLanes<F> / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i)
      v[i] = interleave_low(v[i], v[i + half], LaneIndices<F>()) + interleave_high(v[i], v[i + half], LaneIndices<F>());
  return v[0];
}

inline constexpr int kChains = 4;  // so many sums hide the latency of fma

// scores[0 .. kLanes) = query . key rows of N vectors; rows from `count` on repeat the last one. One row after the
// other: the CPU reads ahead in memory only where it is read in order. The query stays in registers.
template <int N, class T, class F = accumulate_t<T>>
void score_vectors(const T* key, int64_t row, int64_t count, const F* query, F* scores) {
  constexpr int L = kLanes<F>;
  Vec<F> q[N], sum[L];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) q[n] = in_register(load(query + n * L));
  for (int j = 0; j < L; ++j) {
    const T* const from = key + std::min<int64_t>(j, count - 1) * row;
    Vec<F> s[kChains] = {};
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) s[n % kChains] = fma(q[n], load_compute(from + n * L), s[n % kChains]);
    sum[j] = (s[0] + s[1]) + (s[2] + s[3]);
  }
  store(scores, sum_each<F>(sum));
}

// The same for rows of any length.
template <class T, class F = accumulate_t<T>>
void score_keys(const T* key, int64_t row, int64_t count, const F* query, int64_t dim, F* scores) {
  constexpr int L = kLanes<F>;
  if (dim == kChains * L) return score_vectors<kChains>(key, row, count, query, scores);
  if (dim == 2 * kChains * L) return score_vectors<2 * kChains>(key, row, count, query, scores);
  const int64_t whole = dim / L * L, unrolled = dim / (kChains * L) * (kChains * L);
  Vec<F> sum[L];
  for (int j = 0; j < L; ++j) {
    const T* const from = key + std::min<int64_t>(j, count - 1) * row;
    Vec<F> s[kChains] = {};
    for (int64_t d = 0; d < unrolled; d += kChains * L)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) s[c] = fma(load(query + d + c * L), load_compute(from + d + c * L), s[c]);
    for (int64_t d = unrolled; d < whole; d += L) s[0] = fma(load(query + d), load_compute(from + d), s[0]);
    if (whole < dim) s[1] = fma(load(query + whole), load_part(from + whole, dim - whole, F(0)), s[1]);
    sum[j] = (s[0] + s[1]) + (s[2] + s[3]);
  }
  store(scores, sum_each<F>(sum));
}

// to[i * stride + j] = row i of the left, from begin to end, . row first + j of the right, in whole vectors.
template <class T, class F = accumulate_t<T>>
void score_rows(const Read<T>& right, int64_t first, int64_t count, const Matrix<F>& left, int64_t begin, int64_t end,
                int64_t width, F* to, int64_t stride) {
  for (int64_t j = 0; j < count; j += kLanes<F>)
    for (int64_t i = begin; i < end; ++i)
      score_keys(right.data + (first + j) * right.row, right.row, std::min<int64_t>(kLanes<F>, count - j), left.row(i),
                 width, to + i * stride + j);
}

}  // namespace pynn::cpu::attention
