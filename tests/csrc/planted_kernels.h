// Small kernels that are right or wrong in one way each: what the emulator must accept and what it must find.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstring>

namespace planted {

namespace cg = cooperative_groups;

constexpr unsigned WHOLE_WARP = 0xFFFFFFFFu;

template <class T>
T* shared() {
  return static_cast<T*>(emulated_shared_memory());
}

int thread() { return static_cast<int>(threadIdx.x); }

// Blocks

__global__ void add_up(const int* numbers, int* sum, bool has_barrier) {
  int* copied = shared<int>();
  copied[thread()] = numbers[thread()];
  __syncthreads();
  for (int step = static_cast<int>(blockDim.x) / 2; step > 0; step /= 2) {
    if (thread() < step) copied[thread()] += copied[thread() + step];
    if (has_barrier) __syncthreads();
  }
  if (thread() == 0) *sum = copied[0];
}

__global__ void diverge() {
  if (thread() % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void leave_early() {
  if (thread() == 5) return;
  __syncthreads();
}

__global__ void do_nothing() {}

__global__ void wait_in_a_circle() {  // lane 0 for lane 16, that for lane 31, that for lane 0
  if (thread() == 0) __syncwarp(0x00010001u);
  if (thread() == 16) __syncwarp(0x80010000u);
  if (thread() == 31) __syncwarp(0x80000001u);
}

__global__ void write_positions(int* cells) {
  const unsigned x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
  const unsigned z = blockIdx.z * blockDim.z + threadIdx.z;
  const unsigned width = gridDim.x * blockDim.x, height = gridDim.y * blockDim.y;
  cells[(z * height + y) * width + x] = static_cast<int>(x + 10 * y + 100 * z);
}

// Memory

__global__ void read_shared(int* out, int index) { *out = shared<int>()[index]; }

__global__ void read_shared_of_next_rank(int* out, int index) {
  const auto cluster = cg::this_cluster();
  cluster.sync();
  out[blockIdx.x] = cluster.map_shared_rank(shared<int>(), 1 - static_cast<int>(cluster.block_rank()))[index];
  cluster.sync();
}

__global__ void read_global(const int* numbers, int* out, int index) { *out = numbers[index]; }

struct alignas(16) Vector {
  int part[4];
};

__global__ void read_vector(const int* numbers, int* out, int index) {
  const Vector vector = *reinterpret_cast<const Vector*>(numbers + index);
  out[0] = vector.part[0] + vector.part[3];
}

__global__ void multiply(const int* numbers, int* out, int factor) { *out = numbers[8] * factor; }

// Races

__global__ void count(int* number, bool is_atomic) {
  if (is_atomic) {
    atomicAdd(number, 1);
  } else {
    *number += 1;
  }
}

__global__ void count_in_all_types(int* a, unsigned* b, unsigned long long* c, float* d) {
  atomicAdd(a, -2);
  atomicAdd(b, 3u);
  atomicAdd(c, ~0ull);
  atomicAdd(d, 0.5f);
}

__global__ void read_while_counting(int* number, int* out) {
  atomicAdd(number, 1);
  if (thread() == 40) *out = *number;
}

__global__ void write_neighbours(bool* flags) { flags[blockIdx.x * blockDim.x + threadIdx.x] = thread() % 3 == 0; }

__global__ void clear(int* numbers, bool by_all) {
  if (by_all || thread() == 0) std::memset(numbers, 0, 1000 * sizeof *numbers);
}

__global__ void read_then_write(int* out, bool has_barrier) {
  int* number = shared<int>();
  if (thread() == 0) *number = 5;
  __syncthreads();
  out[thread()] = *number;
  if (has_barrier) __syncthreads();
  if (thread() == 63) *number = 7;  // the last reader is not the only one
}

// Clusters

__global__ void read_next_block(int* out, bool has_first_barrier, bool has_last_barrier) {
  const auto cluster = cg::this_cluster();
  const int rank = static_cast<int>(cluster.block_rank()), num_ranks = static_cast<int>(cluster.num_blocks());
  int* own = shared<int>();
  own[thread()] = 100 * rank + thread();
  if (has_first_barrier) {
    cluster.sync();
  } else {
    __syncthreads();
  }
  const int* next = cluster.map_shared_rank(own, (rank + 1) % num_ranks);
  out[blockIdx.x * blockDim.x + threadIdx.x] = next[blockDim.x - 1 - threadIdx.x];
  if (has_last_barrier) cluster.sync();  // the next block's memory ends with it
}

__global__ void leave_cluster() {
  if (cg::this_cluster().block_rank() == 1) return;
  cg::this_cluster().sync();
}

// Warps

template <class T>
__global__ void shuffle_all(T* out, T unit, int width) {
  const int lane = thread();
  const T value = static_cast<T>(lane) * unit;
  for (int argument = 0; argument < 32; ++argument) {
    *(out + (argument * 4 + 0) * 32 + lane) = __shfl_sync(WHOLE_WARP, value, argument, width);
    *(out + (argument * 4 + 1) * 32 + lane) = __shfl_up_sync(WHOLE_WARP, value, argument, width);
    *(out + (argument * 4 + 2) * 32 + lane) = __shfl_down_sync(WHOLE_WARP, value, argument, width);
    *(out + (argument * 4 + 3) * 32 + lane) = __shfl_xor_sync(WHOLE_WARP, value, argument, width);
  }
}

__global__ void vote(unsigned* out) {
  const bool is_third = thread() % 3 == 0;
  const unsigned ballot = __ballot_sync(WHOLE_WARP, is_third);
  const int any = __any_sync(WHOLE_WARP, is_third), all = __all_sync(WHOLE_WARP, is_third);
  const int none = __any_sync(WHOLE_WARP, false), every = __all_sync(WHOLE_WARP, 5);
  const unsigned results[] = {ballot, any != 0, all != 0, none != 0, every != 0, static_cast<unsigned>(__ffs(1 << thread()))};
  for (int i = 0; i < 6; ++i) out[i * 32 + thread()] = results[i];
}

__global__ void add_up_halves(int* out) {  // each half on its way, of a different length
  const unsigned half = thread() < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  int sum = thread();
  for (int round = 0; round < (thread() < 16 ? 1 : 3); ++round) {
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(half, sum, step);
  }
  out[thread()] = sum;
}

__global__ void use_ended_lane(int* out) {
  if (thread() == 7) return;
  out[thread()] = __any_sync(WHOLE_WARP, 1);
}

__global__ void use_whole_warp(int* out) { out[thread()] = __any_sync(WHOLE_WARP, 1); }

__global__ void read_outside_mask(int* out) {
  if (thread() < 8) out[thread()] = __shfl_sync(0xFFu, thread(), 9);
}

__global__ void mix_operations(int* out) {
  out[thread()] = thread() < 16 ? __any_sync(WHOLE_WARP, 1) : __all_sync(WHOLE_WARP, 1);
}

__global__ void mix_with_barrier(int* out) {
  if (thread() == 3) {
    __syncthreads();
  } else {
    out[thread()] = __any_sync(WHOLE_WARP, 1);
  }
}

enum class Between { nothing, whole_warp, halves, shuffle };

__global__ void exchange(int* out, Between between) {
  int* values = shared<int>();
  values[thread()] = 3 * thread();
  if (between == Between::whole_warp) __syncwarp();
  if (between == Between::halves) __syncwarp(thread() < 16 ? 0x0000FFFFu : 0xFFFF0000u);
  if (between == Between::shuffle) __shfl_sync(WHOLE_WARP, 0, 0);  // exchanges registers, orders no memory
  out[thread()] = values[31 - thread()];
}

__global__ void pass_on(int* out, bool is_complete) {  // lane 0 to lane 1 to lane 2
  int* value = shared<int>();
  if (thread() == 0) *value = 11;
  if (thread() < 2 && is_complete) __syncwarp(0x3u);
  if (thread() == 1 || thread() == 2) __syncwarp(0x6u);
  if (thread() == 2) *out = *value;
}

}  // namespace planted
