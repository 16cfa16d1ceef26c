// Launches: what CUDA refuses, and clusters one after the other.
#include <cstdlib>
#include <map>

#include "cluster.h"
#include "cuda_runtime.h"
#include "race_detector.h"

namespace {

constexpr int DEFAULT_SHARED_BYTES = 48 * 1024;  // more has to be asked for
constexpr unsigned MOST_THREADS_PER_BLOCK = 1024, MOST_BLOCKS_PER_CLUSTER = 8;

std::map<const void*, int> asked_shared_bytes;

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidValue;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulator::settings.num_multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulator::settings.compute_capability_major;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulator::settings.shared_bytes_per_block;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || value > emulator::settings.shared_bytes_per_block) return cudaErrorInvalidValue;
  asked_shared_bytes[kernel] = value;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorInvalidClusterSize:
      return "invalid cluster size";
  }
  return "unrecognized error code";
}

namespace emulator {
namespace {

dim3 cluster_size_of(const cudaLaunchConfig_t& config) {
  dim3 size;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& asked = config.attrs[i].val.clusterDim;
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) size = dim3(asked.x, asked.y, asked.z);
  }
  return size;
}

cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim, asked = cluster_size_of(config);
  const uint64_t num_blocks = uint64_t{grid.x} * grid.y * grid.z, num_threads = uint64_t{block.x} * block.y * block.z;
  if (num_blocks == 0 || num_blocks > INT32_MAX || num_threads == 0 || num_threads > MOST_THREADS_PER_BLOCK)
    return cudaErrorInvalidConfiguration;
  if (asked.x > 1 && settings.compute_capability_major < 9) return cudaErrorNotSupported;
  if (asked.x == 0 || asked.x > MOST_BLOCKS_PER_CLUSTER || asked.y != 1 || asked.z != 1) return cudaErrorInvalidClusterSize;
  if (grid.x % asked.x != 0) return cudaErrorInvalidClusterSize;
  const auto found = asked_shared_bytes.find(kernel);
  const int allowed = found == asked_shared_bytes.end() ? DEFAULT_SHARED_BYTES : found->second;
  return config.dynamicSmemBytes > static_cast<size_t>(allowed) ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& run_thread) {
  const cudaError_t error = check_launch(config, kernel);
  if (error != cudaSuccess) return error;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  cluster.num_blocks = static_cast<int>(cluster_size_of(config).x);
  cluster.threads_per_block = static_cast<int>(config.blockDim.x * config.blockDim.y * config.blockDim.z);
  cluster.shared_bytes = config.dynamicSmemBytes;
  cluster.run_thread = &run_thread;
  cluster.blocks.assign(static_cast<size_t>(cluster.num_blocks), {});
  for (int rank = 0; rank < cluster.num_blocks; ++rank) {
    Block& block = cluster.blocks[static_cast<size_t>(rank)];
    block.rank = rank;
    void* allocated = nullptr;
    if (posix_memalign(&allocated, 16, cluster.shared_bytes) != 0) return cudaErrorInvalidValue;
    block.shared_memory = static_cast<unsigned char*>(allocated);
  }
  races::begin_launch();
  const unsigned num_blocks = config.gridDim.x * config.gridDim.y * config.gridDim.z;
  for (unsigned first = 0; first < num_blocks; first += static_cast<unsigned>(cluster.num_blocks)) run_cluster(first);
  for (const Block& block : cluster.blocks) std::free(block.shared_memory);
  return cudaSuccess;
}

}  // namespace emulator
