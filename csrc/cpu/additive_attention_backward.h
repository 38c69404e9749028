// The gradients of additive attention on the CPU, a query after the other; see additive_attention_terms.h.
#pragma once
#include "additive_attention_terms.h"

namespace pynn::cpu {
namespace {
namespace additive {

constexpr int64_t kKept = 1 << 20;  // tangents that a thread keeps: faster to read from any cache than to make
constexpr int64_t kTile = 16;       // keys whose gradients share a load of the query's
constexpr int64_t kRun = 16;        // queries whose gradients of keys are summed before they meet the others'
constexpr int64_t kSplit = 64;      // queries of a unit of the backward at least
constexpr int64_t kMostSplits = 8;  // units of one head, each with sums of its own

inline int64_t splits(const AdditiveShape& shape) {
  return std::min((shape.queries + kSplit - 1) / kSplit, kMostSplits);
}

// Sums of a unit over its queries: (keys, padded dim) without the factor weight, (keys, padded value_dim), (padded
// dim).
template <class A>
struct Sums {
  A *key, *value, *weight;
  static int64_t elements(const AdditiveShape& shape) {
    return (shape.keys + 1) * padded<A>(shape.dim) + shape.keys * padded<A>(shape.value_dim);
  }
  static Sums at(A* memory, const AdditiveShape& shape) {
    A* const value = memory + shape.keys * padded<A>(shape.dim);
    return {memory, value, value + shape.keys * padded<A>(shape.value_dim)};
  }
};

template <class T>
class Backward {
  using A = accumulate_t<T>;
  static constexpr int64_t L = kLanes<A>;

 public:
  Backward(const AdditiveGradients<T>& gradients, const AdditiveSaved<T>& saved, const AdditiveOperands<T>& operands,
           const AdditiveShape& shape, Arena& arena)
      : gradients_(gradients),
        saved_(saved),
        o_(operands),
        shape_(shape),
        width_(padded<A>(shape.dim)),
        value_width_(padded<A>(shape.value_dim)),
        kept_(kept_keys(shape)),
        index_(arena.take<int64_t>(shape.keys)),
        shares_(arena.take<double>(shape.keys)),
        slopes_(arena.take<double>(shape.keys)),
        query_(arena.take<A>(width_)),
        weight_(arena.take<A>(width_)),
        grad_query_(arena.take<A>(width_)),
        grad_out_(arena.take<A>(value_width_)),
        tangents_(arena.take<A>((kept_ + kTile) * width_)),
        run_(Sums<A>::at(arena.take<A>(Sums<A>::elements(shape)), shape)) {
    convert(operands.weight, shape.dim, weight_);
  }
  static int64_t bytes(const AdditiveShape& shape) {
    const int64_t width = padded<A>(shape.dim);
    return Arena::bytes(shape.keys, sizeof(int64_t)) + 2 * Arena::bytes(shape.keys, sizeof(double)) +
           3 * Arena::bytes(width, sizeof(A)) + Arena::bytes(padded<A>(shape.value_dim), sizeof(A)) +
           Arena::bytes((kept_keys(shape) + kTile) * width, sizeof(A)) +
           Arena::bytes(Sums<A>::elements(shape), sizeof(A));
  }

  // Queries [begin, end) of a head: rows of grad_query and of the gradient of the scores, and `sums` of the rest.
  void run(int64_t head, int64_t begin, int64_t end, A* sums) {
    const int64_t elements = Sums<A>::elements(shape_);
    for (int64_t i = 0; i < elements; ++i) sums[i] = 0;
    for (int64_t first = begin; first < end; first += kRun) {
      for (int64_t i = 0; i < elements; ++i) run_.key[i] = 0;
      for (int64_t query = first; query < std::min(first + kRun, end); ++query) add_query(head, query);
      for (int64_t i = 0; i < elements; ++i) sums[i] += run_.key[i];
    }
  }

 private:
  // Of how many of the keys that a query sees the tangents are kept: whole tiles.
  static int64_t kept_keys(const AdditiveShape& shape) {
    const int64_t most = kKept / std::max<int64_t>(padded<A>(shape.dim), 1);
    return std::min(most, shape.keys + kTile - 1) / kTile * kTile;
  }

  void add_query(int64_t head, int64_t query) {
    const int64_t dim = shape_.dim, keys = shape_.keys, value_dim = shape_.value_dim;
    const int64_t row = head * shape_.queries + query;
    const int64_t mask_at = o_.mask.offset(shape_, head) + query * o_.mask.row;
    const int64_t count = visible_keys(o_.mask, mask_at, keys, index_, shares_);
    if (gradients_.scores)
      for (int64_t j = 0; j < keys; ++j) gradients_.scores[row * keys + j] = 0;
    for (int64_t d = 0; d < width_; ++d) grad_query_[d] = 0;
    if (count > 0) {
      convert(o_.query + row * dim, dim, query_);
      convert(saved_.grad_out + row * value_dim, value_dim, grad_out_);
      find_slopes(head, row, count);
      for (int64_t first = 0; first < count; first += kTile) add_tile(head, first, std::min(kTile, count - first));
    }
    T* const to = gradients_.query + row * dim;
    for (int64_t d = 0; d < dim; d += L) store_some(to + d, dim - d, Vec<A>(load(grad_query_ + d) * load(weight_ + d)));
  }

  // P and dS of a query. What the mask adds is in shares_.
  void find_slopes(int64_t head, int64_t row, int64_t count) {
    const int64_t dim = shape_.dim, keys = shape_.keys, value_dim = shape_.value_dim;
    for (int64_t n = 0; n < count; ++n)
      shares_[n] += score_of<T>(query_, o_.key + (head * keys + index_[n]) * dim, weight_, dim,
                                n < kept_ ? tangents_ + n * width_ : nullptr);
    exponentials(shares_, count, double(saved_.lse[row]));
    double delta = 0;
    for (int64_t n = 0; n < count; ++n) {
      slopes_[n] = dot(grad_out_, o_.value + (head * keys + index_[n]) * value_dim, value_dim);
      if (saved_.grad_weights) slopes_[n] += double(to_float(saved_.grad_weights[row * keys + index_[n]]));
      delta += shares_[n] * slopes_[n];
    }
    for (int64_t n = 0; n < count; ++n) {
      slopes_[n] = shares_[n] * (slopes_[n] - delta);
      if (gradients_.scores) gradients_.scores[row * keys + index_[n]] = A(slopes_[n]);
    }
  }

  void add_tile(int64_t head, int64_t first, int64_t count) {
    const int64_t dim = shape_.dim;
    const int64_t* const index = index_ + first;
    const A* tangents = tangents_ + first * width_;
    if (first >= kept_) {
      A* const made = tangents_ + kept_ * width_;
      for (int64_t n = 0; n < count; ++n)
        score_of<T>(query_, o_.key + (head * shape_.keys + index[n]) * dim, weight_, dim, made + n * width_);
      tangents = made;
    }
    A share[kTile], slope[kTile];
    for (int64_t n = 0; n < count; ++n) share[n] = A(shares_[first + n]), slope[n] = A(slopes_[first + n]);
    for (int64_t n = 0; n < count; ++n) {
      A* const to = run_.value + index[n] * value_width_;
      for (int64_t v = 0; v < value_width_; v += L)
        store(to + v, fma(broadcast(share[n]), load(grad_out_ + v), load(to + v)));
    }
    for (int64_t d = 0; d < width_; d += L) {
      Vec<A> to_query{}, to_weight{};
      for (int64_t n = 0; n < count; ++n) {
        const Vec<A> t = load(tangents + n * width_ + d), g = broadcast(slope[n]);
        const Vec<A> term = g * fma(-t, t, broadcast(A(1)));
        A* const to = run_.key + index[n] * width_ + d;
        store(to, Vec<A>(load(to) + term));
        to_query += term;
        to_weight = fma(g, t, to_weight);
      }
      store(grad_query_ + d, Vec<A>(load(grad_query_ + d) + to_query));
      store(run_.weight + d, Vec<A>(load(run_.weight + d) + to_weight));
    }
  }

  // a is padded with zeros.
  static double dot(const A* a, const T* b, int64_t count) {
    Vec<A> sums[2] = {};
    for (int64_t i = 0; i < count; i += L) {
      Vec<A>& sum = sums[i / L % 2];
      sum = fma(load(a + i), load_some(b + i, count - i), sum);
    }
    return add_lanes(sums[0]) + add_lanes(sums[1]);
  }

  const AdditiveGradients<T>& gradients_;
  const AdditiveSaved<T>& saved_;
  const AdditiveOperands<T>& o_;
  const AdditiveShape& shape_;
  int64_t width_, value_width_, kept_;
  int64_t* index_;
  double *shares_, *slopes_;
  A *query_, *weight_, *grad_query_, *grad_out_, *tangents_;
  Sums<A> run_;
};

}  // namespace additive
}  // namespace
}  // namespace pynn::cpu
