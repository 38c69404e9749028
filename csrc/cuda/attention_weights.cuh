// The weights of attention themselves: P (times dropout), formed once more from query, key and lse.
//
// A block owns a tile of one matrix of the result and adds up the weights of all heads that the matrix is the mean of,
// in their order: there is never a matrix per head. Dimensions of more than kWidth are summed in chunks.
#pragma once
#include "scaled_dot_product_attention_forward.cuh"

namespace pynn::cuda {
namespace {
namespace attention {

template <class T>
struct WeightsArguments {
  T* weights;                     // (matrices, queries, keys)
  const attention_lse_t<T>* lse;  // (heads, queries)
  int64_t together;               // heads of a matrix
};

template <class E>
constexpr size_t kWeightsShared = E::kOwnBytes + E::kStreamedBytes;

template <class E, int blocks>
__global__ void __launch_bounds__(E::kThreads, blocks)
    weights_kernel(const __grid_constant__ Problem<typename E::Element> p,
                   const __grid_constant__ WeightsArguments<typename E::Element> to) {
  using T = typename E::Element;
  using F = accumulate_t<T>;
  DYNAMIC_SHARED(unsigned char, own);
  unsigned char* const key_tile = own + E::kOwnBytes;
  const AttentionShape& shape = p.shape;
  const unsigned row_tiles = unsigned((shape.queries + E::kRows - 1) / E::kRows),
                 column_tiles = unsigned((shape.keys + E::kColumns - 1) / E::kColumns);
  const int column_tile = int(blockIdx.x % column_tiles), first_column = column_tile * E::kColumns;
  const int first_row = int(blockIdx.x / column_tiles % row_tiles) * E::kRows;
  const int64_t matrix = blockIdx.x / column_tiles / row_tiles;
  const E e;

  typename E::Tile sums;
  clear<E>(sums);
#pragma unroll 1
  for (int64_t head = matrix * to.together; head < (matrix + 1) * to.together; ++head) {
    const Scores<T> scores(p, head);
    if (column_tile < scores.template first_tile<false>(first_row, E::kColumns) ||
        column_tile >= scores.template end_tile<false>(first_row, E::kRows, E::kColumns))
      continue;
    unsigned bits[E::kThreadRows] = {};
    if (next_tile<false>(column_tile, column_tile + 1, bits, e, scores, first_row) != column_tile) continue;
    const auto queries = matrix_of(p.query, shape, head, 1, shape.queries, shape.dim);
    const auto keys = matrix_of(p.key, shape, head, shape.group, shape.keys, shape.dim);

    typename E::Tile s;
    clear<E>(s);
#pragma unroll 1
    for (int column = 0; column < queries.width; column += E::kWidth) {
      load_tile<E, E::kRows>(own, queries, first_row, column);
      load_tile<E, E::kColumns>(key_tile, keys, first_column, column);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      e.multiply_rows(s, own, key_tile, padded_width(queries.width, column, E::kWidth));
      __syncthreads();  // before the next chunk or head
    }
    const bool whole = scores.template is_whole<false>(first_row, E::kRows, first_column, E::kColumns);
    scores.template finish<false>(s, bits, whole, e, first_row, first_column);
    unsigned kept[E::kThreadRows];
    if (scores.dropout.key) scores.template find_kept<false>(kept, e, first_row, first_column);

#pragma unroll
    for (int i = 0; i < E::kThreadRows; ++i) {
      const int row = first_row + e.row(i);
      const attention_lse_t<T> lse = row < scores.queries ? to.lse[head * shape.queries + row] : 0;
      F shift, norm = 1;  // exp(S - lse) = exp(S - shift) * norm: lse has more digits than F
      if constexpr (kBase2<T>) {
        shift = lse * kLogUnit<T>;
      } else {
        shift = F(lse);
        if (is_finite(shift)) norm = F(exp(double(shift) - double(lse)));
      }
#pragma unroll
      for (int j = 0; j < E::kThreadColumns; ++j) {
        const F score = E::at(s, i, j);
        F factor = norm;
        if (scores.dropout.key) factor *= kept[i] >> j & 1 ? F(scores.dropout.kept) : F(0);
        if (score != minus_infinity<F>()) E::at(sums, i, j) += shifted_exponential<T>(score, shift) * factor;
      }
    }
  }

#pragma unroll
  for (int i = 0; i < E::kThreadRows; ++i) {
    const int row = first_row + e.row(i);
    if (row >= shape.queries) continue;
    T* const start = to.weights + (matrix * shape.queries + row) * shape.keys;
#pragma unroll
    for (int j = 0; j < E::kThreadColumns; ++j) {
      const int column = first_column + e.column(j);
      if (column < shape.keys) start[column] = from_float<T>(E::at(sums, i, j) / F(to.together));
    }
  }
}

}  // namespace attention
}  // namespace
}  // namespace pynn::cuda
