// Attention, backward. With P = exp(S - lse), A = P * keep / (1 - p), G = (dout V^T) * keep / (1 - p):
//
//   delta_i = sum_j P_ij G_ij    dS = P * (G - delta)    dQ = scale dX K    dK = scale dX^T Q    dV = A^T dout
//   dmask = dS summed over the dimensions in which the mask is broadcast, dsink = -sum_i exp(sink - lse_i) delta_i
//
// dX is dS, times the derivative of the soft cap where there is one.
//
// A gradient of lse is taken off delta, since lse has the gradient P with respect to S.
//
// Scores are recomputed block by block as in the forward. One task owns a key head: it walks the blocks of queries of
// all query heads that share it, and for each the blocks of keys, summing dK and dV in compute precision. When
// there are fewer key heads than threads, a first pass gives every block of keys its own task (dK, dV) and a second
// every block of queries (dQ). All sums are sums of block sums in the order of the blocks, so both ways give the same
// bits.
//
// delta comes from P and G themselves when all keys that a block of queries may see are in one block. Otherwise it is
// dout . out. Where out has been rounded to 16 bits, that is off by what the blocks of keys show together when all have
// been seen: missing_i = sum_j P_ij G_ij - dout_i . out_i. Rows in which this is not small against dS - of few keys
// with all the weight, of values with a large mean - get -P_ij missing_i added to dS, in a second walk over the keys.
// In the others it would be seen where keys have a large mean, which stands for sum_j P_ij K_j in what is added to
// their dQ.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "scaled_dot_product_attention_rows.h"
#include "scaled_dot_product_attention_score.h"

namespace pynn::cpu::attention {

template <class T>
struct Gradients {
  using F = accumulate_t<T>;
  typename launch::Attention<T>::Output query, key, value;
  // The gradient of the mask, where it comes about with the others: its matrices (queries, keys), added up over the
  // heads that share one in order if add_mask, and zeroed then or where tiles are left out; or sums in the mask's own
  // shape. Both kinds of sums are for one thread. Otherwise nullptr.
  F* mask;
  bool add_mask;
  double* mask_sums;
};
template <class T>
struct Inputs {
  using F = accumulate_t<T>;
  typename launch::Attention<T>::Input grad_out, query, key, value, out;
  const typename launch::Attention<T>::Lse* lse;
  const typename launch::Attention<T>::Lse* grad_lse;  // nullptr for zeros
  F* delta;                                            // (heads, queries); nullptr when nobody needs it
  F* missing;      // (heads, queries) where delta may be off: what is to be added to it,
  uint8_t* lacks;  // and whether dS wants that
  AttentionPerHead<F> per_head;
};

// So much of sum_j |dS_ij| may be missing in a delta: a part of what rounding dQ and dK costs them.
template <class T>
inline constexpr accumulate_t<T> kMissing = accumulate_t<T>(0.25) * (std::is_same_v<T, Half> ? 2.06e-4 : 1.65e-3);

template <class T>
class Backward {
 public:
  using F = accumulate_t<T>;

  Backward(const Gradients<T>& gradients, const Inputs<T>& in, const AttentionMaskOperand& mask,
           const AttentionShape& shape)
      : gradients_(gradients),
        in_(in),
        mask_(mask),
        shape_(shape),
        key_products_(shape.dim),
        value_products_(shape.value_dim),
        width_(padded<F>(shape.dim)),
        value_width_(padded<F>(shape.value_dim)),
        stride_(tile_stride(shape)),
        block_keys_(block_keys(shape)),
        masked_(shape.windowed() || mask.kind != AttentionMask::kNone),
        few_(has_few_queries(shape)) {
    const int64_t keys = round_up(shape.keys, kPanel<F>);
    key_panels_ = scratch_.take<F>(keys * shape.dim);
    value_panels_ = scratch_.take<F>(keys * shape.value_dim);
    key_buffer_ = scratch_.take<F>(keys * width_);
    panel_buffer_ = scratch_.take<F>(kPanel<F> * std::max(width_, value_width_));
    key_sums_ = scratch_.take<F>(keys * width_);
    value_sums_ = scratch_.take<F>(keys * value_width_);
    query_buffer_ = scratch_.take<F>(kRows * width_);
    grad_buffer_ = scratch_.take<F>(kRows * value_width_);
    out_buffer_ = scratch_.take<F>(kRows * value_width_);
    query_columns_ = scratch_.take<F>(kRows * shape.dim);
    grad_columns_ = scratch_.take<F>(kRows * shape.value_dim);
    query_sums_ = scratch_.take<F>(kRows * width_);
    scores_ = scratch_.take<F>(block_rows(shape) * stride_);
    score_grads_ = scratch_.take<F>(block_rows(shape) * stride_);
    slopes_ = shape.softcap != 0 ? scratch_.take<F>(block_rows(shape) * stride_) : nullptr;
    tile_mask_ = scratch_.take<F>(stride_);
    row_mask_ = scratch_.take<F>(stride_);
    factors_ = scratch_.take<F>(kTogether * stride_);
    key_mean_ = scratch_.take<F>(width_);
    keys_finite_ = scratch_.take<bool>(divide_up(shape.keys, block_keys_));
    if (failed()) return;
    for (int64_t j = 0; j < stride_; ++j) tile_mask_[j] = row_mask_[j] = 0;
    std::fill_n(factors_, kTogether * stride_, F(0));
    if (slopes_) std::fill_n(slopes_, block_rows(shape) * stride_, F(0));
  }
  bool failed() const { return scratch_.failed; }

  // Packs, or finds, keys [begin, end) of the key head that query head `head` uses; begin is a multiple of block_keys.
  void load_keys(int64_t head, int64_t begin, int64_t end) {
    if (loaded_ == head / shape_.group && begin == begin_ && end == end_) return;
    loaded_ = head / shape_.group, begin_ = begin, end_ = end;
    const T* key = head_start(in_.key, shape_, head, shape_.group) + begin * in_.key.row;
    const T* value = head_start(in_.value, shape_, head, shape_.group) + begin * in_.value.row;
    keys_ = rows_of<T>({key, in_.key.row, in_.key.column}, end - begin, shape_.dim, key_buffer_);
    const Read<T> key_rows{key, in_.key.row, in_.key.column}, value_rows{value, in_.value.row, in_.value.column};
    if (few_) {
      key_rows_ = dense_rows(key_rows, end - begin, shape_.dim, key_panels_);
      value_rows_ = dense_rows(value_rows, end - begin, shape_.value_dim, value_panels_);
    } else {
      key_products_.pack_right(key_rows, end - begin, panel_buffer_, key_panels_);
      value_products_.pack_right(value_rows, end - begin, panel_buffer_, value_panels_);
    }
    for (int64_t k = begin; k < end; k += block_keys_)
      keys_finite_[(k - begin) / block_keys_] =
          !masked_ || all_finite<F>({keys_.row(k - begin), keys_.stride}, std::min(block_keys_, end - k), width_);
  }

  // Begins new sums of dK and dV. Where no key is hidden, the first block of queries puts them in place.
  void clear_key_sums() {
    cleared_ = masked_;
    if (!cleared_) return;
    std::fill(key_sums_, key_sums_ + (end_ - begin_) * width_, F(0));
    std::fill(value_sums_, value_sums_ + (end_ - begin_) * value_width_, F(0));
  }

  void load_queries(int64_t head, int64_t first, int64_t rows) {
    head_ = head, first_ = first, rows_ = rows;
    seen_ = keys_of(shape_, first, rows);
    one_block_ = seen_.begin >= seen_.end || seen_.begin / block_keys_ == (seen_.end - 1) / block_keys_;
    const Read<T> query{head_start(in_.query, shape_, head, 1) + first * in_.query.row, in_.query.row,
                        in_.query.column};
    const Read<T> grad{head_start(in_.grad_out, shape_, head, 1) + first * in_.grad_out.row, in_.grad_out.row,
                       in_.grad_out.column};
    if (!few_) {
      key_products_.pack_left(query, rows, query_buffer_, query_columns_);
      value_products_.pack_left(grad, rows, grad_buffer_, grad_columns_);
    }
    queries_ = rows_of<T>(query, rows, shape_.dim, query_buffer_);
    grads_ = rows_of<T>(grad, rows, shape_.value_dim, grad_buffer_);
    queries_finite_ = !masked_ || all_finite(queries_, rows, width_);
    grads_finite_ = !masked_ || all_finite(grads_, rows, value_width_);
  }

  // P (with dropout) and dS of rows [begin, end) of the loaded queries and those keys of the block from `block` on that
  // they see. finished(i, k, count) is called when row i of keys [k, k + count) is there. When correcting, dS is what
  // is to be added to it.
  template <class Finished>
  KeyRange tiles(int64_t block, int64_t begin, int64_t end, const Finished& finished) {
    const int64_t k = std::max(block, seen_.begin / kPanel<F> * kPanel<F>);
    const HeadScores<F> scores = scores_of(shape_, mask_, in_.per_head, head_, tile_mask_, row_mask_);
    const int64_t count = read_tile_mask(scores, k, std::min({block + block_keys_, end_, seen_.end}) - k);
    if (count <= 0) return {k, k};
    F *const s = scores_ + begin * stride_, *const g = score_grads_ + begin * stride_;
    if (few_)
      score_rows(key_rows_, k - begin_, count, queries_, begin, end, shape_.dim, scores_, stride_);
    else
      key_products_.multiply(end - begin, k - begin_, count, query_columns_ + begin, key_panels_, s, stride_);
    if (sizeof(T) == 2 && correcting_)
      for (int64_t i = begin; i < end; ++i) std::fill_n(score_grads_ + i * stride_, padded<F>(count), F(0));
    else if (few_)
      score_rows(value_rows_, k - begin_, count, grads_, begin, end, shape_.value_dim, score_grads_, stride_);
    else
      value_products_.multiply(end - begin, k - begin_, count, grad_columns_ + begin, value_panels_, g, stride_);
    for (int64_t i = begin; i < end; i += kTogether) {
      const int64_t some = std::min(kTogether, end - i);
      weigh(scores, i, some, k, count);
      for (int64_t row = i; row < i + some; ++row) finished(row, k, count);
    }
    return {k, k + count};
  }

  // The first block of the packed keys that the loaded queries may see.
  int64_t first_block() const { return std::max(begin_, seen_.begin / block_keys_ * block_keys_); }
  // Whether queries [first, first + rows) see any of keys [begin, end).
  bool sees(int64_t first, int64_t rows, int64_t begin, int64_t end) const {
    const KeyRange seen = keys_of(shape_, first, rows);
    return std::max(seen.begin, begin) < std::min(seen.end, end);
  }

  // Everything one block of queries adds to dK and dV, and its dQ. What is missing in delta is found with dQ.
  void block(bool want_query, bool want_key) {
    const int64_t matrix = gradients_.mask_sums || gradients_.add_mask ? mask_matrix(mask_, shape_, head_) : head_;
    F* const mask = want_query && gradients_.mask ? gradients_.mask + matrix * shape_.queries * shape_.keys : nullptr;
    double* const sums = gradients_.mask_sums ? gradients_.mask_sums + matrix * mask_.rows * mask_.columns : nullptr;
    const auto to_mask = [&](int64_t i, int64_t k, int64_t count) {
      const F* const from = score_grads_ + i * stride_;
      const int64_t at = (first_ + i) * shape_.keys + k;
      if (mask && (gradients_.add_mask || correcting_))
        add_row(from, count, mask + at);
      else if (mask)
        std::copy_n(from, count, mask + at);
      if (sums) add_mask_row(sums + (mask_.rows == 1 ? 0 : first_ * mask_.columns), i, k, count);
    };
    bool started = false;
    const auto add = [&](int64_t begin, int64_t end) {
      const F *const weights = scores_ + begin * stride_, *const grads = score_grads_ + begin * stride_;
      for (int64_t block = first_block(); block < end_; block += block_keys_) {
        const auto [k, key_end] = tiles(block, begin, end, to_mask);
        const int64_t count = key_end - k, at = k - begin_;
        if (count == 0) continue;
        for (int64_t i = begin; i < (slopes_ ? end : begin); ++i)
          shares_[i] += cap_gradients(score_grads_ + i * stride_, count, slopes_ + i * stride_, scores_ + i * stride_);
        if (want_key && !correcting_)
          multiply_rows<1, kChunk<T>>(count, shape_.value_dim, rows_, Left<F>{weights, stride_}, grads_, grads_finite_,
                                      value_sums_ + at * value_width_, value_width_, cleared_);
        if (want_key)
          multiply_rows<1, kChunk<T>>(count, shape_.dim, end - begin, Left<F>{grads, stride_},
                                      Matrix<F>{queries_.row(begin), queries_.stride}, queries_finite_,
                                      key_sums_ + at * width_, width_, cleared_);
        if (want_query)
          multiply_scores<T>(end - begin, shape_.dim, count, grads, stride_, {keys_.row(at), keys_.stride},
                             keys_finite_[at / block_keys_], query_sums_ + begin * width_, width_, started);
        started = true;
      }
    };
    measuring_ = want_query && in_.missing && !one_block_;
    for (int64_t i = 0; i < (measuring_ ? rows_ : 0); ++i) dots_[i] = sizes_[i] = shares_[i] = 0;
    add(0, rows_);
    if (want_key) cleared_ = true;
    if (measuring_) find_missing();
    correct(add);
    if (!want_query) return;
    if (!started) std::fill(query_sums_, query_sums_ + rows_ * width_, F(0));
    write_rows(gradients_.query, head_start(gradients_.query, shape_, head_, 1) + first_ * gradients_.query.row,
               query_sums_, rows_, shape_.dim, width_, F(shape_.scale));
  }

  void write_keys(int64_t head) {
    const auto &key = gradients_.key, &value = gradients_.value;
    write_rows(key, head_start(key, shape_, head, shape_.group) + begin_ * key.row, key_sums_, end_ - begin_,
               shape_.dim, width_, F(shape_.scale));
    write_rows(value, head_start(value, shape_, head, shape_.group) + begin_ * value.row, value_sums_, end_ - begin_,
               shape_.value_dim, value_width_, F(1));
  }

  // delta of the loaded queries, as far as out knows it.
  void find_delta() {
    if (one_block_) return;
    F* const delta = in_.delta + head_ * shape_.queries + first_;
    const T* out = head_start(in_.out, shape_, head_, 1) + first_ * in_.out.row;
    const auto rows = rows_of<T>({out, in_.out.row, in_.out.column}, rows_, shape_.value_dim, out_buffer_);
    for (int64_t i = 0; i < rows_; ++i) {
      Vec<F> sum{};
      for (int64_t d = 0; d < value_width_; d += kLanes<F>)
        sum = fma(load(grads_.row(i) + d), load(rows.row(i) + d), sum);
      delta[i] = sum_lanes<F>(sum) - grad_lse(i);
    }
  }

  // Adds dS of the loaded queries to `sums`, (rows or 1, keys or 1) as the mask is.
  template <class Sum>
  void add_mask_gradient(Sum* sums) {
    const auto add = [&](int64_t begin, int64_t end) {
      for (int64_t block = first_block(); block < end_; block += block_keys_)
        tiles(block, begin, end, [&](int64_t i, int64_t k, int64_t count) { add_mask_row(sums, i, k, count); });
    };
    add(0, rows_);
    correct(add);
  }

 private:
  template <class Sum>
  static void add_row(const F* from, int64_t count, Sum* to) {
    for (int64_t j = 0; j < count; ++j) to[j] += Sum(from[j]);
  }
  template <class Sum>
  void add_mask_row(Sum* sums, int64_t i, int64_t k, int64_t count) const {
    Sum* const to = sums + (mask_.rows == 1 ? 0 : i) * mask_.columns;
    const F* const from = score_grads_ + i * stride_;
    if (mask_.columns != 1) return add_row(from, count, to + k);
    for (int64_t j = 0; j < count; ++j) to[0] += Sum(from[j]);
  }
  F grad_lse(int64_t i) const { return in_.grad_lse ? F(in_.grad_lse[head_ * shape_.queries + first_ + i]) : F(0); }

  // What is missing in the deltas of the loaded queries, from the tiles of all their keys.
  void find_missing() {
    measuring_ = false;
    const int64_t first = head_ * shape_.queries + first_;
    const bool same_keys = mask_.kind == AttentionMask::kNone || mask_.operand.row == 0;
    if (same_keys) find_key_mean(0, rows_, 4);
    for (int64_t i = 0; i < rows_; ++i) {
      const F missing = dots_[i] - grad_lse(i) - in_.delta[first + i];
      const bool matters = std::fabs(missing) > kMissing<T> * sizes_[i];
      in_.missing[first + i] = missing, in_.lacks[first + i] = matters;
      if (matters || sizes_[i] == F(0)) continue;
      if (!same_keys) find_key_mean(i, i + 1, shape_.keys / 16);
      F weight = missing * (slopes_ ? shares_[i] : F(1));
      if (in_.per_head.sinks) weight *= F(1 - std::exp(in_.per_head.sinks[head_] - in_.lse[first + i]));
      for (int64_t d = 0; d < width_; ++d) query_sums_[i * width_ + d] -= weight * key_mean_[d];
    }
  }
  // The mean of every few keys that all rows from `begin` to `end` see, which have the same row of the mask.
  void find_key_mean(int64_t begin, int64_t end, int64_t step) {
    const int64_t seen_end = keys_of(shape_, first_ + begin, 1).end;
    const void* const start = mask_start(mask_, shape_, head_);
    int64_t count = 0;
    std::fill_n(key_mean_, width_, F(0));
    for (int64_t k = keys_of(shape_, first_ + end - 1, 1).begin; k < seen_end; k += step) {
      F added = 0;
      read_mask(mask_, start, first_ + begin, k, 1, &added);
      if (added == -kInfinity<F>) continue;
      add_row(keys_.row(k), width_, key_mean_);
      ++count;
    }
    for (int64_t d = 0; d < width_; ++d) key_mean_[d] /= F(std::max<int64_t>(count, 1));
  }
  // Adds what the rows with something missing lack: add(begin, end) for runs of kTogether of them.
  template <class Add>
  void correct(const Add& add) {
    if (!in_.missing || one_block_) return;
    const uint8_t* const rows = in_.lacks + head_ * shape_.queries + first_;
    const auto lacks = [&](int64_t i) { return std::memchr(rows + i, 1, size_t(std::min(kTogether, rows_ - i))); };
    correcting_ = true;
    for (int64_t begin = 0, end; begin < rows_; begin = end) {
      end = begin + kTogether;
      if (!lacks(begin)) continue;
      while (end < rows_ && lacks(end)) end += kTogether;
      add(begin, std::min(end, rows_));
    }
    correcting_ = false;
  }

  // Scores of rows [begin, begin + rows) become P (with dropout), gradients with respect to P become dS; both become 0
  // where they take no part.
  void weigh(const HeadScores<F>& scores, int64_t begin, int64_t rows, int64_t k, int64_t count) {
    FinishedRow<F> finished[kTogether];
    std::pair<Vec<F>, Vec<F>> sums[kTogether];
    const int64_t first = head_ * shape_.queries + first_ + begin;  // of the rows
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (begin + i) * stride_;
      const F known = F(in_.lse[first + i]) * kUnit<T>;
      finished[i] =
          finish_row<T>(scores, scores_ + at, first_ + begin + i, k, count, slopes_ ? slopes_ + at : nullptr, &known);
      for (int64_t j = finished[i].valid > 0 ? padded<F>(finished[i].valid) : 0; j < count; ++j)
        score_grads_[at + j] = 0;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const auto [valid, top, factor, masked] = finished[i];
      if (valid == 0) continue;
      F *s = scores_ + (begin + i) * stride_, *g = score_grads_ + (begin + i) * stride_;
      const F* const factors = shape_.dropout_key && !correcting_ ? factors_ + i * stride_ : nullptr;
      if (factors) dropout_factors(shape_, uint64_t((first + i) * shape_.keys + k), valid, factors_ + i * stride_);
      const F shift = shift_of(top);
      sums[i] = masked ? weigh_row<T, true>(s, g, valid, factor, shift, factors)
                       : weigh_row<T, false>(s, g, valid, factor, shift, factors);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const auto [valid, top, factor, masked] = finished[i];
      if (valid == 0) continue;
      // A row in one block is normalised by its own sum, which is more accurate than a rounded log-sum-exp.
      F sum = sum_lanes<F>(sums[i].first);
      const F dot = sum_lanes<F>(sums[i].second), shift = score_of<T>(shift_of(top));
      if (in_.per_head.sinks) sum += exp(broadcast(in_.per_head.sinks[head_] - shift))[0];
      const F norm = sum == F(0) ? F(1) : one_block_ ? 1 / sum : F(std::exp(shift - in_.lse[first + i]));
      F delta = one_block_ ? dot * norm - grad_lse(begin + i) : in_.delta[first + i];
      if (sizeof(T) == 2 && correcting_) delta = in_.lacks[first + i] ? in_.missing[first + i] : F(0);
      if (one_block_ && in_.delta) in_.delta[first + i] = delta;
      F *const s = scores_ + (begin + i) * stride_, *const g = score_grads_ + (begin + i) * stride_;
      const F* const factors = shape_.dropout_key ? factors_ + i * stride_ : nullptr;
      const bool zeros = masked_ || masked;
      if (sizeof(T) == 2 && measuring_) {
        dots_[begin + i] += dot * norm;
        sizes_[begin + i] += sum_lanes<F>(score_gradients<true>(s, g, valid, norm, delta, zeros, factors));
      } else {
        score_gradients<false>(s, g, valid, norm, delta, zeros, factors);
      }
    }
  }
  static F shift_of(F top) { return top == -kInfinity<F> ? kInfinity<F> : top; }

  const Gradients<T>& gradients_;
  const Inputs<T>& in_;
  const AttentionMaskOperand& mask_;
  const AttentionShape& shape_;
  const RowProducts<T> key_products_, value_products_;
  const int64_t width_, value_width_, stride_, block_keys_;
  const bool masked_, few_;  // few_: scores come from rows of keys and values that are not packed
  Scratch scratch_;
  F *key_panels_, *value_panels_, *key_buffer_, *panel_buffer_, *key_sums_, *value_sums_, *query_buffer_, *grad_buffer_,
      *out_buffer_, *query_columns_, *grad_columns_, *query_sums_, *scores_, *score_grads_, *slopes_, *tile_mask_,
      *row_mask_, *factors_, *key_mean_;
  bool* keys_finite_;
  bool one_block_ = true, queries_finite_ = true, grads_finite_ = true, cleared_ = true, measuring_ = false,
       correcting_ = false;
  Matrix<F> keys_{}, queries_{}, grads_{};
  Read<T> key_rows_{}, value_rows_{};
  KeyRange seen_{};
  F dots_[kRows]{}, sizes_[kRows]{}, shares_[kRows]{};  // of rows: sum_j P_ij G_ij, sum_j |dS_ij|, sum_j P_ij slope_ij
  int64_t loaded_ = -1, begin_ = 0, end_ = 0, head_ = 0, first_ = 0, rows_ = 0;
};

}  // namespace pynn::cpu::attention
