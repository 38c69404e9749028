// Attention, forward: one pass over the keys with an online softmax.
//
// A task is a run of (head, block of queries) pairs. Keys are transposed into panels once per key head of the run;
// for each block of keys the task forms a (rows x keys) tile of scores, turns it into exponentials against the
// running row maximum, and adds tile x values to the output rows. Keys outside of the windows of all queries of a
// block, and those at the end that a row-broadcast mask removes, are never touched. Nothing depends on how the runs are
// cut.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "parallel.h"
#include "scaled_dot_product_attention_decode.h"

namespace pynn::cpu {
namespace {
using namespace attention;

constexpr int64_t kAheadKeys = 512;  // so many keys of the next head are fetched ahead, at most

// Rows that are wanted soon, brought into the caches a few at a time while others are at work.
class Ahead {
 public:
  void clear() { begin_ = end_ = 0, rows_ = 0; }
  template <class E>
  void add(const E* data, int64_t row, int64_t column, int64_t rows, int64_t width) {
    if (column != 1 || rows <= 0 || end_ == kRanges) return;
    ranges_[end_++] = {reinterpret_cast<const char*>(data), row * int64_t(sizeof(E)), width * int64_t(sizeof(E)), rows};
    rows_ += rows;
  }
  // In how many parts they are to be fetched.
  void divide(int64_t parts) { part_ = divide_up(rows_, parts); }
  void fetch() {
    for (int64_t i = 0; i < part_ && begin_ < end_; ++i) {
      Range& range = ranges_[begin_];
      for (int64_t at = 0; at < range.bytes; at += kLine) __builtin_prefetch(range.data + at);
      range.data += range.step;
      if (--range.rows == 0) ++begin_;
    }
  }

 private:
  static constexpr int kRanges = 4;
  struct Range {
    const char* data;
    int64_t step, bytes, rows;
  };
  Range ranges_[kRanges];
  int begin_ = 0, end_ = 0;
  int64_t rows_ = 0, part_ = 0;
};

template <class T>
class Forward {
 public:
  using F = accumulate_t<T>;
  using Launcher = launch::Attention<T>;
  using Lse = typename Launcher::Lse;

  Forward(typename Launcher::Output out, Lse* lse, typename Launcher::Input query, typename Launcher::Input key,
          typename Launcher::Input value, const AttentionMaskOperand& mask, const AttentionPerHead<F>& per_head,
          const AttentionShape& shape)
      : out_(out),
        lse_(lse),
        query_(query),
        key_(key),
        value_(value),
        mask_(mask),
        per_head_(per_head),
        shape_(shape),
        products_(shape.dim),
        stride_(tile_stride(shape)),
        block_keys_(block_keys(shape)) {
    const int64_t width = padded<F>(shape.dim), value_width = padded<F>(shape.value_dim);
    key_panels_ = scratch_.take<F>(round_up(shape.keys, kPanel<F>) * shape.dim);
    key_buffer_ = scratch_.take<F>(kPanel<F> * width);
    value_buffer_ = scratch_.take<F>(shape.keys * value_width);
    query_buffer_ = scratch_.take<F>(kRows * width);
    query_columns_ = scratch_.take<F>(kRows * shape.dim);
    scores_ = scratch_.take<F>(kStrip<T> * stride_);
    sums_ = scratch_.take<F>(kRows * value_width);
    tile_mask_ = scratch_.take<F>(stride_);
    row_mask_ = scratch_.take<F>(stride_);
    factors_ = scratch_.take<F>(stride_);
    if (failed()) return;
    for (int64_t j = 0; j < stride_; ++j) tile_mask_[j] = row_mask_[j] = factors_[j] = 0;
  }
  bool failed() const { return scratch_.failed; }

  void load_keys(int64_t head) {
    products_.pack_right({head_start(key_, shape_, head, shape_.group), key_.row, key_.column}, shape_.keys,
                         key_buffer_, key_panels_);
    values_ = rows_of<T>({head_start(value_, shape_, head, shape_.group), value_.row, value_.column}, shape_.keys,
                         shape_.value_dim, value_buffer_);
    const bool masked = shape_.windowed() || mask_.kind != AttentionMask::kNone;
    values_finite_ = !masked || all_finite(values_, shape_.keys, padded<F>(shape_.value_dim));
  }

  // What comes after the next block of queries, and whether that has other keys.
  void expect(int64_t head, int64_t first, int64_t rows, bool other_keys) {
    const auto add = [&](const auto& of, int64_t group, int64_t begin, int64_t count, int64_t width) {
      ahead_.add(head_start(of, shape_, head, group) + begin * of.row, of.row, of.column, count, width);
    };
    ahead_.clear();
    add(query_, 1, first, rows, shape_.dim);
    add(out_, 1, first, rows, shape_.value_dim);
    if (!other_keys) return;
    add(key_, shape_.group, 0, std::min(shape_.keys, kAheadKeys), shape_.dim);
    add(value_, shape_.group, 0, std::min(shape_.keys, kAheadKeys), shape_.value_dim);
  }

  void block(int64_t head, int64_t first, int64_t rows) {
    const int64_t value_width = padded<F>(shape_.value_dim);
    const T* query = head_start(query_, shape_, head, 1) + first * query_.row;
    products_.pack_left({query, query_.row, query_.column}, rows, query_buffer_, query_columns_);
    const F* const sink = per_head_.sinks ? per_head_.sinks + head : nullptr;
    F top[kRows], total[kRows];
    for (int64_t i = 0; i < rows; ++i) top[i] = sink ? *sink * kUnit<T> : -kInfinity<F>, total[i] = sink ? F(1) : F(0);
    const HeadScores<F> scores = scores_of(shape_, mask_, per_head_, head, tile_mask_, row_mask_);
    const KeyRange seen = keys_of(shape_, first, rows);
    bool started = false;
    ahead_.divide(divide_up(std::max<int64_t>(seen.end - seen.begin, 1), block_keys_) * divide_up(rows, kStrip<T>) * 3);
    for (int64_t block = seen.begin / block_keys_ * block_keys_; block < seen.end; block += block_keys_) {
      const int64_t k = std::max(block, seen.begin / kPanel<F> * kPanel<F>);
      const int64_t count = read_tile_mask(scores, k, std::min(block + block_keys_, seen.end) - k);
      if (count <= 0) continue;
      for (int64_t i = 0; i < rows; i += kStrip<T>) {
        const int64_t some = std::min(kStrip<T>, rows - i);
        ahead_.fetch();
        products_.multiply(some, k, count, query_columns_ + i, key_panels_, scores_, stride_);
        ahead_.fetch();
        softmax(scores, head, first, i, some, k, count, started, top + i, total + i);
        ahead_.fetch();
        multiply_scores<T>(some, shape_.value_dim, count, scores_, stride_, {values_.row(k), values_.stride},
                           values_finite_, sums_ + i * value_width, value_width, started);
      }
      started = true;
    }
    if (!started)
      for (int64_t j = 0; j < rows * value_width; ++j) sums_[j] = 0;
    write(head, first, rows, top, total);
  }

 private:
  // Folds scores [k, k + count) of `rows` queries from first + begin on into their running maxima and sums; rescales
  // their output rows.
  void softmax(const HeadScores<F>& scores, int64_t head, int64_t first, int64_t begin, int64_t rows, int64_t k,
               int64_t count, bool started, F* top, F* total) {
    for (int64_t i = 0; i < rows; i += kTogether)
      softmax_together(scores, head, first, begin + i, std::min(kTogether, rows - i), scores_ + i * stride_, k, count,
                       started, top + i, total + i);
  }
  void softmax_together(const HeadScores<F>& scores, int64_t head, int64_t first, int64_t begin, int64_t rows, F* s,
                        int64_t k, int64_t count, bool started, F* top, F* total) {
    FinishedRow<F> finished[kTogether];
    Vec<F> sums[kTogether];
    F tops[kTogether];
    for (int64_t i = 0; i < rows; ++i)
      finished[i] = finish_row<T>(scores, s + i * stride_, first + begin + i, k, count);
    for (int64_t i = 0; i < rows; ++i) {
      const FinishedRow<F>& row = finished[i];
      if (row.valid == 0) continue;
      tops[i] = row.top > top[i] ? row.top : top[i];
      const F* factors = nullptr;
      if (shape_.dropout_key) {
        const uint64_t element = uint64_t((head * shape_.queries + first + begin + i) * shape_.keys + k);
        dropout_factors(shape_, element, row.valid, factors_);
        factors = factors_;
      }
      sums[i] = exponentials<T>(s + i * stride_, row.valid, row.factor, shift_of(tops[i]), factors);
    }
    for (int64_t i = 0; i < rows; ++i) {
      if (finished[i].valid == 0) continue;
      if (started || per_head_.sinks) {
        const Vec<F> correction = exp(broadcast(score_of<T>(top[i] - shift_of(tops[i]))));
        total[i] *= correction[0];
        F* row = sums_ + (begin + i) * padded<F>(shape_.value_dim);
        for (int64_t j = 0; j < (started ? shape_.value_dim : 0); j += kLanes<F>)
          store(row + j, load(row + j) * correction);
      }
      total[i] += sum_lanes<F>(sums[i]);
      top[i] = tops[i];
    }
  }
  static F shift_of(F top) { return top == -kInfinity<F> ? F(0) : top; }

  void write(int64_t head, int64_t first, int64_t rows, const F* top, const F* total) {
    T* out = head_start(out_, shape_, head, 1) + first * out_.row;
    const bool exact = shape_.keys > kKeys;  // a row in one block of keys needs no lse in the backward
    for (int64_t i = 0; i < rows; ++i, out += out_.row) {
      const F divisor = total[i] == F(0) ? F(1) : total[i];
      const F* row = sums_ + i * padded<F>(shape_.value_dim);
      write_quotients(out, out_.column, row, shape_.value_dim, divisor);
      lse_[head * shape_.queries + first + i] =
          total[i] == F(0) ? -kInfinity<Lse>
                           : Lse(score_of<T>(top[i])) + (exact ? std::log(Lse(total[i])) : Lse(std::log(total[i])));
    }
  }

  typename Launcher::Output out_;
  Lse* lse_;
  typename Launcher::Input query_, key_, value_;
  const AttentionMaskOperand& mask_;
  const AttentionPerHead<F>& per_head_;
  const AttentionShape& shape_;
  const RowProducts<T> products_;
  const int64_t stride_, block_keys_;
  Scratch scratch_;
  F *key_panels_, *key_buffer_, *value_buffer_, *query_buffer_, *query_columns_, *scores_, *sums_, *tile_mask_,
      *row_mask_, *factors_;
  Matrix<F> values_{};
  Ahead ahead_;
  bool values_finite_ = true;
};

}  // namespace

template <class T>
int64_t Attention<T>::fwd_scratch(const AttentionShape&) {
  return 0;  // every thread allocates its own
}

template <class T>
bool Attention<T>::fwd(Output out, Lse* lse, Input query, Input key, Input value, AttentionMaskOperand mask,
                       PerHead per_head, AttentionShape shape, void*, void*) {
  if (Decode<T>::serves(shape)) return Decode<T>(out, lse, query, key, value, mask, per_head, shape).run();
  const int64_t height = block_rows(shape), blocks = divide_up(shape.queries, height);
  const int64_t cost = height * (shape.keys + 1) * (shape.dim + shape.value_dim + kLanes<F>);
  std::atomic<bool> failed{false};
  parallel_for(shape.heads * blocks, std::max<int64_t>(1, 100000 / cost), [&](int64_t begin, int64_t end) {
    Forward<T> forward(out, lse, query, key, value, mask, per_head, shape);
    if (forward.failed()) {
      failed = true;
      return;
    }
    int64_t loaded = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / blocks, first = item % blocks * height;
      if (head / shape.group != loaded) forward.load_keys(head);
      loaded = head / shape.group;
      if (item + 1 < end) {
        const int64_t next = (item + 1) / blocks, begins = (item + 1) % blocks * height;
        forward.expect(next, begins, std::min(height, shape.queries - begins), next / shape.group != loaded);
      }
      forward.block(head, first, std::min(height, shape.queries - first));
    }
  });
  return !failed;
}

void attention_keep(bool* keep, AttentionShape shape, void*) {
  constexpr int64_t kPiece = 4096;
  const int64_t count = shape.heads * shape.queries * shape.keys;
  parallel_for(divide_up(count, kPiece), 4, [&](int64_t begin, int64_t end) {
    float factors[kPiece];
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * kPiece, length = std::min(kPiece, count - first);
      dropout_factors(shape, uint64_t(first), length, factors);
      for (int64_t j = 0; j < length; ++j) keep[first + j] = factors[j] != 0;
    }
  });
}

#define PYNN_INSTANTIATE(T)                                                                                         \
  template int64_t Attention<T>::fwd_scratch(const AttentionShape&);                                                \
  template bool Attention<T>::fwd(Output, Lse*, Input, Input, Input, AttentionMaskOperand, PerHead, AttentionShape, \
                                  void*, void*);
PYNN_INSTANTIATE(double)
PYNN_INSTANTIATE(float)
PYNN_INSTANTIATE(Half)
PYNN_INSTANTIATE(BFloat16)

}  // namespace pynn::cpu
