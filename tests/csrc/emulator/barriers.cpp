// Barriers of blocks and clusters, and the shared memory of a cluster.
#include "cluster.h"
#include "race_detector.h"
#include "report.h"

namespace emulator {
namespace {

// All threads of a block come to the same barrier.
void arrive(Barrier barrier, Place place) {
  const Thread& self = *cluster.running;
  Block& block = *self.block;
  const auto here = [&] { return std::string(name_of(barrier)) + " " + name_of(place); };
  if (const auto* pending = operation_awaiting(self)) fail_awaited(self, *pending, "waits at " + here());
  const int num_exited = barrier == Barrier::block ? block.num_exited : cluster.num_exited;
  if (num_exited > 0) {
    fail(EXIT_SYNCHRONISATION, "early exit: %s waits at %s, but %d threads that it waits for have ended",
         name_of(self).c_str(), here().c_str(), num_exited);
  }
  if (block.num_waiting > 0 && (block.barrier != barrier || block.place != place)) {
    fail(EXIT_SYNCHRONISATION, "divergent barrier: %s waits at %s, but %s at %s %s", name_of(self).c_str(), here().c_str(),
         name_of(block, block.first_waiting).c_str(), name_of(block.barrier), name_of(block.place).c_str());
  }
  if (block.num_waiting == 0) {
    block.barrier = barrier;
    block.place = place;
    block.first_waiting = self.number;
  }
  ++block.num_waiting;
  self.warp().at_barrier |= 1u << self.lane();
}

void release(Block& block) {
  block.num_waiting = 0;
  for (Warp& warp : block.warps) warp.at_barrier = 0;
  for (int number = 0; number < cluster.threads_per_block; ++number) make_ready(block, number);
}

}  // namespace

void wait_at_block_barrier(Place place) {
  arrive(Barrier::block, place);
  Block& block = *cluster.running->block;
  if (block.num_waiting == cluster.threads_per_block) {
    races::pass_block_barrier(block.rank);
    release(block);
  }
  wait();
}

void wait_at_cluster_barrier(Place place) {
  arrive(Barrier::cluster, place);
  if (++cluster.num_at_cluster_barrier == cluster.num_threads()) {
    races::pass_cluster_barrier();
    cluster.num_at_cluster_barrier = 0;
    for (Block& block : cluster.blocks) release(block);
  }
  wait();
}

void* shared_memory() { return cluster.running->block->shared_memory; }
unsigned rank_in_cluster() { return static_cast<unsigned>(cluster.running->block->rank); }
unsigned blocks_in_cluster() { return static_cast<unsigned>(cluster.num_blocks); }

void* shared_memory_at_rank(void* own, unsigned rank) {
  const Thread& self = *cluster.running;
  const size_t offset = static_cast<size_t>(static_cast<unsigned char*>(own) - self.block->shared_memory);
  if (offset > cluster.shared_bytes || rank >= blocks_in_cluster()) {
    fail(EXIT_SYNCHRONISATION, "map_shared_rank: %s maps offset %td of its shared memory (%zu bytes) to rank %u of %u",
         name_of(self).c_str(), static_cast<ptrdiff_t>(offset), cluster.shared_bytes, rank,
         blocks_in_cluster());
  }
  return cluster.blocks[rank].shared_memory + offset;
}

const char* name_of(Barrier barrier) { return barrier == Barrier::block ? "barrier" : "cluster barrier"; }

}  // namespace emulator
