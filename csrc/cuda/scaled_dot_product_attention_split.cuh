// Attention, forward, of a few queries over many keys, as in decoding with a cache: the keys are split into parts, so
// that there is work for a whole GPU.
//
// A block owns a part of the keys of a key head, kRows rows of the queries of all heads that share it, and kWidth
// columns of their outputs: keys and values are read once for a whole group. It runs the loop of the forward over its
// part. A second kernel merges what the parts give for a row - a largest score, a sum of weights and sums of weighted
// values - in the order of the parts.
#pragma once
#include "scaled_dot_product_attention_forward.cuh"

namespace pynn::cuda {
namespace {
namespace attention {

// For so many queries of a head at most, and more keys than those of a part.
constexpr int64_t kFewQueries = 16;
// Keys of a part, a multiple of every E::kColumns, unless there were more than kMostParts of them. They follow from the
// number of keys alone: results of a sample depend neither on its batch nor on the device.
constexpr int64_t kPartKeys = 256;
constexpr int kMostParts = 128;

inline bool is_split(const AttentionShape& s) { return s.queries <= kFewQueries && s.keys > kPartKeys; }
inline int64_t part_keys(const AttentionShape& s) { return kPartKeys * ceil_div(s.keys, kPartKeys * kMostParts); }
inline int64_t part_count(const AttentionShape& s) { return ceil_div(s.keys, part_keys(s)); }

// Of a row in a part: its largest score, in units of kLogUnit, and the sum of its weights against that. It is 0 where
// no key of the part takes part; then there may be no sums of values either.
template <class F>
struct PartStatistics {
  F top, total;
};

template <class T>
struct PartialOutputs {
  using F = accumulate_t<T>;
  F* sums;                    // (heads, queries, parts, width)
  PartStatistics<F>* of_row;  // (heads, queries, parts)
  int width, parts, keys;     // width: value_dim, in whole packs of 16 bytes; keys: of a part
};

template <class T>
int64_t padded_value_dim(const AttentionShape& s) {
  constexpr int64_t kPack = 16 / sizeof(accumulate_t<T>);
  return ceil_div(s.value_dim, kPack) * kPack;
}

template <class T>
int64_t split_scratch(const AttentionShape& s) {
  using F = accumulate_t<T>;
  const int64_t of_part = padded_value_dim<T>(s) * int64_t(sizeof(F)) + int64_t(sizeof(PartStatistics<F>));
  return is_split(s) ? s.heads * s.queries * part_count(s) * of_part : 0;
}

template <class T>
PartialOutputs<T> partial_outputs(const AttentionShape& s, void* scratch) {
  using F = accumulate_t<T>;
  F* const sums = static_cast<F*>(scratch);
  const int64_t width = padded_value_dim<T>(s), parts = part_count(s);
  return {sums, reinterpret_cast<PartStatistics<F>*>(sums + s.heads * s.queries * parts * width), int(width),
          int(parts), int(part_keys(s))};
}

template <class E, int blocks>
__global__ void __launch_bounds__(E::kThreads, blocks)
    part_kernel(const __grid_constant__ Problem<typename E::Element> p,
                const __grid_constant__ PartialOutputs<typename E::Element> to) {
  using T = typename E::Element;
  using F = accumulate_t<T>;
  static_assert(kPartKeys % E::kColumns == 0);
  DYNAMIC_SHARED(unsigned char, shared);
  const AttentionShape& shape = p.shape;
  const unsigned tiles = unsigned((shape.queries * shape.group + E::kRows - 1) / E::kRows);
  const int first_row = int(blockIdx.x % tiles) * E::kRows, out_column = int(blockIdx.y) * E::kWidth;
  const int part = int(blockIdx.x / tiles % unsigned(to.parts)), part_tiles = to.keys / E::kColumns;
  const int64_t head = blockIdx.x / tiles / unsigned(to.parts) * shape.group;  // the first of its group
  const E e;
  const Scores<T, true> scores(p, head);
  Attended<E> rows;
  const int begin = max(scores.template first_tile<false>(0, E::kColumns), part * part_tiles),
            end = min(scores.template end_tile<false>(0, scores.length, E::kColumns), (part + 1) * part_tiles);
  attend(rows, e, shared, scores, grouped_matrix_of(p.query, shape, head, shape.queries, shape.dim),
         matrix_of(p.key, shape, head, shape.group, shape.keys, shape.dim),
         matrix_of(p.value, shape, head, shape.group, shape.keys, shape.value_dim), first_row, out_column, begin, end);

  const int64_t first = head * shape.queries * to.parts + part;  // of row 0; rows are to.parts apart
#pragma unroll
  for (int i = 0; i < E::kThreadRows; ++i) {
    const int row = first_row + e.row(i);
    if (blockIdx.y == 0 && e.output_column(0) == 0 && row < scores.queries)
      to.of_row[first + int64_t(row) * to.parts] = {rows.top[i], rows.total[i]};
  }
  if (begin >= end) return;
  const Matrix<F> sums{
      to.sums + first * to.width, int64_t(to.parts) * to.width, 1, scores.queries, int(shape.value_dim), true};
  store_tile(sums, e, first_row, out_column, [&](int i, int n) { return E::at(rows.out, i, n); });
}

// A block per row; a thread for every part, then for every column. Sinks come in here, once.
constexpr int kMergeThreads = kMostParts;
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ Problem<T> p, const __grid_constant__ PartialOutputs<T> from,
                 const __grid_constant__ ForwardOutputs<T> to) {
  using F = accumulate_t<T>;
  using Sum = attention_lse_t<T>;
  SHARED_ARRAY(F, tops, kMostParts);
  SHARED_ARRAY(F, factors, kMostParts);  // of a part, for the largest score of all
  SHARED_ARRAY(F, totals, kMostParts);
  const AttentionShape& shape = p.shape;
  const int64_t index = blockIdx.x, head = index / shape.queries;
  const int parts = from.parts, own = threadIdx.x;
  const F sink = p.per_head.sinks ? p.per_head.sinks[head] * kLogUnit<T> : minus_infinity<F>();
  if (own < parts) {
    const PartStatistics<F> part = from.of_row[index * parts + own];
    tops[own] = part.top, totals[own] = part.total;
  }
  __syncthreads();
  F top = sink;
#pragma unroll 1
  for (int part = 0; part < parts; ++part) top = max(top, tops[part]);
  const F shift = top == minus_infinity<F>() ? F(0) : top;
  if (own < parts) factors[own] = exponential<T>(tops[own] - shift);
  __syncthreads();

  Sum total = exponential<T>(sink - shift);
#pragma unroll 1
  for (int part = 0; part < parts; ++part) total += Sum(totals[part]) * Sum(factors[part]);
  if (own == 0) to.lse[index] = log_sum<T>(top, total);
  if (total == Sum(0)) total = 1;
  const auto out = matrix_of(to.out, shape, head, 1, shape.queries, shape.value_dim);
  T* const out_row = out.at(int(index - head * shape.queries));
  const F* const sums = from.sums + index * parts * from.width;
#pragma unroll 1
  for (int column = threadIdx.x; column < out.width; column += kMergeThreads) {
    Sum sum = 0;
#pragma unroll 4
    for (int part = 0; part < parts; ++part)
      if (totals[part] != F(0)) sum += Sum(sums[int64_t(part) * from.width + column]) * Sum(factors[part]);
    out_row[column * out.column] = from_float<T>(F(sum / total));
  }
}

}  // namespace attention
}  // namespace
}  // namespace pynn::cuda
