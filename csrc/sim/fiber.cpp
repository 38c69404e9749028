#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <vector>

#include "sanitizer.h"

#ifndef PYNN_SIM_UCONTEXT
// Saves the callee-saved registers on the stack, stores the stack pointer in *from, continues on the stack `to`.
extern "C" void pynn_sim_switch(void** from, void* to);
asm(R"(
.text
.globl pynn_sim_switch
.hidden pynn_sim_switch
.type pynn_sim_switch, @function
pynn_sim_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size pynn_sim_switch, .-pynn_sim_switch
)");
#endif

namespace pynn::sim {
namespace {

// One launch runs at a time (launch.cpp), so one scheduler and one running fiber.
Context scheduler_context;
Fiber* running = nullptr;
void *scheduler_asan_stack = nullptr, *scheduler_tsan_fiber = nullptr;
const void* scheduler_stack_bottom = nullptr;
size_t scheduler_stack_size = 0;

// Stacks are used again by later threads; the last one to be given back is still in the cache. TSan must not see two
// threads of one launch on the same stack, which would look like a race: there they retire first.
std::vector<Stack> free_stacks, retired_stacks;

size_t stack_size() { return under_asan() ? 256 * 1024 : 128 * 1024; }  // instrumented frames and reports are large

Stack new_stack() {
  const Unobserved scope;
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), size = stack_size();
  void* memory = mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page, PROT_NONE);
  return {static_cast<char*>(memory) + page, size, under_tsan() ? __tsan_create_fiber(0) : nullptr};
}

Stack take_stack() {
  if (free_stacks.empty()) return new_stack();
  const Stack stack = free_stacks.back();
  free_stacks.pop_back();
  if (under_asan()) __asan_unpoison_memory_region(stack.bottom, stack.size);  // frames of a forgotten fiber
  return stack;
}

void switch_context(Context& from, Context& to) {
#ifdef PYNN_SIM_UCONTEXT
  swapcontext(&from, &to);
#else
  pynn_sim_switch(&from, to);
#endif
}

}  // namespace

void Fiber::start(void (*entry)()) {
  if (!stack_.bottom) stack_ = take_stack();
  entry_ = entry;
#ifdef PYNN_SIM_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_.bottom;
  context_.uc_stack.ss_size = stack_.size;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::enter, 0);
#else
  // Tops of stacks lie at the same offset in a page, so a thousand of them would fight for a few cache lines: spread
  // them. Then what pynn_sim_switch pops: six registers and the address to return to; 16-byte aligned at the call.
  static unsigned fibers_started = 0;
  char* top = stack_.bottom + stack_.size - size_t(fibers_started++ % 61) * 192;
  auto* slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // the return address of enter(): ends stack traces
  *--slot = reinterpret_cast<void*>(&Fiber::enter);
  for (int reg = 0; reg < 6; ++reg) *--slot = nullptr;
  context_ = slot;
#endif
}

void Fiber::resume() {
  running = this;
  if (under_asan()) __sanitizer_start_switch_fiber(&scheduler_asan_stack, stack_.bottom, stack_.size);
  if (under_tsan()) {
    scheduler_tsan_fiber = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(stack_.tsan_fiber, 1);  // 1: switching alone orders nothing
  }
  switch_context(scheduler_context, context_);
  if (under_asan()) __sanitizer_finish_switch_fiber(scheduler_asan_stack, nullptr, nullptr);
}

void Fiber::leave(bool for_good) {
  if (under_asan())
    __sanitizer_start_switch_fiber(for_good ? nullptr : &asan_stack_, scheduler_stack_bottom, scheduler_stack_size);
  if (under_tsan()) __tsan_switch_to_fiber(scheduler_tsan_fiber, 1);
  switch_context(context_, scheduler_context);
  if (under_asan()) __sanitizer_finish_switch_fiber(asan_stack_, &scheduler_stack_bottom, &scheduler_stack_size);
}

void Fiber::suspend() { leave(false); }

void Fiber::finish() {
  leave(true);
  __builtin_unreachable();
}

void Fiber::enter() {
  if (under_asan()) __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_bottom, &scheduler_stack_size);
  running->entry_();
  __builtin_unreachable();
}

void Fiber::reset() {
  const Unobserved scope;
  if (stack_.bottom) (under_tsan() ? retired_stacks : free_stacks).push_back(stack_);
  stack_ = {};
}

void Fiber::release_for(void* tag) {
  if (!under_tsan()) return;
  void* self = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(stack_.tsan_fiber, 1);
  release(tag);
  __tsan_switch_to_fiber(self, 1);
}

size_t Fiber::retired() { return retired_stacks.size(); }

void Fiber::recycle_retired() {
  const Unobserved scope;
  free_stacks.insert(free_stacks.end(), retired_stacks.begin(), retired_stacks.end());
  retired_stacks.clear();
}

}  // namespace pynn::sim
