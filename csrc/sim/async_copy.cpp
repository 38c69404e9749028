// cp.async: a copy is written down when issued and done when waited for, which is as late as the hardware may be.
#include "runtime.h"
#include "sanitizer.h"

namespace pynn::sim {

void AsyncCopies::reset() {
  copies.clear();
  group_ends.clear();
  next = groups_done = 0;
}

void defer_copy(const AsyncCopy& copy) {
  const Unobserved scope;
  current->async_copies.copies.push_back(copy);
}

void commit_copies() {
  const Unobserved scope;
  AsyncCopies& mine = current->async_copies;
  mine.group_ends.push_back(mine.copies.size());
}

bool next_due_copy(unsigned groups_left, AsyncCopy& copy) {
  const Unobserved scope;
  AsyncCopies& mine = current->async_copies;
  while (mine.group_ends.size() - mine.groups_done > groups_left) {
    if (mine.next < mine.group_ends[mine.groups_done]) {
      copy = mine.copies[mine.next++];
      return true;
    }
    ++mine.groups_done;
  }
  if (!mine.pending() && mine.groups_done == mine.group_ends.size()) mine.reset();
  return false;
}

}  // namespace pynn::sim
