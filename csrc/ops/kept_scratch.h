// Scratch memory of CPU launchers that each thread keeps from call to call.
#pragma once
#include <utility>

#include "large_memory.h"

namespace pynn {

#if defined(PYNN_CUDA) || defined(PYNN_SIM)
using KeptScratch = Scratch;  // the device's allocator keeps memory itself
#else
// Packed weights are megabytes that a short sequence writes and reads a few times: memory fresh from the system, which
// comes in pages of 4 KiB that it first clears, would cost more than the products. A thread keeps the last block it
// used, of at most kKeptBytes.
class __attribute__((visibility("hidden"))) KeptScratch {
 public:
  KeptScratch(const Tensor&, int64_t bytes) {
    if (bytes <= 0) return;
    std::swap(block_, kept());  // a launcher inside a launcher finds nothing there
    if (block_.bytes >= bytes) return;
    block_ = {};
    block_ = LargeMemory(bytes);
  }
  KeptScratch(const KeptScratch&) = delete;
  KeptScratch& operator=(const KeptScratch&) = delete;
  ~KeptScratch() {
    if (block_.bytes <= kKeptBytes && block_.bytes > kept().bytes) std::swap(block_, kept());
  }
  void* get() { return block_.memory.get(); }

 private:
  static LargeMemory& kept() {
    static thread_local LargeMemory block;
    return block;
  }
  LargeMemory block_;
};
#endif

}  // namespace pynn
