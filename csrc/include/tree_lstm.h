// Child-sum tree LSTM (Tai, Socher, Manning 2015), the pointwise work of one level of nodes.
//
//   s = sum of h over the children,   i, o = sigmoid(.), g = tanh(.) of weight_ih x + weight_hh s + bias
//   f of each child k = sigmoid(weight_ih x + weight_hh h[k] + bias),   c = i * g + sum over k of f[k] * c[k],
//   h = o * tanh(c)
//
// Nodes are numbered level by level: the children of a node of a level are nodes of earlier levels, and a node has at
// most one parent. The children of node n are children[child_offsets[n] .. child_offsets[n + 1]). The products are the
// caller's, with the library's matrix multiplication. The f of a child is kept in the child's row.
//
// In this contract, the four quantities of a unit are in the order i g o f, so that those of a node's own gates are
// neighbours. An index of a child outside the levels before is passed over, never followed.
#pragma once
#include "dtype.h"

namespace pynn {

struct Tree {
  int64_t nodes, hidden, edges;
  const int64_t* child_offsets;  // (nodes + 1)
  const int64_t* children;       // (edges)

  // The edges of a node, whatever the offsets hold.
  PYNN_HD int64_t begin(int64_t node) const { return clamped(child_offsets[node]); }
  PYNN_HD int64_t end(int64_t node) const { return clamped(child_offsets[node + 1]); }

 private:
  PYNN_HD int64_t clamped(int64_t edge) const { return edge < 0 ? 0 : edge > edges ? edges : edge; }
};

// Nodes first <= n < last.
struct TreeLevel {
  int64_t first, last;
  PYNN_HD int64_t count() const { return last - first; }
};

template <class T>
struct TreeLstmForward {
  using A = accumulate_t<T>;
  T* gates;           // (nodes, 4 hidden): weight_ih x of i g o f; then i g o of the level, and f of its children
  const A* products;  // (level, 3 hidden): weight_hh s of i g o, or nullptr: no children
  const A* forgets;   // (nodes, hidden): weight_hh h of f for the nodes of earlier levels
  const T* bias;      // (4 hidden) or nullptr
  T* h;               // (nodes, hidden)
  A* c;               // (nodes, hidden)
};

template <class T>
struct TreeLstmBackward {
  using A = accumulate_t<T>;
  const T* grad_h;       // (nodes, hidden) or nullptr
  const A* grad_c;       // (nodes, hidden) or nullptr
  const T* gates;        // (nodes, 4 hidden): i g o, and f as a child
  const A* c;            // (nodes, hidden)
  const A* grad_sums;    // (nodes, hidden): gradient of s, known for the later levels
  const A* from_forget;  // (level, hidden): what reaches h through the f of its parent, or nullptr: no parents
  int64_t* parents;      // (nodes): known for the level, -1 without a parent; written for its children
  A* grad_cells;         // (nodes, hidden): the whole gradient of c; read for the parents, written for the level
  T* grad_gates;         // (nodes, 4 hidden), of the level: before the activations; f is the sum over its children
  T* grad_forgets;       // (nodes, hidden): of the children's f before the activation
};

}  // namespace pynn

namespace pynn::PYNN_LAUNCH_NAMESPACE {

template <class T>
struct TreeLstm {
  // sums[n] = the sum of h over the children of n, for the nodes of the level.
  static void sum_children(const T* h, T* sums, const Tree& tree, TreeLevel level, void* stream);
  static void fwd(const TreeLstmForward<T>& call, const Tree& tree, TreeLevel level, void* stream);
  static void bwd(const TreeLstmBackward<T>& call, const Tree& tree, TreeLevel level, void* stream);
};

}  // namespace pynn::PYNN_LAUNCH_NAMESPACE
