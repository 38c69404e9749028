// cp.async as the wrappers in csrc/cuda/primitives.cuh call it.
#pragma once
#include <cstring>

#include "runtime.h"

namespace pynn::sim {

// Deferred: until it is waited for, the destination holds NaN, so that a wait for the wrong group shows.
inline void cp_async(void* shared, const void* global, unsigned bytes, unsigned size) {
  check_alignment("cp.async to shared memory", shared, size);
  check_alignment("cp.async from global memory", global, size);
  check_shared("cp.async", shared, size);
  if (bytes > size) fail("cp.async: expected at most " + std::to_string(size) + " bytes, got " + std::to_string(bytes));
  defer_copy({shared, global, bytes, size});
  memset(shared, 0xff, size);
}

inline void cp_async_commit() { commit_copies(); }

inline void cp_async_wait(unsigned groups_left) {
  AsyncCopy copy;
  while (next_due_copy(groups_left, copy)) {
    memcpy(copy.to, copy.from, copy.bytes);
    memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.size - copy.bytes);
  }
}

}  // namespace pynn::sim
