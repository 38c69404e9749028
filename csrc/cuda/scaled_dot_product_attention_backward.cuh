// Attention, backward. With P = exp(S - lse), A = P * keep / (1 - p), G = (dout V^T) * keep / (1 - p):
//
//   delta_i = dout_i . out_i - dlse_i    dS = P * (G - delta)    dQ = scale dX K    dK = scale dX^T Q    dV = A^T dout
//   dsink = -sum_i exp(sink - lse_i) delta_i
//
// dX is dS, times the derivative of the soft cap where there is one: for that the products are formed once more.
//
// One kernel in two roles, so that every sum has one owner and no atomics are needed: a block owns kRows keys and
// streams the queries of all heads that share them (dK, dV), or owns queries and streams keys (dQ). Either way a tile
// of scores is `first own` x `first streamed`, a tile of G is `second own` x `second streamed`:
//
//   owner is    first own   second own   first streamed   second streamed   sums
//   keys        K           V            Q                dout              dK += dX^T Q, dV += A^T dout
//   queries     Q           dout         K                V                 dQ += dX K
//
// With two stages the next tiles are copied while the current ones are multiplied. Dimensions of more than kWidth are
// summed in chunks that come one after the other; a block then owns kWidth columns of the results.
#pragma once
#include "scaled_dot_product_attention_forward.cuh"
#include "scaled_dot_product_attention_statistics.cuh"

namespace pynn::cuda {
namespace {
namespace attention {

template <class T>
struct BackwardArguments {
  Operand<T> grad_query, grad_key, grad_value;
  accumulate_t<T>* grad_mask;  // (heads, queries, keys), zeroed, when the mask is not broadcast; nullptr otherwise
  const RowStatistics<accumulate_t<T>>* statistics;  // (heads, queries)
  RowStatistics<accumulate_t<T>>* completed;         // the same, written by blocks that own queries; nullptr for keys
  const attention_lse_t<T>* grad_lse;                // (heads, queries), or nullptr for zeros
  accumulate_t<T> scale;
};

// delta = sum_j P_ij G_ij is dout . out, but out and lse have been rounded: with few keys that error is seen in the
// gradients. A block of queries that see no more keys than this sums P and P G itself, in a sweep of its own.
constexpr int kSweptKeys = 512;

template <class E, int stages>
constexpr size_t kBackwardShared =
    2 * E::kOwnBytes + stages * (2 * E::kStreamedBytes + E::kColumns * sizeof(RowStatistics<double>)) +
    E::kExchangeBytes;

// A tile of the backward for one (own, streamed) pair: what the gradients of keys, queries and mask have in common.
template <class E, bool kKeyRows, int stages>
struct BackwardTiles {
  using T = typename E::Element;
  using F = accumulate_t<T>;
  using Statistics = RowStatistics<F>;

  const Problem<T>& p;
  E e;
  unsigned char *own, *streamed, *exchange;
  Statistics* columns;  // of the streamed queries, per stage
  int dim, value_dim;

  __device__ __forceinline__ BackwardTiles(const Problem<T>& p, unsigned char* shared)
      : p(p), own(shared), dim(int(p.shape.dim)), value_dim(int(p.shape.value_dim)) {
    streamed = own + 2 * E::kOwnBytes;
    exchange = streamed + stages * 2 * E::kStreamedBytes;
    columns = reinterpret_cast<Statistics*>(exchange + E::kExchangeBytes);
  }

  __device__ __forceinline__ bool chunked() const { return dim > E::kWidth || value_dim > E::kWidth; }
  __device__ __forceinline__ unsigned char* first(int stage) const { return streamed + stage * 2 * E::kStreamedBytes; }
  __device__ __forceinline__ unsigned char* second(int stage) const { return first(stage) + E::kStreamedBytes; }

  // The operands with rows of queries, or of keys, in the order of their dimensions.
  template <bool kQueries>
  __device__ __forceinline__ Matrix<const T> operand(bool second, int64_t head) const {
    const AttentionShape& s = p.shape;
    if constexpr (kQueries)
      return second ? matrix_of(p.grad_out, s, head, 1, s.queries, s.value_dim)
                    : matrix_of(p.query, s, head, 1, s.queries, s.dim);
    else
      return second ? matrix_of(p.value, s, head, s.group, s.keys, s.value_dim)
                    : matrix_of(p.key, s, head, s.group, s.keys, s.dim);
  }

  __device__ __forceinline__ void load_own(int64_t head, int first_row, int chunk, bool second) const {
    load_tile<E, E::kRows>(own + second * E::kOwnBytes, operand<!kKeyRows>(second, head), first_row, chunk * E::kWidth);
  }
  __device__ __forceinline__ void load_streamed(int64_t head, int first_column, int chunk, int stage,
                                                bool second) const {
    load_tile<E, E::kColumns>(second ? this->second(stage) : first(stage), operand<kKeyRows>(second, head),
                              first_column, chunk * E::kWidth);
  }
  // Starts copying the tiles that `weigh` reads, unless it copies them itself.
  __device__ __forceinline__ void prefetch(int64_t head, int first_column, int stage,
                                           const Statistics* statistics) const {
    if (!chunked())
      load_streamed(head, first_column, 0, stage, false), load_streamed(head, first_column, 0, stage, true);
    cp_async_commit();
    if constexpr (kKeyRows)
      for (int j = threadIdx.x; j < E::kColumns; j += E::kThreads)
        columns[stage * E::kColumns + j] = first_column + j < p.shape.queries
                                               ? statistics[head * p.shape.queries + first_column + j]
                                               : Statistics{0, 0, 0};
  }

  // tile = own streamed^T over all chunks of a dimension.
  __device__ __forceinline__ void product(typename E::Tile& tile, bool second, int64_t head, int first_row,
                                          int first_column, int stage) const {
    const int width = second ? value_dim : dim;
    const unsigned char *left = own + second * E::kOwnBytes, *right = second ? this->second(stage) : first(stage);
    clear<E>(tile);
    if (!chunked()) {
      e.multiply_rows(tile, left, right, padded_width(width, 0, E::kWidth));
      return;
    }
#pragma unroll 1
    for (int chunk = 0; chunk * E::kWidth < width; ++chunk) {
      load_own(head, first_row, chunk, second);
      load_streamed(head, first_column, chunk, stage, second);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      e.multiply_rows(tile, left, right, padded_width(width, chunk * E::kWidth, E::kWidth));
      __syncthreads();
    }
  }

  // weights = A, grads = dS of a tile; adds P to the totals of the thread's rows.
  __device__ __forceinline__ void weigh(typename E::Tile& weights, typename E::Tile& grads, const Scores<T>& scores,
                                        const unsigned (&bits)[E::kThreadRows],
                                        const Statistics (&rows)[E::kThreadRows], F (&totals)[E::kThreadRows],
                                        int64_t head, int first_row, int first_column, int stage) const {
    const bool whole = scores.template is_whole<kKeyRows>(first_row, E::kRows, first_column, E::kColumns);
    product(weights, false, head, first_row, first_column, stage);
    scores.template finish<kKeyRows>(weights, bits, whole, e, first_row, first_column);
    product(grads, true, head, first_row, first_column, stage);
    unsigned kept[E::kThreadRows];
    if (scores.dropout.key) scores.template find_kept<kKeyRows>(kept, e, first_row, first_column);
#pragma unroll
    for (int j = 0; j < E::kThreadColumns; ++j) {
      const Statistics of_column = kKeyRows ? columns[stage * E::kColumns + e.column(j)] : Statistics{};
#pragma unroll
      for (int i = 0; i < E::kThreadRows; ++i) {
        const Statistics& of_query = kKeyRows ? of_column : rows[i];
        F &a = E::at(weights, i, j), &g = E::at(grads, i, j);
        const bool visible = a != minus_infinity<F>();
        const F weight = shifted_exponential<T>(a, of_query.shift) * of_query.norm;
        F factor = 1;
        if (scores.dropout.key) factor = kept[i] >> j & 1 ? F(scores.dropout.kept) : F(0);
        totals[i] += visible ? weight : F(0);
        a = visible ? weight * factor : F(0);
        g = visible ? weight * (g * factor - of_query.delta) : F(0);
      }
    }
  }

  // grads = dX from dS, once weights are not needed any more; chunk `chunk` of the first streamed tile is there again.
  __device__ __forceinline__ void cap(typename E::Tile& grads, typename E::Tile& weights, const Scores<T>& scores,
                                      int64_t head, int first_row, int first_column, int chunk, int stage) const {
    product(weights, false, head, first_row, first_column, stage);
#pragma unroll
    for (int i = 0; i < E::kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < E::kThreadColumns; ++j) {
        const F t = tangent<T>(E::at(weights, i, j) * scores.factor);
        F& g = E::at(grads, i, j);
        if (g != F(0)) g *= multiply_add(-t, t, F(1));  // 0 takes no part, whatever its product
      }
    if (!chunked()) return;
    load_streamed(head, first_column, chunk, stage, false);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }

  // Makes chunk `chunk` of the streamed tiles ready for products with weights. Returns whether second had values that
  // are not finite, which it now lacks.
  __device__ __forceinline__ bool ready(bool may_hide, int64_t head, int first_column, int chunk, int stage) const {
    if (chunked()) {
      load_streamed(head, first_column, chunk, stage, false), load_streamed(head, first_column, chunk, stage, true);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
    }
    if (!may_hide) return false;
    __syncthreads();
    remove_nonfinite<E, E::kColumns>(first(stage), dim, chunk * E::kWidth);
    return __syncthreads_or(remove_nonfinite<E, E::kColumns>(second(stage), value_dim, chunk * E::kWidth));
  }
};

// A position in the sequence of tiles that a block streams: those of one head, or of all heads of a group.
struct StreamPosition {
  int64_t head;
  int tile;
};

template <class E, bool kKeyRows, int stages, int blocks>
__global__ void __launch_bounds__(E::kThreads, blocks)
    gradient_kernel(const __grid_constant__ Problem<typename E::Element> p,
                    const __grid_constant__ BackwardArguments<typename E::Element> to) {
  using T = typename E::Element;
  using F = accumulate_t<T>;
  DYNAMIC_SHARED(unsigned char, shared);
  const BackwardTiles<E, kKeyRows, stages> b(p, shared);
  const E& e = b.e;
  const AttentionShape& shape = p.shape;
  const unsigned tiles = unsigned(((kKeyRows ? shape.keys : shape.queries) + E::kRows - 1) / E::kRows);
  const int64_t group = kKeyRows ? shape.group : 1, first_head = blockIdx.x / tiles * group;
  const int first_row = int(kKeyRows ? blockIdx.x % tiles : tiles - 1 - blockIdx.x % tiles) * E::kRows;
  const int chunk = int(blockIdx.y), out_column = chunk * E::kWidth;

  // Tiles of a head that the windows leave.
  int begin, end;
  {
    const Scores<T> scores(p, first_head);
    begin = scores.template first_tile<kKeyRows>(first_row, E::kColumns);
    end = scores.template end_tile<kKeyRows>(first_row, E::kRows, E::kColumns);
  }

  RowStatistics<F> rows[E::kThreadRows] = {};
  if constexpr (!kKeyRows) {
#pragma unroll
    for (int i = 0; i < E::kThreadRows; ++i) {
      const int row = first_row + e.row(i);
      rows[i] = row < shape.queries ? to.statistics[first_head * shape.queries + row] : RowStatistics<F>{0, 0, 0};
    }
  }
  typename E::Output first_sum;
  typename E::Output second_sum;
  clear_output<E>(first_sum);
  if constexpr (kKeyRows) clear_output<E>(second_sum);

  // The first tile from `at` on that has work; head == first_head + group at the end.
  unsigned bits[E::kThreadRows] = {};
  const auto next = [&](StreamPosition at) {
    for (; at.head < first_head + group; ++at.head, at.tile = begin) {
      at.tile = next_tile<kKeyRows>(at.tile, end, bits, e, Scores<T>(p, at.head), first_row);
      if (at.tile < end) break;
    }
    return at;
  };
  if (!b.chunked()) b.load_own(first_head, first_row, 0, false), b.load_own(first_head, first_row, 0, true);
  cp_async_commit();
  bool sweeping =
      !kKeyRows && (end - begin) * E::kColumns <= kSweptKeys;  // the tiles come twice: for delta, for the sums
  F delta[E::kThreadRows] = {}, total[E::kThreadRows] = {};
  const auto grad_lse = [&](int i) {
    const int row = first_row + e.row(i);
    return to.grad_lse && row < shape.queries ? F(to.grad_lse[first_head * shape.queries + row]) : F(0);
  };
#pragma unroll
  for (int i = 0; i < E::kThreadRows; ++i)
    if (sweeping) rows[i].delta = 0;
  StreamPosition at = next({first_head, begin});
  if (at.head < first_head + group) b.prefetch(at.head, at.tile * E::kColumns, 0, to.statistics);
  int stage = 0;
  bool spoiled = false;  // gradients of the output that are not finite have been left out

#pragma unroll 1
  while (at.head < first_head + group) {
    const Scores<T> scores(p, at.head);
    const int first_column = at.tile * E::kColumns;
    unsigned now[E::kThreadRows];
#pragma unroll
    for (int i = 0; i < E::kThreadRows; ++i) now[i] = bits[i];
    StreamPosition following = next({at.head, at.tile + 1});
    const bool swept = sweeping && following.head == first_head + group;
    if (swept) following = next({first_head, begin});
    const bool more = following.head < first_head + group;
    cp_async_wait<0>();
    __syncthreads();  // the tiles of this stage are here, and nobody reads the other stage any more
    if (stages > 1 && more) b.prefetch(following.head, following.tile * E::kColumns, stage ^ 1, to.statistics);

    typename E::Tile weights, grads;
    b.weigh(weights, grads, scores, now, rows, total, at.head, first_row, first_column, stage);
    if constexpr (!kKeyRows) {
      if (sweeping) {
#pragma unroll
        for (int i = 0; i < E::kThreadRows; ++i)
#pragma unroll
          for (int j = 0; j < E::kThreadColumns; ++j) delta[i] += E::at(grads, i, j);
      }
      if (swept) {
#pragma unroll
        for (int i = 0; i < E::kThreadRows; ++i) {
          delta[i] = over_row<E>(delta[i], [](F a, F b) { return a + b; });
          total[i] = over_row<E>(total[i], [](F a, F b) { return a + b; });
          if (p.per_head.sinks) total[i] += sink_weight<T>(p.per_head.sinks[first_head], rows[i]);
          if (total[i] != F(0)) rows[i].norm /= total[i], delta[i] /= total[i];
          rows[i].delta = delta[i] - grad_lse(i);
        }
      }
      if (to.grad_mask && chunk == 0 && !sweeping) {
#pragma unroll
        for (int i = 0; i < E::kThreadRows; ++i)
#pragma unroll
          for (int j = 0; j < E::kThreadColumns; ++j)
            if (now[i] >> j & 1)
              to.grad_mask[(at.head * shape.queries + first_row + e.row(i)) * shape.keys + first_column + e.column(j)] =
                  E::at(grads, i, j);
      }
    }
    if (!sweeping) {
      spoiled |= b.ready(scores.template may_hide<kKeyRows>(first_row, E::kRows, first_column, E::kColumns), at.head,
                         first_column, chunk, stage);
      if constexpr (kKeyRows)
        e.multiply_weights(second_sum, weights, b.second(stage), b.exchange,
                           padded_width(b.value_dim, out_column, E::kWidth));
      if (scores.cap != F(0)) b.cap(grads, weights, scores, at.head, first_row, first_column, chunk, stage);
      e.multiply_weights(first_sum, grads, b.first(stage), b.exchange, padded_width(b.dim, out_column, E::kWidth));
    }
    sweeping = sweeping && !swept;
    at = following;
    if (stages > 1) {
      stage ^= 1;
    } else {
      __syncthreads();
      if (more) b.prefetch(at.head, at.tile * E::kColumns, 0, to.statistics);
    }
  }
  cp_async_wait<0>();
  if constexpr (kKeyRows) {
    if (set_nan_aside<E>(second_sum) || spoiled) {
#pragma unroll 1
      for (int64_t head = first_head; head < first_head + group; ++head) {
        const RowStatistics<F>* const of_query = to.statistics + head * shape.queries;
        add_nonfinite<true>(second_sum, e, Scores<T>(p, head), b.template operand<true>(true, head), first_row,
                            begin * E::kColumns, end * E::kColumns, out_column,
                            [&](int query) { return of_query[query].shift * 0; });
      }
      put_nan_back<E>(second_sum);
    }
  }

  const auto scaled = [&](int i, int n) { return E::at(first_sum, i, n) * to.scale; };
  if constexpr (kKeyRows) {
    store_tile(matrix_of(to.grad_key, shape, first_head, group, shape.keys, shape.dim), e, first_row, out_column,
               scaled);
    store_tile(matrix_of(to.grad_value, shape, first_head, group, shape.keys, shape.value_dim), e, first_row,
               out_column, [&](int i, int n) { return E::at(second_sum, i, n); });
  } else {
#pragma unroll
    for (int i = 0; i < E::kThreadRows; ++i) {
      const int row = first_row + e.row(i);
      if (sweeping) rows[i].delta = -grad_lse(i);  // there was no key to see
      if (chunk == 0 && threadIdx.x % E::kRowLanes == 0 && row < shape.queries)
        to.completed[first_head * shape.queries + row] = rows[i];
    }
    store_tile(matrix_of(to.grad_query, shape, first_head, 1, shape.queries, shape.dim), e, first_row, out_column,
               scaled);
  }
}

}  // namespace attention
}  // namespace
}  // namespace pynn::cuda
