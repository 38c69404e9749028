// What the forward and backward attention kernels share: operands in compute precision, transposes, and one matrix
// product C (+)= A B in which the scalars of A are broadcast and the rows of B are vectors.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <type_traits>
#include <utility>

#include "multiply_add.h"
#include "scaled_dot_product_attention.h"
#include "vec_load.h"

namespace pynn::cpu::attention {

inline constexpr int64_t kRows = 64;        // query rows of a block, at most
inline constexpr int64_t kKeys = 1024;      // keys of a block, at most
inline constexpr int64_t kShortKeys = 512;  // the same of a tile with all kRows rows
inline constexpr int64_t kShortStride = kShortKeys + 16,
                         kLongStride = kKeys + 16;  // row strides of tiles, off powers of two
inline constexpr int64_t kLine = 64;                // bytes of a line of a cache
inline constexpr int kPanelVectors = kVectorRegisters == 32 ? 4 : 2;
template <class F>
inline constexpr int64_t kPanel = kPanelVectors * kLanes<F>;  // columns of a packed panel
template <class F>
inline constexpr F kInfinity = std::numeric_limits<F>::infinity();

// Keys of a block. Up to kKeys are in one, since the backward of a row in one block needs no more than the row itself.
// More than these are cut into blocks that all kRows rows of a tile can have, for which the keys are read less often.
// The few keys of a narrow window are seldom in two blocks if these are large.
inline int64_t block_keys(const AttentionShape& shape) {
  const bool narrow = shape.key_ranges || shape.upper - shape.lower < kKeys;
  return shape.keys <= kKeys || narrow ? kKeys : kShortKeys;
}
// Whether a score tile has short rows, and more of them, or long ones: it stays in the second-level cache.
inline bool has_short_rows(const AttentionShape& shape) {
  return shape.keys <= kShortKeys || block_keys(shape) == kShortKeys;
}
inline int64_t block_rows(const AttentionShape& shape) { return has_short_rows(shape) ? kRows : kRows / 2; }
inline int64_t tile_stride(const AttentionShape& shape) { return has_short_rows(shape) ? kShortStride : kLongStride; }

// The keys that some query of [first, first + rows) sees are among these; begin may lie behind end.
struct KeyRange {
  int64_t begin, end;
};
inline KeyRange keys_of(const AttentionShape& shape, int64_t first, int64_t rows) {
  if (const AttentionKeyRange* ranges = shape.key_ranges)
    return {std::max<int64_t>(ranges[first].begin, 0), std::min<int64_t>(ranges[first + rows - 1].end, shape.keys)};
  return {std::max<int64_t>(first + shape.lower, 0), std::min(first + rows + shape.upper, shape.keys)};
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Aligned scratch of one thread. A failed allocation is remembered, not thrown: kernels may not throw.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    for (int i = 0; i < count_; ++i) std::free(blocks_[i]);
  }
  template <class E>
  E* take(int64_t count) {
    void* block = std::aligned_alloc(64, size_t(round_up(count * int64_t(sizeof(E)) + 64, 64)));
    failed |= block == nullptr;
    return static_cast<E*>(blocks_[count_++] = block);
  }
  bool failed = false;

 private:
  void* blocks_[24];
  int count_ = 0;
};

// Rows in compute precision whose length is a whole number of vectors.
template <class F>
struct Matrix {
  const F* data;
  int64_t stride;
  const F* row(int64_t i) const { return data + i * stride; }
};

template <class T>
struct Read {
  const T* data;
  int64_t row, column;
};

// Every kFetchRows rows, when row i's turn comes, brings those after the next ones into the cache: rows of a head lie
// too far apart for the CPU to see which comes next.
inline constexpr int64_t kFetchRows = 64;
template <class T>
void fetch_ahead(const Read<T>& of, int64_t i, int64_t rows, int64_t width) {
  if (of.column != 1 || i % kFetchRows != 0) return;
  for (int64_t r = i + kFetchRows; r < std::min(i + 2 * kFetchRows, rows); ++r)
    for (int64_t d = 0; d < width; d += kLine / int64_t(sizeof(T))) __builtin_prefetch(of.data + r * of.row + d);
}

// Where head number `head` of an operand starts; the last batch dimension is divided by `group`.
template <class Pointer>
Pointer head_start(const AttentionOperand<Pointer>& operand, const AttentionShape& shape, int64_t head, int64_t group) {
  int64_t offset = 0;
  for (int d = shape.batch_dims - 1; d >= 0; --d) {
    const int64_t index = head % shape.batch[d];
    offset += (d == shape.batch_dims - 1 ? index / group : index) * operand.batch[d];
    head /= shape.batch[d];
  }
  return operand.data + offset;
}

template <class T>
void widen(const T* from, accumulate_t<T>* to, int64_t count) {
  using F = accumulate_t<T>;
  int64_t j = 0;
  for (; j + kLanes<F> <= count; j += kLanes<F>) store(to + j, load_compute(from + j));
  for (; j < count; ++j) to[j] = to_float(from[j]);
}

// to[d * column] = from[d] times a number.
template <class T, class F = accumulate_t<T>>
void write_row(T* to, int64_t column, const F* from, int64_t width, F number) {
  constexpr int L = kLanes<F>;
  int64_t d = 0;
  if constexpr (std::is_same_v<T, BFloat16>)
    if (column == 1 && has_pair_products())
      for (; d + 2 * L <= width; d += 2 * L) store_pairs(to + d, load(from + d) * number, load(from + d + L) * number);
  if (column == 1)
    for (; d + L <= width; d += L) store_compute(to + d, Vec<F>(load(from + d) * number));
  for (; d < width; ++d) to[d * column] = from_float<T>(from[d] * number);
}
// The same over a number. Results of 16 bits do not notice that it is inverted first.
template <class T, class F = accumulate_t<T>>
void write_quotients(T* to, int64_t column, const F* from, int64_t width, F number) {
  if constexpr (sizeof(T) == 2) return write_row(to, column, from, width, 1 / number);
  int64_t d = 0;
  if (column == 1)
    for (; d + kLanes<F> <= width; d += kLanes<F>) store_compute(to + d, Vec<F>(load(from + d) / number));
  for (; d < width; ++d) to[d * column] = from_float<T>(from[d] / number);
}

template <class F>
int64_t padded(int64_t width) {
  return round_up(width, kLanes<F>);
}

// The rows themselves where they can be read in place, otherwise a copy in `buffer`, padded with zeros.
template <class T>
Matrix<accumulate_t<T>> rows_of(Read<T> from, int64_t rows, int64_t width, accumulate_t<T>* buffer) {
  using F = accumulate_t<T>;
  if constexpr (std::is_same_v<T, F>)
    if (from.column == 1 && width % kLanes<F> == 0) return {from.data, from.row};
  const int64_t stride = padded<F>(width);
  for (int64_t i = 0; i < rows; ++i) {
    fetch_ahead(from, i, rows, width);
    const T* source = from.data + i * from.row;
    F* target = buffer + i * stride;
    if (from.column == 1)
      widen(source, target, width);
    else
      for (int64_t d = 0; d < width; ++d) target[d] = to_float(source[d * from.column]);
    for (int64_t d = width; d < stride; ++d) target[d] = 0;
  }
  return {buffer, stride};
}

template <class F>
bool all_finite(Matrix<F> m, int64_t rows, int64_t width) {
  Vec<F> sum{};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < width; d += kLanes<F>) sum += load(m.row(i) + d) * F(0);
  bool finite = true;
  for (int l = 0; l < kLanes<F>; ++l) finite &= sum[l] == F(0);
  return finite;
}

template <class F>
using LaneIndices = std::make_integer_sequence<int, kLanes<F>>;

template <class V, int... I>
PYNN_HD V interleave_low(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * int(sizeof...(I)))...);
}
template <class V, int... I>
PYNN_HD V interleave_high(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (n / 2 + I / 2 + (I % 2) * n)...);
}
template <int step, class V, int... I>
PYNN_HD V exchange(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ step)...);
}
template <class V, int... I>
PYNN_HD V lane_numbers(std::integer_sequence<int, I...>) {
  return V{I...};
}

// to[d * stride + i] = from[i][d] for d < depth, with zeros for i from rows to the next whole vector.
// Squares of kLanes x kLanes go through log2(kLanes) perfect shuffles.
template <class F>
void transpose(Matrix<F> from, int64_t rows, int64_t depth, F* to, int64_t stride) {
  constexpr int n = kLanes<F>;
  for (int64_t i = 0; i < rows; i += n)
    for (int64_t d = 0; d < depth; d += n) {
      Vec<F> square[n], mixed[n];
#pragma GCC unroll 16
      for (int r = 0; r < n; ++r) square[r] = i + r < rows ? load(from.row(i + r) + d) : Vec<F>{};
#pragma GCC unroll 4
      for (int step = 1; step < n; step *= 2) {
#pragma GCC unroll 16
        for (int r = 0; r < n / 2; ++r) {
          mixed[2 * r] = interleave_low(square[r], square[r + n / 2], LaneIndices<F>());
          mixed[2 * r + 1] = interleave_high(square[r], square[r + n / 2], LaneIndices<F>());
        }
#pragma GCC unroll 16
        for (int r = 0; r < n; ++r) square[r] = mixed[r];
      }
      const int64_t count = depth - d < n ? depth - d : n;
#pragma GCC unroll 16
      for (int c = 0; c < n; ++c)
        if (c < count) store(to + (d + c) * stride + i, square[c]);
    }
}

// The transpose cut into panels of kPanel columns: panel p at to + p * depth * kPanel, row stride kPanel.
template <class F>
void pack_panels(Matrix<F> from, int64_t rows, int64_t depth, F* to) {
  for (int64_t i = 0; i < rows; i += kPanel<F>)
    transpose<F>({from.row(i), from.stride}, rows - i < kPanel<F> ? rows - i : kPanel<F>, depth, to + i * depth,
                 kPanel<F>);
}

// The left operand of a product: element (m, k) at m * kRow + k * step, with kRow known when compiling (1 for an
// operand stored by columns). Sums of kChunk products are added to a total: the rounding error of a long sum grows
// with the number of chunks, not of products. The error of a score is multiplied by exp, so scores use shorter chunks.
// Results of 16 bits do not notice how their sums are formed: no chunks, and twice as many sums in a register tile.
template <class F>
struct Left {
  const F* data;
  int64_t step;
};
inline constexpr int64_t kNoChunks = INT64_MAX;
template <class T>
inline constexpr int64_t kScoreChunk = sizeof(T) == 2 ? kNoChunks : 8;
template <class T>
inline constexpr int64_t kChunk = sizeof(T) == 2 ? kNoChunks : 16;

inline constexpr int kAccumulators = kVectorRegisters == 32 ? 24 : 12;  // sums and totals
template <int64_t kChunk>
constexpr int rows_of_tile(int vectors) {
  return std::min(12, kAccumulators / (kChunk == kNoChunks ? 1 : 2) / vectors);
}
// Query rows that go through all steps of a block of keys one after another: those of a register tile where results
// are so short that it has them all, since their scores stay in the first-level cache.
template <class T>
inline constexpr int64_t kStrip = sizeof(T) == 2 ? rows_of_tile<kNoChunks>(kPanelVectors) : kRows;
inline constexpr int64_t kLastSteps = 8;  // of a sum, for which a register tile is done a few rows at a time

// Adds products [begin, end) of each sum of M rows.
template <int M, int64_t kRow, class Product, int N, class F>
PYNN_HD void add_products(int64_t begin, int64_t end, Left<F> a, const F* b, int64_t b_stride, Vec<F> (*sum)[N]) {
  for (int64_t k = begin; k < end; ++k) {
    Vec<F> row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = in_register(load(b + k * b_stride + n * kLanes<F>));
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec<F> element = Product::element(a.data + m * kRow + k * a.step);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[m][n] = Product::add(element, row[n], sum[m][n]);
    }
  }
}

// The last products of a register tile, a few rows after the others: stores of a whole tile at once would hold up what
// follows. c gets total + sum, added to what it held or not.
template <int M, int64_t kRow, bool kTotals, class Product, int N, class F>
PYNN_HD void finish_rows(int64_t begin, int64_t end, Left<F> a, const F* b, int64_t b_stride, Vec<F> (*total)[N],
                         Vec<F> (*sum)[N], F* c, int64_t c_stride, bool add) {
  constexpr int kGroup = std::min(M, std::max(1, 8 / N));  // rows with enough sums to hide the latency of fma
  add_products<kGroup, kRow, Product, N>(begin, end, a, b, b_stride, sum);
#pragma GCC unroll 16
  for (int m = 0; m < kGroup; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      F* const to = c + m * c_stride + n * kLanes<F>;
      if constexpr (kTotals) sum[m][n] = total[m][n] + sum[m][n];
      store(to, add ? load(to) + sum[m][n] : sum[m][n]);
    }
  if constexpr (M > kGroup)
    finish_rows<M - kGroup, kRow, kTotals, Product, N>(begin, end, {a.data + kGroup * kRow, a.step}, b, b_stride,
                                                       total + kGroup, sum + kGroup, c + kGroup * c_stride, c_stride,
                                                       add);
}

// One register tile: M rows, N vectors.
template <int64_t kRow, int64_t kChunk, int M, int N, class Product, class F>
void tile(int64_t depth, Left<F> a, const F* b, int64_t b_stride, F* c, int64_t c_stride, bool add) {
  constexpr bool kTotals = kChunk != kNoChunks;
  Vec<F> total[M][N] = {}, sum[M][N] = {};
  int64_t k = 0;
  if constexpr (kTotals) {
    for (; k + kChunk < depth; k += kChunk) {
      add_products<M, kRow, Product, N>(k, k + kChunk, a, b, b_stride, sum);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          total[m][n] += sum[m][n];
          sum[m][n] = Vec<F>{};
        }
    }
  }
  const int64_t last = std::max(k, depth - kLastSteps);
  add_products<M, kRow, Product, N>(k, last, a, b, b_stride, sum);
  finish_rows<M, kRow, kTotals, Product, N>(last, depth, a, b, b_stride, total, sum, c, c_stride, add);
}

template <int64_t kRow, int64_t kChunk, int N, class Product, class F, int... I>
void tile_column(int64_t rows, int64_t depth, Left<F> a, const F* b, int64_t b_stride, F* c, int64_t c_stride, bool add,
                 std::integer_sequence<int, I...>) {
  using Tile = void (*)(int64_t, Left<F>, const F*, int64_t, F*, int64_t, bool);
  static constexpr Tile tiles[] = {&tile<kRow, kChunk, I + 1, N, Product, F>...};
  const int64_t height = divide_up(rows, divide_up(rows, int64_t(sizeof...(I))));
  for (int64_t m = 0; m < rows; m += height) {
    const int64_t count = rows - m < height ? rows - m : height;
    tiles[count - 1](depth, {a.data + m * kRow, a.step}, b, b_stride, c + m * c_stride, c_stride, add);
  }
}

// C (rows x width) = A B, or C += A B. `panel` is the distance between column panels of B.
template <int64_t kRow, int64_t kChunk, class Product = MultiplyAdd, class F>
void multiply(int64_t rows, int64_t width, int64_t depth, Left<F> a, const F* b, int64_t b_stride, int64_t panel, F* c,
              int64_t c_stride, bool add) {
  for (int64_t j = 0; j < width; j += kPanel<F>, b += panel, c += kPanel<F>) {
    const auto run = [&]<int N>(std::integral_constant<int, N>) {
      tile_column<kRow, kChunk, N, Product>(rows, depth, a, b, b_stride, c, c_stride, add,
                                            std::make_integer_sequence<int, rows_of_tile<kChunk>(N)>());
    };
    const int64_t vectors = divide_up(width - j, kLanes<F>);
    if (vectors == 1)
      run(std::integral_constant<int, 1>());
    else if (vectors == 2 || kPanelVectors == 2)
      run(std::integral_constant<int, 2>());
    else if constexpr (kPanelVectors == 4) {
      if (vectors == 3)
        run(std::integral_constant<int, 3>());
      else
        run(std::integral_constant<int, 4>());
    }
  }
}

// C += A B where a zero in A takes nothing from B, not even NaN: for operands with non-finite rows that are masked.
template <int64_t kRow, int64_t kChunk, class F>
void multiply_skipping(int64_t rows, int64_t width, int64_t depth, Left<F> a, Matrix<F> b, F* c, int64_t c_stride,
                       bool add) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t j = 0; j < width; j += kLanes<F>) {
      Vec<F> total{};
      for (int64_t begin = 0, end; begin < depth; begin = end) {
        end = depth - begin < kChunk ? depth : begin + kChunk;
        Vec<F> sum{};
        for (int64_t k = begin; k < end; ++k) {
          const F scalar = a.data[m * kRow + k * a.step];
          if (scalar != F(0)) sum = fma(broadcast(scalar), load(b.row(k) + j), sum);
        }
        total += sum;
      }
      F* to = c + m * c_stride + j;
      store(to, add ? load(to) + total : total);
    }
}

// C (+)= A B for B given as rows; `finite` tells whether every element of B is.
template <int64_t kRow, int64_t kChunk, class F>
void multiply_rows(int64_t rows, int64_t width, int64_t depth, Left<F> a, Matrix<F> b, bool finite, F* c,
                   int64_t c_stride, bool add) {
  if (finite)
    multiply<kRow, kChunk>(rows, width, depth, a, b.data, b.stride, kPanel<F>, c, c_stride, add);
  else
    multiply_skipping<kRow, kChunk>(rows, width, depth, a, b, c, c_stride, add);
}

// The same for A a score tile of row stride `stride`; T is the type of the data.
template <class T, class F>
void multiply_scores(int64_t rows, int64_t width, int64_t depth, const F* scores, int64_t stride, Matrix<F> b,
                     bool finite, F* c, int64_t c_stride, bool add) {
  const Left<F> a{scores, 1};
  if (stride == kShortStride)
    multiply_rows<kShortStride, kChunk<T>>(rows, width, depth, a, b, finite, c, c_stride, add);
  else
    multiply_rows<kLongStride, kChunk<T>>(rows, width, depth, a, b, finite, c, c_stride, add);
}

}  // namespace pynn::cpu::attention
