// The operands of a convolution's prologue: activation(input * scale + shift).
#pragma once
#include "conv2d_check.h"
#include "conv2d_prologue.h"

namespace pynn {

inline ScalarType compute_type_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// (C) or (N, C), in input's dtype or the one that is computed in.
inline void check_per_channel(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& input) {
  if (!t) return;
  const int64_t rank = t->dim(), batch = input.size(0), channels = input.size(1);
  const bool fits = (rank == 1 || (rank == 2 && t->size(0) == batch)) && t->size(rank - 1) == channels;
  PYNN_CHECK(fits, op, ": expected ", name, " of shape [", channels, "] or [", batch, ", ", channels, "], got ",
             shape_of(*t));
  const ScalarType dtype = t->scalar_type(), compute = compute_type_of(input);
  PYNN_CHECK(dtype == input.scalar_type() || dtype == compute, op, ": expected ", name, " to be ",
             name_of(input.scalar_type()), " like input", compute == input.scalar_type() ? "" : ", or float32",
             ", got ", name_of(dtype));
  check_same_device(op, name, *t, "input", input);
}

inline Activation check_prologue(const char* op, const Tensor& input, const std::optional<Tensor>& scale,
                                 const std::optional<Tensor>& shift, int64_t activation) {
  PYNN_CHECK(input.dim() == 4,
             "Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: ", shape_of(input));
  check_floating(op, "input", input);
  check_per_channel(op, "input_scale", scale, input);
  check_per_channel(op, "input_shift", shift, input);
  PYNN_CHECK(activation >= 0 && activation < kActivations, op, ": expected input_activation from 0 to ",
             kActivations - 1, ", got ", activation);
  return Activation(activation);
}

// scale or shift as the kernels read it; it owns the copy that this may take.
class __attribute__((visibility("hidden"))) PerChannelOperand {
 public:
  PerChannelOperand(const std::optional<Tensor>& t, const Tensor& input) {
    if (!t) return;
    const ScalarType compute = compute_type_of(input);
    values_ = t->scalar_type() == compute ? *t : torch::stable::to(*t, compute);
    if (!values_->is_contiguous()) values_ = torch::stable::contiguous(*values_);
  }
  template <class A>
  PerChannel<A> get() const {
    if (!values_) return {nullptr, 0};
    return {pointer<A>(*values_), values_->dim() == 2 ? values_->size(1) : 0};
  }

 private:
  std::optional<Tensor> values_;
};

// The images in one of the two layouts without gaps, copied if they are in neither.
inline Tensor without_gaps(const Tensor& t, bool channels_last) {
  constexpr int kOrders[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  int64_t expected = 1;
  for (const int d : kOrders[channels_last]) {
    if (t.size(d) > 1 && t.stride(d) != expected) {
      using torch::headeronly::MemoryFormat;
      return torch::stable::contiguous(t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    }
    expected *= t.size(d);
  }
  return t;
}

}  // namespace pynn
