// Clusters of blocks for the emulated device. A launch without a cluster dimension has clusters of one block.
#pragma once

#include "machine.h"

namespace cooperative_groups {

struct cluster_group {
  static void sync(int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
    emulator::wait_at_cluster_barrier({file, line});
  }
  static unsigned block_rank() { return emulator::rank_in_cluster(); }
  static unsigned num_blocks() { return emulator::blocks_in_cluster(); }

  template <class T>
  static T* map_shared_rank(T* own, int rank) {
    void* address = const_cast<void*>(static_cast<const void*>(own));
    return static_cast<T*>(emulator::shared_memory_at_rank(address, static_cast<unsigned>(rank)));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
