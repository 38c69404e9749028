// Clusters of blocks: their barrier, and shared memory as the other blocks see it.
#include <algorithm>

#include "launch.h"
#include "runtime.h"
#include "sanitizer.h"

namespace pynn::sim {
namespace {

Cluster& cluster_of_launch(const char* what) {
  if (launch_now.together.cluster == 1) fail(std::string(what) + " in a launch without clusters: use LAUNCH_CLUSTERS");
  return *current->block->cluster;
}

// The instructions are the aligned ones: all lanes of a warp come from the same place. Those that have arrived and
// waited as often as this thread are known to be at the same barrier.
void check_aligned(const char* what, Site Thread::* site) {
  const Block& block = *current->block;
  const size_t first = size_t(current->warp) * kWarpSize, end = std::min(first + kWarpSize, block.threads.size());
  for (size_t i = first; i < end; ++i) {
    const Thread& other = block.threads[i];
    const bool waits = site == &Thread::wait_site, here = !waits || other.state == State::cluster;
    if (here && other.cluster_waits == current->cluster_waits && other.cluster_arrivals == current->cluster_arrivals &&
        !same_place(other.*site, current->*site))
      fail(std::string("divergent ") + what + ": this thread is at " + describe(current->*site) + ", lane " +
           std::to_string(other.lane) + " of its warp at " + describe(other.*site));
  }
}

}  // namespace

unsigned cluster_rank() {
  cluster_of_launch("cluster_rank");
  return current->block->rank;
}

unsigned cluster_blocks() { return cluster_of_launch("cluster_blocks").count; }

void cluster_arrive(Site site) {
  Cluster& cluster = cluster_of_launch("cluster_arrive");
  if (current->cluster_arrivals != current->cluster_waits)
    fail("cluster_arrive (" + describe(site) + ") again before a cluster_wait");
  if (cluster.live < cluster.threads)
    fail("cluster_arrive (" + describe(site) + ") after " + std::to_string(cluster.threads - cluster.live) +
         " threads of the cluster have exited");
  release(&cluster.tags[current->cluster_arrivals & 1]);
  ++current->cluster_arrivals;
  current->cluster_arrive_site = site;
  check_aligned("cluster_arrive", &Thread::cluster_arrive_site);
  if (++cluster.arrived < cluster.threads) return;
  cluster.arrived = 0;
  ++cluster.completed;
  for (Block* block = cluster.blocks; block != cluster.blocks + cluster.count; ++block)
    for (Thread& thread : block->threads)
      if (thread.state == State::cluster) thread.state = State::ready;
}

void cluster_wait(Site site) {
  Cluster& cluster = cluster_of_launch("cluster_wait");
  if (current->cluster_arrivals == current->cluster_waits)
    fail("cluster_wait (" + describe(site) + ") without a cluster_arrive before it");
  current->wait_site = site;
  check_aligned("cluster_wait", &Thread::wait_site);
  if (cluster.completed < current->cluster_arrivals) wait_as(State::cluster);
  acquire(&cluster.tags[current->cluster_waits & 1]);
  ++current->cluster_waits;
}

void exit_cluster_thread() {
  const Block& block = *current->block;
  Cluster& cluster = *block.cluster;
  if (current->cluster_arrivals != current->cluster_waits) fail("exits between cluster_arrive and cluster_wait");
  if (cluster.arrived > 0)
    fail("exits while " + std::to_string(cluster.arrived) +
         " other threads have arrived at a barrier of the cluster: it needs every thread of the cluster");
  if (block.live == 1)
    for (const Mbarrier& barrier : block.mbarriers)
      if (barrier.seen < barrier.written)
        fail("exits before it has waited for what was stored to the block's shared memory: more may be on the way");
  --cluster.live;
}

void* in_cluster(const char* what, const void* shared, unsigned rank, size_t bytes) {
  const Cluster& cluster = cluster_of_launch(what);
  check_alignment(what, shared, bytes);
  check_shared(what, shared, bytes);
  if (rank >= cluster.count)
    fail(std::string(what) + ": expected a rank below " + std::to_string(cluster.count) + ", got " +
         std::to_string(rank));
  const Block& mine = *current->block;
  Block& other = cluster.blocks[rank];
  if (&other == &mine) return const_cast<void*>(shared);
  if (current->cluster_waits == 0)
    fail(std::string(what) + ": the other block may not have started: a barrier of the cluster has to come first");
  if (other.live == 0) fail(std::string(what) + ": the block with rank " + std::to_string(rank) + " has exited");
  const auto offset_in = [&](const void* memory) {
    return static_cast<const char*>(shared) - static_cast<const char*>(memory);
  };
  for (const SharedArray& array : mine.shared_arrays)
    if (const ptrdiff_t offset = offset_in(array.memory); offset >= 0 && size_t(offset) < array.bytes)
      return static_cast<char*>(shared_array(other, array.key, array.bytes, array.alignment)) + offset;
  return static_cast<char*>(other.dynamic_shared) + offset_in(mine.dynamic_shared);
}

}  // namespace pynn::sim
