// The blocks that are on the emulated device together: a cluster. Clusters run one after the other.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "fiber.h"
#include "machine.h"
#include "ready_threads.h"

namespace emulator {

constexpr int WARP_SIZE = 32;

struct PendingWarpOperation {
  WarpOperation operation;
  unsigned mask;
  Place place;
  unsigned arrived;
};

// Sets of lanes are bit masks.
struct Warp {
  unsigned lanes, exited, at_barrier;
  std::vector<PendingWarpOperation> pending;
  LaneOperand operands[WARP_SIZE];
  uint64_t results[WARP_SIZE];
};

enum class Barrier { block, cluster };

struct Block {
  uint3 position;  // blockIdx
  unsigned index;  // in the grid
  int rank;        // in the cluster
  std::vector<Warp> warps;
  unsigned char* shared_memory;

  // At most one barrier is waited for at a time.
  Barrier barrier;
  Place place;
  int num_waiting, first_waiting, num_exited;
};

struct Thread {
  Fiber fiber;
  Block* block;
  uint3 position;  // threadIdx
  int number;      // in the block
  int id;          // in the cluster

  Warp& warp() const { return block->warps[static_cast<size_t>(number / WARP_SIZE)]; }
  int lane() const { return number % WARP_SIZE; }
};

struct Cluster {
  int num_blocks, threads_per_block;
  size_t shared_bytes;
  std::vector<Block> blocks;
  int num_exited, num_at_cluster_barrier;

  const std::function<void()>* run_thread;
  Thread* running = nullptr;
  ReadyThreads ready;

  int num_threads() const { return num_blocks * threads_per_block; }
};

extern Cluster cluster;

// Runs all threads of `cluster` to their end; blocks [first_block, first_block + num_blocks) of the grid.
void run_cluster(unsigned first_block);

// The running thread waits: another one runs until somebody has made this one ready.
void wait();
void make_ready(const Block& block, int number);

// A warp operation for which other lanes wait for this thread, or null.
const PendingWarpOperation* operation_awaiting(const Thread& thread);
[[noreturn]] void fail_awaited(const Thread& thread, const PendingWarpOperation& pending, const std::string& what);

std::string name_of(const Block& block, int number);
std::string name_of(const Thread& thread);
std::string name_of(const Place& place);
const char* name_of(Barrier barrier);
std::string name_of(const PendingWarpOperation& pending);

}  // namespace emulator
