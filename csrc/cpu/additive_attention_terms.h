// Additive attention on the CPU: what forward and backward share. A hyperbolic tangent for each of Lq Lk D terms is
// nearly all of the time: lanes run along D, and a query meets the keys that it sees one after the other. Backward
// takes a query twice past its keys: for the scores and the sum delta over all of them, then for the gradients. It
// keeps the tangents in between, as far as they find room in kKept values, and makes the others again.
//
// Scores, their softmax and their gradients are float64, D times fewer than the terms; the terms and the sums of them
// are in the compute type.
#pragma once
#include <cmath>
#include <memory>
#include <new>

#include "additive_attention.h"
#include "recurrent_activation.h"
#include "recurrent_tile.h"

namespace pynn::cpu {
namespace {
namespace additive {
using recurrent::convert;
using recurrent::load_some;
using recurrent::store_some;

constexpr int64_t kSummed = 64;          // values that are summed before they meet the others
constexpr int64_t kUnitTerms = 1 << 16;  // a thread takes as many units as have this many terms

template <class A>
int64_t padded(int64_t width) {
  return (width + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Memory of one thread, cut into aligned arrays.
class Arena {
 public:
  explicit Arena(int64_t bytes) : memory_(new (std::nothrow) char[size_t(bytes + 64)]) {
    next_ = memory_.get();
    if (next_) next_ += (64 - reinterpret_cast<uintptr_t>(next_) % 64) % 64;
  }
  explicit operator bool() const { return next_; }
  static int64_t bytes(int64_t count, int64_t size) { return (count * size + 63) / 64 * 64; }
  template <class E>
  E* take(int64_t count) {
    E* const result = reinterpret_cast<E*>(next_);
    next_ += bytes(count, sizeof(E));
    return result;
  }

 private:
  std::unique_ptr<char[]> memory_;
  char* next_;
};

// The keys that a query sees, and what the mask adds to their scores.
template <class T>
int64_t visible_keys(const ScoreMask<T>& mask, int64_t at, int64_t keys, int64_t* index, double* scores) {
  int64_t count = 0;
  for (int64_t j = 0; j < keys; ++j) {
    accumulate_t<T> added;
    const bool visible = mask.visible(at + j * mask.column, added);
    index[count] = j, scores[count] = added;
    count += visible;
  }
  return count;
}

// sum_d weight_d tanh(query_d + key_d) over two sums of lanes; keeps the tangents at `kept` if it is not null. query
// and weight are padded with zeros, so what the lanes past `dim` hold has no part in it.
template <class T>
double score_of(const accumulate_t<T>* query, const T* key, const accumulate_t<T>* weight, int64_t dim,
                accumulate_t<T>* kept) {
  using A = accumulate_t<T>;
  constexpr int64_t L = kLanes<A>;
  Vec<A> sums[2] = {};
  for (int64_t d = 0; d < dim; d += L) {
    const Vec<A> t = tanh(Vec<A>(load(query + d) + load_some(key + d, dim - d)));
    if (kept) store(kept + d, t);
    Vec<A>& sum = sums[d / L % 2];
    sum = fma(load(weight + d), t, sum);
  }
  return add_lanes(sums[0]) + add_lanes(sums[1]);
}

// scores[i] = exp(scores[i] - shift), whole vectors of them.
inline void exponentials(double* scores, int64_t count, double shift) {
  constexpr int64_t L = kLanes<double>;
  for (int64_t j = 0; j < count; j += L) {
    const VecDouble e = exp(VecDouble(load(scores + j) - shift));
    if (j + L <= count)
      store(scores + j, e);
    else
      for (int64_t i = 0; j + i < count; ++i) scores[j + i] = e[i];
  }
}

}  // namespace additive
}  // namespace
}  // namespace pynn::cpu
