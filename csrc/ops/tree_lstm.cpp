// tree_lstm: validation, allocation, the products of each level around the launchers. Rows of weights are i g o f here.
#include "tree_lstm.h"

#include "recurrent_products.h"

namespace pynn {
namespace {

constexpr const char* kOp = "tree_lstm";

struct TreeOperands {
  const Tensor &input, &weight_ih, &weight_hh;
  const OptionalTensor& bias;
  const Tensor &child_offsets, &children;
  const std::vector<int64_t>& levels;
};

struct TreeShape {
  int64_t nodes, input, hidden, edges;
};

void check_index(const char* name, const Tensor& tensor, const Tensor& input) {
  check_rank(kOp, name, tensor, 1);
  PYNN_CHECK(tensor.scalar_type() == ScalarType::Long, kOp, ": expected ", name, " to be int64, got ",
             name_of(tensor.scalar_type()));
  check_same_device(kOp, name, tensor, "input", input);
}

// Every child once, and of an earlier level than its parent. Where that can be read without waiting for a device.
void check_edges(const TreeOperands& o, const TreeShape& shape) {
  if (!o.input.device().is_cpu()) return;
  const Tensor offsets = dense(o.child_offsets), children = dense(o.children);
  const int64_t *begin = pointer<int64_t>(offsets), *child = pointer<int64_t>(children);
  PYNN_CHECK(begin[0] == 0 && begin[shape.nodes] == shape.edges, kOp, ": expected child_offsets from 0 to ",
             shape.edges, ", the number of children, got ", begin[0], " to ", begin[shape.nodes]);
  std::vector<bool> seen(size_t(shape.nodes), false);
  for (size_t level = 0; level + 1 < o.levels.size(); ++level)
    for (int64_t n = o.levels[level]; n < o.levels[level + 1]; ++n) {
      PYNN_CHECK(begin[n] >= 0 && begin[n] <= begin[n + 1] && begin[n + 1] <= shape.edges, kOp,
                 ": expected child_offsets that do not decrease, got ", begin[n], " and ", begin[n + 1], " at node ",
                 n);
      for (int64_t e = begin[n]; e < begin[n + 1]; ++e) {
        PYNN_CHECK(child[e] >= 0 && child[e] < o.levels[level], kOp, ": expected the children of node ", n,
                   " in earlier levels, below ", o.levels[level], ", got ", child[e]);
        PYNN_CHECK(!seen[size_t(child[e])], kOp, ": expected at most one parent of each node, node ", child[e],
                   " has two");
        seen[size_t(child[e])] = true;
      }
    }
}

TreeShape check(const TreeOperands& o) {
  check_floating(kOp, "input", o.input);
  check_rank(kOp, "input", o.input, 2);
  check_rank(kOp, "weight_hh", o.weight_hh, 2);
  const TreeShape shape{o.input.size(0), o.input.size(1), o.weight_hh.size(1),
                        o.children.dim() == 1 ? o.children.size(0) : 0};
  PYNN_CHECK(shape.hidden > 0 && shape.input > 0, kOp, ": expected input_size and hidden_size greater than 0, got ",
             shape.input, " and ", shape.hidden);
  checked_multiply(kOp, checked_multiply(kOp, shape.nodes, std::max(shape.input, 4 * shape.hidden)), sizeof(double));
  check_like_input(kOp, "weight_ih", o.weight_ih, {checked_multiply(kOp, 4, shape.hidden), shape.input}, o.input);
  check_like_input(kOp, "weight_hh", o.weight_hh, {4 * shape.hidden, shape.hidden}, o.input);
  check_like_input(kOp, "bias", o.bias, {4 * shape.hidden}, o.input);
  check_index("child_offsets", o.child_offsets, o.input);
  check_index("children", o.children, o.input);
  check_shape(kOp, "child_offsets", o.child_offsets, {shape.nodes + 1});
  PYNN_CHECK(!o.levels.empty() && o.levels.front() == 0 && o.levels.back() == shape.nodes, kOp,
             ": expected levels from 0 to ", shape.nodes, ", the number of nodes");
  for (size_t level = 0; level + 1 < o.levels.size(); ++level)
    PYNN_CHECK(o.levels[level] < o.levels[level + 1], kOp, ": expected levels that increase, got ", o.levels[level],
               " and ", o.levels[level + 1]);
  check_edges(o, shape);
  return shape;
}

struct TreeSaved {
  const OptionalTensor &grad_h, &grad_c;
  const Tensor &h, &c, &gates, &sums;
};

TreeShape check(const TreeOperands& o, const TreeSaved& saved, const std::vector<bool>& mask) {
  const TreeShape shape = check(o);
  const auto check_wide = [&](const char* name, const Tensor& tensor) {
    check_shape(kOp, name, tensor, {shape.nodes, shape.hidden});
    PYNN_CHECK(tensor.scalar_type() == accumulate_type(o.input), kOp, ": expected ", name, " to be ",
               name_of(accumulate_type(o.input)), ", got ", name_of(tensor.scalar_type()));
    check_same_device(kOp, name, tensor, "input", o.input);
  };
  check_like_input(kOp, "grad_h", saved.grad_h, {shape.nodes, shape.hidden}, o.input);
  if (saved.grad_c) check_wide("grad_c", *saved.grad_c);
  check_like_input(kOp, "h", saved.h, {shape.nodes, shape.hidden}, o.input);
  check_wide("c", saved.c);
  check_like_input(kOp, "gates", saved.gates, {shape.nodes, 4 * shape.hidden}, o.input);
  check_like_input(kOp, "sums", saved.sums, {shape.nodes, shape.hidden}, o.input);
  PYNN_CHECK(mask.size() == 4, kOp, ": expected output_mask of 4 values, got ", mask.size());
  return shape;
}

// What both passes read.
struct TreeMemory {
  TreeMemory(const TreeOperands& o, const TreeShape& s)
      : shape(s),
        input(dense(o.input)),
        weight_ih(dense(o.weight_ih)),
        weight_hh(dense(o.weight_hh)),
        bias(dense(o.bias)),
        offsets(dense(o.child_offsets)),
        children(dense(o.children)),
        tree{s.nodes, s.hidden, s.edges, pointer<int64_t>(offsets), pointer<int64_t>(children)} {}

  // Rows first <= n < last of a matrix of `width` columns, the first `columns` of them.
  template <class T>
  static Matrix<T> rows(const T* data, TreeLevel level, int64_t width, int64_t columns) {
    return {data + level.first * width, level.count(), columns, width};
  }
  template <class T>
  Matrix<T> hidden_weight() const {
    return {pointer<T>(weight_hh), 4 * shape.hidden, shape.hidden, shape.hidden};
  }
  // Rows of i g o, and of f.
  template <class T>
  Matrix<T> own_weight() const {
    return {pointer<T>(weight_hh), 3 * shape.hidden, shape.hidden, shape.hidden};
  }
  template <class T>
  Matrix<T> forget_weight() const {
    return {pointer<T>(weight_hh) + 3 * shape.hidden * shape.hidden, shape.hidden, shape.hidden, shape.hidden};
  }

  TreeShape shape;
  Tensor input, weight_ih, weight_hh;
  OptionalTensor bias;
  Tensor offsets, children;
  Tree tree;
};

void put_rows(Tensor& to, TreeLevel level, const Tensor& from) {
  Tensor part = torch::stable::narrow(to, 0, level.first, level.count());
  torch::stable::copy_(part, from);
}

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four fwd(const Tensor& input, const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias,
         const Tensor& child_offsets, const Tensor& children, std::vector<int64_t> levels) {
  const TreeOperands o{input, weight_ih, weight_hh, bias, child_offsets, children, levels};
  const TreeShape shape = check(o);
  const ScalarType dtype = input.scalar_type(), wide = accumulate_type(input);
  Tensor h = new_dense(input, {shape.nodes, shape.hidden}, dtype),
         c = new_dense(input, {shape.nodes, shape.hidden}, wide);
  Tensor gates = new_dense(input, {shape.nodes, 4 * shape.hidden}, dtype);
  Tensor sums = new_dense(input, {shape.nodes, shape.hidden}, dtype);
  if (shape.nodes == 0) return {h, c, gates, sums};
  torch::stable::zero_(sums);  // of the leaves, which no launch writes
  const TreeMemory m(o, shape);
  dispatch_floating(kOp, dtype, [&]<class T>(Tag<T>) {
    using A = accumulate_t<T>;
    using Launch = launch::TreeLstm<T>;
    const Products<T> products(m.input);
    const Matrix<T> x{pointer<T>(m.input), shape.nodes, shape.input, shape.input};
    const Matrix<T> weight{pointer<T>(m.weight_ih), 4 * shape.hidden, shape.input, shape.input};
    products.multiply(x, weight.transposed(), mutable_pointer<T>(gates));
    Tensor forgets = new_dense(input, {shape.nodes, shape.hidden}, wide);
    for (size_t l = 0; l + 1 < levels.size(); ++l) {
      const TreeLevel level{levels[l], levels[l + 1]};
      OptionalTensor own;
      if (l > 0) {
        Launch::sum_children(pointer<T>(h), mutable_pointer<T>(sums), m.tree, level, current_stream(input));
        own = products.product(m.rows(pointer<T>(sums), level, shape.hidden, shape.hidden),
                               m.template own_weight<T>().transposed());
      }
      const TreeLstmForward<T> call{mutable_pointer<T>(gates),  pointer_or_null<A>(own), pointer<A>(forgets),
                                    pointer_or_null<T>(m.bias), mutable_pointer<T>(h),   mutable_pointer<A>(c)};
      Launch::fwd(call, m.tree, level, current_stream(input));
      if (l + 2 < levels.size())
        put_rows(forgets, level,
                 products.product(m.rows(pointer<T>(h), level, shape.hidden, shape.hidden),
                                  m.template forget_weight<T>().transposed()));
    }
  });
  return {h, c, gates, sums};
}

Four bwd(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& input, const Tensor& weight_ih,
         const Tensor& weight_hh, const OptionalTensor& bias, const Tensor& child_offsets, const Tensor& children,
         std::vector<int64_t> levels, const Tensor& h_, const Tensor& c_, const Tensor& gates_, const Tensor& sums_,
         std::vector<bool> output_mask) {
  const TreeOperands o{input, weight_ih, weight_hh, bias, child_offsets, children, levels};
  const TreeShape shape = check(o, {grad_h, grad_c, h_, c_, gates_, sums_}, output_mask);
  const ScalarType dtype = input.scalar_type(), wide = accumulate_type(input);
  const auto wanted = [&](bool want, std::initializer_list<int64_t> sizes) {
    Tensor grad = want ? new_dense(input, sizes, dtype) : new_dense(input, {0}, dtype);
    if (want && shape.nodes == 0) torch::stable::zero_(grad);
    return grad;
  };
  Tensor grad_input = wanted(output_mask[0], {shape.nodes, shape.input});
  Tensor grad_weight_ih = wanted(output_mask[1], {4 * shape.hidden, shape.input});
  Tensor grad_weight_hh = wanted(output_mask[2], {4 * shape.hidden, shape.hidden});
  Tensor grad_bias = wanted(output_mask[3] && bias, {4 * shape.hidden});
  if (shape.nodes == 0) return {grad_input, grad_weight_ih, grad_weight_hh, grad_bias};
  const TreeMemory m(o, shape);
  const Tensor h = dense(h_), c = dense(c_), gates = dense(gates_), sums = dense(sums_);
  const OptionalTensor dh = dense(grad_h), dc = dense(grad_c);
  dispatch_floating(kOp, dtype, [&]<class T>(Tag<T>) {
    using A = accumulate_t<T>;
    using Launch = launch::TreeLstm<T>;
    const Products<T> products(m.input);
    const int64_t hidden = shape.hidden;
    Tensor grad_gates = new_dense(input, {shape.nodes, 4 * hidden}, dtype);
    Tensor grad_forgets = new_dense(input, {shape.nodes, hidden}, dtype);
    Tensor grad_sums = new_dense(input, {shape.nodes, hidden}, wide),
           grad_cells = new_dense(input, {shape.nodes, hidden}, wide);
    Tensor parents = new_dense(input, {shape.nodes}, ScalarType::Long);
    torch::stable::fill_(parents, -1);
    torch::stable::zero_(grad_forgets);  // of the nodes without a parent, which no launch writes
    for (size_t l = levels.size() - 1; l-- > 0;) {
      const TreeLevel level{levels[l], levels[l + 1]};
      OptionalTensor from_forget;
      if (l + 2 < levels.size())
        from_forget =
            products.product(m.rows(pointer<T>(grad_forgets), level, hidden, hidden), m.template forget_weight<T>());
      const TreeLstmBackward<T> call{pointer_or_null<T>(dh),
                                     pointer_or_null<A>(dc),
                                     pointer<T>(gates),
                                     pointer<A>(c),
                                     pointer<A>(grad_sums),
                                     pointer_or_null<A>(from_forget),
                                     mutable_pointer<int64_t>(parents),
                                     mutable_pointer<A>(grad_cells),
                                     mutable_pointer<T>(grad_gates),
                                     mutable_pointer<T>(grad_forgets)};
      Launch::bwd(call, m.tree, level, current_stream(input));
      if (l > 0)
        put_rows(grad_sums, level,
                 products.product(m.rows(pointer<T>(grad_gates), level, 4 * hidden, 3 * hidden),
                                  m.template own_weight<T>()));
    }
    const Matrix<T> all{pointer<T>(grad_gates), shape.nodes, 4 * hidden, 4 * hidden};
    if (output_mask[0]) {
      const Matrix<T> weight{pointer<T>(m.weight_ih), 4 * hidden, shape.input, shape.input};
      products.multiply(all, weight, mutable_pointer<T>(grad_input));
    }
    if (output_mask[1]) {
      const Matrix<T> x{pointer<T>(m.input), shape.nodes, shape.input, shape.input};
      torch::stable::copy_(grad_weight_ih, products.product(all.transposed(), x));
    }
    if (output_mask[2]) {
      const Matrix<T> s{pointer<T>(sums), shape.nodes, hidden, hidden},
          states{pointer<T>(h), shape.nodes, hidden, hidden};
      const Matrix<T> forgets{pointer<T>(grad_forgets), shape.nodes, hidden, hidden};
      put_rows(grad_weight_hh, {0, 3 * hidden}, products.product(all.from_column(0, 3 * hidden).transposed(), s));
      put_rows(grad_weight_hh, {3 * hidden, 4 * hidden}, products.product(forgets.transposed(), states));
    }
    if (output_mask[3] && bias) torch::stable::copy_(grad_bias, products.sum_rows(all));
  });
  return {grad_input, grad_weight_ih, grad_weight_hh, grad_bias};
}

}  // namespace

PYNN_LIBRARY(m) {
  m.impl("tree_lstm_fwd", TORCH_BOX(&fwd));
  m.impl("tree_lstm_bwd", TORCH_BOX(&bwd));
}

#ifdef PYNN_CHECKS
namespace {

void fwd_check(const Tensor& input, const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias,
               const Tensor& child_offsets, const Tensor& children, std::vector<int64_t> levels) {
  check({input, weight_ih, weight_hh, bias, child_offsets, children, levels});
}

void bwd_check(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& input, const Tensor& weight_ih,
               const Tensor& weight_hh, const OptionalTensor& bias, const Tensor& child_offsets, const Tensor& children,
               std::vector<int64_t> levels, const Tensor& h, const Tensor& c, const Tensor& gates, const Tensor& sums,
               std::vector<bool> output_mask) {
  check({input, weight_ih, weight_hh, bias, child_offsets, children, levels}, {grad_h, grad_c, h, c, gates, sums},
        output_mask);
}

}  // namespace

PYNN_CHECKS(m) {
  m.impl("tree_lstm_fwd_check", TORCH_BOX(&fwd_check));
  m.impl("tree_lstm_bwd_check", TORCH_BOX(&bwd_check));
}
#endif

}  // namespace pynn
