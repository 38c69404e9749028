// Attention of a few queries over many keys, as in decoding with a cache: every key and value is read once, in place
// (rows whose elements lie apart are copied, a few at a time).
//
// A task is a chunk of kChunkKeys keys of a key head, for all queries of the heads that share it. Scores are dot
// products along the rows of the keys; softmax and values follow. What the chunks of a head give - a maximum, a sum and
// a weighted sum of values per query - is combined in their order, so nothing depends on which thread did which.
//
// Key heads whose rows lie next to each other, as those of a projection (..., L, H, D), share a task, which takes a few
// keys of one after those of the other: memory is read about twice as fast as when each head walks through all of it.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>

#include "parallel.h"
#include "scaled_dot_product_attention_rows.h"
#include "scaled_dot_product_attention_score.h"

namespace pynn::cpu::attention {

inline constexpr int64_t kChunkKeys = kKeys, kChunkStride = kLongStride;
inline constexpr int64_t kValueKeys = 32;  // keys whose values are added before the next ones are read, at most
inline constexpr int64_t kTaskHeads = 16;  // key heads of a task, at most

// to[m][0 .. N vectors) += sum over j < count of weights[m][j] * value rows j, for M queries. The sum of a few keys is
// formed before it is added: the rounding error of a long sum grows with the number of such parts.
template <int M, int N, bool kSkip, class T, class F = accumulate_t<T>>
void add_values(const T* value, int64_t row, int64_t count, int64_t width, const F* weights, F* to, int64_t to_stride) {
  constexpr int L = kLanes<F>;
  Vec<F> sum[M][N] = {};
  for (int64_t j = 0; j < count; ++j, value += row) {
    Vec<F> v[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      v[n] = width >= (n + 1) * L ? load_compute(value + n * L) : load_part(value + n * L, width - n * L, F(0));
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const F weight = weights[m * kChunkStride + j];
      if (kSkip && weight == F(0)) continue;  // a masked key gives nothing, not even NaN
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[m][n] = fma(broadcast(weight), v[n], sum[m][n]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      F* place = to + m * to_stride + n * L;
      store(place, load(place) + sum[m][n]);
    }
}

template <class T>
class Decode {
 public:
  using F = accumulate_t<T>;
  using Launcher = launch::Attention<T>;
  using Lse = typename Launcher::Lse;

  static bool serves(const AttentionShape& shape) { return has_few_queries(shape); }

  Decode(typename Launcher::Output out, Lse* lse, typename Launcher::Input query, typename Launcher::Input key,
         typename Launcher::Input value, const AttentionMaskOperand& mask, const AttentionPerHead<F>& per_head,
         const AttentionShape& shape)
      : out_(out),
        lse_(lse),
        query_(query),
        key_(key),
        value_(value),
        mask_(mask),
        per_head_(per_head),
        shape_(shape) {}

  // False when there is no memory.
  bool run() {
    Scratch scratch;
    partial_ = scratch.take<F>(shape_.heads * shape_.queries * chunks_ * stride_);
    if (scratch.failed) return false;
    const int64_t cost = std::min(shape_.keys, kChunkKeys) * (shape_.dim + shape_.value_dim + 1) * rows_;
    const int64_t row_heads = shape_.batch[shape_.batch_dims - 1] / shape_.group;  // key heads of one batch element
    const int64_t all_heads = shape_.heads / shape_.group, together = heads_together(row_heads);
    const int64_t parts = divide_up(row_heads, together);
    std::atomic<bool> failed{false};
    parallel_for(all_heads / row_heads * parts * chunks_, std::max<int64_t>(1, 100000 / (cost * together)),
                 [&](int64_t begin, int64_t end) {
                   Scratch own;
                   const Buffers buffers{
                       own.take<F>(together * rows_ * padded<F>(shape_.dim)),
                       own.take<F>(together * rows_ * kChunkStride),
                       own.take<F>(kChunkStride),
                       own.take<F>(kChunkStride),
                       own.take<F>(kChunkStride),
                       own.take<T>(is_dense() ? 0 : std::max(kLanes<F> * shape_.dim, value_keys_ * shape_.value_dim))};
                   if (own.failed) {
                     failed = true;
                     return;
                   }
                   for (int64_t j = 0; j < kChunkStride; ++j)
                     buffers.tile_mask[j] = buffers.row_mask[j] = buffers.factors[j] = 0;
                   for (int64_t task = begin; task < end; ++task) {
                     const int64_t element = task / chunks_ / parts, first = task / chunks_ % parts * together;
                     chunk(element * row_heads + first, std::min(together, row_heads - first), task % chunks_, buffers);
                   }
                 });
    if (failed) return false;
    for (int64_t row = 0; row < shape_.heads * shape_.queries; ++row) combine(row);
    return true;
  }

 private:
  // What a chunk gives for row head * queries + query: padded<F>(value_dim) sums, then the maximum and the sum of the
  // weights, as a number and what it lacks: its rounding would be an error of the whole row.
  F* partial(int64_t row, int64_t chunk) const { return partial_ + (row * chunks_ + chunk) * stride_; }

  bool is_dense() const { return key_.column == 1 && value_.column == 1; }
  // `count` rows from `from` on, where they lie or in `buffer`.
  Read<T> rows_at(const typename Launcher::Input& of, const T* from, int64_t count, int64_t width, T* buffer) const {
    if (of.column == 1) return {from, of.row, 1};
    for (int64_t j = 0; j < count; ++j)
      for (int64_t d = 0; d < width; ++d) buffer[j * width + d] = from[j * of.row + d * of.column];
    return {buffer, width, 1};
  }

  // Key heads of a task out of `count` of a batch element: more than one where their rows are neighbours and there are
  // tasks enough for all threads.
  int64_t heads_together(int64_t count) const {
    const int last = shape_.batch_dims - 1;
    const bool neighbours = std::abs(key_.batch[last]) < std::abs(key_.row);
    const int64_t tasks = shape_.heads / shape_.group * chunks_;
    return neighbours ? std::clamp<int64_t>(tasks / thread_count(), 1, std::min(count, kTaskHeads)) : 1;
  }

  struct Buffers {
    F *queries, *scores, *tile_mask, *row_mask, *factors;
    T* rows;
  };

  void chunk(int64_t first_head, int64_t heads, int64_t number, const Buffers& to) const {
    const int64_t width = padded<F>(shape_.dim), chunk_begin = number * kChunkKeys, first_row = first_head * rows_,
                  rows = heads * rows_;
    for (int64_t r = 0; r < rows; ++r) start(first_row + r, number);
    const KeyRange seen = keys_of(shape_, 0, shape_.queries);
    const int64_t begin = std::max(chunk_begin, seen.begin / kValueKeys * kValueKeys);
    const int64_t count = unhidden(first_row, rows, begin, std::min(chunk_begin + kChunkKeys, seen.end) - begin, to);
    if (count <= 0) return;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first_row + r;
      const T* from = head_start(query_, shape_, row / shape_.queries, 1) + row % shape_.queries * query_.row;
      for (int64_t d = 0; d < width; ++d)
        to.queries[r * width + d] = d < shape_.dim ? to_float(from[d * query_.column]) : F(0);
    }
    const T *keys[kTaskHeads], *values[kTaskHeads];
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t head = (first_head + h) * shape_.group;
      keys[h] = head_start(key_, shape_, head, shape_.group) + begin * key_.row;
      values[h] = head_start(value_, shape_, head, shape_.group) + begin * value_.row;
    }
    for (int64_t j = 0; j < count; j += kLanes<F>)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t some = std::min<int64_t>(kLanes<F>, count - j);
        const Read<T> of = rows_at(key_, keys[h] + j * key_.row, some, shape_.dim, to.rows);
        for (int64_t r = h * rows_; r < (h + 1) * rows_; ++r)
          score_keys(of.data, of.row, some, to.queries + r * width, shape_.dim, to.scores + r * kChunkStride + j);
      }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = (first_row + r) / shape_.queries, query = (first_row + r) % shape_.queries;
      const HeadScores<F> of_head = scores_at(first_row + r, to);
      read_tile_mask(of_head, begin, count);
      softmax(of_head, head, query, number, begin, count, to.scores + r * kChunkStride, to.factors);
    }
    for (int64_t j = 0; j < count; j += value_keys_)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t some = std::min(value_keys_, count - j);
        const Read<T> of = rows_at(value_, values[h] + j * value_.row, some, shape_.value_dim, to.rows);
        for (int64_t r = h * rows_; r < (h + 1) * rows_;) {
          // Rows of the same key head are neighbours in partial_, chunks_ * stride_ apart.
          const int64_t left = (h + 1) * rows_ - r, height = left >= 4 ? 4 : left >= 2 ? 2 : 1;
          const auto add_some = [&]<int M>(std::integral_constant<int, M>) {
            add<M>(of, some, to.scores + r * kChunkStride + j, partial(first_row + r, number));
          };
          height == 4   ? add_some(std::integral_constant<int, 4>())
          : height == 2 ? add_some(std::integral_constant<int, 2>())
                        : add_some(std::integral_constant<int, 1>());
          r += height;
        }
      }
  }

  HeadScores<F> scores_at(int64_t row, const Buffers& to) const {
    return scores_of(shape_, mask_, per_head_, row / shape_.queries, to.tile_mask, to.row_mask);
  }

  // How many of keys [begin, begin + count) are left without those at their end that the masks of all rows hide.
  int64_t unhidden(int64_t first_row, int64_t rows, int64_t begin, int64_t count, const Buffers& to) const {
    if (mask_.kind == AttentionMask::kNone || mask_.operand.row != 0) return count;
    if (mask_.operand.batch[shape_.batch_dims - 1] == 0) rows = 1;  // heads share their mask
    int64_t left = 0;
    for (int64_t r = 0; r < rows && left < count; r += shape_.queries)
      left = std::max(left, read_tile_mask(scores_at(first_row + r, to), begin, count));
    return left;
  }

  template <int M>
  void add(const Read<T>& value, int64_t count, const F* weights, F* to) const {
    const bool masked = shape_.windowed() || mask_.kind != AttentionMask::kNone;
    constexpr int kVectors = M < 4 && kVectorRegisters == 32 ? 8 : 4;  // of a row at once
    for (int64_t d = 0; d < shape_.value_dim; d += kVectors * kLanes<F>) {
      const int64_t width = shape_.value_dim - d, stride = chunks_ * stride_;
      const auto run = [&]<int N>(std::integral_constant<int, N>) {
        masked ? add_values<M, N, true>(value.data + d, value.row, count, width, weights, to + d, stride)
               : add_values<M, N, false>(value.data + d, value.row, count, width, weights, to + d, stride);
      };
      [&]<int... I>(std::integer_sequence<int, I...>) {
        const int64_t vectors = std::min<int64_t>(kVectors, divide_up(width, kLanes<F>));
        ((vectors == I + 1 ? run(std::integral_constant<int, I + 1>()) : void()), ...);
      }(std::make_integer_sequence<int, kVectors>());
    }
  }

  // The partial result of a query to which nothing has been added.
  void start(int64_t row, int64_t number) const {
    F* to = partial(row, number);
    const int64_t width = padded<F>(shape_.value_dim);
    for (int64_t d = 0; d < width; ++d) to[d] = 0;
    to[width] = -kInfinity<F>, to[width + 1] = to[width + 2] = 0;
  }

  // Turns the scores of one query into weights against their own maximum.
  void softmax(const HeadScores<F>& of_head, int64_t head, int64_t query, int64_t number, int64_t begin, int64_t count,
               F* s, F* factors) const {
    F* to = partial(head * shape_.queries + query, number) + padded<F>(shape_.value_dim);
    F& top = to[0];
    const auto [valid, largest, factor, masked] = finish_row<T>(of_head, s, query, begin, count);
    top = largest;
    if (valid == 0) return;
    const bool drop = shape_.dropout_key != nullptr;
    if (drop) dropout_factors(shape_, uint64_t((head * shape_.queries + query) * shape_.keys + begin), valid, factors);
    const Vec<F> sums = exponentials<T>(s, valid, factor, top == -kInfinity<F> ? F(0) : top, drop ? factors : nullptr);
    double total = 0;
    for (int l = 0; l < kLanes<F>; ++l) total += double(sums[l]);
    to[1] = F(total), to[2] = F(total - double(to[1]));
  }

  // The result of one query from those of its chunks.
  void combine(int64_t row) const {
    const int64_t width = padded<F>(shape_.value_dim);
    F* first = partial_ + row * chunks_ * stride_;
    const F* const sink = per_head_.sinks ? per_head_.sinks + row / shape_.queries : nullptr;
    F top = sink ? *sink * kUnit<T> : -kInfinity<F>;
    double total = 0;
    for (int64_t c = 0; c < chunks_; ++c) top = std::max(top, first[c * stride_ + width]);
    const F shift = top == -kInfinity<F> ? F(0) : top;
    for (int64_t c = 0; c < chunks_; ++c) {
      const F* part = first + c * stride_;
      const F factor = exp(broadcast(score_of<T>(part[width] - shift)))[0];
      total += (double(part[width + 1]) + double(part[width + 2])) * double(factor);
      if (chunks_ == 1 && !sink) break;
      for (int64_t d = 0; d < width; d += kLanes<F>) {
        const Vec<F> scaled = load(part + d) * factor;
        store(first + d, c == 0 ? scaled : load(first + d) + scaled);
      }
    }
    if (sink) total += double(exp(broadcast(*sink - score_of<T>(shift)))[0]);
    T* out = head_start(out_, shape_, row / shape_.queries, 1) + row % shape_.queries * out_.row;
    const double divisor = total == 0 ? 1 : total;
    if constexpr (std::is_same_v<T, float>)
      for (int64_t d = 0; d < shape_.value_dim; ++d) out[d * out_.column] = float(double(first[d]) / divisor);
    else
      write_quotients(out, out_.column, first, shape_.value_dim, F(divisor));
    const bool exact = shape_.keys > kKeys;  // as in the kernel for many queries
    lse_[row] =
        total == 0 ? -kInfinity<Lse> : Lse(score_of<T>(top)) + Lse(exact ? std::log(total) : std::log(F(total)));
  }

  typename Launcher::Output out_;
  Lse* lse_;
  typename Launcher::Input query_, key_, value_;
  const AttentionMaskOperand& mask_;
  const AttentionPerHead<F>& per_head_;
  const AttentionShape& shape_;
  const int64_t rows_ = shape_.queries * shape_.group, chunks_ = divide_up(shape_.keys, kChunkKeys);
  const int64_t stride_ = padded<F>(shape_.value_dim) + padded<F>(3);
  // Of long rows fewer: so many streams at once read memory best.
  const int64_t value_keys_ = shape_.value_dim * int64_t(sizeof(T)) <= 256 ? kValueKeys : kValueKeys / 2;
  F* partial_ = nullptr;
};

}  // namespace pynn::cpu::attention
