// One stack a device thread, switched by hand: a few nanoseconds on x86-64, ucontext elsewhere.
// AddressSanitizer is told of every switch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CONTRASTILE_ADDRESS_SANITIZER
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#define CONTRASTILE_ADDRESS_SANITIZER
#endif

#ifdef CONTRASTILE_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace contrastile::host {

#ifdef CONTRASTILE_ADDRESS_SANITIZER
inline constexpr std::size_t stack_bytes = 512 << 10;
#else
inline constexpr std::size_t stack_bytes = 128 << 10;
#endif

// Memory from the system, with a page at its low end that no one may touch.
class Stack {
 public:
  Stack() : memory_(mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory_, guard(), PROT_NONE);
  }
  ~Stack() {
    if (!memory_) return;
    unpoison();
    munmap(memory_, stack_bytes);
  }
  Stack(Stack&& other) noexcept : memory_(other.memory_) { other.memory_ = nullptr; }
  Stack(const Stack&) = delete;
  Stack& operator=(Stack&&) = delete;

  char* bottom() const { return static_cast<char*>(memory_) + guard(); }
  std::size_t size() const { return stack_bytes - guard(); }
  char* top() const { return static_cast<char*>(memory_) + stack_bytes; }

  // A thread that was given up leaves the red zones of its frames behind.
  void unpoison() const {
#ifdef CONTRASTILE_ADDRESS_SANITIZER
    __asan_unpoison_memory_region(bottom(), size());
#endif
  }

 private:
  static std::size_t guard() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

  void* memory_;
};

#ifdef __x86_64__
[[gnu::naked, gnu::noinline]] inline void switch_stacks(void** /*saved*/, void* /*next*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}

class Context {
 public:
  void prepare(const Stack& stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack.top());
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
    stack_pointer_ = top;
  }
  static void change(Context& from, Context& to) { switch_stacks(&from.stack_pointer_, to.stack_pointer_); }

 private:
  void* stack_pointer_ = nullptr;
};
#else
class Context {
 public:
  void prepare(const Stack& stack, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack.bottom();
    context_.uc_stack.ss_size = stack.size();
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

 private:
  ucontext_t context_;
};
#endif

// A context and what AddressSanitizer keeps about it. The one that schedules runs on the caller's own stack.
struct Fiber {
  Context context;
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  std::size_t size = 0;

  void prepare(const Stack& stack, void (*entry)()) {
    stack.unpoison();
    fake_stack = nullptr;
    bottom = stack.bottom();
    size = stack.size();
    context.prepare(stack, entry);
  }
};

// First thing on a new fiber; `from` learns the bounds of its stack.
inline void arrive_on_fiber([[maybe_unused]] Fiber& here, [[maybe_unused]] Fiber& from) {
#ifdef CONTRASTILE_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(here.fake_stack, &from.bottom, &from.size);
#endif
}

inline void switch_fiber(Fiber& from, Fiber& to) {
#ifdef CONTRASTILE_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
  Context::change(from.context, to.context);
  arrive_on_fiber(from, to);
}

// Last thing on a fiber: never returns, and its fake stack goes.
[[noreturn]] inline void leave_fiber(Fiber& from, Fiber& to) {
#ifdef CONTRASTILE_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(nullptr, to.bottom, to.size);
#endif
  Context::change(from.context, to.context);
  __builtin_unreachable();
}

}  // namespace contrastile::host
