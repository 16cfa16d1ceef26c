// The functions that code compiled with -fsanitize=thread calls at each access. Linked in place of ThreadSanitizer, which
// knows processor threads only.
#include <cstdint>
#include <cstring>

#include "race_detector.h"

using emulator::races::access;
using emulator::races::Kind;

#define HERE __builtin_return_address(0)

#define EMULATOR_ACCESSES(bytes)                                                                                       \
  void __tsan_read##bytes(void* address) { access(address, bytes, Kind::read, HERE); }                                 \
  void __tsan_write##bytes(void* address) { access(address, bytes, Kind::write, HERE); }                               \
  void __tsan_unaligned_read##bytes(void* address) { access(address, bytes, Kind::read, HERE); }                       \
  void __tsan_unaligned_write##bytes(void* address) { access(address, bytes, Kind::write, HERE); }                     \
  void __tsan_volatile_read##bytes(void* address) { access(address, bytes, Kind::read, HERE); }                        \
  void __tsan_volatile_write##bytes(void* address) { access(address, bytes, Kind::write, HERE); }

#define EMULATOR_ATOMIC_UPDATE(bits, name, builtin)                                                                    \
  uint##bits##_t __tsan_atomic##bits##_##name(volatile uint##bits##_t* address, uint##bits##_t value, int) {           \
    access(address, bits / 8, Kind::atomic, HERE);                                                                     \
    return builtin(address, value, __ATOMIC_SEQ_CST);                                                                  \
  }

#define EMULATOR_ATOMIC_EXCHANGE(bits, name)                                                                           \
  int __tsan_atomic##bits##_compare_exchange_##name(volatile uint##bits##_t* address, uint##bits##_t* expected,        \
                                                    uint##bits##_t desired, int, int) {                                \
    access(address, bits / 8, Kind::atomic, HERE);                                                                     \
    return __atomic_compare_exchange_n(address, expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);         \
  }

// An atomic load counts as an update: device code has no other use for it than to begin one.
#define EMULATOR_ATOMICS(bits)                                                                                         \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* address, int) {                             \
    access(address, bits / 8, Kind::atomic, HERE);                                                                     \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                                                                 \
  }                                                                                                                    \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* address, uint##bits##_t value, int) {                      \
    access(address, bits / 8, Kind::atomic, HERE);                                                                     \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                                    \
  EMULATOR_ATOMIC_UPDATE(bits, exchange, __atomic_exchange_n)                                                          \
  EMULATOR_ATOMIC_UPDATE(bits, fetch_add, __atomic_fetch_add)                                                          \
  EMULATOR_ATOMIC_UPDATE(bits, fetch_sub, __atomic_fetch_sub)                                                          \
  EMULATOR_ATOMIC_UPDATE(bits, fetch_and, __atomic_fetch_and)                                                          \
  EMULATOR_ATOMIC_UPDATE(bits, fetch_or, __atomic_fetch_or)                                                            \
  EMULATOR_ATOMIC_UPDATE(bits, fetch_xor, __atomic_fetch_xor)                                                          \
  EMULATOR_ATOMIC_UPDATE(bits, fetch_nand, __atomic_fetch_nand)                                                        \
  EMULATOR_ATOMIC_EXCHANGE(bits, strong)                                                                               \
  EMULATOR_ATOMIC_EXCHANGE(bits, weak)

extern "C" {

EMULATOR_ACCESSES(1)
EMULATOR_ACCESSES(2)
EMULATOR_ACCESSES(4)
EMULATOR_ACCESSES(8)
EMULATOR_ACCESSES(16)
EMULATOR_ATOMICS(8)
EMULATOR_ATOMICS(16)
EMULATOR_ATOMICS(32)
EMULATOR_ATOMICS(64)

void __tsan_read_range(void* address, size_t bytes) { access(address, bytes, Kind::read, HERE); }
void __tsan_write_range(void* address, size_t bytes) { access(address, bytes, Kind::write, HERE); }
void __tsan_vptr_read(void** pointer) { access(pointer, sizeof(void*), Kind::read, HERE); }
void __tsan_vptr_update(void** pointer, void*) { access(pointer, sizeof(void*), Kind::write, HERE); }

// Compiled kernels call these for memcpy, memmove and memset: the build renames them.
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  access(from, bytes, Kind::read, HERE);
  access(to, bytes, Kind::write, HERE);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  access(from, bytes, Kind::read, HERE);
  access(to, bytes, Kind::write, HERE);
  return std::memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  access(to, bytes, Kind::write, HERE);
  return std::memset(to, value, bytes);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}

}  // extern "C"
