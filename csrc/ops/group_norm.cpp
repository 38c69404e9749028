// group_norm: validation, allocation, dispatch.
#include "group_norm.h"

#include <limits>

#include "kept_scratch.h"
#include "kept_tensor.h"

namespace pynn {
namespace {

using torch::headeronly::MemoryFormat;

constexpr int64_t kDouble = sizeof(double);

// The i-th dimension of a channels-last tensor from the innermost on: channels, then the pixels from the last dimension
// on, then the batch.
int64_t channels_last_dimension(int64_t i, int64_t rank) { return i == 0 ? 1 : i == rank - 1 ? 0 : rank - i; }

// The layout of input's strides, as torch's suggest_memory_format sees it.
MemoryFormat layout_of(const Tensor& input) {
  const int64_t rank = input.dim();
  if ((rank != 4 && rank != 5) || input.stride(1) == 0) return MemoryFormat::Contiguous;
  int64_t least = 0;
  for (int64_t i = 0; i < rank; ++i) {
    const int64_t d = channels_last_dimension(i, rank);
    const int64_t size = input.size(d), stride = input.stride(d);
    if (size == 0 || stride < least || (d == 0 && least == input.stride(1))) return MemoryFormat::Contiguous;
    least = size > 1 ? stride * size : stride;
  }
  return rank == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

// The tensor itself where its memory already has the layout, otherwise a copy.
Tensor in_layout(const Tensor& tensor, MemoryFormat layout) {
  if (layout == MemoryFormat::Contiguous) return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  int64_t expected = 1;
  const int64_t rank = tensor.dim();
  for (int64_t i = 0; i < rank; ++i) {
    const int64_t d = channels_last_dimension(i, rank);
    if (tensor.size(d) > 1 && tensor.stride(d) != expected) return torch::stable::contiguous(tensor, layout);
    expected *= tensor.size(d);
  }
  return tensor;
}

// An uninitialised tensor of like's shape and dtype in the layout. On the CPU one that would be fresh pages every time
// is in memory that is kept: to have them cleared takes as long as the op.
Tensor empty_in(const Tensor& like, MemoryFormat layout) {
  constexpr int64_t kLarge = 1 << 20;
  const int64_t rank = like.dim();
  std::vector<int64_t> strides(static_cast<size_t>(rank));
  int64_t stride = 1;
  for (int64_t i = 0; i < rank; ++i) {
    const int64_t d = layout == MemoryFormat::Contiguous ? rank - 1 - i : channels_last_dimension(i, rank);
    strides[size_t(d)] = stride;
    stride *= std::max<int64_t>(like.size(d), 1);
  }
  return new_kept(like, like.sizes(), Sizes(strides.data(), strides.size()), like.scalar_type(), kLarge);
}

ScalarType compute_type(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

GroupNormShape check(const char* op, const Tensor& input, int64_t num_groups, bool silu) {
  PYNN_CHECK(input.dim() >= 2, "Expected at least 2 dimensions for input tensor but received ", input.dim());
  PYNN_CHECK(num_groups > 0, "Expected num groups to be greater than 0, got ", num_groups);
  PYNN_CHECK(input.size(1) % num_groups == 0,
             "Expected number of channels in input to be divisible by num_groups, but got input of shape ",
             shape_of(input), " and num_groups=", num_groups);
  check_floating(op, "input", input);
  GroupNormShape shape{input.size(0), num_groups, input.size(1) / num_groups, 1, false, silu};
  for (int64_t d = 2; d < input.dim(); ++d) shape.pixels = checked_multiply(op, shape.pixels, input.size(d));
  checked_multiply(op, checked_multiply(op, shape.batch, input.size(1)), shape.pixels);
  checked_multiply(op, checked_multiply(op, shape.batch, num_groups), int64_t(sizeof(double)));
  shape.channels_last = layout_of(input) != MemoryFormat::Contiguous;
  return shape;
}

// weight or bias: a value per channel, in input's dtype or in the compute type.
void check_parameter(const char* op, const char* name, const std::optional<Tensor>& tensor, const Tensor& input) {
  if (!tensor) return;
  PYNN_CHECK(tensor->dim() == 1 && tensor->size(0) == input.size(1), "Expected ", name,
             " to be a vector of size equal to the number of channels in input, but got ", name, " of shape ",
             shape_of(*tensor), " and input of shape ", shape_of(input));
  const ScalarType dtype = tensor->scalar_type(), compute = compute_type(input);
  PYNN_CHECK(dtype == input.scalar_type() || dtype == compute, op, ": expected ", name, " to be ",
             name_of(input.scalar_type()), " like input", compute == input.scalar_type() ? "" : ", or float32",
             ", got ", name_of(dtype));
  check_same_device(op, name, *tensor, "input", input);
}

GroupNormShape check_fwd(const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                         int64_t num_groups, bool silu) {
  const char* op = "group_norm";
  const GroupNormShape shape = check(op, input, num_groups, silu);
  check_parameter(op, "weight", weight, input);
  check_parameter(op, "bias", bias, input);
  return shape;
}

GroupNormShape check_bwd(const Tensor& grad_output, const Tensor& input, const std::optional<Tensor>& weight,
                         const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& rstd, int64_t num_groups,
                         bool silu) {
  const char* op = "group_norm_bwd";
  const GroupNormShape shape = check(op, input, num_groups, silu);
  check_parameter(op, "weight", weight, input);
  check_parameter(op, "bias", bias, input);
  check_same_shape(op, "grad_output", grad_output, "input", input);
  check_same_dtype(op, "grad_output", grad_output, "input", input);
  check_same_device(op, "grad_output", grad_output, "input", input);
  const auto check_statistic = [&](const char* name, const Tensor& tensor) {
    check_shape(op, name, tensor, {shape.batch, shape.groups});
    PYNN_CHECK(tensor.scalar_type() == compute_type(input), op, ": expected ", name, " to be ",
               name_of(compute_type(input)), ", got ", name_of(tensor.scalar_type()));
    check_same_device(op, name, tensor, "input", input);
  };
  check_statistic("mean", mean);
  check_statistic("rstd", rstd);
  return shape;
}

// weight or bias, contiguous and in the compute type; undefined when absent.
std::optional<Tensor> parameter(const std::optional<Tensor>& tensor, const Tensor& input) {
  if (!tensor) return std::nullopt;
  const ScalarType compute = compute_type(input);
  const Tensor same = tensor->scalar_type() == compute ? *tensor : torch::stable::to(*tensor, compute);
  return in_layout(same, MemoryFormat::Contiguous);
}
template <class T>
const T* pointer_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& input, const std::optional<Tensor>& weight,
                                       const std::optional<Tensor>& bias, int64_t num_groups, double eps, bool silu) {
  const GroupNormShape shape = check_fwd(input, weight, bias, num_groups, silu);
  const auto w = parameter(weight, input), b = parameter(bias, input);
  const MemoryFormat layout = layout_of(input);
  Tensor output = empty_in(input, layout);
  Tensor mean = new_dense(input, {shape.batch, shape.groups}, compute_type(input));
  Tensor rstd = new_dense(input, {shape.batch, shape.groups}, compute_type(input));
  if (output.numel() == 0) {
    torch::stable::fill_(mean, 0);
    torch::stable::fill_(rstd, std::numeric_limits<double>::quiet_NaN());
    return {output, mean, rstd};
  }
  const Tensor x = in_layout(input, layout);
  dispatch_floating("group_norm", x.scalar_type(), [&]<class T>(Tag<T>) {
    using A = accumulate_t<T>;
    using Launch = launch::GroupNorm<T>;
    KeptScratch scratch(input, kDouble * Launch::fwd_scratch(shape, true));
    Launch::fwd(pointer<T>(x), pointer_or_null<A>(w), pointer_or_null<A>(b), eps, mutable_pointer<T>(output),
                mutable_pointer<A>(mean), mutable_pointer<A>(rstd), static_cast<double*>(scratch.get()), shape,
                current_stream(x));
  });
  return {output, mean, rstd};
}

// mean and rstd alone: one read of the input.
std::tuple<Tensor, Tensor> statistics(const Tensor& input, int64_t num_groups, double eps) {
  const GroupNormShape shape = check_fwd(input, std::nullopt, std::nullopt, num_groups, false);
  Tensor mean = new_dense(input, {shape.batch, shape.groups}, compute_type(input));
  Tensor rstd = new_dense(input, {shape.batch, shape.groups}, compute_type(input));
  if (input.numel() == 0) {
    torch::stable::fill_(mean, 0);
    torch::stable::fill_(rstd, std::numeric_limits<double>::quiet_NaN());
    return {mean, rstd};
  }
  const Tensor x = in_layout(input, layout_of(input));
  dispatch_floating("group_norm", x.scalar_type(), [&]<class T>(Tag<T>) {
    using A = accumulate_t<T>;
    using Launch = launch::GroupNorm<T>;
    KeptScratch scratch(input, kDouble * Launch::fwd_scratch(shape, false));
    Launch::fwd(pointer<T>(x), nullptr, nullptr, eps, nullptr, mutable_pointer<A>(mean), mutable_pointer<A>(rstd),
                static_cast<double*>(scratch.get()), shape, current_stream(x));
  });
  return {mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& grad_output, const Tensor& input,
                                       const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                       const Tensor& mean_, const Tensor& rstd_, int64_t num_groups, bool silu) {
  const GroupNormShape shape = check_bwd(grad_output, input, weight, bias, mean_, rstd_, num_groups, silu);
  const auto w = parameter(weight, input), b = parameter(bias, input);
  const ScalarType compute = compute_type(input);
  const Tensor mean = in_layout(mean_, MemoryFormat::Contiguous), rstd = in_layout(rstd_, MemoryFormat::Contiguous);
  const MemoryFormat layout = layout_of(input);
  Tensor grad_input = empty_in(input, layout);
  Tensor grad_weight = new_dense(input, {shape.channels()}, compute);
  Tensor grad_bias = new_dense(input, {shape.channels()}, compute);
  if (grad_input.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
  } else {
    const Tensor dy = in_layout(grad_output, layout), x = in_layout(input, layout);
    dispatch_floating("group_norm_bwd", x.scalar_type(), [&]<class T>(Tag<T>) {
      using A = accumulate_t<T>;
      using Launch = launch::GroupNorm<T>;
      KeptScratch scratch(input, kDouble * Launch::bwd_scratch(shape));
      Launch::bwd(pointer<T>(dy), pointer<T>(x), pointer_or_null<A>(w), pointer_or_null<A>(b), pointer<A>(mean),
                  pointer<A>(rstd), mutable_pointer<T>(grad_input), mutable_pointer<A>(grad_weight),
                  mutable_pointer<A>(grad_bias), static_cast<double*>(scratch.get()), shape, current_stream(x));
    });
  }
  const auto like = [&](const Tensor& grad, const std::optional<Tensor>& parameter) {
    const ScalarType dtype = parameter ? parameter->scalar_type() : compute;
    return dtype == compute ? grad : torch::stable::to(grad, dtype);
  };
  return {grad_input, like(grad_weight, weight), like(grad_bias, bias)};
}

}  // namespace

PYNN_LIBRARY(m) {
  m.impl("group_norm_fwd", TORCH_BOX(&fwd));
  m.impl("group_norm_statistics", TORCH_BOX(&statistics));
  m.impl("group_norm_bwd", TORCH_BOX(&bwd));
}

#ifdef PYNN_CHECKS
namespace {

void fwd_check(const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
               int64_t num_groups, double, bool silu) {
  check_fwd(input, weight, bias, num_groups, silu);
}

void statistics_check(const Tensor& input, int64_t num_groups, double) {
  check_fwd(input, std::nullopt, std::nullopt, num_groups, false);
}

void bwd_check(const Tensor& grad_output, const Tensor& input, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& rstd, int64_t num_groups,
               bool silu) {
  check_bwd(grad_output, input, weight, bias, mean, rstd, num_groups, silu);
}

}  // namespace

PYNN_CHECKS(m) {
  m.impl("group_norm_fwd_check", TORCH_BOX(&fwd_check));
  m.impl("group_norm_statistics_check", TORCH_BOX(&statistics_check));
  m.impl("group_norm_bwd_check", TORCH_BOX(&bwd_check));
}
#endif

}  // namespace pynn
