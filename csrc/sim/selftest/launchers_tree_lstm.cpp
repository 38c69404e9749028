// Every launcher of csrc/include/tree_lstm.h: leaves, chains and wide nodes, with and without a bias and each gradient,
// more units than a block has threads, and offsets and children that point nowhere.
#include "launchers.h"
#include "tree_lstm.h"

namespace {

using launchers::Run;
using pynn::Tree;
using pynn::TreeLevel;

// Three levels: five leaves; two nodes with two children and one, and one with none of this level; a root of both.
constexpr int64_t kNodes = 8, kEdges = 5;
constexpr TreeLevel kLevels[] = {{0, 5}, {5, 7}, {7, 8}};
constexpr int64_t kOffsets[kNodes + 1] = {0, 0, 0, 0, 0, 0, 2, 3, 5}, kChildren[kEdges] = {0, 3, 1, 5, 6};
constexpr int64_t kWildOffsets[kNodes + 1] = {-3, 0, 0, 0, 0, 0, 2, 99, 99}, kWildChildren[kEdges] = {-1, 9, 1, 5, 7};

template <class T>
void launch_case(Run& run, int64_t hidden, bool bias, bool grad_h, bool grad_c, bool wild) {
  using A = pynn::accumulate_t<T>;
  using TreeLstm = launch::TreeLstm<T>;
  const size_t size = size_t(kNodes * hidden);
  const int64_t* offsets =
      run.input<int64_t>(kNodes + 1, [&](size_t i) { return wild ? kWildOffsets[i] : kOffsets[i]; });
  const int64_t* children =
      run.input<int64_t>(kEdges, [&](size_t i) { return wild ? kWildChildren[i] : kChildren[i]; });
  const Tree tree{kNodes, hidden, kEdges, offsets, children};
  const auto copy_of = [&]<class E>(const E* values, size_t count) {
    E* memory = run.output<E>(count);
    for (size_t i = 0; i < count; ++i) memory[i] = values[i];
    return memory;
  };
  T* gates = copy_of(run.normals<T>(4 * size), 4 * size);
  const T* b = bias ? run.normals<T>(size_t(4 * hidden)) : nullptr;
  T *h = copy_of(run.normals<T>(size), size), *sums = copy_of(run.normals<T>(size), size);
  A* c = copy_of(run.normals<A>(size), size);
  const A *forgets = run.normals<A>(size), *products = run.normals<A>(size_t(3 * 5 * hidden));
  for (const TreeLevel& level : kLevels) {
    if (level.first > 0) TreeLstm::sum_children(h, sums, tree, level, nullptr);
    TreeLstm::fwd({gates, level.first > 0 ? products : nullptr, forgets, b, h, c}, tree, level, nullptr);
  }
  const T* dh = grad_h ? run.normals<T>(size) : nullptr;
  const A *dc = grad_c ? run.normals<A>(size) : nullptr, *grad_sums = run.normals<A>(size);
  const A* from_forget = run.normals<A>(size_t(5 * hidden));
  int64_t* parents = run.output<int64_t>(kNodes);
  for (int64_t n = 0; n < kNodes; ++n) parents[n] = -1;
  A* grad_cells = run.output<A>(size);
  T *grad_gates = run.output<T>(4 * size), *grad_forgets = copy_of(run.normals<T>(size), size);
  for (int l = 2; l >= 0; --l)
    TreeLstm::bwd(
        {dh, dc, gates, c, grad_sums, l < 2 ? from_forget : nullptr, parents, grad_cells, grad_gates, grad_forgets},
        tree, kLevels[l], nullptr);
}

void launch_all(Run& run) {
  launchers::for_each_type(run, [&]<class T>(T) {
    launch_case<T>(run, 7, true, true, true, false);
    launch_case<T>(run, 300, false, true, false, false);
    launch_case<T>(run, 3, true, false, true, true);
  });
}

const launchers::Op op{"tree_lstm", &launch_all};

}  // namespace
