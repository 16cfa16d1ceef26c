// Lets g++ compile a .cu file for the emulated device: the words that nvcc knows without a header. Use
//
//   g++ -std=c++17 -x c++ -I tests/csrc/emulator -include emulated_cuda.h kernel.cu
//
// __CUDACC__ and __CUDA_ARCH__ stay undefined. Shared memory is dynamic only and comes from emulated_shared_memory().
#pragma once

#include <type_traits>

#include "cuda_runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// The last parameters of a function that has to know from where it is called.
#define EMULATOR_CALLED_FROM int line = __builtin_LINE(), const char* file = __builtin_FILE()

inline void* emulated_shared_memory() { return emulator::shared_memory(); }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}

template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline void __syncthreads(EMULATOR_CALLED_FROM) { emulator::wait_at_block_barrier({file, line}); }

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, EMULATOR_CALLED_FROM) {
  emulator::run_warp_operation(emulator::WarpOperation::sync, mask, {}, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_CALLED_FROM) {
  const emulator::LaneOperand operand{predicate != 0};
  return static_cast<unsigned>(
      emulator::run_warp_operation(emulator::WarpOperation::ballot, mask, operand, {file, line}));
}

inline int __any_sync(unsigned mask, int predicate, EMULATOR_CALLED_FROM) {
  const emulator::LaneOperand operand{predicate != 0};
  return emulator::run_warp_operation(emulator::WarpOperation::any, mask, operand, {file, line}) != 0;
}

inline int __all_sync(unsigned mask, int predicate, EMULATOR_CALLED_FROM) {
  const emulator::LaneOperand operand{predicate != 0};
  return emulator::run_warp_operation(emulator::WarpOperation::all, mask, operand, {file, line}) == mask;
}

namespace emulator {

template <class T>
T shuffle(WarpOperation operation, unsigned mask, T value, int argument, int width, Place place) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles exchange 32 or 64 bits");
  LaneOperand operand{0, argument, width};
  std::memcpy(&operand.value, &value, sizeof value);
  const uint64_t bits = run_warp_operation(operation, mask, operand, place);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_CALLED_FROM) {
  return emulator::shuffle(emulator::WarpOperation::shuffle, mask, value, source, width, {file, line});
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, EMULATOR_CALLED_FROM) {
  const int lanes = static_cast<int>(distance);
  return emulator::shuffle(emulator::WarpOperation::shuffle_up, mask, value, lanes, width, {file, line});
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, EMULATOR_CALLED_FROM) {
  const int lanes = static_cast<int>(distance);
  return emulator::shuffle(emulator::WarpOperation::shuffle_down, mask, value, lanes, width, {file, line});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMULATOR_CALLED_FROM) {
  return emulator::shuffle(emulator::WarpOperation::shuffle_xor, mask, value, lane_mask, width, {file, line});
}

inline int atomicAdd(int* sum, int value) { return __atomic_fetch_add(sum, value, __ATOMIC_RELAXED); }

inline unsigned atomicAdd(unsigned* sum, unsigned value) { return __atomic_fetch_add(sum, value, __ATOMIC_RELAXED); }

inline unsigned long long atomicAdd(unsigned long long* sum, unsigned long long value) {
  return __atomic_fetch_add(sum, value, __ATOMIC_RELAXED);
}

inline float atomicAdd(float* sum, float value) {
  float old, added;
  __atomic_load(sum, &old, __ATOMIC_RELAXED);
  do {
    added = old + value;
  } while (!__atomic_compare_exchange(sum, &old, &added, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
