// layer_norm_lstm: validation, allocation, the products of whole sequences and of each step around the launchers.
#include "layer_norm_lstm.h"

#include "recurrent_products.h"

namespace pynn {
namespace {

constexpr const char* kOp = "layer_norm_lstm";

struct LayerNormLstmOperands {
  const Tensor &input, &hx, &cx, &weight_ih, &weight_hh;
  const OptionalTensor &bias, &norm_ih, &norm_hh, &norm_cell, &norm_cell_bias, &peephole, &lengths, &key;
  bool coupled;
  double epsilon, zoneout_hidden, zoneout_cell, dropout;
  bool training, reverse;

  Zoneout zoneout() const { return {zoneout_hidden, zoneout_cell, training}; }
  bool random() const { return dropout > 0 || (training && (zoneout_hidden > 0 || zoneout_cell > 0)); }
};

void check_rate(const char* name, double rate) {
  PYNN_CHECK(rate >= 0 && rate < 1, kOp, ": expected ", name, " from 0 to less than 1, got ", rate);
}

void check_index(const char* name, const OptionalTensor& tensor, int64_t size, const Tensor& input) {
  if (!tensor) return;
  check_shape(kOp, name, *tensor, {size});
  PYNN_CHECK(tensor->scalar_type() == ScalarType::Long, kOp, ": expected ", name, " to be int64, got ",
             name_of(tensor->scalar_type()));
  check_same_device(kOp, name, *tensor, "input", input);
}

LayerNormLstmShape check(const LayerNormLstmOperands& o) {
  const Tensor& input = o.input;
  check_floating(kOp, "input", input);
  check_rank(kOp, "input", input, 3);
  check_rank(kOp, "weight_hh", o.weight_hh, 2);
  const LayerNormLstmShape shape{input.size(0), input.size(1),         input.size(2), o.weight_hh.size(1),
                                 o.coupled,     o.norm_ih.has_value(), o.reverse};
  PYNN_CHECK(shape.hidden > 0 && shape.input > 0, kOp, ": expected input_size and hidden_size greater than 0, got ",
             shape.input, " and ", shape.hidden);
  PYNN_CHECK(shape.steps > 0, "Expected sequence length to be larger than 0 in RNN");
  const int64_t values = checked_multiply(kOp, checked_multiply(kOp, shape.steps, shape.batch), sizeof(double));
  checked_multiply(kOp, values, checked_multiply(kOp, 4, std::max(shape.input, shape.hidden)));
  const int64_t width = shape.width();
  check_like_input(kOp, "weight_ih", o.weight_ih, {width, shape.input}, input);
  check_like_input(kOp, "weight_hh", o.weight_hh, {width, shape.hidden}, input);
  check_like_input(kOp, "bias", o.bias, {width}, input);
  PYNN_CHECK(o.norm_ih.has_value() == o.norm_hh.has_value() && o.norm_ih.has_value() == o.norm_cell.has_value(), kOp,
             ": expected norm_ih, norm_hh and norm_cell together or none of them");
  PYNN_CHECK(!o.norm_cell_bias || o.norm_cell, kOp, ": expected norm_cell with norm_cell_bias");
  check_like_input(kOp, "norm_ih", o.norm_ih, {width}, input);
  check_like_input(kOp, "norm_hh", o.norm_hh, {width}, input);
  check_like_input(kOp, "norm_cell", o.norm_cell, {shape.hidden}, input);
  check_like_input(kOp, "norm_cell_bias", o.norm_cell_bias, {shape.hidden}, input);
  check_like_input(kOp, "peephole", o.peephole, {width - shape.hidden}, input);
  check_state(kOp, "hx", o.hx, shape.batch, shape.hidden, o.hx);
  check_like_input(kOp, "hx", o.hx, input);
  check_cell_state(kOp, "cx", o.cx, shape.batch, shape.hidden, o.hx, input);
  check_index("lengths", o.lengths, shape.batch, input);
  check_index("key", o.key, 2, input);
  PYNN_CHECK(o.epsilon >= 0, kOp, ": expected eps of at least 0, got ", o.epsilon);
  check_rate("zoneout_hidden", o.zoneout_hidden);
  check_rate("zoneout_cell", o.zoneout_cell);
  check_rate("dropout", o.dropout);
  PYNN_CHECK(o.key || !o.random(), kOp, ": expected a key for dropout or zoneout");
  return shape;
}

struct LayerNormLstmSaved {
  const OptionalTensor &grad_output, &grad_h_n, &grad_c_n;
  const Tensor &output, &products_ih, &products_hh, &cells, &statistics;
};

constexpr size_t kGradients = 11;

LayerNormLstmShape check(const LayerNormLstmOperands& o, const LayerNormLstmSaved& saved,
                         const std::vector<bool>& mask) {
  const LayerNormLstmShape shape = check(o);
  const int64_t steps = shape.steps, batch = shape.batch;
  const auto check_wide = [&](const char* name, const Tensor& tensor, int64_t width) {
    if (width)
      check_shape(kOp, name, tensor, {steps, batch, width});
    else
      check_shape(kOp, name, tensor, {0});
    PYNN_CHECK(tensor.scalar_type() == accumulate_type(o.input), kOp, ": expected ", name, " to be ",
               name_of(accumulate_type(o.input)), ", got ", name_of(tensor.scalar_type()));
    check_same_device(kOp, name, tensor, "input", o.input);
  };
  check_like_input(kOp, "grad_output", saved.grad_output, {steps, batch, shape.hidden}, o.input);
  if (saved.grad_h_n) {
    check_state(kOp, "grad_h_n", *saved.grad_h_n, batch, shape.hidden, o.hx);
    check_like_input(kOp, "grad_h_n", *saved.grad_h_n, o.input);
  }
  if (saved.grad_c_n) check_cell_state(kOp, "grad_c_n", *saved.grad_c_n, batch, shape.hidden, o.hx, o.input);
  check_like_input(kOp, "output", saved.output, {steps, batch, shape.hidden}, o.input);
  check_like_input(kOp, "products_ih", saved.products_ih, {steps, batch, shape.width()}, o.input);
  check_like_input(kOp, "products_hh", saved.products_hh, {steps, batch, shape.width()}, o.input);
  check_wide("cells", saved.cells, shape.hidden);
  check_wide("statistics", saved.statistics, shape.norm ? kStatistics : 0);
  PYNN_CHECK(mask.size() == kGradients, kOp, ": expected output_mask of ", kGradients, " values, got ", mask.size());
  return shape;
}

// What both passes read.
struct LayerNormLstmMemory {
  explicit LayerNormLstmMemory(const LayerNormLstmOperands& o)
      : input(dense(o.input)),
        weight_ih(dense(o.weight_ih)),
        weight_hh(dense(o.weight_hh)),
        bias(dense(o.bias)),
        norm_ih(dense(o.norm_ih)),
        norm_hh(dense(o.norm_hh)),
        norm_cell(dense(o.norm_cell)),
        norm_cell_bias(dense(o.norm_cell_bias)),
        peephole(dense(o.peephole)),
        lengths(dense(o.lengths)),
        key(dense(o.key)) {}

  template <class T>
  LayerNormLstmWeights<T> weights() const {
    return {pointer_or_null<T>(bias),      pointer_or_null<T>(norm_ih),        pointer_or_null<T>(norm_hh),
            pointer_or_null<T>(norm_cell), pointer_or_null<T>(norm_cell_bias), pointer_or_null<T>(peephole)};
  }

  Tensor input, weight_ih, weight_hh;
  OptionalTensor bias, norm_ih, norm_hh, norm_cell, norm_cell_bias, peephole, lengths, key;
};

template <class T>
Matrix<T> rows_of(const Tensor& tensor, int64_t rows, int64_t width) {
  return {pointer<T>(tensor), rows, width, width};
}

// The products of every step with weight_hh: the launcher's own, or the library's. On the sim, where the library has
// none of 16-bit types, the weight is widened once instead of at every step.
template <class T>
class StepProducts {
  using A = accumulate_t<T>;
  using Launch = launch::LayerNormLstm<T>;
#ifdef PYNN_CUDA
  using Operand = T;
#else
  using Operand = A;
#endif
  static constexpr bool kWiden = !std::is_same_v<Operand, T>;

 public:
  StepProducts(const Tensor& weight, const LayerNormLstmShape& shape, bool backward) : weight_(weight), shape_(shape) {
    if constexpr (Launch::kProducts) {
      weight_ = new_dense(weight, {Launch::packed_size(shape)}, scalar_type_of<A>());
      Launch::pack(pointer<T>(weight), shape, backward, mutable_pointer<A>(weight_));
    } else if constexpr (kWiden) {
      weight_ = torch::stable::to(weight, scalar_type_of<Operand>());
    }
  }

  // to = left weight^T, rows (batch, gates * hidden) of a larger tensor from (batch, hidden).
  void forward(const Tensor& left, Tensor to) {
    if constexpr (Launch::kProducts)
      Launch::multiply(pointer<T>(left), shape_, mutable_pointer<A>(weight_), mutable_pointer<T>(to));
    else if constexpr (kWiden)
      torch::stable::copy_(to, Products<A>(left).product(wide(left, shape_.hidden), weight().transposed()));
    else
      Products<T>(left).multiply(wide(left, shape_.hidden), weight().transposed(), mutable_pointer<T>(to));
  }
  // left weight in the compute type, (batch, hidden) from (batch, gates * hidden).
  Tensor backward(const Tensor& left) {
    if constexpr (Launch::kProducts) {
      Tensor out = new_dense(left, {shape_.batch, shape_.hidden}, scalar_type_of<A>());
      Launch::multiply_back(pointer<T>(left), shape_, mutable_pointer<A>(weight_), mutable_pointer<A>(out));
      return out;
    } else {
      return Products<Operand>(left).product(wide(left, shape_.width()), weight());
    }
  }

 private:
  Matrix<Operand> weight() const { return rows_of<Operand>(weight_, shape_.width(), shape_.hidden); }
  Matrix<Operand> wide(const Tensor& left, int64_t columns) {
    if (kWiden) left_ = torch::stable::to(left, scalar_type_of<Operand>());
    return rows_of<Operand>(kWiden ? *left_ : left, shape_.batch, columns);
  }

  Tensor weight_;
  OptionalTensor left_;
  LayerNormLstmShape shape_;
};

Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}
// A state in the shape of hx.
Tensor new_state(const LayerNormLstmOperands& o, const LayerNormLstmShape& s, ScalarType dtype) {
  return o.hx.dim() == 3 ? new_dense(o.input, {1, s.batch, s.hidden}, dtype)
                         : new_dense(o.input, {s.batch, s.hidden}, dtype);
}
Tensor copy_of(const Tensor& tensor, Tensor to) {
  torch::stable::copy_(to, tensor);
  return to;
}

using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Seven forward(const LayerNormLstmOperands& o, bool save) {
  const LayerNormLstmShape shape = check(o);
  const Tensor& input = o.input;
  const int64_t steps = shape.steps, batch = shape.batch, hidden = shape.hidden, width = shape.width();
  const ScalarType dtype = input.scalar_type(), wide = accumulate_type(input);
  const auto new_saved = [&](bool wanted, int64_t columns, ScalarType type) {
    return wanted ? new_dense(input, {steps, batch, columns}, type) : new_dense(input, {0}, type);
  };
  Tensor output = new_dense(input, {steps, batch, hidden}, dtype);
  Tensor h = copy_of(o.hx, new_state(o, shape, dtype)), c = copy_of(o.cx, new_state(o, shape, wide));
  Tensor products_ih = new_dense(input, {steps, batch, width}, dtype);
  Tensor products_hh = save ? new_dense(input, {steps, batch, width}, dtype) : new_dense(input, {batch, width}, dtype);
  Tensor cells = new_saved(save, hidden, wide), statistics = new_saved(save && shape.norm, kStatistics, wide);
  if (batch > 0) {
    const LayerNormLstmMemory m(o);
    dispatch_floating(kOp, dtype, [&]<class T>(Tag<T>) {
      using A = accumulate_t<T>;
      using Launch = launch::LayerNormLstm<T>;
      Products<T>(input).multiply(rows_of<T>(m.input, steps * batch, shape.input),
                                  rows_of<T>(m.weight_ih, width, shape.input).transposed(),
                                  mutable_pointer<T>(products_ih));
      StepProducts<T> products(m.weight_hh, shape, false);
      Tensor dropped = o.dropout > 0 ? new_dense(input, {batch, hidden}, dtype) : h;
      const auto* key = pointer_or_null<int64_t>(m.key);
      if (o.dropout > 0)
        Launch::drop(pointer<T>(h), mutable_pointer<T>(dropped), 1, key, o.dropout, shape, current_stream(input));
      LayerNormLstmForward<T> call{m.weights<T>(),
                                   pointer<T>(products_ih),
                                   nullptr,
                                   pointer_or_null<int64_t>(m.lengths),
                                   key,
                                   o.epsilon,
                                   o.dropout,
                                   o.zoneout(),
                                   mutable_pointer<T>(output),
                                   mutable_pointer<T>(h),
                                   mutable_pointer<A>(c),
                                   o.dropout > 0 ? mutable_pointer<T>(dropped) : nullptr,
                                   save ? mutable_pointer<A>(cells) : nullptr,
                                   save && shape.norm ? mutable_pointer<A>(statistics) : nullptr};
      Tensor scratch = new_dense(input, {Launch::scratch_size(shape, false)}, wide);
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t t = o.reverse ? steps - 1 - step : step;
        Tensor product = save ? torch::stable::select(products_hh, 0, t) : products_hh;
        products.forward(dropped, product);
        call.products_hh = pointer<T>(product);
        Launch::fwd(call, shape, t, mutable_pointer<A>(scratch), current_stream(input));
      }
    });
  }
  if (!save) products_ih = new_dense(input, {0}, dtype), products_hh = new_dense(input, {0}, dtype);
  return {output, h, in_dtype(c, o.cx.scalar_type()), products_ih, products_hh, cells, statistics};
}

using Eleven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Eleven backward(const LayerNormLstmOperands& o, const LayerNormLstmSaved& saved, const std::vector<bool>& mask) {
  const LayerNormLstmShape shape = check(o, saved, mask);
  const Tensor& input = o.input;
  const int64_t steps = shape.steps, batch = shape.batch, hidden = shape.hidden, width = shape.width();
  const ScalarType dtype = input.scalar_type(), wide = accumulate_type(input);
  const auto wanted = [&](bool want, std::initializer_list<int64_t> sizes) {
    Tensor grad = want ? new_dense(input, sizes, dtype) : new_dense(input, {0}, dtype);
    if (want && batch == 0) torch::stable::zero_(grad);
    return grad;
  };
  Tensor grad_input = wanted(mask[0], {steps, batch, shape.input});
  Tensor grad_hx = new_state(o, shape, dtype), grad_cx = new_state(o, shape, wide);
  Tensor grad_weight_ih = wanted(mask[3], {width, shape.input}), grad_weight_hh = wanted(mask[4], {width, hidden});
  Tensor grad_bias = wanted(mask[5] && o.bias, {width}), grad_norm_ih = wanted(mask[6] && o.norm_ih, {width}),
         grad_norm_hh = wanted(mask[7] && o.norm_hh, {width}),
         grad_norm_cell = wanted(mask[8] && o.norm_cell, {hidden}),
         grad_norm_cell_bias = wanted(mask[9] && o.norm_cell_bias, {hidden}),
         grad_peephole = wanted(mask[10] && o.peephole, {width - hidden});
  if (batch > 0) {
    const LayerNormLstmMemory m(o);
    const OptionalTensor grad_output = dense(saved.grad_output);
    const Tensor c0 = dense(o.cx, wide), output = dense(saved.output), products_ih = dense(saved.products_ih),
                 products_hh = dense(saved.products_hh), cells = dense(saved.cells),
                 statistics = dense(saved.statistics);
    dispatch_floating(kOp, dtype, [&]<class T>(Tag<T>) {
      using A = accumulate_t<T>;
      using Launch = launch::LayerNormLstm<T>;
      Tensor grad_ih = new_dense(input, {steps, batch, width}, dtype);
      Tensor grad_hh = shape.norm ? new_dense(input, {steps, batch, width}, dtype) : grad_ih;
      Tensor grad_h = new_state(o, shape, wide);
      const auto start = [](Tensor& to, const OptionalTensor& from) {
        from ? torch::stable::copy_(to, *from) : torch::stable::zero_(to);
      };
      start(grad_h, saved.grad_h_n);
      start(grad_cx, saved.grad_c_n);
      const LayerNormLstmWeights<T> weights = m.weights<T>();
      const auto places = LayerNormLstmSums::of(shape, weights);
      Tensor sums = new_dense(input, {Launch::sum_rows(shape), places.width}, wide);
      torch::stable::zero_(sums);
      const auto* key = pointer_or_null<int64_t>(m.key);
      LayerNormLstmBackward<T> call{weights,
                                    pointer_or_null<T>(grad_output),
                                    pointer<T>(products_ih),
                                    pointer<T>(products_hh),
                                    pointer<A>(c0),
                                    pointer<A>(cells),
                                    pointer<A>(statistics),
                                    pointer_or_null<int64_t>(m.lengths),
                                    key,
                                    o.dropout,
                                    o.zoneout(),
                                    nullptr,
                                    mutable_pointer<A>(grad_h),
                                    mutable_pointer<A>(grad_cx),
                                    mutable_pointer<T>(grad_ih),
                                    mutable_pointer<T>(grad_hh),
                                    mutable_pointer<A>(sums)};
      StepProducts<T> products(m.weight_hh, shape, true);
      Tensor scratch = new_dense(input, {Launch::scratch_size(shape, true)}, wide);
      OptionalTensor grad_operand;
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t t = o.reverse ? step : steps - 1 - step;
        Launch::bwd(call, shape, t, mutable_pointer<A>(scratch), current_stream(input));
        grad_operand = products.backward(torch::stable::select(grad_hh, 0, t));
        call.grad_operand = pointer<A>(*grad_operand);
      }
      Launch::bwd(call, shape, -1, mutable_pointer<A>(scratch), current_stream(input));
      torch::stable::copy_(grad_hx, grad_h);

      const Products<T> whole(input);
      const Matrix<T> to_ih = rows_of<T>(grad_ih, steps * batch, width);
      if (mask[0]) whole.multiply(to_ih, rows_of<T>(m.weight_ih, width, shape.input), mutable_pointer<T>(grad_input));
      if (mask[3])
        torch::stable::copy_(grad_weight_ih,
                             whole.product(to_ih.transposed(), rows_of<T>(m.input, steps * batch, shape.input)));
      if (mask[4]) {
        Tensor before = states_before(output, dense(o.hx), m.lengths, o.reverse);
        if (o.dropout > 0)
          Launch::drop(pointer<T>(before), mutable_pointer<T>(before), steps, key, o.dropout, shape,
                       current_stream(input));
        torch::stable::copy_(grad_weight_hh, whole.product(rows_of<T>(grad_hh, steps * batch, width).transposed(),
                                                           rows_of<T>(before, steps * batch, hidden)));
      }
      if (places.width == 0) return;
      Tensor totals = Products<A>(input).sum_rows(rows_of<A>(sums, Launch::sum_rows(shape), places.width));
      const auto put = [&](Tensor& grad, int64_t place) {
        if (grad.numel() > 0) torch::stable::copy_(grad, torch::stable::narrow(totals, 0, place, grad.numel()));
      };
      put(grad_bias, places.bias);
      put(grad_norm_ih, places.norm_ih);
      put(grad_norm_hh, places.norm_hh);
      put(grad_norm_cell, places.norm_cell);
      put(grad_norm_cell_bias, places.norm_cell_bias);
      put(grad_peephole, places.peephole);
    });
  }
  return {grad_input,          grad_hx,        in_dtype(grad_cx, o.cx.scalar_type()),
          grad_weight_ih,      grad_weight_hh, grad_bias,
          grad_norm_ih,        grad_norm_hh,   grad_norm_cell,
          grad_norm_cell_bias, grad_peephole};
}

Seven fwd(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih, const Tensor& weight_hh,
          const OptionalTensor& bias, const OptionalTensor& norm_ih, const OptionalTensor& norm_hh,
          const OptionalTensor& norm_cell, const OptionalTensor& norm_cell_bias, const OptionalTensor& peephole,
          const OptionalTensor& lengths, const OptionalTensor& key, bool coupled, double eps, double zoneout_hidden,
          double zoneout_cell, double dropout, bool training, bool reverse, bool save) {
  return forward(
      {input,    hx,      cx,  weight_ih, weight_hh, bias,           norm_ih,      norm_hh, norm_cell, norm_cell_bias,
       peephole, lengths, key, coupled,   eps,       zoneout_hidden, zoneout_cell, dropout, training,  reverse},
      save);
}

Eleven bwd(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
           const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih, const Tensor& weight_hh,
           const OptionalTensor& bias, const OptionalTensor& norm_ih, const OptionalTensor& norm_hh,
           const OptionalTensor& norm_cell, const OptionalTensor& norm_cell_bias, const OptionalTensor& peephole,
           const OptionalTensor& lengths, const OptionalTensor& key, const Tensor& output, const Tensor& products_ih,
           const Tensor& products_hh, const Tensor& cells, const Tensor& statistics, bool coupled, double eps,
           double zoneout_hidden, double zoneout_cell, double dropout, bool training, bool reverse,
           std::vector<bool> output_mask) {
  return backward(
      {input,    hx,      cx,  weight_ih, weight_hh, bias,           norm_ih,      norm_hh, norm_cell, norm_cell_bias,
       peephole, lengths, key, coupled,   eps,       zoneout_hidden, zoneout_cell, dropout, training,  reverse},
      {grad_output, grad_h_n, grad_c_n, output, products_ih, products_hh, cells, statistics}, output_mask);
}

}  // namespace

PYNN_LIBRARY(m) {
  m.impl("layer_norm_lstm_fwd", TORCH_BOX(&fwd));
  m.impl("layer_norm_lstm_bwd", TORCH_BOX(&bwd));
}

#ifdef PYNN_CHECKS
namespace {

void fwd_check(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
               const Tensor& weight_hh, const OptionalTensor& bias, const OptionalTensor& norm_ih,
               const OptionalTensor& norm_hh, const OptionalTensor& norm_cell, const OptionalTensor& norm_cell_bias,
               const OptionalTensor& peephole, const OptionalTensor& lengths, const OptionalTensor& key, bool coupled,
               double eps, double zoneout_hidden, double zoneout_cell, double dropout, bool training, bool reverse,
               bool) {
  check({input,    hx,      cx,  weight_ih, weight_hh, bias,           norm_ih,      norm_hh, norm_cell, norm_cell_bias,
         peephole, lengths, key, coupled,   eps,       zoneout_hidden, zoneout_cell, dropout, training,  reverse});
}

void bwd_check(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
               const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
               const Tensor& weight_hh, const OptionalTensor& bias, const OptionalTensor& norm_ih,
               const OptionalTensor& norm_hh, const OptionalTensor& norm_cell, const OptionalTensor& norm_cell_bias,
               const OptionalTensor& peephole, const OptionalTensor& lengths, const OptionalTensor& key,
               const Tensor& output, const Tensor& products_ih, const Tensor& products_hh, const Tensor& cells,
               const Tensor& statistics, bool coupled, double eps, double zoneout_hidden, double zoneout_cell,
               double dropout, bool training, bool reverse, std::vector<bool> output_mask) {
  check({input,    hx,      cx,  weight_ih, weight_hh, bias,           norm_ih,      norm_hh, norm_cell, norm_cell_bias,
         peephole, lengths, key, coupled,   eps,       zoneout_hidden, zoneout_cell, dropout, training,  reverse},
        {grad_output, grad_h_n, grad_c_n, output, products_ih, products_hh, cells, statistics}, output_mask);
}

}  // namespace

PYNN_CHECKS(m) {
  m.impl("layer_norm_lstm_fwd_check", TORCH_BOX(&fwd_check));
  m.impl("layer_norm_lstm_bwd_check", TORCH_BOX(&bwd_check));
}
#endif

}  // namespace pynn
