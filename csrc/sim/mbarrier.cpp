// Barriers in shared memory: phases that end when all arrivals and all announced bytes have come.
#include "runtime.h"
#include "sanitizer.h"

namespace pynn::sim {
namespace {

Mbarrier& find(Block& block, const char* what, const void* place) {
  for (Mbarrier& barrier : block.mbarriers)
    if (barrier.place == place) return barrier;
  fail(std::string(what) + ": expected a barrier that mbarrier_init has made");
}

void complete_if_due(Block& block, Mbarrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.arrivals;
  ++barrier.completed;
  for (Thread& thread : block.threads)
    if (thread.state == State::mbarrier) thread.state = State::ready;
}

}  // namespace

void mbarrier_init(const void* place, unsigned arrivals) {
  check_alignment("mbarrier_init", place, 8);
  check_shared("mbarrier_init", place, 8);
  const Unobserved scope;
  Block& block = *current->block;
  if (arrivals == 0) fail("mbarrier_init: expected at least one arrival");
  Mbarrier barrier;
  barrier.place = place, barrier.arrivals = barrier.missing = arrivals;
  block.mbarriers.push_back(barrier);
}

void mbarrier_arrive(const void* place, unsigned bytes) {
  Block& block = *current->block;
  Mbarrier& barrier = find(block, "mbarrier_arrive", place);
  if (barrier.missing == 0)
    fail("mbarrier_arrive: more than the " + std::to_string(barrier.arrivals) + " arrivals of a phase");
  release(&barrier.tags[barrier.completed & 1]);
  --barrier.missing;
  barrier.bytes += bytes;
  complete_if_due(block, barrier);
}

void mbarrier_wait(const void* place, unsigned parity, Site site) {
  Block& block = *current->block;
  current->wait_site = site;
  while ((find(block, "mbarrier_wait", place).completed & 1) == parity) wait_as(State::mbarrier);
  Mbarrier& barrier = find(block, "mbarrier_wait", place);
  acquire(&barrier.tags[parity]);
  barrier.seen = barrier.completed;
}

void count_bytes(unsigned rank, const void* place, unsigned bytes) {
  Block& block = current->block->cluster->blocks[rank];
  Mbarrier& barrier = find(block, "store_async", in_cluster("store_async", place, rank, 8));
  release(&barrier.tags[barrier.completed & 1]);
  barrier.bytes -= bytes;
  barrier.written = barrier.completed + 1;
  complete_if_due(block, barrier);
}

}  // namespace pynn::sim
