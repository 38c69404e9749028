// What conv2d and conv_transpose2d share: operands, layouts and the checks of both. Messages are torch's own where
// torch has one.
#pragma once
#include "conv2d.h"
#include "library.h"

namespace pynn {

using Ints = std::vector<int64_t>;
inline constexpr int64_t kLargest = int64_t(1) << 31;  // of any size, pad, stride or dilation: sums and products fit

inline std::string text(const Ints& values) { return to_string(Sizes(values.data(), values.size())); }
inline Ints sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

inline Strides4 strides_of(const Tensor& t) {
  return {t.stride(0), t.size(1) == 1 ? 1 : t.stride(1), t.stride(2), t.stride(3)};
}

inline Strides4 plain_strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// Torch's rule for tensors whose strides fit both layouts: a size of 1 does not decide, and NCHW wins a tie.
inline bool is_channels_last(const Tensor& t) {
  if (t.stride(1) == 0) return false;
  int64_t least = 0;
  for (const int d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < least || (d == 0 && least == t.stride(1))) return false;
    least = t.stride(d) * std::max<int64_t>(t.size(d), 1);
  }
  return true;
}

// Of four dimensions, or of one.
inline Tensor empty(const char* op, const Tensor& like, const Ints& shape, bool channels_last) {
  int64_t count = 16;
  for (const int64_t size : shape) count = checked_multiply(op, count, size);
  if (shape.size() == 1) return new_dense(like, {shape[0]}, like.scalar_type());
  if (!channels_last) return new_dense(like, {shape[0], shape[1], shape[2], shape[3]}, like.scalar_type());
  const int64_t pixel = std::max<int64_t>(shape[1], 1), row = pixel * shape[3], image = row * shape[2];
  const int64_t strides[] = {image, 1, row, pixel};
  return new_strided(like, 4, shape.data(), strides, like.scalar_type());
}

inline void check_list(const char* op, const char* name, const Ints& values, size_t count) {
  PYNN_CHECK(values.size() == count, "expected ", name,
             " to be a single integer value or a list of 2 values to match the ", "convolution dimensions, but got ",
             name, "=", text(values));
  for (const int64_t v : values) PYNN_CHECK(v < kLargest, op, ": expected ", name, " below 2**31, got ", v);
}

inline void check_steps(const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups) {
  for (const int64_t p : padding) PYNN_CHECK(p >= 0, "negative padding is not supported");
  for (const int64_t s : stride) PYNN_CHECK(s > 0, "non-positive stride is not supported");
  for (const int64_t d : dilation) PYNN_CHECK(d > 0, "dilation should be greater than zero, but got ", text(dilation));
  PYNN_CHECK(groups > 0, "non-positive groups is not supported");
}

inline void check_sizes(const char* op, const Ints& sizes) {
  for (const int64_t size : sizes)
    PYNN_CHECK(size >= 0 && size < kLargest, op, ": expected sizes from 0 to 2**31 - 1, got ", text(sizes));
}

inline void check_groups(const Ints& weight, int64_t groups) {
  PYNN_CHECK(weight[0] >= groups, "Given groups=", groups, ", expected weight to be at least ", groups,
             " at dimension 0, but got weight of size ", text(weight), " instead");
  PYNN_CHECK(weight[0] % groups == 0, "Given groups=", groups, ", expected weight to be divisible by ", groups,
             " at dimension 0, but got weight of size ", text(weight), " instead");
}

inline void check_operand(const char* op, const char* name, const Tensor& t, const char* other_name,
                          const Tensor& other) {
  PYNN_CHECK(t.scalar_type() == other.scalar_type(), "Input type (", name_of(other.scalar_type()), ") and ", name,
             " type (", name_of(t.scalar_type()), ") should be the same");
  check_same_device(op, name, t, other_name, other);
}

inline void check_bias(const char* op, const Tensor& bias, const Tensor& weight, int64_t channels,
                       const Tensor& input) {
  PYNN_CHECK(bias.dim() == 1 && bias.size(0) == channels, "Given weight of size ", shape_of(weight),
             ", expected bias to be 1-dimensional with ", channels, " elements, but got bias of size ", shape_of(bias),
             " instead");
  check_operand(op, "bias", bias, "input", input);
}

inline Activation check_activation(const char* op, int64_t activation) {
  PYNN_CHECK(activation >= 0 && activation < kActivations, op, ": expected activation from 0 to ", kActivations - 1,
             ", got ", activation);
  return Activation(activation);
}

// Strides that read a tensor of up to four dimensions as if expanded to `shape`.
inline Strides4 expanded_strides(const char* op, const char* name, const Tensor& t, const Ints& shape) {
  int64_t strides[4] = {0, 0, 0, 0};
  bool fits = t.dim() <= 4;
  for (int64_t d = 4 - std::min<int64_t>(t.dim(), 4), from = 0; fits && d < 4; ++d, ++from) {
    fits = t.size(from) == shape[d] || t.size(from) == 1;
    strides[d] = t.size(from) == 1 ? 0 : t.stride(from);
  }
  PYNN_CHECK(fits, op, ": expected ", name, " that can be expanded to ", text(shape), ", got ", shape_of(t));
  return {strides[0], strides[1], strides[2], strides[3]};
}

// What a forward pass takes, validated, and what it returns.
struct Forward {
  Conv2dShape shape;
  Activation activation;
  Strides4 residual_strides;
};

template <class T>
Conv2dEpilogue<T> epilogue_of(const Forward& f, const std::optional<Tensor>& bias,
                              const std::optional<Tensor>& residual, Tensor* pre) {
  return {bias ? pointer<T>(*bias) : nullptr,         bias ? bias->stride(0) : 0,
          residual ? pointer<T>(*residual) : nullptr, f.residual_strides,
          pre ? mutable_pointer<T>(*pre) : nullptr,   f.activation};
}

}  // namespace pynn
