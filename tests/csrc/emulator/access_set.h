// The accesses to a byte that a later access has to come after, in constant space.
//
// Time is one counter for all threads; it moves on when a barrier is passed. What orders two threads of a launch are barriers
// alone: those of the cluster, of the block, and __syncwarp. A block's barrier is passed by all its threads together, a
// cluster's by all its blocks, so a thread knows
//   of the lanes of its warp: what each did before the last __syncwarp through which word of it came (lane_time), and
//   of all threads of its block: what they did before the block's last barrier (block_time);
//   of all threads of its cluster: what they did before the cluster's last barrier (cluster_time);
//   of threads of other clusters: nothing.
// Nothing else passes on knowledge between warps, so this is what vector clocks would say.
//
// Of a set of accesses it is therefore enough to keep the last one, and for each of the three levels whether several parts
// took part since that level's last barrier: if two blocks did, whoever comes without a cluster barrier in between races with
// one of them. Only among the lanes of a single warp are the times of all lanes needed.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace emulator::races {

using Time = uint32_t;
using LaneTimes = std::array<Time, 32>;

// A thread of the grid: its block times 1024, plus its number in the block.
using ThreadId = uint32_t;
constexpr ThreadId NOBODY = ~0u;
constexpr ThreadId id_of(unsigned block, int number) { return block << 10 | static_cast<unsigned>(number); }
constexpr unsigned block_of(ThreadId id) { return id >> 10; }
constexpr unsigned number_of(ThreadId id) { return id & 1023; }
constexpr unsigned warp_of(ThreadId id) { return id >> 5; }
constexpr unsigned lane_of(ThreadId id) { return id & 31; }

struct Knowledge {
  ThreadId self;
  unsigned first_block, num_blocks;  // of the cluster
  Time cluster_time, block_time;
  const LaneTimes* lane_time;

  bool is_of_cluster(ThreadId id) const { return block_of(id) - first_block < num_blocks; }
};

// An access, for the report; `code` is the address of the instruction after it, of a recent one where lanes took turns.
struct Access {
  ThreadId thread = NOBODY;
  uint32_t code = 0;
};

// Lane times of the sets that need them.
class LaneTimesPool {
 public:
  int take() {
    if (free_.empty()) {
      times_.emplace_back();
      return static_cast<int>(times_.size()) - 1;
    }
    const int index = free_.back();
    free_.pop_back();
    times_[index] = {};
    return index;
  }
  void give_back(int index) { free_.push_back(index); }
  void clear() {
    times_.clear();
    free_.clear();
  }
  LaneTimes& operator[](int index) { return times_[index]; }

 private:
  std::vector<LaneTimes> times_;
  std::vector<int> free_;
};

inline LaneTimesPool lane_times_pool;

class AccessSet {
 public:
  bool is_empty() const { return last_.thread == NOBODY; }

  bool ends_with(ThreadId thread, Time now) const { return last_.thread == thread && time_ == now; }

  void clear() {
    if (lanes_ >= 0) lane_times_pool.give_back(lanes_);
    *this = AccessSet();
  }

  AccessSet copy() const {
    AccessSet copied = *this;
    if (lanes_ >= 0) {
      copied.lanes_ = lane_times_pool.take();
      lane_times_pool[copied.lanes_] = lane_times_pool[lanes_];
    }
    return copied;
  }

  void add(const Knowledge& who, Time now, uint32_t code) {
    if (!is_empty()) {
      const bool is_new_phase = who.is_of_cluster(last_.thread) && time_ < who.cluster_time;
      if (is_new_phase) {
        has_several_blocks_ = false;
        forget_phase_of_block();
      } else if (!who.is_of_cluster(last_.thread)) {
        other_ = last_;
        has_several_clusters_ = true;
      } else if (block_of(last_.thread) != block_of(who.self)) {
        if (!has_several_clusters_) other_ = last_;
        has_several_blocks_ = true;
      } else if (time_ < who.block_time) {
        forget_phase_of_block();
      } else if (warp_of(last_.thread) != warp_of(who.self)) {
        if (!has_several_clusters_ && !has_several_blocks_) other_ = last_;
        has_several_warps_ = true;
      } else if (last_.thread != who.self && lanes_ < 0) {
        lanes_ = lane_times_pool.take();
        lane_times_pool[lanes_][lane_of(last_.thread)] = time_;
      }
    }
    if (lanes_ >= 0) lane_times_pool[lanes_][lane_of(who.self)] = now;
    last_ = {who.self, code};
    time_ = now;
  }

  // An access of the set that `who` does not know of; NOBODY's if there is none.
  Access unknown_to(const Knowledge& who) const {
    if (is_empty()) return {};
    if (!who.is_of_cluster(last_.thread)) return last_;
    if (has_several_clusters_) return other_;
    if (time_ < who.cluster_time) return {};
    if (block_of(last_.thread) != block_of(who.self)) return last_;
    if (has_several_blocks_) return other_;
    if (time_ < who.block_time) return {};
    if (warp_of(last_.thread) != warp_of(who.self)) return last_;
    if (has_several_warps_) return other_;
    if (lanes_ < 0) return last_.thread == who.self || time_ < (*who.lane_time)[lane_of(last_.thread)] ? Access{} : last_;
    for (unsigned lane = 0; lane < 32; ++lane) {
      const Time time = lane_times_pool[lanes_][lane];
      if (lane != lane_of(who.self) && time != 0 && time >= (*who.lane_time)[lane])
        return {(warp_of(who.self) << 5) + lane, last_.code};
    }
    return {};
  }

  // The same for the end of a block, which knows of all that its own threads did.
  Access unknown_to_block(const Knowledge& block) const {
    if (is_empty() || time_ < block.cluster_time) return {};
    return block_of(last_.thread) != block_of(block.self) ? last_ : has_several_blocks_ ? other_ : Access{};
  }

 private:
  void forget_phase_of_block() {
    has_several_warps_ = false;
    if (lanes_ >= 0) lane_times_pool.give_back(lanes_);
    lanes_ = -1;
  }

  Access last_, other_;  // other_: of another part than last_, where there are several
  Time time_ = 0;        // of last_
  int lanes_ = -1;       // in lane_times_pool, when several lanes of one warp took part
  bool has_several_warps_ = false, has_several_blocks_ = false, has_several_clusters_ = false;
};

}  // namespace emulator::races
