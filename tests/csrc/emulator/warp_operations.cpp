// Operations of the lanes of a warp named by a mask. CUDA leaves undefined what happens when these lanes do not all take part,
// or a shuffle reads a lane outside the mask; here both end the program.
#include <cstdio>

#include "cluster.h"
#include "race_detector.h"
#include "report.h"

namespace emulator {
namespace {

const char* spelling_of(WarpOperation operation) {
  constexpr const char* NAMES[] = {"__syncwarp",  "__ballot_sync",  "__any_sync",       "__all_sync",
                                   "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  return NAMES[static_cast<int>(operation)];
}

// The lane that a shuffle reads (PTX ISA, shfl.sync): lanes form groups of `width`, and what leaves the group reads itself.
int source_lane(WarpOperation operation, int lane, const LaneOperand& operand) {
  const int first = lane / operand.width * operand.width, last = first + operand.width - 1, argument = operand.argument % 32;
  int source = first + argument % operand.width;
  if (operation == WarpOperation::shuffle_up) source = lane - argument;
  if (operation == WarpOperation::shuffle_down) source = lane + argument;
  if (operation == WarpOperation::shuffle_xor) source = lane ^ argument;
  const bool is_outside = operation == WarpOperation::shuffle_up ? source < first : source > last;
  return is_outside ? lane : source;
}

void check_lanes_can_come(const Thread& self, const PendingWarpOperation& pending) {
  const Warp& warp = self.warp();
  const int first = self.number - self.lane();
  const auto refuse = [&](unsigned lanes, const char* what) {
    if (lanes == 0) return;
    fail(EXIT_SYNCHRONISATION, "warp operation: %s does %s, but %s, which the mask names, %s",
         name_of(self).c_str(), name_of(pending).c_str(),
         name_of(*self.block, first + __builtin_ctz(lanes)).c_str(), what);
  };
  refuse(pending.mask & ~warp.lanes, "does not exist");
  refuse(pending.mask & warp.exited, "has ended");
  refuse(pending.mask & warp.at_barrier, "waits at a barrier");
}

void complete(const Thread& self, const PendingWarpOperation& pending) {
  Warp& warp = self.warp();
  const int first = self.number - self.lane();
  const bool is_shuffle = pending.operation >= WarpOperation::shuffle;
  uint64_t ballot = 0;
  for (unsigned rest = pending.mask; rest != 0 && !is_shuffle; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    ballot |= uint64_t{warp.operands[lane].value != 0} << lane;
  }
  for (unsigned rest = pending.mask; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    warp.results[lane] = ballot;
    if (is_shuffle) {
      const int source = source_lane(pending.operation, lane, warp.operands[lane]);
      if ((pending.mask >> source & 1) == 0) {
        fail(EXIT_SYNCHRONISATION, "warp operation: %s does %s and reads lane %d, which the mask does not name",
             name_of(*self.block, first + lane).c_str(), name_of(pending).c_str(), source);
      }
      warp.results[lane] = warp.operands[source].value;
    }
    make_ready(*self.block, first + lane);
  }
  if (pending.operation == WarpOperation::sync) races::pass_warp_barrier(self.block->rank, first, pending.mask);
}

}  // namespace

std::string name_of(const PendingWarpOperation& pending) {
  char text[64];
  std::snprintf(text, sizeof text, "%s(0x%08x) ", spelling_of(pending.operation), pending.mask);
  return text + name_of(pending.place);
}

const PendingWarpOperation* operation_awaiting(const Thread& thread) {
  for (const PendingWarpOperation& pending : thread.warp().pending) {
    if (pending.mask >> thread.lane() & 1) return &pending;
  }
  return nullptr;
}

void fail_awaited(const Thread& thread, const PendingWarpOperation& pending, const std::string& what) {
  const int waiting = thread.number - thread.lane() + __builtin_ctz(pending.arrived);
  fail(EXIT_SYNCHRONISATION, "warp operation: %s %s, but %s waits for it at %s", name_of(thread).c_str(), what.c_str(),
       name_of(*thread.block, waiting).c_str(), name_of(pending).c_str());
}

uint64_t run_warp_operation(WarpOperation operation, unsigned mask, LaneOperand operand, Place place) {
  const Thread& self = *cluster.running;
  Warp& warp = self.warp();
  const unsigned own = 1u << self.lane();
  warp.operands[self.lane()] = operand;
  size_t found = 0;
  for (; found < warp.pending.size(); ++found) {
    const PendingWarpOperation& other = warp.pending[found];
    if (other.operation == operation && other.mask == mask && other.place == place) break;
  }
  if (found == warp.pending.size()) {
    const PendingWarpOperation started{operation, mask, place, 0};
    if ((mask & own) == 0 || operand.width < 1 || operand.width > 32 || (operand.width & (operand.width - 1)) != 0) {
      fail(EXIT_SYNCHRONISATION, "warp operation: %s does %s with width %d; the mask must name itself, the width be a power "
           "of two up to 32", name_of(self).c_str(), name_of(started).c_str(), operand.width);
    }
    // A lane may do another operation first, but not one for which the lanes that wait for it have to come.
    const auto* awaiting = operation_awaiting(self);
    if (awaiting != nullptr && (awaiting->arrived & mask) != 0) fail_awaited(self, *awaiting, "does " + name_of(started));
    check_lanes_can_come(self, started);
    warp.pending.push_back(started);
  }
  warp.pending[found].arrived |= own;
  if (warp.pending[found].arrived == mask) {
    complete(self, warp.pending[found]);
    warp.pending.erase(warp.pending.begin() + static_cast<ptrdiff_t>(found));
  }
  wait();
  return warp.results[self.lane()];
}

}  // namespace emulator
