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
  __device__ __forceinline__ T* at(int r) const { return data + r * row; }
};

// The rows of the `rows / length` heads that share a key head, one head after the other.
template <class T>
struct GroupedMatrix {
  T* data;
  int64_t head, row, column;
  int length, rows, width;
  bool packs;
  __device__ __forceinline__ T* at(int r) const { return data + r / length * head + r % length * row; }
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

// From head `head` on, the first of its group.
template <class T>
__device__ __forceinline__ GroupedMatrix<T> grouped_matrix_of(const Operand<T>& operand, const AttentionShape& shape,
                                                              int64_t head, int64_t rows, int64_t width) {
  return {operand.at.data + head_offset(shape, operand.at.batch, head, 1),
          operand.at.batch[shape.batch_dims - 1],
          operand.at.row,
          operand.at.column,
          int(rows),
          int(rows * shape.group),
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
template <class E, int rows, class M>
__device__ __forceinline__ void load_tile(unsigned char* tile, const M& m, int first_row, int first_column) {
  using T = typename E::Element;
  constexpr int kPack = 16 / sizeof(T), kPacks = E::kWidth / kPack;
  const int padded = padded_width(m.width, first_column, E::kWidth);
  if (m.packs) {
#pragma unroll 2
    for (int at = threadIdx.x; at < rows * kPacks; at += E::kThreads) {
      const int row = at / kPacks, pack = at % kPacks, column = first_column + pack * kPack;
      if (pack * kPack >= padded) continue;
      const int valid = first_row + row < m.rows ? max(min(m.width - column, kPack), 0) : 0;
      const T* from = m.at(first_row + row) + column;
      cp_async<16>(tile + E::offset(row, pack), valid > 0 ? from : m.data, valid * int(sizeof(T)));
    }
  } else {
#pragma unroll 1
    for (int at = threadIdx.x; at < rows * kPacks; at += E::kThreads) {
      const int row = at / kPacks, pack = at % kPacks, column = first_column + pack * kPack;
      if (pack * kPack >= padded) continue;
      const int valid = first_row + row < m.rows ? m.width - column : 0;
      const T* from = m.at(first_row + row) + column * m.column;
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

// With kGrouped, of all heads that share a key head: the rows of scores of one head come after those of the other.
template <class T, bool kGrouped = false>
struct Scores {
  using F = accumulate_t<T>;
  int length, queries, keys;   // queries of one head, and of all of them
  int lower, upper, diagonal;  // as in AttentionShape, and so are these two
  const AttentionKeyRange* key_ranges;
  const AttentionQueryRange* query_ranges;
  F slope;          // of alibi, in units of kLogUnit
  const F* slopes;  // of the heads with kGrouped, or nullptr
  AttentionMask kind;
  const void* mask;  // of the head
  int64_t mask_head, mask_row, mask_column;
  Dropout dropout;
  uint64_t first_element;  // of the head, as dropout counts
  F factor, cap;           // as in Problem

  __device__ __forceinline__ Scores(const Problem<T>& p, int64_t head)
      : length(int(p.shape.queries)),
        queries(kGrouped ? length * int(p.shape.group) : length),
        keys(int(p.shape.keys)),
        lower(int(p.shape.lower)),
        upper(int(p.shape.upper)),
        diagonal(int(p.shape.diagonal)),
        key_ranges(p.shape.key_ranges),
        query_ranges(p.shape.query_ranges),
        slope(!kGrouped && p.per_head.alibi_slopes ? p.per_head.alibi_slopes[head] * kLogUnit<T> : F(0)),
        slopes(p.per_head.alibi_slopes ? p.per_head.alibi_slopes + head : nullptr),
        kind(p.mask.kind),
        mask(nullptr),
        mask_head(p.mask.operand.batch[p.shape.batch_dims - 1]),
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

  // The place of a query in its head.
  __device__ __forceinline__ int place_of(int query) const { return kGrouped ? query % length : query; }

  __device__ __forceinline__ int64_t mask_at(int query, int key) const {
    const int64_t in_head = place_of(query) * mask_row + key * mask_column;
    return kGrouped ? query / length * mask_head + in_head : in_head;
  }

  // Whether all queries of a tile see all keys of it, as far as their places say.
  template <bool kKeyRows>
  __device__ __forceinline__ bool is_inside(int first_row, int rows, int first_column, int columns) const {
    const int query = kGrouped   ? 0
                      : kKeyRows ? first_column
                                 : first_row,
              query_end = kGrouped ? length : min(query + (kKeyRows ? columns : rows), length),
              key = kKeyRows ? first_row : first_column, key_end = min(key + (kKeyRows ? rows : columns), keys);
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

  // The tiles of `columns` that places of queries (keys, with kKeyRows) of [first_row, first_row + rows) may see (be
  // seen by).
  template <bool kKeyRows>
  __device__ __forceinline__ int first_tile(int first_row, int columns) const {
    if (key_ranges) return max(kKeyRows ? query_ranges[first_row].begin : key_ranges[first_row].begin, 0) / columns;
    return max(first_row + (kKeyRows ? -upper : lower), 0) / columns;
  }
  template <bool kKeyRows>
  __device__ __forceinline__ int end_tile(int first_row, int rows, int columns) const {
    const int last = min(first_row + rows, kKeyRows ? keys : length) - 1;
    const int limit = !key_ranges ? last + 1 + (kKeyRows ? -lower : upper)
                      : kKeyRows  ? query_ranges[last].end
                                  : key_ranges[last].end;
    const int end = min(limit, kKeyRows ? length : keys);
    return end <= 0 ? 0 : (end + columns - 1) / columns;
  }

  // The key from which alibi counts distances.
  __device__ __forceinline__ int on_diagonal(int query) const {
    const int place = place_of(query);
    return key_ranges ? key_ranges[min(place, length - 1)].diagonal : place + diagonal;
  }

  __device__ __forceinline__ bool takes_part(int query, int key) const {
    if (query >= queries || key >= keys) return false;
    const int place = place_of(query);
    if (key_ranges ? key < key_ranges[place].begin || key >= key_ranges[place].end
                   : key > place + upper || key < place + lower)
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
    if (kGrouped ? slopes != nullptr : slope != F(0)) {
      int row_place[E::kThreadRows];  // of keys their own, of queries that of the key on the diagonal
      F row_slope[E::kThreadRows];
#pragma unroll
      for (int i = 0; i < E::kThreadRows; ++i) {
        const int row = first_row + e.row(i);
        row_place[i] = kKeyRows ? row : on_diagonal(row);
        row_slope[i] = kGrouped ? slopes[min(row, queries - 1) / length] * kLogUnit<T> : slope;
      }
#pragma unroll
      for (int j = 0; j < E::kThreadColumns; ++j) {
        const int column = first_column + e.column(j), column_place = kKeyRows ? on_diagonal(column) : column;
#pragma unroll
        for (int i = 0; i < E::kThreadRows; ++i)
          E::at(s, i, j) = multiply_add(-row_slope[i], F(abs(column_place - row_place[i])), E::at(s, i, j));
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

}  // namespace attention
}  // namespace
}  // namespace pynn::cuda
