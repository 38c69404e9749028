// Launching a kernel on the CPU: checks the launch against the limits of the hardware, then runs every thread.
#pragma once
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>

#include "vector_types.h"

namespace pynn::sim {

// Limits of sm_90. The smallest device we build for has less shared memory (99 KB), which a launcher must ask about:
// pynn_sim_device() makes the sim such a device.
constexpr size_t kMaxSharedBytes = 227 * 1024, kMaxStaticSharedBytes = 48 * 1024;
constexpr unsigned kMaxBlockThreads = 1024, kMaxBlockZ = 64, kMaxGridX = 2147483647u, kMaxGridYZ = 65535;
constexpr int kMaxClusterBlocks = 8;  // that every device with clusters has; more is not portable
// Threads of a cooperative launch, all of which are resident here at once (an H200 has 132 * 2048).
constexpr size_t kMaxResidentThreads = 64 * 1024;

// uneven: always the first thread that can run, so that the last ones fall as far behind as nobody waits for them.
enum class Order : int { forward, reverse, shuffled, uneven };

// The schedule of all launches: the order in which the threads of a block and the blocks of a grid take their turns,
// and how many blocks - or clusters, where a launch has them - run at the same time. Any choice is a legal one on a
// GPU, so no result may depend on it.
struct Configuration {
  Order order = Order::forward;
  uint64_t seed = 0;  // of the shuffled order
  int resident_blocks = 1;
};
const Configuration& configuration();

struct Device {
  int processors = 132;
  size_t shared_bytes = kMaxSharedBytes;   // of a block, at most
  int cluster_blocks = kMaxClusterBlocks;  // of a cluster, at most; 0 where the device has none
};
const Device& device_now();

// Blocks that a processor holds at once, by threads and shared memory. The sim knows no registers.
int resident_blocks(int threads, size_t shared_bytes);
// Clusters that the device holds at once. The sim's processors are in one group: a device's holes are not simulated.
int resident_clusters(int blocks, int threads, size_t shared_bytes);

// Which blocks of a launch run at the same time whatever the schedule: each alone, the whole grid, or as many as form a
// cluster, neighbours in x.
struct Together {
  bool grid = false;
  unsigned cluster = 1;
};

void run_launch(const char* kernel, Together together, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                void (*body)(const void* arguments), const void* arguments);

// LAUNCH(...) under the sim. Arguments are converted to the parameters' types once, as <<<>>> does.
template <class... Parameters>
void launch(const char* name, Together together, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            void (*kernel)(Parameters...), std::type_identity_t<Parameters>... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const Call call{kernel, {arguments...}};
  const auto body = [](const void* call) {
    std::apply(static_cast<const Call*>(call)->kernel, static_cast<const Call*>(call)->arguments);
  };
  run_launch(name, together, grid, block, dynamic_shared_bytes, body, &call);
}

}  // namespace pynn::sim

extern "C" {
// Chooses the schedule of the launches that follow; order is 0 forward, 1 reverse, 2 shuffled, 3 uneven. Returns 0, or
// -1 when an argument is out of range (then nothing changes).
[[gnu::visibility("default")]] int pynn_sim_configure(int order, uint64_t seed, int resident_blocks);
// Chooses the device that launchers ask about: processors, the bytes of shared memory of a block, and the blocks of the
// largest cluster (0: it has no clusters). Returns 0, or -1 when an argument is out of range (then nothing changes).
[[gnu::visibility("default")]] int pynn_sim_device(int processors, int shared_bytes, int cluster_blocks);
// Launches so far, to prove that a test ran kernels.
[[gnu::visibility("default")]] uint64_t pynn_sim_launches();
// The kernel of the latest launch as its source spells it, to prove that a test ran that one.
[[gnu::visibility("default")]] const char* pynn_sim_latest_kernel();
}
