// The state of a running launch: the grid, its resident blocks, their warps and threads, and how a thread stops to let
// others run. Kernels never see this file's names; cuda.h, warp.h, ... put CUDA's names on them.
//
// Functions declared here are compiled without ThreadSanitizer (scheduler.cpp, block.cpp, ...): the scheduler works
// with every thread's data and is no part of the program under test. Everything that touches a kernel's own memory is
// inline in a header instead, so that the sanitizers see it, at the kernel's line.
#pragma once
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

#include "fiber.h"
#include "launch.h"
#include "vector_types.h"

namespace pynn::sim {

constexpr unsigned kWarpSize = 32;

using Site = std::source_location;  // where in the kernel a collective was called
bool same_place(const Site& a, const Site& b);

struct Block;
struct Thread;

// A warp-wide operation in which a lane waits for the others. Lives on the lane's stack.
struct Collective {
  const char* name;
  unsigned mask;
  Site site;
  void* operands;  // what the lane brings, and where its result goes
};

// One deferred cp.async.
struct AsyncCopy {
  void* to;
  const void* from;
  unsigned bytes, size;  // bytes are copied, the rest of size is filled with zeros
};

struct AsyncCopies {
  std::vector<AsyncCopy> copies;     // in the order of issue
  std::vector<size_t> group_ends;    // copies.size() at each commit
  size_t next = 0, groups_done = 0;  // copies and groups before these are complete

  bool pending() const { return next < copies.size(); }
  void reset();
};

enum class State : uint8_t { ready, polling, barrier, warp, cluster, mbarrier, done };

struct Thread {
  uint3 index{};
  unsigned lane = 0, warp = 0;
  State state = State::done;
  bool started = false;
  Block* block = nullptr;
  Fiber fiber;
  const Collective* collective = nullptr;  // while state is warp
  AsyncCopies async_copies;
  unsigned warp_syncs = 0;
  unsigned cluster_arrivals = 0, cluster_waits = 0;
  Site cluster_arrive_site, wait_site;  // wait_site: of cluster_wait and mbarrier_wait
};

struct SharedArray {
  const void* key;  // identifies the declaration
  void* memory;
  size_t bytes, alignment;
};

// A barrier in shared memory that counts arrivals and bytes.
struct Mbarrier {
  const void* place = nullptr;
  unsigned arrivals = 0, missing = 0;  // of a phase; those that have not come yet
  int64_t bytes = 0;                   // announced and not come yet; below 0 while they came first
  unsigned completed = 0;              // phases
  // What has to be complete because bytes came in it, and what a thread has seen complete.
  unsigned written = 0, seen = 0;
  std::vector<char> tags = std::vector<char>(2);  // what TSan is told to order by, in turn
};

// The blocks of a cluster and their barrier. In a launch without clusters each block is one.
struct Cluster {
  Block* blocks = nullptr;              // in the order of their ranks
  unsigned count = 0;                   // of them
  unsigned threads = 0, live = 0;       // of all blocks; those that have not exited
  unsigned arrived = 0, completed = 0;  // threads at the barrier; barriers that all have arrived at
  std::vector<char> tags;               // what TSan is told to order by, two in turn
};

// A block that is resident: its threads, its shared memory, the barrier it may be waiting at.
struct Block {
  uint3 index{};
  std::vector<Thread> threads;
  unsigned live = 0, waiting = 0;  // threads that have not exited; those at the barrier
  Site barrier_site;
  const char* barrier_name = "";
  unsigned barrier_count = 0, barrier_result = 0;  // of __syncthreads_count and its relatives
  unsigned barrier_phase = 0;
  // What TSan is told to order by: two objects for the barrier and two for each thread's __syncwarp, used in turn, as
  // one alone would order too much. New memory for every block, or a block would come after the one before it.
  std::vector<char> tags;
  std::vector<SharedArray> shared_arrays;
  void* dynamic_shared = nullptr;
  Cluster* cluster = nullptr;
  unsigned rank = 0;
  std::vector<Mbarrier> mbarriers;

  Thread& thread(unsigned warp, unsigned lane) { return threads[warp * kWarpSize + lane]; }
  char* barrier_tag() { return &tags[barrier_phase & 1]; }
  char* warp_sync_tag(const Thread& thread) {
    return &tags[2 + 2 * (&thread - threads.data()) + (thread.warp_syncs & 1)];
  }
};

struct Launch {
  const char* kernel = "";
  dim3 grid, block;
  size_t dynamic_shared_bytes = 0;
  Together together;
  void (*body)(const void* arguments) = nullptr;
  const void* arguments = nullptr;
};

// The launch and the thread that run now.
extern Launch launch_now;
extern Thread* current;

// Ends the launch with an exception that names the kernel and, inside a thread, the block and the thread.
[[noreturn]] void fail(const std::string& what);
std::string describe(const Site& site);       // diffusion.cuh:171
std::string describe(const uint3& position);  // (3, 0, 0)

// Lets other threads run until the scheduler finds this one ready again.
void wait_as(State state);

// scheduler.cpp: runs every thread of every block of launch_now.
void run_grid();

// block.cpp
void prepare_threads(Block& block);  // for the block size of launch_now
void start_cluster(Cluster& cluster);
void start_block(Block& block, uint3 index);
void end_block(Block& block);
void exit_thread();
unsigned barrier(const char* name, bool predicate, Site site);
void* shared_array(Block& block, const void* key, size_t bytes, size_t alignment);
void* dynamic_shared();
// Fail unless the address is aligned, or the bytes lie in this block's shared memory.
void check_alignment(const char* what, const void* address, size_t alignment);
void check_shared(const char* what, const void* address, size_t bytes);

// cluster.cpp. arrive and wait are the two halves of the cluster's barrier.
unsigned cluster_rank();
unsigned cluster_blocks();
void cluster_arrive(Site site);
void cluster_wait(Site site);
void exit_cluster_thread();  // of the thread that runs: fails where it leaves others waiting or its memory in use
// Where `bytes` of this block's shared memory lie in the block with that rank.
void* in_cluster(const char* what, const void* shared, unsigned rank, size_t bytes);

// mbarrier.cpp
void mbarrier_init(const void* barrier, unsigned arrivals);
void mbarrier_arrive(const void* barrier, unsigned bytes);
void mbarrier_wait(const void* barrier, unsigned parity, Site site);
void count_bytes(unsigned rank, const void* barrier, unsigned bytes);  // for the barrier of another block

// warp.cpp: waits for every lane of the mask to call the same operation from the same place; the last one to come calls
// complete(operands of the lanes, mask). Lanes that the block does not have are left out of the mask.
using Complete = void (*)(void* const operands[kWarpSize], unsigned mask);
void meet(const Collective& mine, Complete complete);
void meet_whole_warp(const Collective& mine, Complete complete);  // for instructions that need all 32 lanes
void sync_warp(unsigned mask, Site site);

// scheduler.cpp: __threadfence, for TSan; running one thread at a time needs no fence.
void fence();

// async_copy.cpp
void defer_copy(const AsyncCopy& copy);
void commit_copies();
// The next copy that is due when at most `groups_left` groups may stay pending; false when there is none.
bool next_due_copy(unsigned groups_left, AsyncCopy& copy);

}  // namespace pynn::sim
