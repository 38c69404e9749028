// The geometry of a convolution on a GPU: which input a filter tap meets in each padding mode, which outputs reach an
// input, and sums in an order that the shape alone decides.
#pragma once
#include <algorithm>
#include <numeric>
#include <type_traits>

#include "arithmetic.cuh"
#include "conv2d.h"

namespace pynn::cuda {
namespace {

// The position in the image that stands at `position` of the padded plane, whose origin is the image's; -1 for a zero,
// and beyond the padded plane, where tiles at its end may look.
template <class Index>
__device__ __forceinline__ Index source_of(Index position, std::type_identity_t<Index> size, PaddingMode mode) {
  if (position >= 0 && position < size) return position;
  Index source = -1;
  switch (mode) {
    case PaddingMode::zeros:
      break;
    case PaddingMode::reflect:
      source = position < 0 ? -position : 2 * (size - 1) - position;
      break;
    case PaddingMode::replicate:
      return position < 0 ? 0 : size - 1;
    case PaddingMode::circular:
      source = position < 0 ? position + size : position - size;
      break;
  }
  return source < size ? source : -1;
}

// One axis of a convolution: output i meets input i * stride - pad + tap * dilation.
struct Axis {
  int64_t in, out, kernel, stride, dilation, pad;
};
inline Axis rows_of(const Conv2dShape& s) {
  return {s.in_height, s.out_height, s.kernel_height, s.stride_height, s.dilation_height, s.pad_top};
}
inline Axis columns_of(const Conv2dShape& s) {
  return {s.in_width, s.out_width, s.kernel_width, s.stride_width, s.dilation_width, s.pad_left};
}

// Whether 32 bits hold every position on an axis, and the pixels of a plane.
inline bool is_small(const Axis& a) {
  constexpr int64_t kLarge = 1 << 28;
  return a.in < kLarge && a.out < kLarge && a.kernel * a.dilation < kLarge && std::abs(a.pad) < kLarge &&
         a.stride < kLarge && a.out * a.stride < kLarge;
}
inline bool is_small(const Axis& rows, const Axis& columns) {
  constexpr int64_t kLarge = int64_t(1) << 31;
  return is_small(rows) && is_small(columns) && rows.in * columns.in < kLarge && rows.out * columns.out < kLarge;
}

// The correlation with the flipped filter that gives the input gradient for stride 1.
inline Axis gradient_axis(const Axis& a) {
  return {a.out, a.in, a.kernel, 1, a.dilation, a.dilation * (a.kernel - 1) - a.pad};
}

// The outputs that reach one input: `count` pairs of a tap and an output, (tap + k * tap_step, output - k * out_step).
struct Reach {
  int64_t tap, output, count;
};

// Finds them: taps whose distance to the input is a multiple of the stride. Zero padding only.
struct Reaches {
  Axis axis;
  int64_t divisor, tap_step, out_step, inverse;

  explicit Reaches(const Axis& axis) : axis(axis), divisor(std::gcd(axis.stride, axis.dilation)) {
    tap_step = axis.stride / divisor;
    out_step = axis.dilation / divisor;
    // The inverse of out_step modulo tap_step, by Euclid's algorithm.
    int64_t a = tap_step, b = out_step % tap_step, x = 0, y = 1;
    while (b > 0) {
      const int64_t q = a / b;
      x -= q * y, std::swap(x, y);
      a -= q * b, std::swap(a, b);
    }
    inverse = tap_step == 1 ? 0 : (x % tap_step + tap_step) % tap_step;
  }

  __device__ Reach of(int64_t input) const {
    const int64_t at = input + axis.pad;
    if (at % divisor != 0) return {0, 0, 0};
    const int64_t tap = at / divisor % tap_step * inverse % tap_step;  // the least one
    // Taps below `begin` reach past the last output, those from `end` before the first.
    const int64_t over = at - axis.stride * (axis.out - 1);
    const int64_t begin = over > 0 ? (over + axis.dilation - 1) / axis.dilation : 0;
    const int64_t end = min(axis.kernel, at / axis.dilation + 1);
    const int64_t first = begin <= tap ? tap : tap + (begin - tap + tap_step - 1) / tap_step * tap_step;
    if (first >= end) return {0, 0, 0};
    return {first, (at - first * axis.dilation) / axis.stride, (end - first + tap_step - 1) / tap_step};
  }
};

// Sums of products whose rounding errors grow slowly: rows of filter taps make parts of at least kPart products, parts
// make blocks, and what is lost when blocks are added is kept. Every kernel that may compute the same result adds in
// this order, so its bits do not depend on which one does.
template <class A, int count = 1>
class ChunkedSums {
 public:
  __device__ void add(A a, A b, int k = 0) { part_[k] = fma(a, b, part_[k]); }
  // Ends a row of `products` products of every sum.
  __device__ void end_row(int products) {
    in_part_ += products;
    if (in_part_ < kPart) return;
    in_part_ = 0;
    const bool full = ++in_block_ == kBlock;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      block_[k] += part_[k], part_[k] = 0;
      if (full) add_block(k);
    }
    if (full) in_block_ = 0, many_ = true;
  }
  __device__ A value(int k = 0) const {
    const A rest = block_[k] + part_[k];
    if (!many_) return rest;
    return isfinite(total_[k]) ? total_[k] + (lost_[k] + rest) : total_[k] + rest;  // what infinity lost is NaN
  }

 private:
  static constexpr int kPart = 4, kBlock = 4;
  __device__ void add_block(int k) {
    const A next = total_[k] + block_[k], taken = next - total_[k];
    lost_[k] += (total_[k] - (next - taken)) + (block_[k] - taken);
    total_[k] = next, block_[k] = 0;
  }

  A part_[count] = {}, block_[count] = {}, total_[count] = {}, lost_[count] = {};
  int in_part_ = 0, in_block_ = 0;
  bool many_ = false;
};

// An element of a 4-D tensor, from its position in an order of dimensions in which the fastest is the one whose
// neighbours lie side by side.
struct Element {
  int64_t n, c, h, w;
  __device__ int64_t at(const Strides4& s) const { return n * s.n + c * s.c + h * s.h + w * s.w; }
};
struct Elements {
  int64_t batch, channels, height, width;
  bool channels_last;

  int64_t count() const { return batch * channels * height * width; }
  __device__ Element operator[](int64_t index) const {
    Element e;
    if (channels_last) e.c = index % channels, index /= channels;
    e.w = index % width, index /= width;
    e.h = index % height, index /= height;
    if (!channels_last) e.c = index % channels, index /= channels;
    e.n = index;
    return e;
  }
};
inline bool is_channels_last(const Strides4& s) { return s.c == 1 && s.w != 1; }

// Hands out parts of the scratch, each on 64 bytes; without memory it only counts them.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class V>
  V* take(int64_t count) {
    char* const begin = memory_ ? memory_ + used_ : nullptr;
    used_ += ceil_div(count * int64_t(sizeof(V)), 64) * 64;
    return reinterpret_cast<V*>(begin);
  }
  void* rest() const { return memory_ ? memory_ + used_ : nullptr; }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

constexpr int kThreads = 256;
inline unsigned blocks_of(int64_t threads) { return unsigned(ceil_div(threads, kThreads)); }
__device__ __forceinline__ int64_t thread_index() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }

// to[i] = the sum of partial[k * count + i] over k < partials, added in fp64. A block adds 32 results, kAddLanes
// threads to each, whose sums are added in their order.
constexpr int kAddColumns = 32, kAddLanes = kThreads / kAddColumns;
template <class T, class Partial>
__global__ void __launch_bounds__(kThreads)
    add_partials_kernel(T* to, const Partial* partial, int64_t count, int64_t partials) {
  SHARED_ARRAY(double, sums, kThreads);
  const int64_t index = int64_t(blockIdx.x) * kAddColumns + threadIdx.x % kAddColumns;
  double sum = 0;
  if (index < count) {
#pragma unroll 4
    for (int64_t k = threadIdx.x / kAddColumns; k < partials; k += kAddLanes) sum += partial[k * count + index];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (int(threadIdx.x) >= kAddColumns || index >= count) return;
#pragma unroll
  for (int lane = 1; lane < kAddLanes; ++lane) sum += sums[lane * kAddColumns + threadIdx.x];
  to[index] = from_float<T>(accumulate_t<T>(sum));
}
template <class T, class Partial>
void add_partials(T* to, const Partial* partial, int64_t count, int64_t partials, void* stream) {
  LAUNCH((add_partials_kernel<T, Partial>), unsigned(ceil_div(count, kAddColumns)), kThreads, 0, stream, to, partial,
         count, partials);
}

}  // namespace
}  // namespace pynn::cuda
