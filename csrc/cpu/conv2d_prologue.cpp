// The prologue of a convolution on the CPU: a pass over the input before the convolution reads it, and its gradient.
#include "conv2d_prologue.h"

#include <algorithm>

#include "conv2d_activation.h"
#include "parallel.h"

namespace pynn::cpu {
namespace {

constexpr int64_t kGrain = 16384;  // elements that a thread is worth
constexpr int64_t kBlock = 256;    // pixels of a channels-last image that a thread adds at once
constexpr int64_t kPart = 8;       // terms of a sum that are added in the compute type, the rest is in fp64

// Calls body(i, valid) for vectors at i < count; valid is less than a vector at the end.
template <class A, class Body>
void for_vectors(int64_t count, const Body& body) {
  for (int64_t i = 0; i < count; i += kLanes<A>) body(i, std::min<int64_t>(kLanes<A>, count - i));
}

template <class T>
Vec<accumulate_t<T>> load_up_to(const T* from, int64_t valid) {
  return valid == kComputeLanes<T> ? load_compute(from) : load_part(from, valid, accumulate_t<T>(0));
}
template <class T>
void store_up_to(T* to, int64_t valid, Vec<accumulate_t<T>> v) {
  return valid == kComputeLanes<T> ? store_compute(to, v) : store_part(to, valid, v);
}

// The coefficients of one sample.
template <class A>
struct Coefficients {
  const A *scale, *shift;

  template <class T>
  Coefficients(const Conv2dPrologue<T>& p, int64_t n)
      : scale(p.scale.values ? p.scale.values + n * p.scale.stride : nullptr),
        shift(p.shift.values ? p.shift.values + n * p.shift.stride : nullptr) {}
  // Of one channel, or of those along a vector.
  Vec<A> scale_of(int64_t c) const { return broadcast(scale ? scale[c] : A(1)); }
  Vec<A> shift_of(int64_t c) const { return broadcast(shift ? shift[c] : A(0)); }
  Vec<A> scales_from(int64_t c, int64_t valid) const { return scale ? load_up_to(scale + c, valid) : broadcast(A(1)); }
  Vec<A> shifts_from(int64_t c, int64_t valid) const { return shift ? load_up_to(shift + c, valid) : broadcast(A(0)); }
};

template <class Body>
void with_any_activation(Activation activation, const Body& body) {
  return activation == Activation::none ? body.template operator()<Activation::none>()
                                        : with_activation(activation, body);
}

template <Activation kind, class A>
Vec<A> derivative_at(Vec<A> u) {
  if constexpr (kind == Activation::sigmoid || kind == Activation::tanh)
    return derivative_lanes<kind>(activated_lanes<kind>(u));
  else
    return derivative_lanes<kind>(u);
}

}  // namespace

template <class T>
void Conv2dProloguePass<T>::fwd(const T* x, const Conv2dPrologue<T>& p, T* y, const ImagesShape& s, void*) {
  // A line has one channel, or one pixel.
  const int64_t inner = s.channels_last ? s.pixels : s.channels, length = s.channels_last ? s.channels : s.pixels;
  with_any_activation(p.activation, [&]<Activation kind>() {
    parallel_for(s.batch * inner, 1 + kGrain / length, [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line) {
        const Coefficients<A> coefficients(p, line / inner);
        const int64_t c = line % inner;
        const T* from = x + line * length;
        T* to = y + line * length;
        if (s.channels_last) {
          for_vectors<A>(length, [&](int64_t i, int64_t valid) {
            const Vec<A> u = fma(load_up_to(from + i, valid), coefficients.scales_from(i, valid),
                                 coefficients.shifts_from(i, valid));
            store_up_to(to + i, valid, activated_lanes<kind>(u));
          });
        } else {
          const Vec<A> scale = coefficients.scale_of(c), shift = coefficients.shift_of(c);
          for_vectors<A>(length, [&](int64_t i, int64_t valid) {
            store_up_to(to + i, valid, activated_lanes<kind>(fma(load_up_to(from + i, valid), scale, shift)));
          });
        }
      }
    });
  });
}

// Of channels-last images: the sums of each block of pixels, (batch, blocks, 2, channels).
template <class T>
int64_t Conv2dProloguePass<T>::bwd_scratch(const ImagesShape& s) {
  const int64_t blocks = (s.pixels + kBlock - 1) / kBlock;
  return s.channels_last ? s.batch * blocks * 2 * s.channels * int64_t(sizeof(double)) : 0;
}

template <class T>
void Conv2dProloguePass<T>::bwd(const T* dy, const T* x, const Conv2dPrologue<T>& p, T* dx, A* sums,
                                const ImagesShape& s, void* scratch, void*) {
  const int64_t channels = s.channels, pixels = s.pixels;
  // The gradient of u = x * scale + shift, and that of x to `to`.
  const auto step = [&]<Activation kind>(const T* gradient, T* to, int64_t valid, Vec<A> value, Vec<A> scale,
                                         Vec<A> shift) {
    const Vec<A> g = load_up_to(gradient, valid) * derivative_at<kind, A>(fma(value, scale, shift));
    store_up_to(to, valid, g * scale);
    return g;
  };
  if (s.channels_last) {
    const int64_t blocks = (pixels + kBlock - 1) / kBlock;
    double* const partial = static_cast<double*>(scratch);
    with_any_activation(p.activation, [&]<Activation kind>() {
      parallel_for(s.batch * blocks, 1 + kGrain / (kBlock * channels), [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t n = item / blocks, first = item % blocks * kBlock, last = std::min(first + kBlock, pixels);
          const Coefficients<A> coefficients(p, n);
          for_vectors<A>(channels, [&](int64_t c, int64_t valid) {
            const Vec<A> scale = coefficients.scales_from(c, valid), shift = coefficients.shifts_from(c, valid);
            double products[kLanes<A>] = {}, total[kLanes<A>] = {};
            for (int64_t part = first; part < last; part += kPart) {
              Vec<A> part_products{}, part_total{};
              for (int64_t pixel = part; pixel < std::min(part + kPart, last); ++pixel) {
                const int64_t at = (n * pixels + pixel) * channels + c;
                const Vec<A> value = load_up_to(x + at, valid);
                const Vec<A> g = step.template operator()<kind>(dy + at, dx + at, valid, value, scale, shift);
                part_products = fma(g, value, part_products);
                part_total += g;
              }
              for (int k = 0; k < kLanes<A>; ++k) products[k] += part_products[k], total[k] += part_total[k];
            }
            if (!sums) return;
            std::copy_n(products, valid, partial + item * 2 * channels + c);
            std::copy_n(total, valid, partial + (item * 2 + 1) * channels + c);
          });
        }
      });
    });
    if (!sums) return;
    for (int64_t n = 0; n < s.batch; ++n)
      for (int64_t i = 0; i < 2 * channels; ++i) {
        double sum = 0;
        for (int64_t b = 0; b < blocks; ++b) sum += partial[(n * blocks + b) * 2 * channels + i];
        sums[(i / channels * s.batch + n) * channels + i % channels] = A(sum);
      }
    return;
  }
  with_any_activation(p.activation, [&]<Activation kind>() {
    parallel_for(s.batch * channels, 1 + kGrain / pixels, [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line) {
        const Coefficients<A> coefficients(p, line / channels);
        const Vec<A> scale = coefficients.scale_of(line % channels), shift = coefficients.shift_of(line % channels);
        double products = 0, total = 0;
        for (int64_t first = 0; first < pixels; first += kPart * kLanes<A>) {
          Vec<A> part_products{}, part_total{};
          for_vectors<A>(std::min(kPart * kLanes<A>, pixels - first), [&](int64_t i, int64_t valid) {
            const int64_t at = line * pixels + first + i;
            const Vec<A> value = load_up_to(x + at, valid);  // and the gradient are 0 beyond the last
            const Vec<A> g = step.template operator()<kind>(dy + at, dx + at, valid, value, scale, shift);
            part_products = fma(g, value, part_products);
            part_total += g;
          });
          products += add_lanes(part_products), total += add_lanes(part_total);
        }
        if (sums) sums[line] = A(products), sums[s.batch * channels + line] = A(total);
      }
    });
  });
}

template <class T>
int64_t PrologueConv2d<T>::fwd_scratch(const Conv2dShape& d) {
  return d.batch * d.in_channels * d.in_height * d.in_width * int64_t(sizeof(T));
}

template <class T>
void PrologueConv2d<T>::fwd(const T* x, bool channels_last, const Conv2dPrologue<T>& prologue, const T* w,
                            Strides4 w_strides, T* y, Strides4 y_strides, const Conv2dEpilogue<T>& epilogue,
                            const Conv2dShape& d, void* scratch, void* stream) {
  T* const image = static_cast<T*>(scratch);
  const int64_t pixels = d.in_height * d.in_width, c = d.in_channels;
  if (c > 0) Conv2dProloguePass<T>::fwd(x, prologue, image, {d.batch, c, pixels, channels_last}, stream);
  const Strides4 strides = dense_strides(c, d.in_height, d.in_width, channels_last);
  Conv2d<T>::fwd(image, strides, w, w_strides, y, y_strides, epilogue, d, nullptr, stream);
}

#define INSTANTIATE(T)                   \
  template struct Conv2dProloguePass<T>; \
  template struct PrologueConv2d<T>;
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(Half)
INSTANTIATE(BFloat16)

}  // namespace pynn::cpu
