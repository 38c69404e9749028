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

// The memory of one stack, with an unmapped page below it so that an overflow is a fault, not silent corruption.
struct Stack {
  char* bottom = nullptr;
  size_t size = 0;
};

class Fiber {
 public:
  // Prepares to call entry(), which must end by calling finish(). Only the scheduler calls start, resume and reset.
  void start(void (*entry)());
  // Runs the fiber until it suspends or finishes.
  void resume();
  // Gives the stack back, also of a fiber that has not finished: what it was doing is forgotten.
  void reset();
  // At the end of a launch: frees what TSan keeps about fibers that were reset.
  static void forget_retired();

  // Called by the running fiber: goes back to the scheduler.
  void suspend();
  [[noreturn]] void finish();

 private:
  static void enter();
  void leave(bool for_good);

  Context context_{};
  Stack stack_;
  void (*entry_)() = nullptr;
  void* asan_stack_ = nullptr;  // ASan's and TSan's own notion of this fiber
  void* tsan_fiber_ = nullptr;
};

}  // namespace pynn::sim
