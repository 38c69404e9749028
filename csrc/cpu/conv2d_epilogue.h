// The epilogue of a convolution on the CPU: finished sums get bias, residual and activation, are rounded once and
// stored, in either layout.
#pragma once
#include "conv2d_activation.h"
#include "conv2d_geometry.h"

namespace pynn::cpu {

// Adds `count` elements of a strided row to values.
template <class T, class A>
inline void add_row(A* values, const T* row, int64_t stride, int64_t count) {
  if (stride == 1) {
    int64_t i = 0;
    for (; i + kLanes<A> <= count; i += kLanes<A>) store(values + i, load(values + i) + load_compute(row + i));
    for (; i < count; ++i) values[i] += to_float(row[i]);
  } else if (stride == 0) {
    const A value = to_float(*row);
    for (int64_t i = 0; i < count; ++i) values[i] += value;
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] += to_float(row[i * stride]);
  }
}

template <class T, class A>
inline void store_row(T* row, int64_t stride, const A* values, int64_t count) {
  if (stride == 1) {
    if (count < kLanes<A>) return store_part(row, count, load_part(values, count, A(0)));
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      const int64_t at = std::min(i, count - kLanes<A>);
      store_compute(row + at, load(values + at));
    }
  } else {
    for (int64_t i = 0; i < count; ++i) row[i * stride] = from_float<T>(values[i]);
  }
}

// A bias in the compute type, without gaps; null when there is none.
template <class T>
class Bias {
  using A = accumulate_t<T>;

 public:
  Bias(const Conv2dEpilogue<T>& epilogue, int64_t channels) : values_(epilogue.bias ? channels : 0) {
    given_ = epilogue.bias != nullptr;
    for (int64_t o = 0; given_ && o < channels; ++o)
      values_.get()[o] = to_float(epilogue.bias[o * epilogue.bias_stride]);
  }
  const A* get() const { return given_ ? values_.get() : nullptr; }

 private:
  Buffer<A> values_;
  bool given_;
};

// What happens to a finished block of sums.
template <class T>
struct Epilogue {
  using A = accumulate_t<T>;
  const A* bias;
  const T* residual;
  Strides4 r;
  T* y;
  Strides4 s;
  T* pre;
  Activation activation;
  int64_t width;  // pixels per row

  // Whether at most a bias is added.
  bool plain() const { return !residual && !pre && activation == Activation::none; }

  // One line of `count` values that lie `stride` apart in y and `r_stride` apart in the residual; its biases are
  // bias_step (0 or 1) apart.
  __attribute__((noinline)) void line(A* values, int64_t count, const A* biases, int64_t bias_step, int64_t at,
                                      int64_t stride, int64_t r_at, int64_t r_stride) const {
    if (stride == 1 && (!residual || r_stride == 1 || r_stride == 0)) {
      const auto dense = [&]<Activation kind>() {
        dense_line<kind>(values, count, biases, bias_step, at, residual ? residual + r_at : nullptr, r_stride);
      };
      return activation == Activation::none ? dense.template operator()<Activation::none>()
                                            : with_activation(activation, dense);
    }
    for (int64_t j = 0; j < count; ++j) {
      if (biases) values[j] += biases[j * bias_step];
      if (residual) values[j] += to_float(residual[r_at + j * r_stride]);
    }
    if (pre) store_row(pre + at, stride, values, count);
    if (activation != Activation::none) activate(activation, values, count);
    store_row(y + at, stride, values, count);
  }

  // A line among others: an activation works on whole vectors, and must not see the next one.
  void row(A* values, int64_t count, const A* biases, int64_t bias_step, int64_t at, int64_t stride, int64_t r_at,
           int64_t r_stride) const {
    if (activation == Activation::none) return line(values, count, biases, bias_step, at, stride, r_at, r_stride);
    constexpr int64_t kLine = 256;
    A copy[kLine];
    for (int64_t i = 0; i < count; i += kLine) {
      const int64_t here = std::min(kLine, count - i);
      std::copy_n(values + i, here, copy);
      line(copy, here, biases ? biases + i * bias_step : nullptr, bias_step, at + i * stride, stride,
           r_at + i * r_stride, r_stride);
    }
  }

  // A line without gaps, in one pass: the last vector overlaps the one before it, or is a part of one.
  template <Activation kind>
  void dense_line(const A* values, int64_t count, const A* biases, int64_t bias_step, int64_t at, const T* added,
                  int64_t added_step) const {
    constexpr int L = kLanes<A>;
    const auto one = added && added_step == 0 ? broadcast(A(to_float(*added))) : Vec<A>{};
    for (int64_t block = 0; block < count; block += L) {
      const bool part = count < L;
      const int64_t i = part ? 0 : std::min(block, count - L);
      Vec<A> v = part ? load_part(values, count, A(0)) : load(values + i);
      if (biases) v += bias_step == 0 ? broadcast(*biases) : part ? load_part(biases, count, A(0)) : load(biases + i);
      if (added) v += added_step == 0 ? one : part ? load_part(added, count, A(0)) : load_compute(added + i);
      const Vec<A> result = activated_lanes<kind>(v);
      if (part) {
        if (pre) store_part(pre + at, count, v);
        store_part(y + at, count, result);
      } else {
        if (pre) store_compute(pre + at + i, v);
        store_compute(y + at + i, result);
      }
    }
  }

  void operator()(const Panel<A>& p) const { s.c == 1 && p.channels > 1 ? channels_last(p) : channels_first(p); }

  void channels_last(const Panel<A>& p) const {
    A* values = p.values;
    const Unit& u = p.unit;
    if constexpr (sizeof(T) == sizeof(A)) {
      if (plain() && p.channels == p.stride) {
        return bias ? store_panel(p, [&](Vec<A> v, int64_t c) { return v + load(bias + p.channel + c); })
                    : store_panel(p, [](Vec<A> v, int64_t) { return v; });
      }
    }
    for (int64_t n = u.image; n < u.image + u.images; ++n)
      for (int64_t i = u.row; i < u.row + u.rows; ++i) {
        const int64_t at = n * s.n + p.channel + i * s.h, r_at = n * r.n + p.channel * r.c + i * r.h;
        for (int64_t j = 0; j < width; ++j, values += p.stride) {
          line(values, p.channels, bias ? bias + p.channel : nullptr, 1, at + j * s.w, 1, r_at + j * r.w, r.c);
        }
      }
  }

  // The usual case: whole vectors of channels, at most a bias to add.
  template <class Map>
  void store_panel(const Panel<A>& p, const Map& map) const {
    const A* values = p.values;
    const Unit& u = p.unit;
    for (int64_t n = u.image; n < u.image + u.images; ++n)
      for (int64_t i = u.row; i < u.row + u.rows; ++i) {
        A* to = reinterpret_cast<A*>(y) + n * s.n + p.channel + i * s.h;
        for (int64_t j = 0; j < width; ++j, to += s.w, values += p.stride)
          for (int64_t c = 0; c < p.stride; c += kLanes<A>) store(to + c, map(load(values + c), c));
      }
  }

  // Lines of pixels: across rows where they touch in y and in the residual, single rows elsewhere.
  void channels_first(const Panel<A>& p) const {
    constexpr int64_t kLine = 128;
    A turned[4 * kLanes<A> * kLine];
    const Unit& u = p.unit;
    const bool rows_touch = s.h == width * s.w && (!residual || r.h == width * r.w);
    const int64_t run = rows_touch ? u.rows * width : width, runs = rows_touch ? 1 : u.rows;
    for (int64_t n = 0; n < u.images; ++n)
      for (int64_t i = 0; i < runs; ++i)
        for (int64_t first = 0; first < run; first += kLine) {
          const int64_t count = std::min(kLine, run - first), image = u.image + n, row = u.row + i;
          transpose_out(p.values + ((n * u.rows + i) * width + first) * p.stride, p.stride, count, p.channels, turned,
                        kLine);
          const int64_t at = image * s.n + row * s.h + first * s.w, r_at = image * r.n + row * r.h + first * r.w;
          for (int64_t c = 0; c < p.channels; ++c) {
            line(turned + c * kLine, count, bias ? bias + p.channel + c : nullptr, 0, at + (p.channel + c) * s.c, s.w,
                 r_at + (p.channel + c) * r.c, r.w);
          }
        }
  }
};

}  // namespace pynn::cpu
