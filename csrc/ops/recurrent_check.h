// The operands of recurrent layers: their validation, and their form for the launchers. Messages are torch's own where
// torch has one.
#pragma once
#include <algorithm>

#include "library.h"
#include "recurrent.h"

namespace pynn {

using OptionalTensor = std::optional<Tensor>;

inline const char* name_of(Cell cell) { return cell == Cell::lstm ? "lstm" : cell == Cell::gru ? "gru" : "rnn"; }

// What forward and backward of every cell take. Without weight_ih, input is the product (steps, batch, gates * hidden)
// already, as wide is shape.input and the gradient of input.
struct RecurrentOperands {
  Cell cell;
  const Tensor &input, &hx;
  const Tensor* cx;  // lstm only
  const OptionalTensor& weight_ih;
  const Tensor& weight_hh;
  const OptionalTensor &bias_ih, &bias_hh;
  const OptionalTensor* weight_hr;  // lstm only
  const OptionalTensor& lengths;
  bool reverse;

  const OptionalTensor& projection() const {
    static const OptionalTensor none;
    return weight_hr ? *weight_hr : none;
  }
};

inline ScalarType accumulate_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_like_input(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  PYNN_CHECK(tensor.scalar_type() == input.scalar_type(), op, ": expected ", name, " to be ",
             name_of(input.scalar_type()), " like input, got ", name_of(tensor.scalar_type()));
  check_same_device(op, name, tensor, "input", input);
}

inline void check_like_input(const char* op, const char* name, const Tensor& tensor,
                             std::initializer_list<int64_t> shape, const Tensor& input) {
  check_shape(op, name, tensor, shape);
  check_like_input(op, name, tensor, input);
}

inline void check_like_input(const char* op, const char* name, const OptionalTensor& tensor,
                             std::initializer_list<int64_t> shape, const Tensor& input) {
  if (tensor) check_like_input(op, name, *tensor, shape, input);
}

// A state or its gradient: (batch, width), or (1, batch, width) where `like` is.
inline void check_state(const char* op, const char* name, const Tensor& tensor, int64_t batch, int64_t width,
                        const Tensor& like) {
  if (like.dim() == 3)
    check_shape(op, name, tensor, {1, batch, width});
  else
    check_shape(op, name, tensor, {batch, width});
}

// The state c and its gradient are in input's dtype, or in float32 for 16-bit input.
inline void check_cell_state(const char* op, const char* name, const Tensor& tensor, int64_t batch, int64_t width,
                             const Tensor& like, const Tensor& input) {
  check_state(op, name, tensor, batch, width, like);
  const ScalarType dtype = tensor.scalar_type(), wide = accumulate_type(input);
  PYNN_CHECK(dtype == input.scalar_type() || dtype == wide, op, ": expected ", name, " to be ",
             name_of(input.scalar_type()), " like input", wide == input.scalar_type() ? "" : ", or float32", ", got ",
             name_of(dtype));
  check_same_device(op, name, tensor, "input", input);
}

inline RecurrentShape check(const RecurrentOperands& o) {
  const char* op = name_of(o.cell);
  const Tensor& input = o.input;
  check_floating(op, "input", input);
  check_rank(op, "input", input, 3);
  check_rank(op, "weight_hh", o.weight_hh, 2);
  check_like_input(op, "weight_hh", o.weight_hh, input);
  const int64_t gates = gates_of(o.cell), rows = o.weight_hh.size(0), state = o.weight_hh.size(1);
  PYNN_CHECK(rows > 0 && rows % gates == 0 && state > 0, op, ": expected weight_hh of shape [", gates,
             " * hidden_size, ", o.weight_hr ? "hidden_size or proj_size" : "hidden_size", "], got ",
             shape_of(o.weight_hh));
  const RecurrentShape shape{
      o.cell, input.size(0), input.size(1), input.size(2), rows / gates, state, o.projection().has_value(), o.reverse};
  PYNN_CHECK(shape.projected || state == shape.hidden, op, ": expected weight_hh of shape [", rows, ", ", shape.hidden,
             "], got ", shape_of(o.weight_hh));
  check_like_input(op, "weight_hr", o.projection(), {state, shape.hidden}, input);
  if (o.weight_ih) {
    check_rank(op, "weight_ih", *o.weight_ih, 2);
    PYNN_CHECK(input.size(2) == o.weight_ih->size(1), "input.size(-1) must be equal to input_size. Expected ",
               o.weight_ih->size(1), ", got ", input.size(2));
    PYNN_CHECK(shape.input > 0, op, ": expected input_size greater than 0, got input ", shape_of(input));
    check_like_input(op, "weight_ih", *o.weight_ih, {rows, shape.input}, input);
  } else {
    PYNN_CHECK(input.size(2) == rows, op, ": expected input of shape [steps, batch, ", rows,
               "] without weight_ih, got ", shape_of(input));
  }
  check_like_input(op, "bias_ih", o.bias_ih, {rows}, input);
  check_like_input(op, "bias_hh", o.bias_hh, {rows}, input);
  check_state(op, "hx", o.hx, shape.batch, state, o.hx);
  check_like_input(op, "hx", o.hx, input);
  if (o.cx) check_cell_state(op, "cx", *o.cx, shape.batch, shape.hidden, o.hx, input);
  if (o.lengths) {
    check_shape(op, "lengths", *o.lengths, {shape.batch});
    PYNN_CHECK(o.lengths->scalar_type() == ScalarType::Long, op, ": expected lengths to be int64, got ",
               name_of(o.lengths->scalar_type()));
    check_same_device(op, "lengths", *o.lengths, "input", input);
  }
  PYNN_CHECK(shape.steps > 0, "Expected sequence length to be larger than 0 in RNN");
  const int64_t values = checked_multiply(op, checked_multiply(op, shape.steps, shape.batch), int64_t(sizeof(double)));
  for (const int64_t width : {shape.input, 4 * shape.hidden, state}) checked_multiply(op, values, width);
  return shape;
}

// What backward takes besides.
struct RecurrentSaved {
  const OptionalTensor &grad_output, &grad_h_n;
  const OptionalTensor* grad_c_n;  // lstm only
  const Tensor& output;
  const Tensor* gates;  // lstm and gru
  const Tensor* cells;  // lstm only
};

inline RecurrentShape check(const RecurrentOperands& o, const RecurrentSaved& saved) {
  const RecurrentShape shape = check(o);
  const char* op = name_of(o.cell);
  const int64_t steps = shape.steps, batch = shape.batch;
  check_like_input(op, "grad_output", saved.grad_output, {steps, batch, shape.state}, o.input);
  if (saved.grad_h_n) {
    check_state(op, "grad_h_n", *saved.grad_h_n, batch, shape.state, o.hx);
    check_like_input(op, "grad_h_n", *saved.grad_h_n, o.input);
  }
  if (saved.grad_c_n && *saved.grad_c_n)
    check_cell_state(op, "grad_c_n", **saved.grad_c_n, batch, shape.hidden, o.hx, o.input);
  check_like_input(op, "output", saved.output, {steps, batch, shape.state}, o.input);
  if (saved.gates)
    check_like_input(op, "gates", *saved.gates, {steps, batch, saved_of(o.cell) * shape.hidden}, o.input);
  if (saved.cells) {
    check_shape(op, "cells", *saved.cells, {steps, batch, shape.hidden});
    PYNN_CHECK(saved.cells->scalar_type() == accumulate_type(o.input), op, ": expected cells to be ",
               name_of(accumulate_type(o.input)), ", got ", name_of(saved.cells->scalar_type()));
    check_same_device(op, "cells", *saved.cells, "input", o.input);
  }
  return shape;
}

inline void check_mask(const RecurrentOperands& o, const std::vector<bool>& mask) {
  const size_t expected = o.cell == Cell::lstm ? 6 : 4;
  PYNN_CHECK(mask.size() == expected, name_of(o.cell), ": expected output_mask of ", expected, " values, got ",
             mask.size());
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(dense(*tensor)) : std::nullopt;
}
inline Tensor dense(const Tensor& tensor, ScalarType dtype) {
  return dense(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}
template <class T>
const T* pointer_or_null(const OptionalTensor& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}
template <class T>
T* mutable_pointer_or_null(OptionalTensor& tensor) {
  return tensor ? mutable_pointer<T>(*tensor) : nullptr;
}
// A state in the shape of hx.
inline Tensor new_state(const RecurrentOperands& o, int64_t batch, int64_t width, ScalarType dtype) {
  return o.hx.dim() == 3 ? new_dense(o.input, {1, batch, width}, dtype) : new_dense(o.input, {batch, width}, dtype);
}

// The operands as the launchers read them.
struct Dense {
  explicit Dense(const RecurrentOperands& o)
      : input(dense(o.input)),
        hx(dense(o.hx)),
        cx(o.cx ? OptionalTensor(dense(*o.cx, accumulate_type(o.input))) : std::nullopt),
        weight_ih(dense(o.weight_ih)),
        weight_hh(dense(o.weight_hh)),
        bias_ih(dense(o.bias_ih)),
        bias_hh(dense(o.bias_hh)),
        weight_hr(dense(o.projection())),
        lengths(dense(o.lengths)) {}

  template <class T>
  RecurrentWeights<T> weights() const {
    return {pointer_or_null<T>(weight_ih), pointer<T>(weight_hh), pointer_or_null<T>(bias_ih),
            pointer_or_null<T>(bias_hh), pointer_or_null<T>(weight_hr)};
  }

  Tensor input, hx;
  OptionalTensor cx, weight_ih;
  Tensor weight_hh;
  OptionalTensor bias_ih, bias_hh, weight_hr, lengths;
};

// What backward takes besides, as the launchers read it.
struct DenseSaved {
  DenseSaved(const RecurrentOperands& o, const RecurrentSaved& saved)
      : grad_output(dense(saved.grad_output)),
        grad_h_n(dense(saved.grad_h_n)),
        grad_c_n(saved.grad_c_n && *saved.grad_c_n ? OptionalTensor(dense(**saved.grad_c_n, accumulate_type(o.input)))
                                                   : std::nullopt),
        output(dense(saved.output)),
        gates(saved.gates ? OptionalTensor(dense(*saved.gates)) : std::nullopt),
        cells(saved.cells ? OptionalTensor(dense(*saved.cells)) : std::nullopt) {}

  // A call that makes no gradient yet.
  template <class T>
  RecurrentBackward<T> call(const Dense& operands) const {
    using A = accumulate_t<T>;
    return {pointer_or_null<T>(grad_output),
            pointer_or_null<T>(grad_h_n),
            pointer_or_null<A>(grad_c_n),
            pointer<T>(operands.input),
            operands.weights<T>(),
            pointer<T>(operands.hx),
            pointer_or_null<A>(operands.cx),
            pointer_or_null<int64_t>(operands.lengths),
            pointer<T>(output),
            pointer_or_null<T>(gates),
            pointer_or_null<A>(cells)};
  }

  OptionalTensor grad_output, grad_h_n, grad_c_n;
  Tensor output;
  OptionalTensor gates, cells;
};

}  // namespace pynn
