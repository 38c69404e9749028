// Blocks of megabytes for CPU launchers, in huge pages where the system has them.
#pragma once
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>

#include "library.h"

namespace pynn {

// What is kept from call to call, at most.
#ifdef __SANITIZE_ADDRESS__
inline constexpr int64_t kKeptBytes = 0;  // so that accesses past the end are seen
#else
inline constexpr int64_t kKeptBytes = 64 << 20;
#endif

struct __attribute__((visibility("hidden"))) LargeMemory {
  static constexpr int64_t kHugePage = 2 << 20, kLine = 64;

  static int64_t unit_of(int64_t needed) { return needed >= kHugePage && needed <= kKeptBytes ? kHugePage : kLine; }
  static int64_t size_of(int64_t needed) {
    const int64_t unit = unit_of(needed);
    return (needed + unit - 1) / unit * unit;
  }

  LargeMemory() = default;
  explicit LargeMemory(int64_t needed) : bytes(size_of(needed)) {
    const int64_t unit = unit_of(needed);
    memory.reset(std::aligned_alloc(size_t(unit), size_t(bytes)));
    PYNN_CHECK(memory, "pynn: no memory for ", needed, " bytes");
#ifdef MADV_HUGEPAGE
    if (unit == kHugePage) madvise(memory.get(), size_t(bytes), MADV_HUGEPAGE);
#endif
  }

  struct Free {
    void operator()(void* block) const { std::free(block); }
  };
  std::unique_ptr<void, Free> memory;
  int64_t bytes = 0;
};

}  // namespace pynn
