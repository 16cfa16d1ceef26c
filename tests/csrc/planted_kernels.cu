// Launches one of the kernels of planted_kernels.h, by name:
//
//   planted_kernels NAME ORDER SEED
//
// prints what the kernel wrote, a number on each line. ORDER as in emulator/settings.h: 0 ascending, 1 descending, 2 random.
#include "planted_kernels.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "emulator/settings.h"

namespace planted {
namespace {

struct Shape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
};

template <class... Parameters, class... Arguments>
cudaError_t launch(const Shape& shape, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {shape.cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = shape.cluster == 1 ? 0 : 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// A heap block of exactly `count` elements, printed at its end.
template <class T>
struct Output {
  explicit Output(size_t count) : values(count) {}
  ~Output() {
    for (const T value : values) std::printf("%.17g\n", static_cast<double>(value));
  }
  T* data() { return values.data(); }
  std::vector<T> values;
};

template <>
struct Output<bool> : Output<char> {
  using Output<char>::Output;
  bool* data() { return reinterpret_cast<bool*>(values.data()); }
};

// The squares of 0, 1, ...
struct Squares : std::vector<int> {
  explicit Squares(int count) {
    reserve(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) push_back(i * i);
  }
  const int* data() const { return std::vector<int>::data(); }
};

template <class T>
void shuffle_in_groups(T unit, int width) {
  launch({1, 32}, shuffle_all<T>, Output<T>(32 * 4 * 32).data(), unit, width);
}

void count_in_all_types_twice() {  // what the first launch did comes before the second
  Output<int> a(1);
  Output<unsigned> b(1);
  Output<unsigned long long> c(1);
  Output<float> d(1);
  for (int i = 0; i < 2; ++i) launch({4, 96}, count_in_all_types, a.data(), b.data(), c.data(), d.data());
}

void print_launch_errors() {
  const auto print = [](cudaError_t error) { std::printf("%d\n", error); };
  const auto ask = [](const void* kernel, int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  const auto* kernel = reinterpret_cast<const void*>(do_nothing);
  print(launch({1, 32, 48 * 1024 + 1}, do_nothing));  // not asked for
  print(ask(kernel, 227 * 1024 + 1));
  print(ask(kernel, 100000));
  print(launch({1, 32, 100000}, do_nothing));
  print(launch({1, 32, 100001}, do_nothing));
  print(launch({1, 1024}, do_nothing));
  print(launch({1, 1025}, do_nothing));
  print(launch({0, 32}, do_nothing));
  print(launch({8, 32, 0, 8}, do_nothing));
  print(launch({6, 32, 0, 4}, do_nothing));
  print(launch({16, 32, 0, 16}, do_nothing));
  emulator::settings.compute_capability_major = 8;
  print(launch({4, 32, 0, 4}, do_nothing));
}

const std::map<std::string, void (*)()> LAUNCHES = {
    {"sum", [] { launch({1, 256, 1024}, add_up, Squares(256).data(), Output<int>(1).data(), true); }},
    {"sum_without_barrier", [] { launch({1, 256, 1024}, add_up, Squares(256).data(), Output<int>(1).data(), false); }},
    {"diverge", [] { launch({2, 64}, diverge); }},
    {"leave_early", [] { launch({1, 64}, leave_early); }},
    {"wait_in_a_circle", [] { launch({1, 32}, wait_in_a_circle); }},
    {"positions", [] { launch({{2, 3, 2}, {4, 2, 3}}, write_positions, Output<int>(8 * 6 * 6).data()); }},

    {"shared_end", [] { launch({1, 1, 400}, read_shared, Output<int>(1).data(), 99); }},
    {"past_shared", [] { launch({1, 1, 400}, read_shared, Output<int>(1).data(), 100); }},
    {"shared_of_next_rank", [] { launch({2, 1, 400, 2}, read_shared_of_next_rank, Output<int>(2).data(), 99); }},
    {"past_shared_of_next_rank", [] { launch({2, 1, 400, 2}, read_shared_of_next_rank, Output<int>(2).data(), 100); }},
    {"global_end", [] { launch({1, 1}, read_global, Squares(9).data(), Output<int>(1).data(), 8); }},
    {"past_global", [] { launch({1, 1}, read_global, Squares(9).data(), Output<int>(1).data(), 9); }},
    {"vector", [] { launch({1, 1}, read_vector, Squares(9).data(), Output<int>(1).data(), 4); }},
    {"misaligned_vector", [] { launch({1, 1}, read_vector, Squares(9).data(), Output<int>(1).data(), 2); }},
    {"product", [] { launch({1, 1}, multiply, Squares(9).data(), Output<int>(1).data(), 1 << 24); }},
    {"overflow", [] { launch({1, 1}, multiply, Squares(9).data(), Output<int>(1).data(), 1 << 26); }},

    {"count", [] { launch({1, 64}, count, Output<int>(1).data(), false); }},
    {"count_in_blocks", [] { launch({2, 1}, count, Output<int>(1).data(), false); }},
    {"count_atomically", [] { launch({3, 64}, count, Output<int>(1).data(), true); }},
    {"count_in_all_types", count_in_all_types_twice},
    {"read_while_counting", [] { launch({1, 64}, read_while_counting, Output<int>(1).data(), Output<int>(1).data()); }},
    {"neighbours", [] { launch({2, 64}, write_neighbours, Output<bool>(128).data()); }},
    {"clear_by_one", [] { launch({1, 64}, clear, Output<int>(1000).data(), false); }},
    {"clear_by_all", [] { launch({1, 64}, clear, Output<int>(1000).data(), true); }},
    {"read_then_write", [] { launch({1, 64, 4}, read_then_write, Output<int>(64).data(), true); }},
    {"read_then_write_without_barrier", [] { launch({1, 64, 4}, read_then_write, Output<int>(64).data(), false); }},

    {"next_block", [] { launch({8, 64, 256, 4}, read_next_block, Output<int>(512).data(), true, true); }},
    {"next_block_too_early", [] { launch({8, 64, 256, 4}, read_next_block, Output<int>(512).data(), false, true); }},
    {"next_block_too_late", [] { launch({8, 64, 256, 4}, read_next_block, Output<int>(512).data(), true, false); }},
    {"leave_cluster", [] { launch({2, 32, 0, 2}, leave_cluster); }},

    {"shuffle_int32", [] { shuffle_in_groups<int>(-3, 32); }},
    {"shuffle_uint32", [] { shuffle_in_groups<unsigned>(100000000u, 8); }},
    {"shuffle_int64", [] { shuffle_in_groups<long long>(-100000000000, 16); }},
    {"shuffle_uint64", [] { shuffle_in_groups<unsigned long long>(200000000000, 32); }},
    {"shuffle_float", [] { shuffle_in_groups<float>(0.25f, 4); }},
    {"votes", [] { launch({1, 32}, vote, Output<unsigned>(6 * 32).data()); }},
    {"halves", [] { launch({1, 32}, add_up_halves, Output<int>(32).data()); }},
    {"ended_lane", [] { launch({1, 32}, use_ended_lane, Output<int>(32).data()); }},
    {"absent_lane", [] { launch({1, 31}, use_whole_warp, Output<int>(32).data()); }},
    {"outside_mask", [] { launch({1, 32}, read_outside_mask, Output<int>(32).data()); }},
    {"mixed_operations", [] { launch({1, 32}, mix_operations, Output<int>(32).data()); }},
    {"mixed_with_barrier", [] { launch({1, 32}, mix_with_barrier, Output<int>(32).data()); }},
    {"exchange", [] { launch({1, 32, 128}, exchange, Output<int>(32).data(), Between::whole_warp); }},
    {"exchange_without_barrier", [] { launch({1, 32, 128}, exchange, Output<int>(32).data(), Between::nothing); }},
    {"exchange_across_halves", [] { launch({1, 32, 128}, exchange, Output<int>(32).data(), Between::halves); }},
    {"exchange_after_shuffle", [] { launch({1, 32, 128}, exchange, Output<int>(32).data(), Between::shuffle); }},
    {"pass_on", [] { launch({1, 32, 4}, pass_on, Output<int>(1).data(), true); }},
    {"pass_on_with_gap", [] { launch({1, 32, 4}, pass_on, Output<int>(1).data(), false); }},

    {"launch_errors", print_launch_errors},
};

}  // namespace
}  // namespace planted

int main(int count, char** words) {
  if (count != 4 || planted::LAUNCHES.count(words[1]) == 0) {
    std::fputs("usage: planted_kernels NAME ORDER SEED\n", stderr);
    return 2;
  }
  emulator::settings.order = static_cast<emulator::Order>(std::atoi(words[2]));
  emulator::settings.seed = static_cast<uint64_t>(std::atoi(words[3]));
  planted::LAUNCHES.at(words[1])();
}
