// The threads that sample one row: a block, or the blocks of a cluster, each of which keeps a part of the row.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "host_device.h"

// Clusters exist from compute capability 9.0 on; before, a row has one block.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define ESR_HAS_CLUSTERS 1
#else
#define ESR_HAS_CLUSTERS 0
#endif

namespace esr {

constexpr unsigned WHOLE_WARP = 0xFFFFFFFFu;

// The dynamic shared memory of this block.
ESR_INLINE void* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
#else
  return emulated_shared_memory();
#endif
}

struct RowThreads {
  int thread, num_threads, lane, warp, num_warps;
  int rank, num_ranks;  // this block among those of the row

  ESR_INLINE RowThreads()
      : thread(static_cast<int>(threadIdx.x)), num_threads(static_cast<int>(blockDim.x)), lane(thread % 32),
        warp(thread / 32), num_warps(num_threads / 32), rank(0), num_ranks(1) {
#if ESR_HAS_CLUSTERS
    const auto cluster = cooperative_groups::this_cluster();
    rank = static_cast<int>(cluster.block_rank());
    num_ranks = static_cast<int>(cluster.num_blocks());
#endif
  }

  ESR_INLINE void sync_block() const { __syncthreads(); }

  // All threads of the row; what they wrote in shared memory before is seen by all of them after.
  ESR_INLINE void sync_row() const {
#if ESR_HAS_CLUSTERS
    if (num_ranks > 1) {
      cooperative_groups::this_cluster().sync();
      return;
    }
#endif
    __syncthreads();
  }

  // The same place in the shared memory of another block of the row.
  template <class T>
  ESR_INLINE T* at_rank(T* own, int other_rank) const {
#if ESR_HAS_CLUSTERS
    if (num_ranks > 1) return cooperative_groups::this_cluster().map_shared_rank(own, other_rank);
#endif
    return own;
  }
};

ESR_INLINE uint64_t warp_sum(uint64_t value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(WHOLE_WARP, value, step);
  return value;
}

// Sum of the lanes up to and including this one.
ESR_INLINE uint64_t warp_inclusive_sum(uint64_t value, int lane) {
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t lower = __shfl_up_sync(WHOLE_WARP, value, step);
    if (lane >= step) value += lower;
  }
  return value;
}

}  // namespace esr
