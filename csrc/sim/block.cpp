// One block: starting and ending it, its barrier, its shared memory.
#include <cstdlib>
#include <new>

#include "launch.h"
#include "runtime.h"
#include "sanitizer.h"

namespace pynn::sim {
namespace {

// Shared memory starts out as 0xFF bytes: NaN as a float of any width, -1 as an integer. A heap allocation of its own
// per array, so that ASan knows its ends.
void* new_shared(size_t bytes, size_t alignment) {
  const Unobserved scope;
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes) != 0) throw std::bad_alloc();
  __builtin_memset(memory, 0xff, bytes);
  return memory;
}

void free_shared(void* memory) {
  const Unobserved scope;
  free(memory);
}

}  // namespace

void prepare_threads(Block& block) {
  const dim3& size = launch_now.block;
  block.threads.resize(size_t(size.x) * size.y * size.z);
  unsigned i = 0;
  for (unsigned z = 0; z < size.z; ++z)
    for (unsigned y = 0; y < size.y; ++y)
      for (unsigned x = 0; x < size.x; ++x, ++i) {
        Thread& thread = block.threads[i];
        thread.index = {x, y, z};
        thread.lane = i % kWarpSize, thread.warp = i / kWarpSize;
        thread.block = &block;
      }
}

void start_cluster(Cluster& cluster) {
  cluster.threads = cluster.live = cluster.count * unsigned(cluster.blocks->threads.size());
  cluster.arrived = cluster.completed = 0;
  cluster.tags = std::vector<char>(2);
}

void start_block(Block& block, uint3 index) {
  block.index = index;
  block.live = unsigned(block.threads.size());
  block.tags = std::vector<char>(2 + 2 * block.threads.size());
  block.waiting = block.barrier_count = block.barrier_phase = 0;
  for (Thread& thread : block.threads) {
    thread.state = State::ready;
    thread.started = false;
    thread.collective = nullptr;
    thread.async_copies.reset();
    thread.cluster_arrivals = thread.cluster_waits = 0;
  }
  block.mbarriers.clear();
  constexpr size_t kAlignment = 128;  // what TMA and 128-byte swizzles want
  const size_t bytes = launch_now.dynamic_shared_bytes;
  block.dynamic_shared = bytes ? new_shared(bytes, kAlignment) : nullptr;
}

void end_block(Block& block) {
  for (Thread& thread : block.threads) thread.fiber.reset();
  for (const SharedArray& array : block.shared_arrays) free_shared(array.memory);
  block.shared_arrays.clear();
  if (block.dynamic_shared) free_shared(block.dynamic_shared);
  block.dynamic_shared = nullptr;
  block.live = 0;
}

void exit_thread() {
  Block& block = *current->block;
  if (current->async_copies.pending())
    fail("exits with cp.async copies pending: wait for them, or they may write to the next block's shared memory");
  if (block.waiting > 0)
    fail("exits while " + std::to_string(block.waiting) + " other threads wait at " + block.barrier_name + " (" +
         describe(block.barrier_site) + "): a barrier needs every thread of the block");
  exit_cluster_thread();
  --block.live;
  current->state = State::done;
}

unsigned barrier(const char* name, bool predicate, Site site) {
  Block& block = *current->block;
  if (block.live < block.threads.size())
    fail(std::string(name) + " (" + describe(site) + ") after " + std::to_string(block.threads.size() - block.live) +
         " threads of the block have exited");
  if (block.waiting == 0) {
    block.barrier_site = site;
    block.barrier_name = name;
    block.barrier_count = 0;
  } else if (block.barrier_name != name || !same_place(block.barrier_site, site)) {
    fail("divergent barrier: this thread is at " + std::string(name) + " (" + describe(site) + "), " +
         std::to_string(block.waiting) + " other threads of the block wait at " + block.barrier_name + " (" +
         describe(block.barrier_site) + ")");
  }
  char* tag = block.barrier_tag();
  release(tag);
  block.barrier_count += predicate;
  current->state = State::barrier;
  if (++block.waiting == block.live) {
    block.waiting = 0;
    ++block.barrier_phase;
    block.barrier_result = block.barrier_count;
    for (Thread& thread : block.threads) thread.state = State::ready;
  }
  current->fiber.suspend();  // the last one as well, so that it does not run ahead of the configured order
  acquire(tag);
  return block.barrier_result;
}

void* shared_array(Block& block, const void* key, size_t bytes, size_t alignment) {
  size_t total = bytes;
  for (const SharedArray& array : block.shared_arrays) {
    if (array.key == key) return array.memory;
    total += array.bytes;
  }
  if (total > kMaxStaticSharedBytes)
    fail("expected at most " + std::to_string(kMaxStaticSharedBytes) + " bytes of static shared memory, got " +
         std::to_string(total) + ": use dynamic shared memory");
  if (total + launch_now.dynamic_shared_bytes > kMaxSharedBytes)
    fail("expected at most " + std::to_string(kMaxSharedBytes) + " bytes of shared memory, got " +
         std::to_string(total) + " static and " + std::to_string(launch_now.dynamic_shared_bytes) + " dynamic");
  const Unobserved scope;
  block.shared_arrays.push_back({key, new_shared(bytes, alignment < 16 ? 16 : alignment), bytes, alignment});
  return block.shared_arrays.back().memory;
}

void* dynamic_shared() {
  if (!current->block->dynamic_shared) fail("declares dynamic shared memory, but was launched without any");
  return current->block->dynamic_shared;
}

void check_alignment(const char* what, const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment)
    fail(std::string(what) + ": expected an address aligned to " + std::to_string(alignment) + " bytes, got one with " +
         std::to_string(reinterpret_cast<uintptr_t>(address) % alignment) + " bytes over");
}

void check_shared(const char* what, const void* address, size_t bytes) {
  const Block& block = *current->block;
  const auto inside = [&](const void* memory, size_t size) {
    const auto start = reinterpret_cast<uintptr_t>(memory), at = reinterpret_cast<uintptr_t>(address);
    return at >= start && at + bytes <= start + size;
  };
  if (inside(block.dynamic_shared, launch_now.dynamic_shared_bytes)) return;
  for (const SharedArray& array : block.shared_arrays)
    if (inside(array.memory, array.bytes)) return;
  fail(std::string(what) + ": expected " + std::to_string(bytes) + " bytes inside the block's shared memory");
}

}  // namespace pynn::sim
