// The weights of attention themselves: P (times dropout), formed once more from query and key as the backward does.
//
// A task owns a tile of the result: up to kBlocks blocks of queries times a block of keys of one matrix. It adds the
// weights of all heads that the matrix is the mean of, one after the other, in compute precision, so that there is
// never a matrix per head. Keys are packed once per head of a task.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "parallel.h"
#include "scaled_dot_product_attention_rows.h"

namespace pynn::cpu {
namespace {
using namespace attention;

constexpr int64_t kBlocks = 4;  // of queries, for which keys are packed only once

template <class T>
class Weights {
 public:
  using F = accumulate_t<T>;
  using Launcher = launch::Attention<T>;
  using Lse = typename Launcher::Lse;

  Weights(typename Launcher::Input query, typename Launcher::Input key, const AttentionMaskOperand& mask,
          const AttentionPerHead<F>& per_head, const Lse* lse, const AttentionShape& shape)
      : query_(query),
        key_(key),
        mask_(mask),
        per_head_(per_head),
        lse_(lse),
        shape_(shape),
        products_(shape.dim),
        stride_(tile_stride(shape)) {
    const int64_t width = padded<F>(shape.dim);
    key_panels_ = scratch_.take<F>(round_up(std::min(shape.keys, block_keys(shape)), kPanel<F>) * shape.dim);
    key_buffer_ = scratch_.take<F>(kPanel<F> * width);
    query_buffer_ = scratch_.take<F>(kRows * width);
    query_columns_ = scratch_.take<F>(kRows * shape.dim);
    scores_ = scratch_.take<F>(block_rows(shape) * stride_);
    sums_ = scratch_.take<F>(kBlocks * block_rows(shape) * stride_);
    tile_mask_ = scratch_.take<F>(stride_);
    row_mask_ = scratch_.take<F>(stride_);
    factors_ = scratch_.take<F>(stride_);
    if (failed()) return;
    for (int64_t j = 0; j < stride_; ++j) tile_mask_[j] = row_mask_[j] = factors_[j] = 0;
  }
  bool failed() const { return scratch_.failed; }

  // to[i * keys + j] = the mean over `count` heads from `head` on of weight (first + i, begin + j), j < end - begin.
  void tile(T* to, int64_t head, int64_t count, int64_t first, int64_t rows, int64_t begin, int64_t end) {
    begin_ = begin, end_ = end;
    for (int64_t i = 0; i < rows; ++i) std::fill_n(sums_ + i * stride_, end - begin, F(0));
    const int64_t height = block_rows(shape_);
    for (int64_t h = head; h < head + count; ++h) {
      bool loaded = false;
      for (int64_t i = 0; i < rows; i += height)
        add_block(h, first + i, std::min(height, rows - i), sums_ + i * stride_, loaded);
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < end - begin; ++j)
        to[i * shape_.keys + j] = from_float<T>(sums_[i * stride_ + j] / F(count));
  }

 private:
  void load_keys(int64_t head) {
    const T* key = head_start(key_, shape_, head, shape_.group) + begin_ * key_.row;
    products_.pack_right({key, key_.row, key_.column}, end_ - begin_, key_buffer_, key_panels_);
  }

  void add_block(int64_t head, int64_t first, int64_t rows, F* sums, bool& loaded) {
    const KeyRange seen = keys_of(shape_, first, rows);
    const int64_t k = std::max(begin_, seen.begin / kPanel<F> * kPanel<F>);
    const HeadScores<F> scores = scores_of(shape_, mask_, per_head_, head, tile_mask_, row_mask_);
    const int64_t count = read_tile_mask(scores, k, std::min(end_, seen.end) - k);
    if (count <= 0) return;
    if (!loaded) load_keys(head);
    loaded = true;
    const T* query = head_start(query_, shape_, head, 1) + first * query_.row;
    products_.pack_left({query, query_.row, query_.column}, rows, query_buffer_, query_columns_);
    products_.multiply(rows, k - begin_, count, query_columns_, key_panels_, scores_, stride_);
    const int64_t block = block_keys(shape_);
    const bool one_block = seen.begin / block == (seen.end - 1) / block;
    for (int64_t i = 0; i < rows; ++i)
      add_row(scores, head, first + i, k, count, one_block, scores_ + i * stride_, sums + i * stride_ + (k - begin_));
  }

  void add_row(const HeadScores<F>& scores, int64_t head, int64_t query, int64_t k, int64_t count, bool one_block, F* s,
               F* sums) {
    const auto [valid, top, factor, masked] = finish_row<T>(scores, s, query, k, count);
    if (valid == 0) return;
    const int64_t at = head * shape_.queries + query;
    const F* factors = nullptr;
    if (shape_.dropout_key) {
      dropout_factors(shape_, uint64_t(at * shape_.keys + k), valid, factors_);
      factors = factors_;
    }
    // As in the backward, a row in one block is normalised by its own sum, which is more accurate than a rounded lse.
    const F shift = top == -kInfinity<F> ? F(0) : top;
    F sum = sum_lanes<F>(exponentials<T>(s, valid, factor, shift, factors));
    if (per_head_.sinks) sum += exp(broadcast(per_head_.sinks[head] - score_of<T>(shift)))[0];
    const F norm = sum == F(0) ? F(0) : one_block ? 1 / sum : F(std::exp(score_of<T>(shift) - lse_[at]));
    for (int64_t j = 0; j < valid; j += kLanes<F>) {  // a masked weight stays 0 in a row of NaN
      const Vec<F> weight = load(s + j), zero{};
      store(sums + j,
            load(sums + j) + (masked && !(norm == norm) ? (weight == zero ? zero : weight * norm) : weight * norm));
    }
  }

  typename Launcher::Input query_, key_;
  const AttentionMaskOperand& mask_;
  const AttentionPerHead<F>& per_head_;
  const Lse* lse_;
  const AttentionShape& shape_;
  const RowProducts<T> products_;
  const int64_t stride_;
  Scratch scratch_;
  F *key_panels_, *key_buffer_, *query_buffer_, *query_columns_, *scores_, *sums_, *tile_mask_, *row_mask_, *factors_;
  int64_t begin_ = 0, end_ = 0;
};

}  // namespace

template <class T>
bool Attention<T>::weights(T* to, bool average, Input query, Input key, AttentionMaskOperand mask, PerHead per_head,
                           const Lse* lse, AttentionShape shape, void*) {
  const int64_t together = average ? shape.batch[shape.batch_dims - 1] : 1, matrices = shape.heads / together;
  const int64_t height = kBlocks * block_rows(shape), row_tiles = divide_up(shape.queries, height);
  const int64_t block = block_keys(shape), column_tiles = divide_up(shape.keys, block);
  std::atomic<bool> failed{false};
  parallel_for(matrices * row_tiles * column_tiles, 1, [&](int64_t item, int64_t last) {
    Weights<T> weights(query, key, mask, per_head, lse, shape);
    if (weights.failed()) {
      failed = true;
      return;
    }
    for (; item < last; ++item) {
      const int64_t matrix = item / column_tiles / row_tiles, first = item / column_tiles % row_tiles * height,
                    begin = item % column_tiles * block;
      weights.tile(to + (matrix * shape.queries + first) * shape.keys + begin, matrix * together, together, first,
                   std::min(height, shape.queries - first), begin, std::min(begin + block, shape.keys));
    }
  });
  return !failed;
}

#define PYNN_INSTANTIATE(T)                                                                              \
  template bool Attention<T>::weights(T*, bool, Input, Input, AttentionMaskOperand, PerHead, const Lse*, \
                                      AttentionShape, void*);
PYNN_INSTANTIATE(double)
PYNN_INSTANTIATE(float)
PYNN_INSTANTIATE(Half)
PYNN_INSTANTIATE(BFloat16)

}  // namespace pynn::cpu
