// Warp-wide operations: lanes meet, the last one to come does the work of all.
#include <cstdio>

#include "runtime.h"
#include "sanitizer.h"

namespace pynn::sim {
namespace {

std::string hex(unsigned mask) {
  char text[11];
  snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

std::string describe_call(const Collective& collective) {
  return std::string(collective.name) + " with mask " + hex(collective.mask) + " (" + describe(collective.site) + ")";
}

// The lanes of the mask that this block has.
unsigned existing(unsigned mask) {
  const size_t first = size_t(current->warp) * kWarpSize, threads = current->block->threads.size();
  return threads - first >= kWarpSize ? mask : mask & ((1u << (threads - first)) - 1);
}

bool same_call(const Collective& a, const Collective& b) { return a.mask == b.mask && same_place(a.site, b.site); }

}  // namespace

void meet(const Collective& mine, Complete complete) {
  Block& block = *current->block;
  if (!(mine.mask >> current->lane & 1))
    fail("lane " + std::to_string(current->lane) + " calls " + describe_call(mine) + " but is not in the mask");
  const unsigned mask = existing(mine.mask);
  unsigned arrived = 1u << current->lane;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1) || lane == current->lane) continue;
    const Thread& other = block.thread(current->warp, lane);
    if (other.state == State::done)
      fail(describe_call(mine) + ": lane " + std::to_string(lane) + " of the mask has exited");
    if (other.state != State::warp) continue;
    if (!same_call(mine, *other.collective)) {
      // A lane in an operation that this one has no part in is merely late.
      if (!(other.collective->mask >> current->lane & 1)) continue;
      fail("divergent warp: lane " + std::to_string(current->lane) + " is at " + describe_call(mine) + ", lane " +
           std::to_string(lane) + " waits at " + describe_call(*other.collective));
    }
    arrived |= 1u << lane;
  }
  current->collective = &mine;
  if (arrived != mask) {
    wait_as(State::warp);
    return;
  }
  void* operands[kWarpSize] = {};
  for (unsigned lane = 0; lane < kWarpSize; ++lane)
    if (mask >> lane & 1) {
      Thread& thread = block.thread(current->warp, lane);
      operands[lane] = thread.collective->operands;
      thread.state = State::ready;
    }
  const Unobserved scope;  // the operands are on the stacks of other threads
  complete(operands, mask);
}

void meet_whole_warp(const Collective& mine, Complete complete) {
  if (existing(mine.mask) != 0xffffffffu)
    fail(std::string(mine.name) + " (" + describe(mine.site) + ") needs a warp of 32 threads; the block has " +
         std::to_string(current->block->threads.size()));
  meet(mine, complete);
}

void sync_warp(unsigned mask, Site site) {
  struct Tags {
    char *mine, *joined;  // joined: where the last lane to come released what it had acquired from all
  } tags{current->block->warp_sync_tag(*current), nullptr};
  ++current->warp_syncs;
  release(tags.mine);
  meet({"__syncwarp", mask, site, &tags}, [](void* const* lanes, unsigned mask) {
    if (!under_tsan()) return;
    char* const joined = static_cast<Tags*>(lanes[current->lane])->mine;
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
      if (mask >> lane & 1) {
        acquire(static_cast<Tags*>(lanes[lane])->mine);
        static_cast<Tags*>(lanes[lane])->joined = joined;
      }
    release(joined);
  });
  if (tags.joined) acquire(tags.joined);
}

}  // namespace pynn::sim
