// Fibers: stacks of their own between which one processor thread moves. Every thread of an emulated block is one.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(EMULATOR_PORTABLE_FIBERS)
#define EMULATOR_USES_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emulator {

struct Fiber {
  void* stack_pointer = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // of AddressSanitizer
#if defined(EMULATOR_USES_UCONTEXT)
  ucontext_t context;
#endif
};

constexpr int MOST_FIBERS = 8 * 1024;

// Gives a fiber the stack of that number; `entry` begins on the first switch to the fiber and never returns.
void prepare_fiber(Fiber& fiber, int number, void (*entry)());

// Leaves `from`, which is running, and continues `to`; returns when somebody switches back.
void switch_fiber(Fiber& from, Fiber& to);

bool is_on_fiber_stack(const void* address);

}  // namespace emulator
