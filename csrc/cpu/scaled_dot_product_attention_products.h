// Products of rows with rows - queries with keys, gradients with values - packed for register tiles.
// Where the CPU multiplies pairs of bfloat16 (multiply_add.h), their rows are packed as they are.
#pragma once
#include "scaled_dot_product_attention_tile.h"

namespace pynn::cpu::attention {

// Rows of bfloat16 as pairs in the place of floats, whole vectors of them: in place, or a copy in `buffer` with zeros.
inline Matrix<float> pairs_of(Read<BFloat16> from, int64_t rows, int64_t width, float* buffer) {
  if (from.column == 1 && width % (2 * kLanes<float>) == 0 && from.row % 2 == 0 && uintptr_t(from.data) % 4 == 0)
    return {reinterpret_cast<const float*>(from.data), from.row / 2};
  const int64_t stride = padded<float>(divide_up(width, 2));
  for (int64_t i = 0; i < rows; ++i) {
    const BFloat16* const source = from.data + i * from.row;
    BFloat16* const target = reinterpret_cast<BFloat16*>(buffer + i * stride);
    for (int64_t d = 0; d < width; ++d) target[d] = source[d * from.column];
    std::fill(target + width, target + 2 * stride, BFloat16{});
  }
  return {buffer, stride};
}

// The rows where they lie, or copied where their elements lie apart.
template <class T>
Read<T> dense_rows(const Read<T>& from, int64_t rows, int64_t width, accumulate_t<T>* buffer) {
  if (from.column == 1) return from;
  T* const to = reinterpret_cast<T*>(buffer);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < width; ++d) to[i * width + d] = from.data[i * from.row + d * from.column];
  return {to, width, 1};
}

// Rows from `to` on get those of `from`, `stride` apart, times a number.
template <class T, class F = accumulate_t<T>>
void write_rows(const AttentionOperand<T*>& layout, T* to, const F* from, int64_t rows, int64_t width, int64_t stride,
                F number) {
  for (int64_t i = 0; i < rows; ++i, to += layout.row, from += stride)
    write_row(to, layout.column, from, width, number);
}

template <class T>
class RowProducts {
 public:
  using F = accumulate_t<T>;

  explicit RowProducts(int64_t width) : width_(width), depth_(pairs() ? divide_up(width, 2) : width) {}

  // Elements that a packed row takes.
  int64_t depth() const { return depth_; }

  // Packs rows of the right side into panels of kPanel; `buffer` has room for so many rows.
  void pack_right(Read<T> from, int64_t rows, F* buffer, F* panels) const {
    for (int64_t j = 0; j < rows; j += kPanel<F>) {
      const int64_t count = std::min(kPanel<F>, rows - j);
      fetch_ahead(from, j, rows, width_);
      const Read<T> panel{from.data + j * from.row, from.row, from.column};
      pack_panels(elements(panel, count, buffer), count, depth_, panels + j * depth_);
    }
  }
  // Packs up to kRows rows of the left side by columns.
  void pack_left(Read<T> from, int64_t rows, F* buffer, F* columns) const {
    transpose(elements(from, rows, buffer), rows, depth_, columns, kRows);
  }
  // The products of the left rows with `count` right ones from `first` on, which begins a panel.
  void multiply(int64_t rows, int64_t first, int64_t count, const F* columns, const F* panels, F* to,
                int64_t stride) const {
    const Left<F> left{columns, kRows};
    const F* const right = panels + first * depth_;
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (pairs()) {
        attention::multiply<1, kScoreChunk<T>, MultiplyAddPairs>(rows, count, depth_, left, right, kPanel<F>,
                                                                 kPanel<F> * depth_, to, stride, false);
        return;
      }
    }
    attention::multiply<1, kScoreChunk<T>>(rows, count, depth_, left, right, kPanel<F>, kPanel<F> * depth_, to, stride,
                                           false);
  }

 private:
  static bool pairs() {
    if constexpr (std::is_same_v<T, BFloat16>)
      return has_pair_products();
    else
      return false;
  }
  Matrix<F> elements(Read<T> from, int64_t rows, F* buffer) const {
    if constexpr (std::is_same_v<T, BFloat16>)
      if (pairs()) return pairs_of(from, rows, width_, buffer);
    return rows_of<T>(from, rows, width_, buffer);
  }

  const int64_t width_, depth_;
};

}  // namespace pynn::cpu::attention
