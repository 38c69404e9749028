// Child-sum tree LSTM on the CPU: the pointwise work of a level, a vector of units at a time.
#include "tree_lstm.h"

#include "parallel.h"
#include "recurrent_activation.h"
#include "recurrent_tile.h"

namespace pynn::cpu {
namespace {
using recurrent::load_some;
using recurrent::store_some;

// Calls body(node, unit, count) for the vectors of units of every node of a level.
template <class T, class Body>
void each_vector(const Tree& tree, TreeLevel level, const Body& body) {
  constexpr int64_t L = kComputeLanes<T>;
  const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(tree.hidden, 1));
  parallel_for(level.count(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = level.first + begin; n < level.first + end; ++n)
      for (int64_t u = 0; u < tree.hidden; u += L) body(n, u, std::min(L, tree.hidden - u));
  });
}

// Calls body(child) for the children of a node.
template <class Body>
void each_child(const Tree& tree, TreeLevel level, int64_t node, const Body& body) {
  for (int64_t e = tree.begin(node), end = tree.end(node); e < end; ++e)
    if (const int64_t child = tree.children[e]; child >= 0 && child < level.first) body(child);
}

}  // namespace

template <class T>
void TreeLstm<T>::sum_children(const T* h, T* sums, const Tree& tree, TreeLevel level, void*) {
  each_vector<T>(tree, level, [&](int64_t n, int64_t u, int64_t count) {
    Vec<accumulate_t<T>> sum{};
    each_child(tree, level, n, [&](int64_t child) { sum += load_some(h + child * tree.hidden + u, count); });
    store_some(sums + n * tree.hidden + u, count, sum);
  });
}

template <class T>
void TreeLstm<T>::fwd(const TreeLstmForward<T>& call, const Tree& tree, TreeLevel level, void*) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const int64_t hidden = tree.hidden;
  each_vector<T>(tree, level, [&](int64_t n, int64_t u, int64_t count) {
    T* const gates = call.gates + n * 4 * hidden + u;
    const auto input_share = [&](int64_t gate) {
      const V x = load_some(gates + gate * hidden, count);
      return call.bias ? V(x + load_some(call.bias + gate * hidden + u, count)) : x;
    };
    const auto pre = [&](int64_t gate) {
      if (!call.products) return input_share(gate);
      return V(input_share(gate) + load_some(call.products + ((n - level.first) * 3 + gate) * hidden + u, count));
    };
    const V i = sigmoid(pre(0)), g = tanh(pre(1)), o = sigmoid(pre(2)), share = input_share(3);
    V c = i * g;
    each_child(tree, level, n, [&](int64_t child) {
      const V f = sigmoid(V(share + load_some(call.forgets + child * hidden + u, count)));
      store_some(call.gates + (child * 4 + 3) * hidden + u, count, f);
      c = fma(f, load_some(call.c + child * hidden + u, count), c);
    });
    store_some(gates, count, i);
    store_some(gates + hidden, count, g);
    store_some(gates + 2 * hidden, count, o);
    store_some(call.c + n * hidden + u, count, c);
    store_some(call.h + n * hidden + u, count, V(o * tanh(c)));
  });
}

template <class T>
void TreeLstm<T>::bwd(const TreeLstmBackward<T>& call, const Tree& tree, TreeLevel level, void*) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const int64_t hidden = tree.hidden;
  each_vector<T>(tree, level, [&](int64_t n, int64_t u, int64_t count) {
    const int64_t at = n * hidden + u, parent = call.parents[n];
    const T* const gates = call.gates + n * 4 * hidden + u;
    const V i = load_some(gates, count), g = load_some(gates + hidden, count), o = load_some(gates + 2 * hidden, count);
    const V activated = tanh(load_some(call.c + at, count));
    V grad = call.grad_h ? load_some(call.grad_h + at, count) : V{};
    V d = call.grad_c ? load_some(call.grad_c + at, count) : V{};
    if (parent >= 0) {
      grad += load_some(call.grad_sums + parent * hidden + u, count) +
              load_some(call.from_forget + (n - level.first) * hidden + u, count);
      d = fma(load_some(call.grad_cells + parent * hidden + u, count), load_some(gates + 3 * hidden, count), d);
    }
    d = fma(grad * o, fma(-activated, activated, V{} + 1), d);
    store_some(call.grad_cells + at, count, d);
    V forget{};
    each_child(tree, level, n, [&](int64_t child) {
      const V f = load_some(call.gates + (child * 4 + 3) * hidden + u, count);
      const V to_child = d * load_some(call.c + child * hidden + u, count) * fma(-f, f, f);
      store_some(call.grad_forgets + child * hidden + u, count, to_child);
      forget += to_child;
    });
    T* const to = call.grad_gates + n * 4 * hidden + u;
    store_some(to, count, V(d * g * fma(-i, i, i)));
    store_some(to + hidden, count, V(d * i * fma(-g, g, V{} + 1)));
    store_some(to + 2 * hidden, count, V(grad * activated * fma(-o, o, o)));
    store_some(to + 3 * hidden, count, forget);
  });
  for (int64_t n = level.first; n < level.last; ++n)
    each_child(tree, level, n, [&](int64_t child) { call.parents[child] = n; });
}

template struct TreeLstm<double>;
template struct TreeLstm<float>;
template struct TreeLstm<Half>;
template struct TreeLstm<BFloat16>;

}  // namespace pynn::cpu
