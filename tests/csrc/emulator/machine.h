// The emulated device as a running kernel meets it. A kernel calls these through emulated_cuda.h and cooperative_groups.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the running thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

// Where a barrier or a warp operation stands in the source.
struct Place {
  const char* file;
  int line;

  bool operator==(const Place& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
  bool operator!=(const Place& other) const { return !(*this == other); }
};

void* shared_memory();
void wait_at_block_barrier(Place place);

unsigned rank_in_cluster();
unsigned blocks_in_cluster();
void* shared_memory_at_rank(void* own, unsigned rank);
void wait_at_cluster_barrier(Place place);

enum class WarpOperation { sync, ballot, any, all, shuffle, shuffle_up, shuffle_down, shuffle_xor };

// What a lane brings: `value` is exchanged; `argument` is the source lane or the distance, among groups of `width` lanes.
struct LaneOperand {
  uint64_t value = 0;
  int argument = 0;
  int width = 32;
};

// Waits until all lanes in `mask` call this with the same operation, mask and place. A shuffle returns the value of the lane
// that it names, the others a bit for each lane of `mask` whose value is not 0.
uint64_t run_warp_operation(WarpOperation operation, unsigned mask, LaneOperand operand, Place place);

}  // namespace emulator
