// What the program that launches kernels chooses about the emulated device.
#pragma once

#include <cstdint>

namespace emulator {

// Which of the threads that can run does so next, until it waits: the lowest of the cluster, the highest, or any. Whatever is
// right for some orders only lacks a barrier.
enum class Order { ascending, descending, random };

struct Settings {
  Order order = Order::ascending;
  uint64_t seed = 0;
  int compute_capability_major = 9;
  int num_multiprocessors = 132;
  int shared_bytes_per_block = 227 * 1024;  // the most that a kernel can ask for
};

extern Settings settings;

}  // namespace emulator
