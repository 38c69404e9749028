// Which thread runs next. One pass visits every thread of every resident block, in the configured order, and runs those
// that can run until they stop at a barrier, wait for their warp, poll, or exit. In the uneven order it ends with the
// first of them.
#include <algorithm>
#include <exception>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "launch.h"
#include "runtime.h"
#include "sanitizer.h"

namespace pynn::sim {

Launch launch_now;
Thread* current = nullptr;

namespace {

// A grid whose threads only poll each other for this many passes will never end.
constexpr unsigned kIdlePasses = 10'000;
// Under TSan, finished threads are told apart until there are this many, or two blocks of them: each costs TSan time
// in every other, and it has numbers for 8,192 only.
constexpr size_t kRetiredThreads = 512, kRetiredBlocks = 2;

std::string failure;  // of the running thread; empty when all is well
char begin_tag, end_tag, fence_tag;

struct Random {  // splitmix64
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  size_t below(size_t bound) { return size_t((unsigned __int128)(next()) * bound >> 64); }
};

// The order in which the clusters of a grid - most often single blocks - become resident. Shuffled is i -> (i step +
// start) mod count with a step that has no common factor with count: every one once, without a table of all.
class ClusterOrder {
 public:
  ClusterOrder(Order order, size_t count, Random& random) : order_(order), count_(count) {
    if (order != Order::shuffled || count < 3) return;
    start_ = random.below(count);
    step_ = 1 + random.below(count - 1);
    while (std::gcd(step_, count) != 1) step_ = step_ % (count - 1) + 1;
  }
  bool empty() const { return given_ == count_; }
  // Its first block.
  uint3 next() {
    const size_t i = given_++;
    const size_t at =
        order_ == Order::reverse ? count_ - 1 - i : size_t(((unsigned __int128)(i)*step_ + start_) % count_);
    const dim3& grid = launch_now.grid;
    const unsigned size = launch_now.together.cluster, width = grid.x / size;
    return {unsigned(at % width) * size, unsigned(at / width % grid.y), unsigned(at / width / grid.y)};
  }

 private:
  Order order_;
  size_t count_, given_ = 0, start_ = 0, step_ = 1;
};

void run_thread() {
  acquire(&begin_tag);
  try {
    launch_now.body(launch_now.arguments);
    exit_thread();
  } catch (const std::exception& error) {
    const Unobserved scope;
    failure = error.what();
  }
  release(&end_tag);
  current->fiber.finish();
}

bool can_run(const Thread& thread) { return thread.state == State::ready || thread.state == State::polling; }

// The resident blocks, kept from one launch to the next: their threads and stacks are used again.
std::vector<Block> resident;

class Grid {
 public:
  Grid()
      : size_(launch_now.together.cluster),
        count_(size_t(launch_now.grid.x) * launch_now.grid.y * launch_now.grid.z / size_),
        random_{configuration().seed},
        order_(configuration().order),
        clusters_left_(order_, count_, random_) {}

  // After an error: forgets the threads that have not finished.
  ~Grid() {
    for (Block& block : resident) {
      if (block.live > 0)
        for (Thread& thread : block.threads)
          if (thread.started && thread.state != State::done) thread.fiber.release_for(&end_tag);
      end_block(block);
    }
    order_finished_threads();
  }

  void run() {
    release(&begin_tag);
    make_resident();
    unsigned idle = 0;
    while (live_clusters_ > 0) {
      const Pass pass = run_pass();
      if (pass == Pass::stuck) fail(describe_deadlock());
      idle = pass == Pass::polled ? idle + 1 : 0;
      if (idle == kIdlePasses) fail("deadlock: the threads that can run only poll memory that nobody writes");
    }
  }

 private:
  enum class Pass { worked, polled, stuck };

  void make_resident() {
    const size_t wanted = launch_now.together.grid ? count_ : size_t(configuration().resident_blocks);
    live_clusters_ = wanted < count_ ? wanted : count_;
    resident.resize(live_clusters_ * size_);
    clusters_.resize(live_clusters_);
    for (Block& block : resident) {
      prepare_threads(block);
      for (Thread& thread : block.threads) visits_.push_back(&thread);
    }
    for (size_t i = 0; i < live_clusters_; ++i) {
      clusters_[i].blocks = &resident[i * size_];
      clusters_[i].count = size_;
      start(clusters_[i]);
    }
    if (order_ == Order::reverse) std::reverse(visits_.begin(), visits_.end());
  }

  // The next cluster of the grid in the place of one that has ended.
  void start(Cluster& cluster) {
    start_cluster(cluster);
    uint3 index = clusters_left_.next();
    for (unsigned rank = 0; rank < cluster.count; ++rank, ++index.x) {
      Block& block = cluster.blocks[rank];
      block.cluster = &cluster, block.rank = rank;
      start_block(block, index);
    }
  }

  Pass run_pass() {
    if (order_ == Order::shuffled)
      for (size_t i = visits_.size(); i > 1; --i) std::swap(visits_[i - 1], visits_[random_.below(i)]);
    Pass result = Pass::stuck;
    for (Thread* thread : visits_) {
      if (!can_run(*thread)) continue;
      run(*thread);
      if (thread->state != State::polling)
        result = Pass::worked;
      else if (result == Pass::stuck)
        result = Pass::polled;
      if (result == Pass::worked && order_ == Order::uneven) break;
    }
    return result;
  }

  void run(Thread& thread) {
    thread.state = State::ready;
    if (!thread.started) thread.fiber.start(run_thread);
    thread.started = true;
    current = &thread;
    thread.fiber.resume();
    current = nullptr;
    if (!failure.empty()) throw std::runtime_error(std::exchange(failure, {}));
    if (thread.state != State::done) return;
    thread.fiber.reset();
    Block& block = *thread.block;
    if (Fiber::retired() >= std::max(kRetiredThreads, kRetiredBlocks * block.threads.size())) order_finished_threads();
    Cluster& cluster = *block.cluster;
    if (cluster.live > 0) return;
    for (unsigned rank = 0; rank < cluster.count; ++rank) end_block(cluster.blocks[rank]);
    if (clusters_left_.empty())
      --live_clusters_;
    else
      start(cluster);
  }

  // Tells TSan that all threads which have finished come before all that will start. Within a launch that is not so: it
  // hides races between blocks that are far apart.
  static void order_finished_threads() {
    acquire(&end_tag);
    release(&begin_tag);
    Fiber::recycle_retired();
  }

  // Where the threads wait, the first few of them.
  static std::string describe_deadlock() {
    std::ostringstream message;
    message << "deadlock: no thread can run";
    int lines = 0;
    for (const Block& block : resident)
      for (const Thread& thread : block.threads) {
        if (thread.state == State::done || lines == 8) continue;
        ++lines;
        message << "\n  block " << describe(block.index) << ", thread " << describe(thread.index) << " waits at ";
        if (thread.state == State::barrier)
          message << block.barrier_name << " (" << describe(block.barrier_site) << ")";
        else if (thread.state == State::cluster)
          message << "cluster_wait (" << describe(thread.wait_site) << ")";
        else if (thread.state == State::mbarrier)
          message << "mbarrier_wait (" << describe(thread.wait_site) << ")";
        else
          message << thread.collective->name << " (" << describe(thread.collective->site)
                  << ") for the lanes of mask 0x" << std::hex << thread.collective->mask << std::dec;
      }
    return message.str();
  }

  unsigned size_;  // blocks of a cluster
  size_t count_;   // clusters of the grid
  Random random_;
  Order order_;
  ClusterOrder clusters_left_;
  std::vector<Cluster> clusters_;  // the resident ones
  std::vector<Thread*> visits_;
  size_t live_clusters_ = 0;
};

}  // namespace

void run_grid() {
  const Unobserved scope;  // of the scheduler; every thread has its own
  Grid().run();
}

void fail(const std::string& what) {
  const Unobserved scope;
  std::string message = std::string("pynn sim: kernel ") + launch_now.kernel;
  if (current) message += ", block " + describe(current->block->index) + ", thread " + describe(current->index);
  throw std::runtime_error(message + ": " + what);  // of a thread: on to run_thread
}

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::string_view(a.file_name()) == b.file_name());
}

std::string describe(const Site& site) {
  const std::string_view path = site.file_name();
  return std::string(path.substr(path.rfind('/') + 1)) + ":" + std::to_string(site.line());
}

std::string describe(const uint3& position) {
  std::ostringstream text;
  text << '(' << position.x << ", " << position.y << ", " << position.z << ')';
  return text.str();
}

void fence() {
  release(&fence_tag);
  acquire(&fence_tag);
}

void wait_as(State state) {
  current->state = state;
  current->fiber.suspend();
}

}  // namespace pynn::sim
