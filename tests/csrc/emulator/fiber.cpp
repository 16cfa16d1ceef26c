#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>

#include "report.h"

#if defined(EMULATOR_ADDRESS_SANITIZER)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

constexpr size_t STACK_BYTES = 128 * 1024, GUARD_BYTES = 4096;  // a stack that is too small ends in a page fault

char* first_stack = nullptr;
Fiber* left = nullptr;  // from which the last switch came
void (*entry_of_new_fibers)() = nullptr;

void begin_switch([[maybe_unused]] Fiber& from, [[maybe_unused]] const Fiber& to) {
  left = &from;
#if defined(EMULATOR_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
}

void end_switch([[maybe_unused]] void* fake_stack) {
#if defined(EMULATOR_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(fake_stack, &left->stack_bottom, &left->stack_bytes);
#endif
}

void enter_fiber() {
  end_switch(nullptr);
  entry_of_new_fibers();
}

#if defined(EMULATOR_USES_UCONTEXT)

void prepare_context(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = const_cast<void*>(fiber.stack_bottom);
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter_fiber, 0);
}

void switch_context(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#else

// swapcontext makes a system call for the signal mask at every switch.
extern "C" void emulator_switch_stack(void** left, void* entered);

asm(R"(
.text
.globl emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack, .-emulator_switch_stack
)");

void prepare_context(Fiber& fiber) {
  auto* top = reinterpret_cast<void**>(static_cast<char*>(const_cast<void*>(fiber.stack_bottom)) + fiber.stack_bytes);
  *--top = nullptr;  // the return address of enter_fiber, which never returns; it ends stack traces
  *--top = reinterpret_cast<void*>(enter_fiber);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  fiber.stack_pointer = top;
}

void switch_context(Fiber& from, Fiber& to) { emulator_switch_stack(&from.stack_pointer, to.stack_pointer); }

#endif

}  // namespace

bool is_on_fiber_stack(const void* address) {
  return static_cast<size_t>(static_cast<const char*>(address) - first_stack) < MOST_FIBERS * STACK_BYTES;
}

void switch_fiber(Fiber& from, Fiber& to) {
  begin_switch(from, to);
  switch_context(from, to);
  end_switch(from.fake_stack);
}

void prepare_fiber(Fiber& fiber, int number, void (*entry)()) {
  if (first_stack == nullptr) {
    void* region = mmap(nullptr, MOST_FIBERS * STACK_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (region == MAP_FAILED) fail(1, "no address space for the stacks of %d threads", MOST_FIBERS);
    first_stack = static_cast<char*>(region);
  }
  char* stack = first_stack + number * STACK_BYTES;
  mprotect(stack, GUARD_BYTES, PROT_NONE);
  fiber.stack_bottom = stack + GUARD_BYTES;
  fiber.stack_bytes = STACK_BYTES - GUARD_BYTES;
  entry_of_new_fibers = entry;
  prepare_context(fiber);
}

}  // namespace emulator
