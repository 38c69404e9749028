// Attention, forward: one pass over the keys with an online softmax.
//
// A block owns kRows queries of a head and kWidth columns of their outputs; tiles of kColumns keys and values stream
// past. Values arrive while the scores are formed, the next keys while weights and values are multiplied. Tiles outside
// of the windows of all its queries, and those that a mask hides from all queries of the block, are never copied. A
// head dimension of more than kWidth is summed in chunks for which queries and keys come one after the other.
#pragma once
#include "scaled_dot_product_attention_engines.cuh"

namespace pynn::cuda {
namespace {
namespace attention {

template <class T>
struct ForwardOutputs {
  Operand<T> out;
  attention_lse_t<T>* lse;
};

template <class E>
constexpr size_t kForwardShared = E::kOwnBytes + 2 * E::kStreamedBytes + E::kExchangeBytes;

// The next tile from `tile` on that holds a score of this block; `bits` become those of its scores that take part.
// Every thread calls it. kKeyRows as in Scores.
template <bool kKeyRows, class E, class S>
__device__ __forceinline__ int next_tile(int tile, int end, unsigned (&bits)[E::kThreadRows], const E& e,
                                         const S& scores, int first_row) {
  for (; tile < end; ++tile) {
    const int first_column = tile * E::kColumns;
    if (scores.template is_whole<kKeyRows>(first_row, E::kRows, first_column, E::kColumns)) break;
    scores.template find_visible<kKeyRows>(bits, e, first_row, first_column);
    if (scores.kind == AttentionMask::kNone) break;
    unsigned any = 0;
#pragma unroll
    for (int i = 0; i < E::kThreadRows; ++i) any |= bits[i];
    if (__syncthreads_or(any != 0)) break;
  }
  return tile;
}

// Rows of queries after all keys they have seen so far.
template <class E>
struct Attended {
  using F = accumulate_t<typename E::Element>;
  typename E::Output out;  // sums of weighted values
  F top[E::kThreadRows],
      total[E::kThreadRows];  // largest score, and the thread's part of the sum of weights against it
  __device__ __forceinline__ Attended() {
    clear_output<E>(out);
#pragma unroll
    for (int i = 0; i < E::kThreadRows; ++i) top[i] = minus_infinity<F>(), total[i] = 0;
  }
};

// The rows of `queries` from first_row on, and columns of the values from out_column on, over the tiles of keys from
// `tile` to `end`. `shared` has kForwardShared<E> bytes.
template <class E, class S, class Q, class T>
__device__ __forceinline__ void attend(Attended<E>& to, const E& e, unsigned char* shared, const S& scores,
                                       const Q& queries, const Matrix<const T>& keys, const Matrix<const T>& values,
                                       int first_row, int out_column, int tile, int end) {
  using F = accumulate_t<T>;
  unsigned char *const own = shared, *const key_tile = own + E::kOwnBytes,
                       *const value_tile = key_tile + E::kStreamedBytes,
                       *const exchange = value_tile + E::kStreamedBytes;
  const int chunks = (queries.width + E::kWidth - 1) / E::kWidth;
  const int value_width = padded_width(values.width, out_column, E::kWidth);
  auto& [out, top, total] = to;
  const int first_streamed = tile * E::kColumns;
  bool spoiled = false;  // values that are not finite have been left out

  unsigned bits[E::kThreadRows] = {};
  tile = next_tile<false>(tile, end, bits, e, scores, first_row);
  load_tile<E, E::kRows>(own, queries, first_row, 0);
  if (tile < end) load_tile<E, E::kColumns>(key_tile, keys, tile * E::kColumns, 0);
  cp_async_commit();

#pragma unroll 1
  while (tile < end) {
    const int first_column = tile * E::kColumns;
    cp_async_wait<0>();
    __syncthreads();
    load_tile<E, E::kColumns>(value_tile, values, first_column, out_column);
    cp_async_commit();

    typename E::Tile s;
    clear<E>(s);
    e.multiply_rows(s, own, key_tile, padded_width(queries.width, 0, E::kWidth));
#pragma unroll 1
    for (int chunk = 1; chunk < chunks; ++chunk) {
      __syncthreads();
      load_tile<E, E::kRows>(own, queries, first_row, chunk * E::kWidth);
      load_tile<E, E::kColumns>(key_tile, keys, first_column, chunk * E::kWidth);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      e.multiply_rows(s, own, key_tile, padded_width(queries.width, chunk * E::kWidth, E::kWidth));
    }
    const bool whole = scores.template is_whole<false>(first_row, E::kRows, first_column, E::kColumns);
    scores.template finish<false>(s, bits, whole, e, first_row, first_column);

#pragma unroll
    for (int i = 0; i < E::kThreadRows; ++i) {
      F most = E::at(s, i, 0);
#pragma unroll
      for (int j = 1; j < E::kThreadColumns; ++j) most = max(most, E::at(s, i, j));
      most = max(top[i], over_row<E>(most, [](F a, F b) { return max(a, b); }));
      const F shift = most == minus_infinity<F>() ? F(0) : most;
      F sum = 0;
#pragma unroll
      for (int j = 0; j < E::kThreadColumns; ++j) {
        E::at(s, i, j) = exponential<T>(E::at(s, i, j) - shift);
        sum += E::at(s, i, j);
      }
      const F correction = exponential<T>(top[i] - shift);
      total[i] = multiply_add(total[i], correction, sum);
      top[i] = most;
#pragma unroll
      for (int n = 0; n < E::kOutputColumns; ++n) E::at(out, i, n) *= correction;
    }
    if (scores.dropout.key) {
      unsigned kept[E::kThreadRows];
      scores.template find_kept<false>(kept, e, first_row, first_column);
#pragma unroll
      for (int i = 0; i < E::kThreadRows; ++i)
#pragma unroll
        for (int j = 0; j < E::kThreadColumns; ++j) E::at(s, i, j) *= kept[i] >> j & 1 ? F(scores.dropout.kept) : F(0);
    }

    cp_async_wait<0>();
    if (scores.template may_hide<false>(first_row, E::kRows, first_column, E::kColumns))
      spoiled |= bool(__syncthreads_or(remove_nonfinite<E, E::kColumns>(value_tile, values.width, out_column)));
    else
      __syncthreads();
    tile = next_tile<false>(tile + 1, end, bits, e, scores, first_row);
    if (tile < end) {
      if (chunks > 1) load_tile<E, E::kRows>(own, queries, first_row, 0);
      load_tile<E, E::kColumns>(key_tile, keys, tile * E::kColumns, 0);
    }
    cp_async_commit();
    e.multiply_weights(out, s, value_tile, exchange, value_width);
  }
  cp_async_wait<0>();
  if (set_nan_aside<E>(out) || spoiled) {  // where weights are NaN, so is their total
    add_nonfinite<false>(out, e, scores, values, first_row, first_streamed, end * E::kColumns, out_column,
                         [](int) { return F(0); });
    put_nan_back<E>(out);
  }
#pragma unroll
  for (int i = 0; i < E::kThreadRows; ++i) total[i] = over_row<E>(total[i], [](F a, F b) { return a + b; });
}

// log of a sum of weights against `top`, which is in units of kLogUnit.
template <class T>
__device__ __forceinline__ attention_lse_t<T> log_sum(accumulate_t<T> top, attention_lse_t<T> total) {
  using Lse = attention_lse_t<T>;
  if (total == Lse(0)) return minus_infinity<Lse>();
  if constexpr (kBase2<T>)
    return (top + log2f(total)) / kLogUnit<T>;
  else
    return Lse(top) + log(total);
}

template <class E, int blocks>
__global__ void __launch_bounds__(E::kThreads, blocks)
    forward_kernel(const __grid_constant__ Problem<typename E::Element> p,
                   const __grid_constant__ ForwardOutputs<typename E::Element> to) {
  using T = typename E::Element;
  using F = accumulate_t<T>;
  DYNAMIC_SHARED(unsigned char, shared);
  const AttentionShape& shape = p.shape;
  const unsigned tiles = unsigned((shape.queries + E::kRows - 1) / E::kRows);
  const int64_t head = blockIdx.x / tiles;
  // The last queries see the most keys of a causal head: their blocks begin first.
  const int first_row = int(tiles - 1 - blockIdx.x % tiles) * E::kRows, out_column = int(blockIdx.y) * E::kWidth;
  const E e;
  const Scores<T> scores(p, head);
  Attended<E> rows;
  if (p.per_head.sinks) {
#pragma unroll
    for (int i = 0; i < E::kThreadRows; ++i) {
      rows.top[i] = p.per_head.sinks[head] * kLogUnit<T>;
      rows.total[i] = threadIdx.x % E::kRowLanes == 0 ? F(1) : F(0);
    }
  }
  attend(rows, e, shared, scores, matrix_of(p.query, shape, head, 1, shape.queries, shape.dim),
         matrix_of(p.key, shape, head, shape.group, shape.keys, shape.dim),
         matrix_of(p.value, shape, head, shape.group, shape.keys, shape.value_dim), first_row, out_column,
         scores.template first_tile<false>(first_row, E::kColumns),
         scores.template end_tile<false>(first_row, E::kRows, E::kColumns));

#pragma unroll
  for (int i = 0; i < E::kThreadRows; ++i) {
    const int row = first_row + e.row(i);
    F& total = rows.total[i];
    if (blockIdx.y == 0 && threadIdx.x % E::kRowLanes == 0 && row < scores.queries)
      to.lse[head * shape.queries + row] = log_sum<T>(rows.top[i], total);
    if (total == F(0)) total = 1;
  }
  store_tile(matrix_of(to.out, shape, head, 1, shape.queries, shape.value_dim), e, first_row, out_column,
             [&](int i, int n) { return E::at(rows.out, i, n) / rows.total[i]; });
}

}  // namespace attention
}  // namespace
}  // namespace pynn::cuda
