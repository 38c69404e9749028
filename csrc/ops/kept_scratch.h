// Scratch memory of CPU launchers that each thread keeps from call to call.
#pragma once
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <utility>

#include "library.h"

namespace pynn {

#if defined(PYNN_CUDA) || defined(PYNN_SIM)
using KeptScratch = Scratch;  // the device's allocator keeps memory itself
#else
// Packed weights are megabytes that a short sequence writes and reads a few times: memory fresh from the system, which
// comes in pages of 4 KiB that it first clears, would cost more than the products. A thread keeps the last block it
// used, of at most kKept bytes.
class __attribute__((visibility("hidden"))) KeptScratch {
#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t kKept = 0;  // so that accesses past the end are seen
#else
  static constexpr int64_t kKept = 64 << 20;
#endif
  static constexpr int64_t kHugePage = 2 << 20, kLine = 64;

 public:
  KeptScratch(const Tensor&, int64_t bytes) {
    if (bytes <= 0) return;
    std::swap(block_, kept());  // a launcher inside a launcher finds nothing there
    if (block_.bytes >= bytes) return;
    block_ = {};
    const int64_t unit = bytes >= kHugePage && bytes <= kKept ? kHugePage : kLine,
                  size = (bytes + unit - 1) / unit * unit;
    block_.memory.reset(std::aligned_alloc(size_t(unit), size_t(size)));
    PYNN_CHECK(block_.memory, "pynn: no memory for ", bytes, " bytes of scratch");
    block_.bytes = size;
#ifdef MADV_HUGEPAGE
    if (unit == kHugePage) madvise(block_.memory.get(), size_t(size), MADV_HUGEPAGE);
#endif
  }
  KeptScratch(const KeptScratch&) = delete;
  KeptScratch& operator=(const KeptScratch&) = delete;
  ~KeptScratch() {
    if (block_.bytes <= kKept && block_.bytes > kept().bytes) std::swap(block_, kept());
  }
  void* get() { return block_.memory.get(); }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  struct Block {
    std::unique_ptr<void, Free> memory;
    int64_t bytes = 0;
  };
  static Block& kept() {
    static thread_local Block block;
    return block;
  }
  Block block_;
};
#endif

}  // namespace pynn
