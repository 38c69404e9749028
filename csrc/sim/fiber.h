// A fiber: a function on a stack of its own that can stop in the middle and go on later. One fiber is one CUDA thread.
#pragma once
#include <cstddef>

#if !defined(__x86_64__) && !defined(PYNN_SIM_UCONTEXT)
#define PYNN_SIM_UCONTEXT  // the portable switch; ten times slower, because it saves the signal mask
#endif
#ifdef PYNN_SIM_UCONTEXT
#include <ucontext.h>
#endif

namespace pynn::sim {

#ifdef PYNN_SIM_UCONTEXT
using Context = ucontext_t;
#else
using Context = void*;  // the saved stack pointer; the registers lie on the stack
#endif

// The memory of one stack, with an unmapped page below it so that an overflow is a fault, not silent corruption; and
// the thread that TSan takes its user for.
struct Stack {
  char* bottom = nullptr;
  size_t size = 0;
  void* tsan_fiber = nullptr;
};

class Fiber {
 public:
  // Prepares to call entry(), which must end by calling finish(). Only the scheduler calls start, resume and reset.
  void start(void (*entry)());
  // Runs the fiber until it suspends or finishes.
  void resume();
  // Gives the stack back, also of a fiber that has not finished: what it was doing is forgotten.
  void reset();
  // release(tag) on behalf of a fiber that will never run again.
  void release_for(void* tag);

  // Under TSan a stack is used again only after recycle_retired: whoever calls it has ordered the threads that used the
  // retired stacks before those that will.
  static size_t retired();
  static void recycle_retired();

  // Called by the running fiber: goes back to the scheduler.
  void suspend();
  [[noreturn]] void finish();

 private:
  static void enter();
  void leave(bool for_good);

  Context context_{};
  Stack stack_;
  void (*entry_)() = nullptr;
  void* asan_stack_ = nullptr;  // ASan's notion of this fiber's stack
};

}  // namespace pynn::sim
