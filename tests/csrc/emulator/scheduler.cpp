// Which thread runs, from the first of a cluster to the end of the last.
#include <deque>

#include "cluster.h"
#include "race_detector.h"
#include "report.h"

#if defined(EMULATOR_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Settings settings;
Cluster cluster;

namespace {

constexpr int SHARED_MEMORY_PATTERN = 0xCD;

std::deque<Thread> threads;  // kept from cluster to cluster: a fiber begins its next thread where the last one ended
Fiber host;

uint3 position_in(const dim3& size, unsigned index) {
  return {index % size.x, index / size.x % size.y, index / size.x / size.y};
}

// Continues a thread that can run; returns when `left` is continued.
void leave_for_next(Fiber& left) {
  Thread& next = threads[static_cast<size_t>(cluster.ready.take())];
  cluster.running = &next;
  threadIdx = next.position;
  blockIdx = next.block->position;
  if (&next.fiber != &left) switch_fiber(left, next.fiber);
}

std::string waiting_threads() {
  std::string text;
  int listed = 0;
  for (const Block& block : cluster.blocks) {
    for (int number = 0; number < cluster.threads_per_block && listed < 8; ++number) {
      const Warp& warp = block.warps[static_cast<size_t>(number / WARP_SIZE)];
      const unsigned lane = 1u << number % WARP_SIZE;
      std::string what;
      if (warp.at_barrier & lane) what = std::string(name_of(block.barrier)) + " " + name_of(block.place);
      for (const PendingWarpOperation& pending : warp.pending) {
        if (pending.arrived & lane) what = name_of(pending);
      }
      if (what.empty()) continue;
      text += "\n  " + name_of(block, number) + " waits at " + what;
      ++listed;
    }
  }
  return text;
}

// The emulator itself is not compiled under AddressSanitizer, whose macros are empty here.
void begin_shared_memory(const Block& block) {
#if defined(EMULATOR_ADDRESS_SANITIZER)
  __asan_unpoison_memory_region(block.shared_memory, cluster.shared_bytes);
#endif
  std::memset(block.shared_memory, SHARED_MEMORY_PATTERN, cluster.shared_bytes);
}

// From now on other blocks of the cluster must not touch it.
void end_shared_memory(const Block& block) {
  races::end_block(block.rank);
#if defined(EMULATOR_ADDRESS_SANITIZER)
  __asan_poison_memory_region(block.shared_memory, cluster.shared_bytes);
#endif
}

void end_thread() {
  Thread& self = *cluster.running;
  Block& block = *self.block;
  if (const auto* pending = operation_awaiting(self)) fail_awaited(self, *pending, "has ended");
  for (const Block& other : cluster.blocks) {
    if (other.num_waiting > 0 && (&other == &block || other.barrier == Barrier::cluster)) {
      fail(EXIT_SYNCHRONISATION, "early exit: %s has ended, but %s waits at %s %s", name_of(self).c_str(),
           name_of(other, other.first_waiting).c_str(), name_of(other.barrier), name_of(other.place).c_str());
    }
  }
  self.warp().exited |= 1u << self.lane();
  ++cluster.num_exited;
  if (++block.num_exited == cluster.threads_per_block) end_shared_memory(block);
  if (cluster.num_exited < cluster.num_threads()) {
    wait();
  } else {
    cluster.running = nullptr;
    switch_fiber(self.fiber, host);
  }
}

void run_threads_forever() {
  for (;;) {
    (*cluster.run_thread)();
    end_thread();
  }
}

}  // namespace

void make_ready(const Block& block, int number) { cluster.ready.add(block.rank * cluster.threads_per_block + number); }

void wait() {
  if (cluster.ready.is_empty()) fail(EXIT_SYNCHRONISATION, "deadlock%s", waiting_threads().c_str());
  leave_for_next(cluster.running->fiber);
}

void run_cluster(unsigned first_block) {
  const int num_threads = cluster.num_threads(), num_warps = (cluster.threads_per_block + WARP_SIZE - 1) / WARP_SIZE;
  cluster.num_exited = cluster.num_at_cluster_barrier = 0;
  cluster.ready.reset(num_threads, settings.order, settings.seed + first_block);
  while (static_cast<int>(threads.size()) < num_threads) {
    const int id = static_cast<int>(threads.size());
    prepare_fiber(threads.emplace_back().fiber, id, run_threads_forever);
    threads.back().id = id;
  }
  for (Block& block : cluster.blocks) {
    block.index = first_block + static_cast<unsigned>(block.rank);
    block.position = position_in(gridDim, block.index);
    block.num_waiting = block.num_exited = 0;
    block.warps.resize(static_cast<size_t>(num_warps));
    for (int warp = 0; warp < num_warps; ++warp) {
      const int rest = cluster.threads_per_block - warp * WARP_SIZE;
      Warp& reset = block.warps[static_cast<size_t>(warp)];
      reset.lanes = rest >= WARP_SIZE ? ~0u : (1u << rest) - 1;
      reset.exited = reset.at_barrier = 0;
      reset.pending.clear();
    }
    for (int number = 0; number < cluster.threads_per_block; ++number) {
      Thread& thread = threads[static_cast<size_t>(block.rank * cluster.threads_per_block + number)];
      thread.block = &block;
      thread.number = number;
      thread.position = position_in(blockDim, static_cast<unsigned>(number));
      make_ready(block, number);
    }
    begin_shared_memory(block);
  }
  races::begin_cluster();
  leave_for_next(host);
}

std::string name_of(const Block& block, int number) {
  return "block " + std::to_string(block.index) + " thread " + std::to_string(number);
}

std::string name_of(const Thread& thread) { return name_of(*thread.block, thread.number); }

std::string name_of(const Place& place) { return name_of_file(place.file) + (":" + std::to_string(place.line)); }

}  // namespace emulator
