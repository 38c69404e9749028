#include "launch.h"

#include <algorithm>
#include <mutex>
#include <sstream>
#include <stdexcept>

#include "runtime.h"

namespace pynn::sim {
namespace {

Configuration configuration_now;
Device device;
uint64_t launches = 0;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message << "pynn sim: kernel " << launch_now.kernel << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

void check_limits(const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxBlockThreads || block.z > kMaxBlockZ || block.x > kMaxBlockThreads ||
      block.y > kMaxBlockThreads)
    refuse("expected a block of 1 to ", kMaxBlockThreads, " threads with z <= ", kMaxBlockZ, ", got ",
           describe(uint3{block.x, block.y, block.z}));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ)
    refuse("expected a grid of at least one block with x <= ", kMaxGridX, ", y and z <= ", kMaxGridYZ, ", got ",
           describe(uint3{grid.x, grid.y, grid.z}));
  if (launch.dynamic_shared_bytes > device.shared_bytes)
    refuse("expected at most ", device.shared_bytes, " bytes of shared memory, got ", launch.dynamic_shared_bytes);
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  if (launch.together.grid && blocks * threads > kMaxResidentThreads)
    refuse("expected a cooperative grid of at most ", kMaxResidentThreads, " threads, got ", blocks, " blocks of ",
           threads);
  const int most = resident_blocks(int(threads), launch.dynamic_shared_bytes) * device.processors;
  if (launch.together.grid && blocks > size_t(most))
    refuse("expected a cooperative grid of at most ", most, " blocks, got ", blocks);
  const unsigned cluster = launch.together.cluster;
  if (cluster != 1 && (cluster == 0 || cluster > unsigned(device.cluster_blocks)))
    refuse("expected a cluster of 1 to ", device.cluster_blocks, " blocks, got ", cluster);
  if (grid.x % cluster != 0)
    refuse("expected a grid of whole clusters of ", cluster, " blocks in x, got ", grid.x, " blocks");
}

}  // namespace

const Device& device_now() { return device; }

int resident_blocks(int threads, size_t shared_bytes) {
  return int(std::min<size_t>(2048 / unsigned(threads), (device.shared_bytes + 1024) / (shared_bytes + 1024)));
}

int resident_clusters(int blocks, int threads, size_t shared_bytes) {
  return resident_blocks(threads, shared_bytes) * device.processors / blocks;
}

const Configuration& configuration() { return configuration_now; }

void run_launch(const char* kernel, Together together, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                void (*body)(const void* arguments), const void* arguments) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard lock(one_launch_at_a_time);
  launch_now = {kernel, grid, block, dynamic_shared_bytes, together, body, arguments};
  check_limits(launch_now);
  ++launches;
  run_grid();
}

}  // namespace pynn::sim

int pynn_sim_configure(int order, uint64_t seed, int resident_blocks) {
  if (order < 0 || order > 3 || resident_blocks < 1 || resident_blocks > 64) return -1;
  pynn::sim::configuration_now = {static_cast<pynn::sim::Order>(order), seed, resident_blocks};
  return 0;
}

int pynn_sim_device(int processors, int shared_bytes, int cluster_blocks) {
  using namespace pynn::sim;
  if (processors < 1 || shared_bytes < 0 || size_t(shared_bytes) > kMaxSharedBytes) return -1;
  if (cluster_blocks < 0 || cluster_blocks > kMaxClusterBlocks) return -1;
  device = {processors, size_t(shared_bytes), cluster_blocks};
  return 0;
}

uint64_t pynn_sim_launches() { return pynn::sim::launches; }
const char* pynn_sim_latest_kernel() { return pynn::sim::launch_now.kernel; }
