// The sampler on a CUDA device: one kernel, a block or a cluster of blocks for each row.
//
// Bytes read: 2 or 4 per logit where the row stays in shared memory, that times the number of passes elsewhere (3 without
// filters, about 10 with top-k and top-p; small batches find the later ones in the L2 cache). Arithmetic per logit: about
// 20 instructions for each of the two weights (one where the temperature is 1), 5 for each other pass.
#include "cooperative_row.h"

namespace esr {
namespace {

template <class Format, bool IN_SHARED>
__global__ void __launch_bounds__(MOST_THREADS, 1) sample_tokens_kernel(const SamplerArguments a, int blocks_per_row) {
  const int index = static_cast<int>(blockIdx.x) / blocks_per_row;
  if (a.finished_B[index]) return;  // for all blocks of the row alike
  const auto* logits = static_cast<const typename Format::Bits*>(a.logits_B_V) + index * a.row_stride;
  CooperativeRow<Format, IN_SHARED> row(logits, a.vocab_size);
  const RowOutcome outcome = sample_row(row, parameters_of(a, index), random_of(a, index));
  if (row.threads.rank == 0 && row.threads.thread == 0) {
    auto* active = reinterpret_cast<unsigned long long*>(a.active);
    write_outcome(a, index, outcome, [=] { atomicAdd(active, ~0ull); });  // adds -1
  }
}

using Kernel = void (*)(SamplerArguments, int);

template <class Format>
Kernel kernel_of(bool in_shared) {
  return in_shared ? sample_tokens_kernel<Format, true> : sample_tokens_kernel<Format, false>;
}

Kernel kernel_of(LogitDtype dtype, bool in_shared) {
  if (dtype == LogitDtype::float32) return kernel_of<Float32>(in_shared);
  return dtype == LogitDtype::bfloat16 ? kernel_of<BFloat16>(in_shared) : kernel_of<Float16>(in_shared);
}

struct Device {
  int major, num_multiprocessors, shared_bytes_per_block;
};

cudaError_t describe_device(Device& device) {
  int index;
  cudaError_t error = cudaGetDevice(&index);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, index);
  };
  read(device.major, cudaDevAttrComputeCapabilityMajor);
  read(device.num_multiprocessors, cudaDevAttrMultiProcessorCount);
  read(device.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return error;
}

int64_t vectors_per_block(const SamplerArguments& a, int blocks_per_row) {
  const int64_t vector = a.dtype == LogitDtype::float32 ? 4 : 8;
  const int64_t num_vectors = (a.vocab_size + vector - 1) / vector + 1;  // a row may start inside a vector
  return (num_vectors + blocks_per_row - 1) / blocks_per_row;
}

int64_t shared_bytes(const SamplerArguments& a, int blocks_per_row, bool in_shared) {
  return sizeof(RowExchange) + (in_shared ? 16 * vectors_per_block(a, blocks_per_row) : 0);
}

// Fills in what the caller left open. As many blocks as it takes to keep a row in shared memory; more while the batch leaves
// multiprocessors idle.
LaunchPlan complete(LaunchPlan plan, const SamplerArguments& a, const Device& device) {
  const auto fits = [&](int blocks) { return shared_bytes(a, blocks, true) <= device.shared_bytes_per_block; };
  if (plan.blocks_per_row == 0) {
    const int most = device.major >= 9 ? 8 : 1;
    plan.blocks_per_row = 1;
    while (plan.blocks_per_row < most && !fits(plan.blocks_per_row)) plan.blocks_per_row *= 2;
    if (!fits(plan.blocks_per_row)) plan.blocks_per_row = most;
    while (plan.blocks_per_row < most && 2 * plan.blocks_per_row * a.batch_size <= device.num_multiprocessors &&
           vectors_per_block(a, plan.blocks_per_row) > MOST_THREADS)
      plan.blocks_per_row *= 2;
  }
  if (plan.row_in_shared_memory < 0) plan.row_in_shared_memory = fits(plan.blocks_per_row);
  if (plan.threads_per_block == 0) {
    const int64_t wanted = (vectors_per_block(a, plan.blocks_per_row) + 31) / 32 * 32;
    plan.threads_per_block = static_cast<int>(wanted < MOST_THREADS ? wanted : MOST_THREADS);
  }
  return plan;
}

}  // namespace

int launch_sample_tokens(const SamplerArguments& arguments, void* stream, LaunchPlan plan) {
  if (arguments.batch_size == 0) return cudaSuccess;
  Device device{};
  cudaError_t error = describe_device(device);
  if (error != cudaSuccess) return error;
  plan = complete(plan, arguments, device);
  const Kernel kernel = kernel_of(arguments.dtype, plan.row_in_shared_memory != 0);
  const auto bytes = static_cast<size_t>(shared_bytes(arguments, plan.blocks_per_row, plan.row_in_shared_memory != 0));
  error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes));
  if (error != cudaSuccess) return error;

  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(plan.blocks_per_row);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(arguments.batch_size) * static_cast<unsigned>(plan.blocks_per_row));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads_per_block));
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = plan.blocks_per_row > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments, plan.blocks_per_row);
}

const char* describe_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace esr
