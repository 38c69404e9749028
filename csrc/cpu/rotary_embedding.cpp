// Rotary embedding: a task owns rows of positions, and turns all heads of a position with the cos and sin it read once.
#include "rotary_embedding.h"

#include <algorithm>

#include "parallel.h"
#include "vec_load.h"

namespace pynn::cpu {
namespace {

constexpr int64_t kPairs = 128;  // of which a task keeps factors at a time

template <class F, int... I>
Vec<F> exchanged(Vec<F> v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ 1)...);
}
// The neighbour of each lane's channel: a for b and b for a.
template <class F>
Vec<F> exchanged(Vec<F> v) {
  return exchanged<F>(v, std::make_integer_sequence<int, kLanes<F>>());
}

// first = a cos - b sin, second = b cos + a sin.
template <class F>
void turn(Vec<F>& a, Vec<F>& b, Vec<F> cos, Vec<F> sin) {
  const Vec<F> first = fma(a, cos, -(b * sin));
  b = fma(b, cos, a * sin);
  a = first;
}

template <class T>
class Position {
 public:
  using F = accumulate_t<T>;

  explicit Position(const RotaryEmbeddingCall<T>& call) : c_(call) {}

  void run(int64_t n, int64_t row) {
    const int64_t at = n * c_.table_batch + row * c_.table_row;
    const T* x = c_.x + n * c_.x_strides.batch + row * c_.x_strides.row;
    T* y = c_.y + n * c_.y_strides.batch + row * c_.y_strides.row;
    for (int64_t first = 0; first < c_.pairs; first += kPairs) {
      const int64_t count = std::min(kPairs, c_.pairs - first);
      c_.interleaved ? read_doubled(at + first, count) : read(at + first, count);
      for (int64_t h = 0; h < c_.heads; ++h) {
        const T* from = x + h * c_.x_strides.head;
        T* to = y + h * c_.y_strides.head;
        c_.interleaved ? interleaved(from + 2 * first, to + 2 * first, 2 * count)
                       : halves(from + first, to + first, count);
      }
    }
    const int64_t turned = 2 * c_.pairs;
    for (int64_t h = 0; h < (c_.x == c_.y ? 0 : c_.heads); ++h)
      std::copy_n(x + h * c_.x_strides.head + turned, c_.width - turned, y + h * c_.y_strides.head + turned);
  }

 private:
  void read(int64_t at, int64_t count) {
    std::copy_n(c_.cos + at, count, cos_);
    for (int64_t i = 0; i < count; ++i) sin_[i] = c_.inverse ? -c_.sin[at + i] : c_.sin[at + i];
  }
  // One of each channel; the sign of sin is that of its product.
  void read_doubled(int64_t at, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const F sin = c_.inverse ? -c_.sin[at + i] : c_.sin[at + i];
      cos_[2 * i] = cos_[2 * i + 1] = c_.cos[at + i];
      sin_[2 * i] = -sin, sin_[2 * i + 1] = sin;
    }
  }

  void halves(const T* x, T* y, int64_t count) const {
    const int64_t pairs = c_.pairs;
    for (int64_t i = 0; i < count; i += kLanes<F>) {
      const int64_t left = count - i;
      const bool whole = left >= kLanes<F>;
      Vec<F> a = whole ? load_compute(x + i) : load_part(x + i, left, F(0));
      Vec<F> b = whole ? load_compute(x + i + pairs) : load_part(x + i + pairs, left, F(0));
      turn<F>(a, b, load(cos_ + i), load(sin_ + i));
      if (whole) {
        store_compute(y + i, a);
        store_compute(y + i + pairs, b);
      } else {
        store_part(y + i, left, a);
        store_part(y + i + pairs, left, b);
      }
    }
  }

  void interleaved(const T* x, T* y, int64_t count) const {
    for (int64_t i = 0; i < count; i += kLanes<F>) {
      const int64_t left = count - i;
      const bool whole = left >= kLanes<F>;
      const Vec<F> v = whole ? load_compute(x + i) : load_part(x + i, left, F(0));
      const Vec<F> turned = fma(v, load(cos_ + i), exchanged<F>(v) * load(sin_ + i));
      if (whole)
        store_compute(y + i, turned);
      else
        store_part(y + i, left, turned);
    }
  }

  const RotaryEmbeddingCall<T>& c_;
  F cos_[2 * kPairs + kLanes<F>] = {}, sin_[2 * kPairs + kLanes<F>] = {};
};

}  // namespace

template <class T>
void RotaryEmbedding<T>::run(const RotaryEmbeddingCall<T>& call, void*) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(call.heads * call.width, 1));
  parallel_for(call.batch * call.length, grain, [&](int64_t begin, int64_t end) {
    Position<T> position(call);
    for (int64_t i = begin; i < end; ++i) position.run(i / call.length, i % call.length);
  });
}

template struct RotaryEmbedding<double>;
template struct RotaryEmbedding<float>;
template struct RotaryEmbedding<Half>;
template struct RotaryEmbedding<BFloat16>;

}  // namespace pynn::cpu
