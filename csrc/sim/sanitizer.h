// What the runtime tells the sanitizers about fibers. Every function is a weak symbol: it exists only in a program that
// was linked with that sanitizer, so one build of the runtime serves all of them.
#pragma once
#include <cstddef>

extern "C" {
[[gnu::weak]] void __asan_unpoison_memory_region(const volatile void* address, size_t size);
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);

[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_destroy_fiber(void* fiber);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void* tag);
[[gnu::weak]] void __tsan_release(void* tag);
[[gnu::weak]] void AnnotateIgnoreReadsBegin(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreReadsEnd(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreWritesBegin(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace pynn::sim {

inline bool under_asan() { return __asan_unpoison_memory_region != nullptr; }
inline bool under_tsan() { return __tsan_create_fiber != nullptr; }

// Everything before release(tag) in one CUDA thread happens before everything after acquire(tag) in another.
inline void release(void* tag) {
  if (__tsan_release) __tsan_release(tag);
}
inline void acquire(void* tag) {
  if (__tsan_acquire) __tsan_acquire(tag);
}

// Memory touched inside this scope is the runtime's own business: TSan does not record it, and memory allocated inside
// starts without a history.
class Unobserved {
 public:
  Unobserved() {
    if (!AnnotateIgnoreReadsBegin) return;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unobserved() {
    if (!AnnotateIgnoreReadsBegin) return;
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Unobserved(const Unobserved&) = delete;
  Unobserved& operator=(const Unobserved&) = delete;
};

}  // namespace pynn::sim
