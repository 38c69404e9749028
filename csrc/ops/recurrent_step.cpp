// Backward passes of single steps of lstm, gru and rnn that leave the gradients of weights to one pass over the rows of
// many steps: validation, allocation, dispatch. Of the CPU, whose launchers make all products.
#include "kept_scratch.h"
#include "kept_tensor.h"
#include "recurrent_check.h"

namespace pynn {
namespace {

Cell cell_of(int64_t cell) {
  PYNN_CHECK(cell >= int64_t(Cell::lstm) && cell <= int64_t(Cell::rnn_relu), "recurrent: expected cell 0 to 3, got ",
             cell);
  return Cell(cell);
}

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// (gradients of input, hx, cx, and of the pre-activations as RecurrentBackward::grad_gates); input is (1, batch, size).
Four recurrent_step_bwd(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                        const OptionalTensor& grad_c_n, const Tensor& input, const Tensor& hx, const OptionalTensor& cx,
                        const Tensor& weight_ih, const Tensor& weight_hh, const Tensor& output,
                        const OptionalTensor& gates, const OptionalTensor& cells, int64_t cell,
                        std::vector<bool> output_mask) {
  const OptionalTensor none, ih = weight_ih;
  const Cell kind = cell_of(cell);
  const bool lstm = kind == Cell::lstm, saves = saved_of(kind) > 0;
  PYNN_CHECK(bool(cx) == lstm && bool(cells) == lstm && bool(gates) == saves,
             "recurrent_step_bwd: expected cx and cells of lstm, and gates of lstm and gru");
  PYNN_CHECK(output_mask.size() == 2, "recurrent_step_bwd: expected output_mask of 2 values, got ", output_mask.size());
  const RecurrentOperands o{kind, input, hx, lstm ? &*cx : nullptr, ih, weight_hh, none, none, &none, none, false};
  const RecurrentSaved saved{
      grad_output, grad_h_n, &grad_c_n, output, saves ? &*gates : nullptr, lstm ? &*cells : nullptr};
  const RecurrentShape shape = check(o, saved);
  PYNN_CHECK(shape.steps == 1, "recurrent_step_bwd: expected input of 1 step, got ", shape_of(input));
  const ScalarType dtype = input.scalar_type(), wide = accumulate_type(input);
  const auto state = [&](bool wanted, int64_t width, ScalarType type) {
    return wanted ? new_state(o, shape.batch, width, type) : new_dense(input, {0}, type);
  };
  Tensor grad_hx = state(output_mask[1], shape.state, dtype);
  Tensor grad_cx = state(lstm, shape.hidden, wide);
  Tensor grad_input =
      output_mask[0] ? new_kept(input, {1, shape.batch, shape.input}, dtype) : new_dense(input, {0}, dtype);
  Tensor grad_gates = new_kept(input, {shape.batch, gradients_of(kind) * shape.hidden}, dtype);
  if (shape.batch > 0) {
    const Dense d(o);
    const DenseSaved kept(o, saved);
    dispatch_floating(name_of(kind), dtype, [&]<class T>(Tag<T>) {
      using A = accumulate_t<T>;
      RecurrentBackward<T> call = kept.call<T>(d);
      call.grad_h0 = output_mask[1] ? mutable_pointer<T>(grad_hx) : nullptr;
      call.grad_c0 = lstm ? mutable_pointer<A>(grad_cx) : nullptr;
      call.grad_input = output_mask[0] ? mutable_pointer<T>(grad_input) : nullptr;
      call.grad_gates = mutable_pointer<T>(grad_gates);
      KeptScratch scratch(input, launch::Recurrent<T>::bwd_scratch(shape));
      launch::Recurrent<T>::bwd(call, shape, scratch.get(), current_stream(input));
    });
  }
  if (lstm && grad_cx.scalar_type() != cx->scalar_type()) grad_cx = torch::stable::to(grad_cx, cx->scalar_type());
  return {grad_input, grad_hx, grad_cx, grad_gates};
}

// (gradients of weight_ih, weight_hh and the biases) from rows of any number of steps: grad_gates (rows, gradients *
// hidden), input (rows, size) and states (rows, hidden), which weight_hh multiplied.
Four recurrent_weights_bwd(const Tensor& grad_gates, const Tensor& input, const Tensor& states, int64_t cell,
                           std::vector<bool> output_mask) {
  const char* const op = "recurrent_weights_bwd";
  const Cell kind = cell_of(cell);
  check_floating(op, "input", input);
  check_rank(op, "input", input, 2);
  check_rank(op, "states", states, 2);
  const int64_t rows = input.size(0), size = input.size(1), hidden = states.size(1), gates = gates_of(kind) * hidden;
  PYNN_CHECK(size > 0 && hidden > 0, op, ": expected sizes greater than 0, got input ", shape_of(input), " and states ",
             shape_of(states));
  check_like_input(op, "states", states, {rows, hidden}, input);
  check_like_input(op, "grad_gates", grad_gates, {rows, gradients_of(kind) * hidden}, input);
  PYNN_CHECK(output_mask.size() == 3, op, ": expected output_mask of 3 values, got ", output_mask.size());
  const RecurrentShape shape{kind, 1, rows, size, hidden, hidden, false, false};
  for (const int64_t width : {size, 4 * hidden})
    checked_multiply(op, checked_multiply(op, rows, int64_t(sizeof(double))), width);
  const ScalarType dtype = input.scalar_type();
  const auto weight = [&](bool wanted, int64_t columns) {
    return wanted ? OptionalTensor(new_kept(input, {gates, columns}, dtype)) : std::nullopt;
  };
  const auto bias = [&](bool wanted) {
    return wanted ? OptionalTensor(new_dense(input, {gates}, dtype)) : std::nullopt;
  };
  OptionalTensor of_ih = weight(output_mask[0], size), of_hh = weight(output_mask[1], hidden);
  OptionalTensor bias_ih = bias(output_mask[2]), bias_hh = bias(output_mask[2] && kind == Cell::gru);
  if (rows > 0) {
    const Tensor given = dense(grad_gates), x = dense(input), h = dense(states);
    dispatch_floating(name_of(kind), dtype, [&]<class T>(Tag<T>) {
      RecurrentBackward<T> call{};
      call.input = pointer<T>(x);
      call.h0 = pointer<T>(h);
      call.gates_given = pointer<T>(given);
      call.grad_weight_ih = mutable_pointer_or_null<T>(of_ih);
      call.grad_weight_hh = mutable_pointer_or_null<T>(of_hh);
      call.grad_bias_ih = mutable_pointer_or_null<T>(bias_ih);
      call.grad_bias_hh = mutable_pointer_or_null<T>(bias_hh);
      KeptScratch scratch(input, launch::Recurrent<T>::bwd_scratch(shape));
      launch::Recurrent<T>::bwd(call, shape, scratch.get(), current_stream(input));
    });
  } else {
    for (OptionalTensor* grad : {&of_ih, &of_hh, &bias_ih, &bias_hh})
      if (*grad) torch::stable::zero_(**grad);
  }
  const auto grad = [&](const OptionalTensor& tensor) { return tensor ? *tensor : new_dense(input, {0}, dtype); };
  return {grad(of_ih), grad(of_hh), grad(bias_ih), grad(bias_hh)};
}

}  // namespace

PYNN_LIBRARY(m) {
  m.impl("recurrent_step_bwd", TORCH_BOX(&recurrent_step_bwd));
  m.impl("recurrent_weights_bwd", TORCH_BOX(&recurrent_weights_bwd));
}

}  // namespace pynn
