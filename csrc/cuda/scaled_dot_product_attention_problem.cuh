// What every attention kernel knows: where the matrices of a head lie, which scores take part, what dropout keeps, and
// how tiles of a matrix come to shared memory.
//
// Kernels own a tile of rows of one matrix and stream tiles of rows of another past it; scores are (owned rows x
// streamed rows). The engine E (scaled_dot_product_attention_engines.cuh) says which of them a thread holds:
// E::kThreadRows x E::kThreadColumns, at rows e.row(i) and columns e.column(j) of the tile. With kKeyRows the owned
// rows are keys and the columns queries, otherwise the other way round.
#pragma once
#include <algorithm>
#include <stdexcept>

#include "pack.cuh"
#include "philox.h"
#include "scaled_dot_product_attention.h"
#include "scaled_dot_product_attention_math.cuh"

namespace pynn::cuda {
namespace {
namespace attention {

// An operand, and whether its rows lie in packs of 16 bytes.
template <class T>
struct Operand {
  AttentionOperand<T*> at;
  bool packs;
};

// One head of an operand.
template <class T>
struct Matrix {
  T* data;
  int64_t row, column;
  int rows, width;
  bool packs;
};

struct Dropout {
  const int64_t* key;  // (seed, offset), or nullptr without dropout
  uint64_t threshold;
  double kept;  // factor of what is kept
};

// The arguments of a kernel that do not differ between passes.
template <class T>
struct Problem {
  AttentionShape shape;
  AttentionMaskOperand mask;
  Dropout dropout;
  Operand<const T> query, key, value, grad_out;
  // Scores are products times factor or, with a cap, cap tanh(products times factor); in units of kLogUnit.
  accumulate_t<T> factor, cap;
  AttentionPerHead<accumulate_t<T>> per_head;
};

// The offset of a query head; in an operand with fewer heads, `group` of them share one.
__host__ __device__ inline int64_t head_offset(const AttentionShape& shape, const int64_t* strides, int64_t head,
                                               int64_t group) {
  int64_t offset = 0;
  for (int d = shape.batch_dims - 1; d >= 0; --d) {
    const int64_t index = head % shape.batch[d];
    head /= shape.batch[d];
    offset += (d == shape.batch_dims - 1 ? index / group : index) * strides[d];
  }
  return offset;
}

template <class T>
__device__ __forceinline__ Matrix<T> matrix_of(const Operand<T>& operand, const AttentionShape& shape, int64_t head,
                                               int64_t group, int64_t rows, int64_t width) {
  return {operand.at.data + head_offset(shape, operand.at.batch, head, group),
          operand.at.row,
          operand.at.column,
          int(rows),
          int(width),
          operand.packs};
}

// ---- Tiles ----

// Columns of a tile that hold data, in whole steps of a product.
constexpr int kStep = 16;
__host__ __device__ __forceinline__ int padded_width(int width, int first_column, int tile_width) {
  const int left = min(width - first_column, tile_width);
  return (left + kStep - 1) / kStep * kStep;
}

// Starts copying `rows` rows and up to E::kWidth columns; what lies outside of the matrix becomes 0. A thread copies
// the packs that the loops of remove_nonfinite give it.
template <class E, int rows>
__device__ __forceinline__ void load_tile(unsigned char* tile, const Matrix<const typename E::Element>& m,
                                          int first_row, int first_column) {
  using T = typename E::Element;
  constexpr int kPack = 16 / sizeof(T), kPacks = E::kWidth / kPack;
  const int padded = padded_width(m.width, first_column, E::kWidth);
  if (m.packs) {
#pragma unroll 2
    for (int at = threadIdx.x; at < rows * kPacks; at += E::kThreads) {
      const int row = at / kPacks, pack = at % kPacks, column = first_column + pack * kPack;
      if (pack * kPack >= padded) continue;
      const int valid = first_row + row < m.rows ? max(min(m.width - column, kPack), 0) : 0;
      const T* from = m.data + int64_t(first_row + row) * m.row + column;
      cp_async<16>(tile + E::offset(row, pack), valid > 0 ? from : m.data, valid * int(sizeof(T)));
    }
  } else {
#pragma unroll 1
    for (int at = threadIdx.x; at < rows * kPacks; at += E::kThreads) {
      const int row = at / kPacks, pack = at % kPacks, column = first_column + pack * kPack;
      if (pack * kPack >= padded) continue;
      const int valid = first_row + row < m.rows ? m.width - column : 0;
      const T* from = m.data + int64_t(first_row + row) * m.row + column * m.column;
      T* to = reinterpret_cast<T*>(tile + E::offset(row, pack));
#pragma unroll 1
      for (int k = 0; k < kPack; ++k, from += m.column) to[k] = k < valid ? *from : T{};
    }
  }
}

// Zeros in place of NaN and infinity: a product with a weight of 0 is to be 0. Returns whether there were any.
template <class E, int rows>
__device__ __forceinline__ bool remove_nonfinite(unsigned char* tile, int width, int first_column) {
  using T = typename E::Element;
  constexpr int kPack = 16 / sizeof(T), kPacks = E::kWidth / kPack;
  const int padded = padded_width(width, first_column, E::kWidth);
  bool found = false;
#pragma unroll 1
  for (int at = threadIdx.x; at < rows * kPacks; at += E::kThreads) {
    const int row = at / kPacks, pack = at % kPacks;
    if (pack * kPack >= padded) continue;
    auto& elements = *reinterpret_cast<PackOf<T, kPack>*>(tile + E::offset(row, pack));
#pragma unroll
    for (int k = 0; k < kPack; ++k)
      if (!is_finite(to_float(elements.element[k]))) elements.element[k] = T{}, found = true;
  }
  return found;
}

// ---- Scores of one head ----

template <class T>
struct Scores {
  using F = accumulate_t<T>;
  int queries, keys;
  int lower, upper, diagonal;  // as in AttentionShape, and so are these two
  const AttentionKeyRange* key_ranges;
  const AttentionQueryRange* query_ranges;
  F slope;  // of alibi, in units of kLogUnit
  AttentionMask kind;
  const void* mask;  // of the head
  int64_t mask_row, mask_column;
  Dropout dropout;
  uint64_t first_element;  // of the head, as dropout counts
  F factor, cap;           // as in Problem

  __device__ __forceinline__ Scores(const Problem<T>& p, int64_t head)
      : queries(int(p.shape.queries)),
        keys(int(p.shape.keys)),
        lower(int(p.shape.lower)),
        upper(int(p.shape.upper)),
        diagonal(int(p.shape.diagonal)),
        key_ranges(p.shape.key_ranges),
        query_ranges(p.shape.query_ranges),
        slope(p.per_head.alibi_slopes ? p.per_head.alibi_slopes[head] * kLogUnit<T> : F(0)),
        kind(p.mask.kind),
        mask(nullptr),
        mask_row(p.mask.operand.row),
        mask_column(p.mask.operand.column),
        dropout(p.dropout),
        first_element(uint64_t(head) * uint64_t(p.shape.queries) * uint64_t(p.shape.keys)),
        factor(p.factor),
        cap(p.cap) {
    const int64_t offset = kind == AttentionMask::kNone ? 0 : head_offset(p.shape, p.mask.operand.batch, head, 1);
    if (kind == AttentionMask::kBool)
      mask = static_cast<const uint8_t*>(p.mask.operand.data) + offset;
    else
      with_mask(p.mask.operand.data, [&](auto* data) { mask = data + offset; });
  }

  // Calls body with a pointer of a floating mask's type.
  template <class Body>
  __device__ __forceinline__ void with_mask(const void* data, const Body& body) const {
    if (kind == AttentionMask::kNone || kind == AttentionMask::kBool) return;
    if constexpr (!std::is_same_v<T, float>) {
      if (kind != AttentionMask::kFloat) {
        body(static_cast<const T*>(data));
        return;
      }
    }
    body(static_cast<const float*>(data));
  }

  __device__ __forceinline__ int64_t mask_at(int query, int key) const { return query * mask_row + key * mask_column; }

  // Whether all queries of a tile see all keys of it, as far as their places say.
  template <bool kKeyRows>
  __device__ __forceinline__ bool is_inside(int first_row, int rows, int first_column, int columns) const {
    const int query = kKeyRows ? first_column : first_row,
              query_end = min(query + (kKeyRows ? columns : rows), queries), key = kKeyRows ? first_row : first_column,
              key_end = min(key + (kKeyRows ? rows : columns), keys);
    if (key_ranges)
      return query < query_end && key_end <= key_ranges[query].end && key >= key_ranges[query_end - 1].begin;
    return key_end <= query + upper + 1 && key >= query_end - 1 + lower;
  }
  template <bool kKeyRows>
  __device__ __forceinline__ bool is_whole(int first_row, int rows, int first_column, int columns) const {
    return kind == AttentionMask::kNone && first_column + columns <= (kKeyRows ? queries : keys) &&
           is_inside<kKeyRows>(first_row, rows, first_column, columns);
  }

  // Whether masks may hide scores of the tile, so that what they hide must not be seen.
  template <bool kKeyRows>
  __device__ __forceinline__ bool may_hide(int first_row, int rows, int first_column, int columns) const {
    return kind != AttentionMask::kNone || !is_inside<kKeyRows>(first_row, rows, first_column, columns);
  }

  // The tiles of `columns` that queries (keys, with kKeyRows) of [first_row, first_row + rows) may see (be seen by).
  template <bool kKeyRows>
  __device__ __forceinline__ int first_tile(int first_row, int columns) const {
    if (key_ranges) return max(kKeyRows ? query_ranges[first_row].begin : key_ranges[first_row].begin, 0) / columns;
    return max(first_row + (kKeyRows ? -upper : lower), 0) / columns;
  }
  template <bool kKeyRows>
  __device__ __forceinline__ int end_tile(int first_row, int rows, int columns) const {
    const int last = min(first_row + rows, kKeyRows ? keys : queries) - 1;
    const int limit = !key_ranges ? last + 1 + (kKeyRows ? -lower : upper)
                      : kKeyRows  ? query_ranges[last].end
                                  : key_ranges[last].end;
    const int end = min(limit, kKeyRows ? queries : keys);
    return end <= 0 ? 0 : (end + columns - 1) / columns;
  }

  // The key from which alibi counts distances.
  __device__ __forceinline__ int on_diagonal(int query) const {
    return key_ranges ? key_ranges[min(query, queries - 1)].diagonal : query + diagonal;
  }

  __device__ __forceinline__ bool takes_part(int query, int key) const {
    if (query >= queries || key >= keys) return false;
    if (key_ranges ? key < key_ranges[query].begin || key >= key_ranges[query].end
                   : key > query + upper || key < query + lower)
      return false;
    bool visible = true;
    if (kind == AttentionMask::kBool) visible = static_cast<const uint8_t*>(mask)[mask_at(query, key)] != 0;
    with_mask(mask, [&](auto* data) { visible = to_float(data[mask_at(query, key)]) != minus_infinity<F>(); });
    return visible;
  }

  // Bit j of bits[i]: whether score (i, j) of this thread takes part.
  template <bool kKeyRows, class E>
  __device__ __forceinline__ void find_visible(unsigned (&bits)[E::kThreadRows], const E& e, int first_row,
                                               int first_column) const {
#pragma unroll
    for (int i = 0; i < E::kThreadRows; ++i) {
      const int row = first_row + e.row(i);
      bits[i] = 0;
#pragma unroll 1
      for (int j = 0; j < E::kThreadColumns; ++j) {
        const int column = first_column + e.column(j);
        if (takes_part(kKeyRows ? column : row, kKeyRows ? row : column)) bits[i] |= 1u << j;
      }
    }
  }

  // Products become scores: scaled, capped, masked, -inf where they take no part.
  template <bool kKeyRows, class E>
  __device__ __forceinline__ void finish(typename E::Tile& s, const unsigned (&bits)[E::kThreadRows], bool whole,
                                         const E& e, int first_row, int first_column) const {
#pragma unroll
    for (int i = 0; i < E::kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < E::kThreadColumns; ++j) E::at(s, i, j) *= factor;
    if (cap != F(0)) {
#pragma unroll
      for (int i = 0; i < E::kThreadRows; ++i)
#pragma unroll
        for (int j = 0; j < E::kThreadColumns; ++j) E::at(s, i, j) = cap * tangent<T>(E::at(s, i, j));
    }
    if (slope != F(0)) {
      int row_place[E::kThreadRows];  // of keys their own, of queries that of the key on the diagonal
#pragma unroll
      for (int i = 0; i < E::kThreadRows; ++i) {
        const int row = first_row + e.row(i);
        row_place[i] = kKeyRows ? row : on_diagonal(row);
      }
#pragma unroll
      for (int j = 0; j < E::kThreadColumns; ++j) {
        const int column = first_column + e.column(j), column_place = kKeyRows ? on_diagonal(column) : column;
#pragma unroll
        for (int i = 0; i < E::kThreadRows; ++i)
          E::at(s, i, j) = multiply_add(-slope, F(abs(column_place - row_place[i])), E::at(s, i, j));
      }
    }
    if (whole) return;
    with_mask(mask, [&](auto* data) {
#pragma unroll
      for (int i = 0; i < E::kThreadRows; ++i) {
        const int row = first_row + e.row(i);
#pragma unroll
        for (int j = 0; j < E::kThreadColumns; ++j) {
          const int column = first_column + e.column(j);
          if (bits[i] >> j & 1)
            E::at(s, i, j) = multiply_add(F(to_float(data[kKeyRows ? mask_at(column, row) : mask_at(row, column)])),
                                          kLogUnit<T>, E::at(s, i, j));
        }
      }
    });
#pragma unroll
    for (int i = 0; i < E::kThreadRows; ++i)
#pragma unroll
      for (int j = 0; j < E::kThreadColumns; ++j)
        if (!(bits[i] >> j & 1)) E::at(s, i, j) = minus_infinity<F>();
  }

  // Bit j of bits[i]: whether dropout keeps weight (i, j) of this thread.
  template <bool kKeyRows, class E>
  __device__ __forceinline__ void find_kept(unsigned (&bits)[E::kThreadRows], const E& e, int first_row,
                                            int first_column) const {
    const uint64_t seed = uint64_t(dropout.key[0]), offset = uint64_t(dropout.key[1]);
#pragma unroll
    for (int i = 0; i < E::kThreadRows; ++i) {
      const int row = first_row + e.row(i);
      uint64_t drawn = 0;
      uint32_t words[4];
      bits[i] = 0;
#pragma unroll 1
      for (int j = 0; j < E::kThreadColumns; ++j) {
        const int column = first_column + e.column(j);
        const uint64_t query = uint64_t(kKeyRows ? column : row), key = uint64_t(kKeyRows ? row : column);
        const uint64_t element = first_element + query * uint64_t(keys) + key;
        if (j == 0 || drawn != element / 4) philox4x32(seed, offset + element / 4, words);
        drawn = element / 4;
        const uint32_t low = element & 1 ? words[1] : words[0], high = element & 1 ? words[3] : words[2];
        if ((element & 2 ? high : low) >= dropout.threshold) bits[i] |= 1u << j;
      }
    }
  }
};

// ---- Results ----

// Writes the thread's part of an output tile, times `factor` per row.
template <class E, class Value>
__device__ __forceinline__ void store_tile(const Matrix<typename E::Element>& to, const E& e, int first_row,
                                           int first_column, const Value& value) {
  using T = typename E::Element;
  constexpr int kRun = E::kRun;
  struct alignas(kRun * sizeof(T)) Run {
    T element[kRun];
  };
#pragma unroll
  for (int i = 0; i < E::kThreadRows; ++i) {
    const int row = first_row + e.row(i);
    if (row >= to.rows) continue;
    T* const start = to.data + row * to.row;
#pragma unroll
    for (int n = 0; n < E::kOutputColumns; n += kRun) {
      const int column = first_column + e.output_column(n);
      Run run;
#pragma unroll
      for (int k = 0; k < kRun; ++k) run.element[k] = from_float<T>(value(i, n + k));
      if (to.packs && column + kRun <= to.width) {
        *reinterpret_cast<Run*>(start + column) = run;
      } else {
#pragma unroll
        for (int k = 0; k < kRun; ++k)
          if (column + k < to.width) start[(column + k) * to.column] = run.element[k];
      }
    }
  }
}

}  // namespace attention
}  // namespace
}  // namespace pynn::cuda
