// Child-sum tree LSTM on a GPU: the pointwise work of a level, a thread per unit of a node. Neighbouring threads have
// neighbouring units, so every access is a run of elements; the children of a node are few and walked one by one.
#pragma once
#include "recurrent_cells.cuh"
#include "tree_lstm.h"

namespace pynn::cuda {
namespace {
namespace tree {
using recurrent::sigmoid;
using recurrent::tanh_of;

constexpr int kThreads = 256;  // four blocks on a processor leave 64 registers, which spares the compiler spilling

// Calls body(node, unit) for this thread's share of a level.
template <class Body>
__device__ void each_unit(const Tree& tree, TreeLevel level, const Body& body) {
  const int64_t count = level.count() * tree.hidden, step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step)
    body(level.first + i / tree.hidden, i % tree.hidden);
}

template <class Body>
__device__ void each_child(const Tree& tree, TreeLevel level, int64_t node, const Body& body) {
  for (int64_t e = tree.begin(node), end = tree.end(node); e < end; ++e) {
    const int64_t child = tree.children[e];
    if (child >= 0 && child < level.first) body(child);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_kernel(const T* h, T* sums, Tree tree, TreeLevel level) {
  each_unit(tree, level, [&](int64_t n, int64_t u) {
    accumulate_t<T> sum = 0;
    each_child(tree, level, n, [&](int64_t child) { sum += to_float(h[child * tree.hidden + u]); });
    sums[n * tree.hidden + u] = from_float<T>(sum);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) forward_kernel(TreeLstmForward<T> call, Tree tree, TreeLevel level) {
  using A = accumulate_t<T>;
  const int64_t hidden = tree.hidden;
  each_unit(tree, level, [&](int64_t n, int64_t u) {
    T* const gates = call.gates + n * 4 * hidden + u;
    A pre[4];
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      pre[gate] = to_float(gates[gate * hidden]);
      if (call.bias) pre[gate] += to_float(call.bias[gate * hidden + u]);
      if (gate < 3 && call.products) pre[gate] += call.products[((n - level.first) * 3 + gate) * hidden + u];
    }
    const A i = sigmoid<T>(pre[0]), g = tanh_of(pre[1]), o = sigmoid<T>(pre[2]);
    A c = i * g;
    each_child(tree, level, n, [&](int64_t child) {
      const A f = sigmoid<T>(pre[3] + call.forgets[child * hidden + u]);
      call.gates[(child * 4 + 3) * hidden + u] = from_float<T>(f);
      c = fma(f, call.c[child * hidden + u], c);
    });
    gates[0] = from_float<T>(i);
    gates[hidden] = from_float<T>(g);
    gates[2 * hidden] = from_float<T>(o);
    call.c[n * hidden + u] = c;
    call.h[n * hidden + u] = from_float<T>(o * tanh_of(c));
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) backward_kernel(TreeLstmBackward<T> call, Tree tree, TreeLevel level) {
  using A = accumulate_t<T>;
  const int64_t hidden = tree.hidden;
  each_unit(tree, level, [&](int64_t n, int64_t u) {
    const int64_t at = n * hidden + u, parent = call.parents[n];
    const T* const gates = call.gates + n * 4 * hidden + u;
    const A i = to_float(gates[0]), g = to_float(gates[hidden]), o = to_float(gates[2 * hidden]);
    const A activated = tanh_of(call.c[at]);
    A grad = call.grad_h ? to_float(call.grad_h[at]) : A(0);
    A d = call.grad_c ? call.grad_c[at] : A(0);
    if (parent >= 0) {
      grad += call.grad_sums[parent * hidden + u] + call.from_forget[(n - level.first) * hidden + u];
      d = fma(call.grad_cells[parent * hidden + u], A(to_float(gates[3 * hidden])), d);
    }
    d = fma(grad * o, fma(-activated, activated, A(1)), d);
    call.grad_cells[at] = d;
    A forget = 0;
    each_child(tree, level, n, [&](int64_t child) {
      const A f = to_float(call.gates[(child * 4 + 3) * hidden + u]);
      const A to_child = d * call.c[child * hidden + u] * fma(-f, f, f);
      call.grad_forgets[child * hidden + u] = from_float<T>(to_child);
      forget += to_child;
      if (u == 0) call.parents[child] = n;
    });
    T* const to = call.grad_gates + n * 4 * hidden + u;
    to[0] = from_float<T>(d * g * fma(-i, i, i));
    to[hidden] = from_float<T>(d * i * fma(-g, g, A(1)));
    to[2 * hidden] = from_float<T>(grad * activated * fma(-o, o, o));
    to[3 * hidden] = from_float<T>(forget);
  });
}

inline unsigned blocks_of(const Tree& tree, TreeLevel level) {
  return unsigned(min(ceil_div(level.count() * tree.hidden, kThreads), int64_t(1) << 20));
}

}  // namespace tree
}  // namespace

template <class T>
void TreeLstm<T>::sum_children(const T* h, T* sums, const Tree& tree, TreeLevel level, void* stream) {
  LAUNCH((tree::sum_kernel<T>), tree::blocks_of(tree, level), tree::kThreads, 0, stream, h, sums, tree, level);
}

template <class T>
void TreeLstm<T>::fwd(const TreeLstmForward<T>& call, const Tree& tree, TreeLevel level, void* stream) {
  LAUNCH((tree::forward_kernel<T>), tree::blocks_of(tree, level), tree::kThreads, 0, stream, call, tree, level);
}

template <class T>
void TreeLstm<T>::bwd(const TreeLstmBackward<T>& call, const Tree& tree, TreeLevel level, void* stream) {
  LAUNCH((tree::backward_kernel<T>), tree::blocks_of(tree, level), tree::kThreads, 0, stream, call, tree, level);
}

template struct TreeLstm<double>;
template struct TreeLstm<float>;
template struct TreeLstm<Half>;
template struct TreeLstm<BFloat16>;

}  // namespace pynn::cuda
