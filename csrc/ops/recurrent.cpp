// lstm, gru and rnn: validation, allocation, dispatch. Launchers see contiguous, time-major tensors.
#include "recurrent.h"

#include "kept_scratch.h"
#include "kept_tensor.h"
#include "recurrent_products.h"

namespace pynn {
namespace {

Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}
Tensor or_nothing(const OptionalTensor& tensor, const Tensor& like) {
  return tensor ? *tensor : new_dense(like, {0}, like.scalar_type());
}

struct Results {
  Tensor output, h_n;
  OptionalTensor c_n, gates, cells;
};

Results forward(const RecurrentOperands& o, bool save) {
  const RecurrentShape shape = check(o);
  const Tensor& input = o.input;
  const ScalarType dtype = input.scalar_type(), wide = accumulate_type(input);
  const bool lstm = shape.cell == Cell::lstm;
  Results r{new_dense(input, {shape.steps, shape.batch, shape.state}, dtype),
            new_state(o, shape.batch, shape.state, dtype)};
  if (lstm) r.c_n = new_state(o, shape.batch, shape.hidden, wide);
  if (save) {
    const int64_t values = saved_of(shape.cell) * shape.hidden;
    if (values) r.gates = new_kept(input, {shape.steps, shape.batch, values}, dtype);
    if (lstm) r.cells = new_kept(input, {shape.steps, shape.batch, shape.hidden}, wide);
  }
  if (shape.batch > 0) {
    const Dense d(o);
    dispatch_floating(name_of(shape.cell), input.scalar_type(), [&]<class T>(Tag<T>) {
      using A = accumulate_t<T>;
      using Launch = launch::Recurrent<T>;
      const T* products = o.weight_ih ? nullptr : pointer<T>(d.input);
      OptionalTensor memory;
      if constexpr (!Launch::kProducts) {
        if (o.weight_ih) {
          const int64_t gates = gates_of(shape.cell) * shape.hidden;
          const bool in_place = lstm && save;
          if (!in_place) memory = new_dense(input, {shape.rows(), gates}, dtype);
          T* out = mutable_pointer<T>(in_place ? *r.gates : *memory);
          const Matrix<T> x{pointer<T>(d.input), shape.rows(), shape.input, shape.input};
          const Matrix<T> weight{pointer<T>(*d.weight_ih), gates, shape.input, shape.input};
          Products<T>(input).multiply(x, weight.transposed(), out);
          products = out;
        }
      }
      const RecurrentForward<T> call{pointer<T>(d.input),
                                     products,
                                     d.weights<T>(),
                                     pointer<T>(d.hx),
                                     pointer_or_null<A>(d.cx),
                                     pointer_or_null<int64_t>(d.lengths),
                                     mutable_pointer<T>(r.output),
                                     mutable_pointer<T>(r.h_n),
                                     mutable_pointer_or_null<A>(r.c_n),
                                     mutable_pointer_or_null<T>(r.gates),
                                     mutable_pointer_or_null<A>(r.cells)};
      KeptScratch scratch(input, Launch::fwd_scratch(shape));
      Launch::fwd(call, shape, scratch.get(), current_stream(input));
    });
  }
  if (lstm) r.c_n = in_dtype(*r.c_n, o.cx->scalar_type());
  return r;
}

struct Wanted {
  bool input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, states;
};

struct Gradients {
  OptionalTensor hx, cx, input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr;
};

// Which gradients exist. LSTM and RNN have one of both biases, bias_ih here; GRU and RNN always have those of states.
Wanted wanted_of(const RecurrentOperands& o, const std::vector<bool>& mask) {
  check_mask(o, mask);
  const bool biases = mask[3] && (o.bias_ih || o.bias_hh);
  const bool lstm = o.cell == Cell::lstm;
  return {mask[0],         mask[1] && o.weight_ih,        mask[2],
          biases,          biases && o.cell == Cell::gru, lstm && mask[4] && o.projection(),
          !lstm || mask[5]};
}

// What a launcher leaves behind for the products.
struct Left {
  OptionalTensor grad_gates, grad_states, hiddens;
};

// Gradients of input, weights and biases from those of the pre-activations.
template <class T>
void multiply(const Left& left, const Dense& d, const Tensor& output, const RecurrentShape& shape, bool reverse,
              Gradients& grads) {
  const Products<T> products(d.input);
  const int64_t hidden = shape.hidden, gates = gates_of(shape.cell) * hidden, rows = shape.rows();
  const int64_t width = gradients_of(shape.cell) * hidden;
  const bool gru = shape.cell == Cell::gru;
  const Matrix<T> all{pointer<T>(*left.grad_gates), rows, width, width};
  const Matrix<T> to_input = all.from_column(0, gates);
  const int64_t shared = gru ? 2 * hidden : gates;  // of to_input's columns are those of the hidden product too

  if (grads.input && d.weight_ih) {
    const Matrix<T> weight{pointer<T>(*d.weight_ih), gates, shape.input, shape.input};
    products.multiply(to_input, weight, mutable_pointer<T>(*grads.input));
  } else if (grads.input) {
    Tensor grad_gates = *left.grad_gates;
    torch::stable::copy_(*grads.input, torch::stable::narrow(grad_gates, 2, 0, gates));
  }
  if (grads.weight_ih) {
    const Matrix<T> x{pointer<T>(d.input), rows, shape.input, shape.input};
    torch::stable::copy_(*grads.weight_ih, products.product(to_input.transposed(), x));
  }
  if (grads.weight_hh) {
    const Tensor before = states_before(output, d.hx, d.lengths, reverse);
    const Matrix<T> h{pointer<T>(before), rows, shape.state, shape.state};
    const auto put = [&](int64_t first, int64_t row, int64_t count) {
      Tensor part = torch::stable::narrow(*grads.weight_hh, 0, row, count);
      torch::stable::copy_(part, products.product(all.from_column(first, count).transposed(), h));
    };
    put(0, 0, shared);
    if (gru) put(gates, shared, hidden);
  }
  if (grads.bias_ih || grads.bias_hh) {
    Tensor sums = products.sum_rows(all);
    const auto put = [&](Tensor& grad, int64_t first, int64_t row, int64_t count) {
      Tensor part = torch::stable::narrow(grad, 0, row, count);
      torch::stable::copy_(part, torch::stable::narrow(sums, 0, first, count));
    };
    if (grads.bias_ih) put(*grads.bias_ih, 0, 0, gates);
    if (grads.bias_hh) put(*grads.bias_hh, 0, 0, shared);
    if (grads.bias_hh) put(*grads.bias_hh, gates, shared, hidden);
  }
  if (grads.weight_hr) {
    const Matrix<T> states{pointer<T>(*left.grad_states), rows, shape.state, shape.state};
    const Matrix<T> hiddens{pointer<T>(*left.hiddens), rows, hidden, hidden};
    torch::stable::copy_(*grads.weight_hr, products.product(states.transposed(), hiddens));
  }
}

Gradients backward(const RecurrentOperands& o, const RecurrentSaved& saved, const std::vector<bool>& mask) {
  const RecurrentShape shape = check(o, saved);
  const Wanted wanted = wanted_of(o, mask);
  const Tensor& input = o.input;
  const ScalarType dtype = input.scalar_type(), wide = accumulate_type(input);
  const int64_t rows = gates_of(shape.cell) * shape.hidden;
  const bool lstm = shape.cell == Cell::lstm;
  const auto empty_weight = [&](bool want, int64_t count, int64_t columns) {
    return want ? OptionalTensor(new_kept(input, {count, columns}, dtype)) : std::nullopt;
  };
  const auto empty_bias = [&](bool want) {
    return want ? OptionalTensor(new_dense(input, {rows}, dtype)) : std::nullopt;
  };
  Gradients grads;
  if (wanted.states || !launch::Recurrent<float>::kProducts) grads.hx = new_state(o, shape.batch, shape.state, dtype);
  if (lstm) grads.cx = new_state(o, shape.batch, shape.hidden, wide);
  if (wanted.input) grads.input = new_kept(input, {shape.steps, shape.batch, shape.input}, dtype);
  grads.weight_ih = empty_weight(wanted.weight_ih, rows, shape.input);
  grads.weight_hh = empty_weight(wanted.weight_hh, rows, shape.state);
  grads.bias_ih = empty_bias(wanted.bias_ih);
  grads.bias_hh = empty_bias(wanted.bias_hh);
  grads.weight_hr = empty_weight(wanted.weight_hr, shape.state, shape.hidden);
  if (shape.batch == 0) {
    for (OptionalTensor* grad : {&grads.weight_ih, &grads.weight_hh, &grads.bias_ih, &grads.bias_hh, &grads.weight_hr})
      if (*grad) torch::stable::zero_(**grad);
  } else {
    const Dense d(o);
    const DenseSaved kept(o, saved);
    dispatch_floating(name_of(shape.cell), input.scalar_type(), [&]<class T>(Tag<T>) {
      using A = accumulate_t<T>;
      using Launch = launch::Recurrent<T>;
      RecurrentBackward<T> call = kept.call<T>(d);
      call.grad_h0 = mutable_pointer_or_null<T>(grads.hx);
      call.grad_c0 = mutable_pointer_or_null<A>(grads.cx);
      Left left;
      if constexpr (Launch::kProducts) {
        call.grad_input = mutable_pointer_or_null<T>(grads.input);
        call.grad_weight_ih = mutable_pointer_or_null<T>(grads.weight_ih);
        call.grad_weight_hh = mutable_pointer_or_null<T>(grads.weight_hh);
        call.grad_bias_ih = mutable_pointer_or_null<T>(grads.bias_ih);
        call.grad_bias_hh = mutable_pointer_or_null<T>(grads.bias_hh);
        call.grad_weight_hr = mutable_pointer_or_null<T>(grads.weight_hr);
      } else {
        const auto steps_of = [&](int64_t width) {
          return OptionalTensor(new_dense(input, {shape.steps, shape.batch, width}, dtype));
        };
        left.grad_gates = steps_of(gradients_of(shape.cell) * shape.hidden);
        if (shape.projected) left.grad_states = steps_of(shape.state), left.hiddens = steps_of(shape.hidden);
        call.grad_gates = mutable_pointer_or_null<T>(left.grad_gates);
        call.grad_states = mutable_pointer_or_null<T>(left.grad_states);
        call.hiddens = mutable_pointer_or_null<T>(left.hiddens);
      }
      {
        KeptScratch scratch(input, Launch::bwd_scratch(shape));
        Launch::bwd(call, shape, scratch.get(), current_stream(input));
      }
      if constexpr (!Launch::kProducts) multiply<T>(left, d, kept.output, shape, o.reverse, grads);
    });
  }
  if (!wanted.states)
    grads.hx = grads.cx = std::nullopt;
  else if (lstm)
    grads.cx = in_dtype(*grads.cx, o.cx->scalar_type());
  return grads;
}

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Five lstm_fwd(const Tensor& input, const Tensor& hx, const Tensor& cx, const OptionalTensor& weight_ih,
              const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
              const OptionalTensor& weight_hr, const OptionalTensor& lengths, bool reverse, bool save) {
  const Results r =
      forward({Cell::lstm, input, hx, &cx, weight_ih, weight_hh, bias_ih, bias_hh, &weight_hr, lengths, reverse}, save);
  Tensor cells = r.cells ? *r.cells : new_dense(input, {0}, accumulate_type(input));
  return {r.output, r.h_n, *r.c_n, or_nothing(r.gates, input), cells};
}

Seven lstm_bwd(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
               const Tensor& input, const Tensor& hx, const Tensor& cx, const OptionalTensor& weight_ih,
               const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
               const OptionalTensor& weight_hr, const OptionalTensor& lengths, const Tensor& output,
               const Tensor& gates, const Tensor& cells, bool reverse, std::vector<bool> output_mask) {
  const Gradients g =
      backward({Cell::lstm, input, hx, &cx, weight_ih, weight_hh, bias_ih, bias_hh, &weight_hr, lengths, reverse},
               {grad_output, grad_h_n, &grad_c_n, output, &gates, &cells}, output_mask);
  const auto grad = [&](const OptionalTensor& tensor) { return or_nothing(tensor, input); };
  return {grad(g.input),     grad(g.hx),      grad(g.cx),       grad(g.weight_ih),
          grad(g.weight_hh), grad(g.bias_ih), grad(g.weight_hr)};
}

Three gru_fwd(const Tensor& input, const Tensor& hx, const OptionalTensor& weight_ih, const Tensor& weight_hh,
              const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& lengths, bool reverse,
              bool save) {
  const Results r =
      forward({Cell::gru, input, hx, nullptr, weight_ih, weight_hh, bias_ih, bias_hh, nullptr, lengths, reverse}, save);
  return {r.output, r.h_n, or_nothing(r.gates, input)};
}

Six gru_bwd(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& input, const Tensor& hx,
            const OptionalTensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
            const OptionalTensor& bias_hh, const OptionalTensor& lengths, const Tensor& output, const Tensor& gates,
            bool reverse, std::vector<bool> output_mask) {
  const Gradients g =
      backward({Cell::gru, input, hx, nullptr, weight_ih, weight_hh, bias_ih, bias_hh, nullptr, lengths, reverse},
               {grad_output, grad_h_n, nullptr, output, &gates, nullptr}, output_mask);
  const auto grad = [&](const OptionalTensor& tensor) { return or_nothing(tensor, input); };
  return {grad(g.input), grad(g.hx), grad(g.weight_ih), grad(g.weight_hh), grad(g.bias_ih), grad(g.bias_hh)};
}

Cell rnn_cell(bool relu) { return relu ? Cell::rnn_relu : Cell::rnn_tanh; }

std::tuple<Tensor, Tensor> rnn_fwd(const Tensor& input, const Tensor& hx, const OptionalTensor& weight_ih,
                                   const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                   const OptionalTensor& bias_hh, const OptionalTensor& lengths, bool relu,
                                   bool reverse) {
  const Results r = forward(
      {rnn_cell(relu), input, hx, nullptr, weight_ih, weight_hh, bias_ih, bias_hh, nullptr, lengths, reverse}, false);
  return {r.output, r.h_n};
}

Five rnn_bwd(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& input, const Tensor& hx,
             const OptionalTensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
             const OptionalTensor& bias_hh, const OptionalTensor& lengths, const Tensor& output, bool relu,
             bool reverse, std::vector<bool> output_mask) {
  const Gradients g =
      backward({rnn_cell(relu), input, hx, nullptr, weight_ih, weight_hh, bias_ih, bias_hh, nullptr, lengths, reverse},
               {grad_output, grad_h_n, nullptr, output, nullptr, nullptr}, output_mask);
  const auto grad = [&](const OptionalTensor& tensor) { return or_nothing(tensor, input); };
  return {grad(g.input), grad(g.hx), grad(g.weight_ih), grad(g.weight_hh), grad(g.bias_ih)};
}

}  // namespace

PYNN_LIBRARY(m) {
  m.impl("lstm_fwd", TORCH_BOX(&lstm_fwd));
  m.impl("lstm_bwd", TORCH_BOX(&lstm_bwd));
  m.impl("gru_fwd", TORCH_BOX(&gru_fwd));
  m.impl("gru_bwd", TORCH_BOX(&gru_bwd));
  m.impl("rnn_fwd", TORCH_BOX(&rnn_fwd));
  m.impl("rnn_bwd", TORCH_BOX(&rnn_bwd));
}

#ifdef PYNN_CHECKS
namespace {

void lstm_fwd_check(const Tensor& input, const Tensor& hx, const Tensor& cx, const OptionalTensor& weight_ih,
                    const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                    const OptionalTensor& weight_hr, const OptionalTensor& lengths, bool reverse, bool) {
  check({Cell::lstm, input, hx, &cx, weight_ih, weight_hh, bias_ih, bias_hh, &weight_hr, lengths, reverse});
}

void lstm_bwd_check(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
                    const Tensor& input, const Tensor& hx, const Tensor& cx, const OptionalTensor& weight_ih,
                    const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                    const OptionalTensor& weight_hr, const OptionalTensor& lengths, const Tensor& output,
                    const Tensor& gates, const Tensor& cells, bool reverse, std::vector<bool> output_mask) {
  const RecurrentOperands o{Cell::lstm, input,   hx,         &cx,     weight_ih, weight_hh,
                            bias_ih,    bias_hh, &weight_hr, lengths, reverse};
  check(o, {grad_output, grad_h_n, &grad_c_n, output, &gates, &cells});
  check_mask(o, output_mask);
}

void gru_fwd_check(const Tensor& input, const Tensor& hx, const OptionalTensor& weight_ih, const Tensor& weight_hh,
                   const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& lengths,
                   bool reverse, bool) {
  check({Cell::gru, input, hx, nullptr, weight_ih, weight_hh, bias_ih, bias_hh, nullptr, lengths, reverse});
}

void gru_bwd_check(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& input,
                   const Tensor& hx, const OptionalTensor& weight_ih, const Tensor& weight_hh,
                   const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& lengths,
                   const Tensor& output, const Tensor& gates, bool reverse, std::vector<bool> output_mask) {
  const RecurrentOperands o{Cell::gru, input,   hx,      nullptr, weight_ih, weight_hh,
                            bias_ih,   bias_hh, nullptr, lengths, reverse};
  check(o, {grad_output, grad_h_n, nullptr, output, &gates, nullptr});
  check_mask(o, output_mask);
}

void rnn_fwd_check(const Tensor& input, const Tensor& hx, const OptionalTensor& weight_ih, const Tensor& weight_hh,
                   const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& lengths,
                   bool relu, bool reverse) {
  check({rnn_cell(relu), input, hx, nullptr, weight_ih, weight_hh, bias_ih, bias_hh, nullptr, lengths, reverse});
}

void rnn_bwd_check(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& input,
                   const Tensor& hx, const OptionalTensor& weight_ih, const Tensor& weight_hh,
                   const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& lengths,
                   const Tensor& output, bool relu, bool reverse, std::vector<bool> output_mask) {
  const RecurrentOperands o{rnn_cell(relu), input,   hx,      nullptr, weight_ih, weight_hh,
                            bias_ih,        bias_hh, nullptr, lengths, reverse};
  check(o, {grad_output, grad_h_n, nullptr, output, nullptr, nullptr});
  check_mask(o, output_mask);
}

}  // namespace

PYNN_CHECKS(m) {
  m.impl("lstm_fwd_check", TORCH_BOX(&lstm_fwd_check));
  m.impl("lstm_bwd_check", TORCH_BOX(&lstm_bwd_check));
  m.impl("gru_fwd_check", TORCH_BOX(&gru_fwd_check));
  m.impl("gru_bwd_check", TORCH_BOX(&gru_bwd_check));
  m.impl("rnn_fwd_check", TORCH_BOX(&rnn_fwd_check));
  m.impl("rnn_bwd_check", TORCH_BOX(&rnn_bwd_check));
}
#endif

}  // namespace pynn
