// Compares AccessSet with what it stands for: all accesses kept, and a vector clock for each thread.
//
//   access_set_check SEED HISTORIES
//
// Each history is a random sequence of accesses and barriers in two clusters, one after the other, of two blocks with two
// warps, of which three lanes run. After each step every thread of the cluster is asked which access it does not know of.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "emulator/access_set.h"

namespace emulator::races {

namespace {

constexpr int LANES = 3, WARPS = 2, BLOCKS = 2, CLUSTERS = 2;
constexpr int BLOCK_THREADS = LANES * WARPS, CLUSTER_THREADS = BLOCK_THREADS * BLOCKS, THREADS = CLUSTER_THREADS * CLUSTERS;

using VectorClock = std::array<int, THREADS>;  // how many steps of each thread are known

ThreadId id_of_thread(int thread) {
  const int in_block = thread % BLOCK_THREADS;
  return id_of(static_cast<unsigned>(thread / BLOCK_THREADS), in_block / LANES * 32 + in_block % LANES);
}

// The plain way: every thread counts its own steps, and a barrier joins the clocks of those that pass it.
struct PlainHistory {
  struct Step {
    int thread, count;
  };
  std::vector<VectorClock> clocks = std::vector<VectorClock>(THREADS, VectorClock{});
  std::vector<Step> accesses;

  void access(int thread) { accesses.push_back({thread, ++clocks[thread][thread]}); }

  void pass(const std::vector<int>& threads) {
    VectorClock joined{};
    for (int thread : threads) {
      for (int i = 0; i < THREADS; ++i) joined[i] = std::max(joined[i], clocks[thread][i]);
    }
    for (int thread : threads) clocks[thread] = joined;
  }

  bool is_unknown(const Step& step, int thread) const {
    return step.thread != thread && step.count > clocks[thread][step.thread];
  }

  bool has_unknown(int thread) const {
    for (const Step& step : accesses) {
      if (is_unknown(step, thread)) return true;
    }
    return false;
  }

  bool has_unknown_by(ThreadId id, int thread) const {
    for (const Step& step : accesses) {
      if (id_of_thread(step.thread) == id && is_unknown(step, thread)) return true;
    }
    return false;
  }
};

// What the race detector keeps for the same.
struct Detector {
  Time now = 1, cluster_time = 0;
  Time block_times[BLOCKS] = {};
  LaneTimes lane_times[THREADS] = {};
  AccessSet accesses;
  int cluster = 0;

  Knowledge knowledge_of(int thread) const {
    return {id_of_thread(thread), static_cast<unsigned>(cluster * BLOCKS), BLOCKS, cluster_time,
            block_times[thread / BLOCK_THREADS % BLOCKS], &lane_times[thread]};
  }

  void begin_cluster(int index) {
    cluster = index;
    cluster_time = 0;
    for (Time& time : block_times) time = 0;
  }

  void pass_warp_barrier(const std::vector<int>& threads) {
    ++now;
    LaneTimes joined{};
    for (int thread : threads) {
      for (size_t lane = 0; lane < 32; ++lane) joined[lane] = std::max(joined[lane], lane_times[thread][lane]);
    }
    for (int thread : threads) joined[lane_of(id_of_thread(thread))] = now;
    for (int thread : threads) lane_times[thread] = joined;
  }
};

std::vector<int> range(int first, int count) {
  std::vector<int> threads;
  for (int i = 0; i < count; ++i) threads.push_back(first + i);
  return threads;
}

bool agree(const PlainHistory& plain, const Detector& detector) {
  const int first = detector.cluster * CLUSTER_THREADS;
  for (int thread = first; thread < first + CLUSTER_THREADS; ++thread) {
    const Access unknown = detector.accesses.unknown_to(detector.knowledge_of(thread));
    const bool is_found = unknown.thread != NOBODY;
    if (is_found != plain.has_unknown(thread)) return false;
    if (is_found && !plain.has_unknown_by(unknown.thread, thread)) return false;
  }
  return true;
}

bool run_history(std::mt19937& random) {
  PlainHistory plain;
  Detector detector;
  lane_times_pool.clear();
  const auto choose = [&](int count) { return static_cast<int>(random() % static_cast<unsigned>(count)); };
  for (int cluster = 0; cluster < CLUSTERS; ++cluster) {
    detector.begin_cluster(cluster);
    const int first = cluster * CLUSTER_THREADS, num_steps = choose(12), spread = 1 + choose(CLUSTER_THREADS);
    for (int step = 0; step < num_steps; ++step) {
      const int block = choose(BLOCKS), first_of_block = first + block * BLOCK_THREADS;
      switch (choose(8)) {
        case 0:
          detector.cluster_time = ++detector.now;
          for (Time& time : detector.block_times) time = detector.now;
          plain.pass(range(first, CLUSTER_THREADS));
          break;
        case 1:
          detector.block_times[block] = ++detector.now;
          plain.pass(range(first_of_block, BLOCK_THREADS));
          break;
        case 2:
        case 3: {
          std::vector<int> warp = range(first_of_block + choose(WARPS) * LANES, LANES);
          warp.erase(warp.begin() + choose(LANES));
          detector.pass_warp_barrier(warp);
          plain.pass(warp);
          break;
        }
        default: {
          const int thread = first + choose(spread);  // often few threads, so that few barriers order all
          detector.accesses.add(detector.knowledge_of(thread), detector.now, 0);
          plain.access(thread);
        }
      }
      if (!agree(plain, detector)) return false;
    }
  }
  return true;
}

}  // namespace
}  // namespace emulator::races

int main(int count, char** words) {
  if (count != 3) return 2;
  std::mt19937 random(static_cast<unsigned>(std::atoi(words[1])));
  for (int i = 0, last = std::atoi(words[2]); i < last; ++i) {
    if (emulator::races::run_history(random)) continue;
    std::fprintf(stderr, "history %d: AccessSet and the vector clocks disagree\n", i);
    return 1;
  }
}
