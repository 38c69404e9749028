// The gradient of a mask that is broadcast: dS summed over the dimensions in which it is.
//
// A block owns a tile of scores of one of the mask's own matrices and adds up dS of that tile over all heads that share
// the matrix, in their order. Where rows or columns are broadcast the tile is then summed to one row or column, and a
// second kernel adds those of all tiles: a partial result is laid out like the mask, with a row (column) for every tile
// of rows (columns) in place of the broadcast one.
#pragma once
#include "scaled_dot_product_attention_backward.cuh"

namespace pynn::cuda {
namespace {
namespace attention {

// fp64 sums cost little beside fp32 products, but would take the registers that 16-bit tiles need.
template <class T>
using mask_sum_t = std::conditional_t<sizeof(T) == 2, float, double>;

template <class T>
struct MaskGradient {
  mask_sum_t<T>* partial;  // (matrices, row_parts, column_parts)
  const RowStatistics<accumulate_t<T>>* statistics;
  int64_t sharing;  // heads that share a matrix
  int64_t row_parts, column_parts;
};

// The index-th head of those that share matrix `matrix`.
__device__ inline int64_t sharing_head(const AttentionShape& shape, const AttentionMaskOperand& mask, int64_t matrix,
                                       int64_t index) {
  int64_t head = 0, step = 1;
  for (int d = shape.batch_dims - 1; d >= 0; step *= shape.batch[d], --d) {
    int64_t& from = mask.batch[d] == 1 ? index : matrix;
    head += from % shape.batch[d] * step;
    from /= shape.batch[d];
  }
  return head;
}

template <class E, int blocks>
__global__ void __launch_bounds__(E::kThreads, blocks)
    mask_gradient_kernel(const __grid_constant__ Problem<typename E::Element> p,
                         const __grid_constant__ MaskGradient<typename E::Element> to) {
  using T = typename E::Element;
  using F = accumulate_t<T>;
  using Sum = mask_sum_t<T>;
  static_assert(E::kRows * E::kColumns * sizeof(Sum) <= 2 * E::kOwnBytes);
  DYNAMIC_SHARED(unsigned char, shared);
  const BackwardTiles<E, false, 1> b(p, shared);
  const E& e = b.e;
  const AttentionShape& shape = p.shape;
  const unsigned row_tiles = unsigned((shape.queries + E::kRows - 1) / E::kRows),
                 column_tiles = unsigned((shape.keys + E::kColumns - 1) / E::kColumns);
  const int column_tile = int(blockIdx.x % column_tiles), row_tile = int(blockIdx.x / column_tiles % row_tiles);
  const int64_t matrix = blockIdx.x / column_tiles / row_tiles;
  const int first_row = row_tile * E::kRows, first_column = column_tile * E::kColumns;

  Sum sums[E::kThreadRows][E::kThreadColumns] = {};
#pragma unroll 1
  for (int64_t index = 0; index < to.sharing; ++index) {
    const int64_t head = sharing_head(shape, p.mask, matrix, index);
    const Scores<T> scores(p, head);
    unsigned bits[E::kThreadRows] = {};
    if (next_tile<false>(column_tile, column_tile + 1, bits, e, scores, first_row) != column_tile) continue;
    RowStatistics<F> rows[E::kThreadRows];
#pragma unroll
    for (int i = 0; i < E::kThreadRows; ++i) {
      const int row = first_row + e.row(i);
      rows[i] = row < shape.queries ? to.statistics[head * shape.queries + row] : RowStatistics<F>{0, 0, 0};
    }
    if (!b.chunked()) b.load_own(head, first_row, 0, false), b.load_own(head, first_row, 0, true);
    b.prefetch(head, first_column, 0, nullptr);
    cp_async_wait<0>();
    __syncthreads();
    typename E::Tile weights, grads;
    F totals[E::kThreadRows] = {};
    b.weigh(weights, grads, scores, bits, rows, totals, head, first_row, first_column, 0);
#pragma unroll
    for (int i = 0; i < E::kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < E::kThreadColumns; ++j) sums[i][j] += Sum(E::at(grads, i, j));
    __syncthreads();
  }

  const bool one_row = p.mask.rows == 1, one_column = p.mask.columns == 1;
  Sum* const tile = reinterpret_cast<Sum*>(shared);
#pragma unroll
  for (int i = 0; i < E::kThreadRows; ++i)
#pragma unroll
    for (int j = 0; j < E::kThreadColumns; ++j) tile[e.row(i) * E::kColumns + e.column(j)] = sums[i][j];
  __syncthreads();
  if (one_row) {
    for (int j = threadIdx.x; j < E::kColumns; j += E::kThreads)
      for (int i = 1; i < E::kRows; ++i) tile[j] += tile[i * E::kColumns + j];
    __syncthreads();
  }
  if (one_column) {
    for (int i = threadIdx.x; i < (one_row ? 1 : E::kRows); i += E::kThreads)
      for (int j = 1; j < E::kColumns; ++j) tile[i * E::kColumns] += tile[i * E::kColumns + j];
    __syncthreads();
  }
  const int rows = one_row ? 1 : E::kRows, columns = one_column ? 1 : E::kColumns;
  const int64_t row = one_row ? row_tile : first_row, column = one_column ? column_tile : first_column;
  for (int at = threadIdx.x; at < rows * columns; at += E::kThreads) {
    const int i = at / columns, j = at - i * columns;
    if (row + i < to.row_parts && column + j < to.column_parts)
      to.partial[(matrix * to.row_parts + row + i) * to.column_parts + column + j] = tile[i * E::kColumns + j];
  }
}

// grad_mask[matrix][row][column] = the sum of the partial results in its place.
constexpr int kSumThreads = 256;
template <class Sum, class F>
__global__ void __launch_bounds__(kSumThreads)
    sum_mask_gradient_kernel(const Sum* partial, F* grad_mask, int64_t rows, int64_t columns, int64_t row_parts,
                             int64_t column_parts, int64_t count) {
  const int64_t at = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (at >= count) return;
  const int64_t column = at % columns, row = at / columns % rows, matrix = at / columns / rows;
  const int64_t row_end = rows == 1 ? row_parts : row + 1, column_end = columns == 1 ? column_parts : column + 1;
  double sum = 0;
  for (int64_t i = rows == 1 ? 0 : row; i < row_end; ++i)
    for (int64_t j = columns == 1 ? 0 : column; j < column_end; ++j)
      sum += double(partial[(matrix * row_parts + i) * column_parts + j]);
  grad_mask[at] = F(sum);
}

template <class F>
__global__ void __launch_bounds__(kSumThreads) zero_kernel(F* to, int64_t count) {
  const int64_t at = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (at < count) to[at] = 0;
}

}  // namespace attention
}  // namespace
}  // namespace pynn::cuda
