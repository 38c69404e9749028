// Additive attention on the CPU: the forward, a query after the other, and the launchers. See
// additive_attention_terms.h.
#include <algorithm>
#include <atomic>

#include "additive_attention_backward.h"
#include "additive_attention_terms.h"
#include "parallel.h"

namespace pynn::cpu {
namespace {
namespace additive {

template <class T>
class Forward {
  using A = accumulate_t<T>;
  static constexpr int64_t L = kLanes<A>;

 public:
  Forward(const AdditiveOperands<T>& operands, const AdditiveShape& shape, Arena& arena)
      : o_(operands),
        shape_(shape),
        index_(arena.take<int64_t>(shape.keys)),
        scores_(arena.take<double>(padded<double>(shape.keys))),
        shares_(arena.take<A>(shape.keys)),
        query_(arena.take<A>(padded<A>(shape.dim))),
        weight_(arena.take<A>(padded<A>(shape.dim))) {
    for (int64_t j = shape.keys; j < padded<double>(shape.keys); ++j) scores_[j] = 0;
    convert(operands.weight, shape.dim, weight_);
  }
  static int64_t bytes(const AdditiveShape& shape) {
    return Arena::bytes(shape.keys, sizeof(int64_t)) + Arena::bytes(padded<double>(shape.keys), sizeof(double)) +
           Arena::bytes(shape.keys, sizeof(A)) + 2 * Arena::bytes(padded<A>(shape.dim), sizeof(A));
  }

  // One query of a head: its row of out and of weights (if not null); returns its lse.
  double run(int64_t head, int64_t query, T* out, T* weights) {
    const int64_t dim = shape_.dim, keys = shape_.keys, value_dim = shape_.value_dim;
    const int64_t mask_at = o_.mask.offset(shape_, head) + query * o_.mask.row;
    const int64_t count = visible_keys(o_.mask, mask_at, keys, index_, scores_);
    if (weights)
      for (int64_t j = 0; j < keys; ++j) weights[j] = T{};
    if (count == 0) {
      for (int64_t v = 0; v < value_dim; ++v) out[v] = T{};
      return -INFINITY;
    }
    convert(o_.query + (head * shape_.queries + query) * dim, dim, query_);
    const T* const key = o_.key + head * keys * dim;
    double top = -INFINITY, sum = 0;
    for (int64_t n = 0; n < count; ++n) {
      scores_[n] += score_of<T>(query_, key + index_[n] * dim, weight_, dim, nullptr);
      top = std::max(top, scores_[n]);
    }
    exponentials(scores_, count, top);
    for (int64_t n = 0; n < count; ++n) sum += scores_[n];
    for (int64_t n = 0; n < count; ++n) {
      shares_[n] = A(scores_[n] / sum);
      if (weights) weights[index_[n]] = from_float<T>(shares_[n]);
    }
    const T* const value = o_.value + head * keys * value_dim;
    int64_t v = 0;
    for (; v + 4 * L <= value_dim; v += 4 * L) add_values<4>(value, v, count, out);
    for (; v < value_dim; v += L) add_values<1>(value, v, count, out);
    return top + std::log(sum);
  }

 private:
  // N vectors of out, from column v on. Runs of kSummed keys are summed on their own.
  template <int N>
  void add_values(const T* value, int64_t v, int64_t count, T* out) const {
    Vec<A> total[N] = {};
    for (int64_t first = 0; first < count; first += kSummed) {
      Vec<A> sum[N] = {};
      for (int64_t n = first; n < std::min(first + kSummed, count); ++n)
        for (int i = 0; i < N; ++i)
          sum[i] =
              fma(broadcast(shares_[n]),
                  load_some(value + index_[n] * shape_.value_dim + v + i * L, shape_.value_dim - v - i * L), sum[i]);
      for (int i = 0; i < N; ++i) total[i] += sum[i];
    }
    for (int i = 0; i < N; ++i) store_some(out + v + i * L, shape_.value_dim - v - i * L, total[i]);
  }

  const AdditiveOperands<T>& o_;
  const AdditiveShape& shape_;
  int64_t* index_;
  double* scores_;
  A *shares_, *query_, *weight_;
};

// Rows of a gradient: the sums of all units of a head in order, times `factor` if it is not null.
template <class T, class A = accumulate_t<T>>
void add_units(T* to, const A* from, int64_t units, int64_t stride, int64_t width, const T* factor) {
  for (int64_t d = 0; d < width; d += kLanes<A>) {
    Vec<A> sum = load(from + d);
    for (int64_t unit = 1; unit < units; ++unit) sum += load(from + unit * stride + d);
    if (factor) sum *= load_some(factor + d, width - d);
    store_some(to + d, width - d, sum);
  }
}

}  // namespace additive
}  // namespace

template <class T>
int64_t AdditiveAttention<T>::fwd_scratch(const AdditiveShape&) {
  return 0;
}

template <class T>
int64_t AdditiveAttention<T>::bwd_scratch(const AdditiveShape& shape) {
  using A = accumulate_t<T>;
  return shape.heads * additive::splits(shape) * additive::Sums<A>::elements(shape) * int64_t(sizeof(A));
}

template <class T>
bool AdditiveAttention<T>::fwd(T* out, attention_lse_t<T>* lse, T* weights, const AdditiveOperands<T>& operands,
                               const AdditiveShape& shape, void*, void*) {
  const int64_t terms = std::max<int64_t>(1, shape.keys * (shape.dim + shape.value_dim));
  const int64_t grain = std::max<int64_t>(1, additive::kUnitTerms / terms);
  std::atomic<bool> done = true;
  parallel_for(shape.heads * shape.queries, grain, [&](int64_t begin, int64_t end) {
    additive::Arena arena(additive::Forward<T>::bytes(shape));
    if (!arena) {
      done = false;
      return;
    }
    additive::Forward<T> forward(operands, shape, arena);
    for (int64_t row = begin; row < end; ++row)
      lse[row] = attention_lse_t<T>(forward.run(row / shape.queries, row % shape.queries, out + row * shape.value_dim,
                                                weights ? weights + row * shape.keys : nullptr));
  });
  return done;
}

template <class T>
bool AdditiveAttention<T>::bwd(const AdditiveGradients<T>& gradients, const AdditiveSaved<T>& saved,
                               const AdditiveOperands<T>& operands, const AdditiveShape& shape, void* scratch, void*) {
  using A = accumulate_t<T>;
  using Sums = additive::Sums<A>;
  const int64_t splits = additive::splits(shape), elements = Sums::elements(shape);
  const int64_t terms = std::max<int64_t>(1, shape.queries * shape.keys * (shape.dim + shape.value_dim) / splits);
  A* const sums = static_cast<A*>(scratch);
  std::atomic<bool> done = true;
  parallel_for(shape.heads * splits, std::max<int64_t>(1, additive::kUnitTerms / terms),
               [&](int64_t begin, int64_t end) {
                 additive::Arena arena(additive::Backward<T>::bytes(shape));
                 if (!arena) {
                   done = false;
                   return;
                 }
                 additive::Backward<T> backward(gradients, saved, operands, shape, arena);
                 for (int64_t unit = begin; unit < end; ++unit) {
                   const int64_t split = unit % splits;
                   backward.run(unit / splits, shape.queries * split / splits, shape.queries * (split + 1) / splits,
                                sums + unit * elements);
                 }
               });
  if (!done) return false;
  const int64_t width = additive::padded<A>(shape.dim), value_width = additive::padded<A>(shape.value_dim);
  const int64_t grain =
      std::max<int64_t>(1, additive::kUnitTerms / std::max<int64_t>(1, splits * (width + value_width)));
  parallel_for(shape.heads * shape.keys, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Sums from = Sums::at(sums + row / shape.keys * splits * elements, shape);
      const int64_t key = row % shape.keys;
      additive::add_units(gradients.key + row * shape.dim, from.key + key * width, splits, elements, shape.dim,
                          operands.weight);
      additive::add_units<T>(gradients.value + row * shape.value_dim, from.value + key * value_width, splits, elements,
                             shape.value_dim, nullptr);
    }
  });
  const A* const of_weight = Sums::at(sums, shape).weight;
  for (int64_t d = 0; d < shape.dim; ++d) {
    double sum = 0;
    for (int64_t unit = 0; unit < shape.heads * splits; ++unit) sum += double(of_weight[unit * elements + d]);
    gradients.weight[d] = from_float<T>(A(sum));
  }
  return true;
}

template struct AdditiveAttention<double>;
template struct AdditiveAttention<float>;
template struct AdditiveAttention<Half>;
template struct AdditiveAttention<BFloat16>;

}  // namespace pynn::cpu
