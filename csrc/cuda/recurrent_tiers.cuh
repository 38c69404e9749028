// Recurrent layers on a GPU: which of four kinds of kernels runs.
//
//   block        a block of threads for 16 rows of the batch, weights in its shared memory   (recurrent_block.cuh)
//   cluster      a cluster of 2, 4 or 8 blocks for 16 rows, weights split over them; sm_90   (recurrent_cluster.cuh)
//   cooperative  weights in the shared memory of all processors, blocks wait for each other  (recurrent_steps.cuh)
//   steps        one launch per step, two with a projection                                  (recurrent_steps.cuh)
//
// All of them compute the same bits, so the choice is free. It is the first that has the memory and the processors:
// the fewer blocks have to wait for each other in a step, the less the step takes. On an H200 a block holds an lstm of
// 152 units in 16 bits, a cluster one of 512, or of 256 in float32. 16-bit products run on tensor cores in all of them.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "recurrent_block.cuh"
#include "recurrent_cluster.cuh"
#include "recurrent_steps.cuh"

namespace pynn::cuda {
namespace {
namespace recurrent {

inline int64_t unit_tiles_of(int64_t units) { return ceil_div(units, kTileUnits); }
inline int64_t strips_of(int64_t batch) { return ceil_div(batch, kStripRows); }

enum class Tier { block, cluster, cooperative, steps };

// A single step has no use for weights that stay, a projection comes between two products, and fp64 is for reference.
template <class T>
bool may_stay(const RecurrentShape& s) {
  return sizeof(T) < 8 && !s.projected && s.steps > 1;
}

// The tier, by the memory of a block, by whether clusters() can run and by the groups() of a cooperative launch.
template <class T, class Clusters, class Groups>
Tier tier_of(const RecurrentShape& s, const BlockLayout& layout, const Device& device, const Clusters& clusters,
             const Groups& groups) {
  if (!may_stay<T>(s)) return Tier::steps;
  if (layout.bytes() <= int64_t(device.shared_bytes)) return Tier::block;
  if (clusters()) return Tier::cluster;
  return groups() > 0 ? Tier::cooperative : Tier::steps;
}

// Where there would be more rounds than two, of clusters or of strips of rows in a cooperative launch, a step's launch
// costs less: its tiles have more rows, and it keeps all processors busy.
inline bool in_two_rounds(int64_t at_once, int64_t batch) { return 2 * at_once >= strips_of(batch); }

// ---------------------------------------------------------------- clusters

// Pairs of packs of a warp's weights that a thread's registers have room for beside the sums: 2 * gates registers each,
// of 72 or, backward, 96. An rnn's weights are few enough for shared memory.
template <class T, int gates>
constexpr int kKeptForward = sizeof(T) == 2 && gates > 1 ? 36 / gates : 0;
template <class T>
constexpr int kKeptBackward = sizeof(T) == 2 ? 48 : 0;

// How the blocks of a cluster hold weights and states.
struct Holding {
  int kept, buffers;
};

// The smallest cluster in which no warp has more than one group of units, or else the smallest that has the memory;
// `ways` to hold it are tried in their order. length: of the sum.
template <class T>
ClusterLayout cluster_layout(int64_t length, int64_t units, int gates, std::initializer_list<Holding> ways,
                             const Device& device) {
  const int groups = int(ceil_div(units, 8)), pairs = int(ceil_div(length * int64_t(sizeof(T)), 32));
  for (const bool one_group : {true, false})
    for (int blocks = 2; blocks <= device.cluster_blocks; blocks *= 2)
      for (const Holding& way : ways) {
        const int own = int(ceil_div(groups, blocks));
        const ClusterLayout layout{blocks, int(ceil_div(groups, own)), own, pairs, way.kept, way.buffers};
        const bool needs_one = one_group || way.kept > 0 || way.buffers == 1;
        if ((needs_one && layout.groups > kWarps) || (way.kept > 0 && way.kept >= pairs)) continue;
        if (layout.bytes(gates) <= int64_t(device.shared_bytes)) return layout;
      }
  return {};
}

template <class T, int gates>
ClusterLayout forward_cluster_layout(const RecurrentShape& s, const Device& device) {
  return cluster_layout<T>(s.state, s.hidden, gates, {{0, 2}, {kKeptForward<T, gates>, 2}}, device);
}
template <class T, int gates>
auto forward_cluster_kernel_of(const ClusterLayout& layout) {
  return layout.kept > 0 ? &forward_cluster_kernel<T, gates, kKeptForward<T, gates>>
                         : &forward_cluster_kernel<T, gates, 0>;
}

// The gradients of a gate's units begin on packs only where units come in eights.
template <class T>
ClusterLayout backward_cluster_layout(const RecurrentShape& s, const Device& device) {
  if (s.hidden % 8 != 0) return {};
  return cluster_layout<T>(gates_of(s.cell) * s.hidden, s.hidden, 1, {{0, 2}, {0, 1}, {kKeptBackward<T>, 1}}, device);
}
template <class T>
auto backward_cluster_kernel_of(const ClusterLayout& layout) {
  return layout.kept > 0 ? &backward_cluster_kernel<T, kKeptBackward<T>> : &backward_cluster_kernel<T, 0>;
}

// Whether clusters of the layout can run, gates: of a unit's columns.
template <class Kernel>
bool can_run(Kernel* kernel, const ClusterLayout& layout, int gates, int64_t batch) {
  return in_two_rounds(resident_clusters(kernel, layout.blocks, kThreads, size_t(layout.bytes(gates))), batch);
}

// ---------------------------------------------------------------- the cooperative launch

// Blocks of a cooperative launch per tile of units; 0 where not even one for each tile is resident.
template <class Kernel>
int team_groups(Kernel* kernel, size_t shared_bytes, int64_t unit_tiles, int64_t batch, const Device& device) {
  if (shared_bytes > device.shared_bytes) return 0;
  const int64_t blocks = int64_t(resident_blocks(kernel, kThreads, shared_bytes)) * device.processors;
  const int64_t groups = std::min(blocks / unit_tiles, strips_of(batch));
  return in_two_rounds(groups, batch) ? int(groups) : 0;
}

template <class T, int gates>
size_t team_bytes(const Operands<T>& o) {
  return kTeamBytes<T, gates> + size_t(o.stages) * Pipeline<T, gates, 1, true>::kRightBytes;
}

}  // namespace recurrent
}  // namespace
}  // namespace pynn::cuda
