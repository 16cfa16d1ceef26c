#include "race_detector.h"

#include <unistd.h>

#include <array>
#include <cstdio>
#include <memory>
#include <unordered_map>

#include "access_set.h"
#include "cluster.h"
#include "report.h"

namespace emulator::races {

namespace {

// What is remembered of one byte, or of bytes that were always accessed together. A write comes after all that was there, so
// it alone is remembered then.
struct History {
  AccessSet writes, reads, atomics;

  void clear() {
    writes.clear();
    reads.clear();
    atomics.clear();
  }

  History copy() const { return {writes.copy(), reads.copy(), atomics.copy()}; }
};

constexpr size_t WORD_BYTES = 4;

struct Word {
  History whole;
  std::unique_ptr<std::array<History, WORD_BYTES>> bytes;  // once a part of the word was accessed alone

  void split() {
    bytes = std::make_unique<std::array<History, WORD_BYTES>>();
    for (History& byte : *bytes) byte = whole.copy();
    whole.clear();
  }

  void clear() {
    whole.clear();
    if (bytes == nullptr) return;
    for (History& byte : *bytes) byte.clear();
    bytes = nullptr;
  }
};

class Shadow {
 public:
  Word& word_at(uintptr_t address) {
    const uintptr_t number = address / PAGE_BYTES;
    Recent& recent = recent_[number % NUM_RECENT];
    if (recent.page == nullptr || recent.number != number) {
      std::unique_ptr<Page>& page = pages_[number];
      if (page == nullptr) page = std::make_unique<Page>();
      recent = {number, page.get()};
    }
    return recent.page->words[address % PAGE_BYTES / WORD_BYTES];
  }

  // f(history, address) for the histories of these bytes.
  template <class F>
  void for_each(uintptr_t first, size_t count, F f) {
    for (uintptr_t address = first, end = first + count; address < end;) {
      Word& word = word_at(address);
      const uintptr_t next = (address / WORD_BYTES + 1) * WORD_BYTES;
      if (word.bytes == nullptr && (address % WORD_BYTES != 0 || next > end)) word.split();
      if (word.bytes == nullptr) {
        f(word.whole, address);
        address = next;
      } else {
        for (; address < next && address < end; ++address) f((*word.bytes)[address % WORD_BYTES], address);
      }
    }
  }

  void clear() {
    pages_.clear();
    for (Recent& recent : recent_) recent = {};
  }

 private:
  static constexpr uintptr_t PAGE_BYTES = 1024, NUM_RECENT = 256;
  struct Page {
    Word words[PAGE_BYTES / WORD_BYTES];
  };
  struct Recent {
    uintptr_t number = 0;
    Page* page = nullptr;
  };
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  Recent recent_[NUM_RECENT];
};

Shadow shadow;
Time now = 1;
Time cluster_time = 0;
std::vector<Time> block_times;         // by rank
std::vector<LaneTimes> lane_times;     // by thread of the cluster
std::vector<bool> has_ended;           // by rank
bool has_any_ended = false;

Knowledge knowledge_of(const Thread& thread) {
  const Block& block = *thread.block;
  return {id_of(block.index, thread.number),
          cluster.blocks[0].index,
          static_cast<unsigned>(cluster.num_blocks),
          cluster_time,
          block_times[static_cast<size_t>(block.rank)],
          &lane_times[static_cast<size_t>(thread.id)]};
}

const Block* owner_of(uintptr_t address) {
  for (const Block& block : cluster.blocks) {
    if (address - reinterpret_cast<uintptr_t>(block.shared_memory) < cluster.shared_bytes) return &block;
  }
  return nullptr;
}

std::string name_of_address(uintptr_t address) {
  const Block* owner = owner_of(address);
  if (owner == nullptr) return "global memory";
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(owner->shared_memory);
  return "shared memory of block " + std::to_string(owner->index) + " at offset " + std::to_string(offset);
}

// File and line of the instruction before `code`, then of the functions into which it was inlined.
std::string source_lines_of(uint32_t code) {
  char command[96], line[512];
  std::snprintf(command, sizeof command, "addr2line -s -i -e /proc/%d/exe 0x%x 2>&1", static_cast<int>(getpid()), code - 1);
  FILE* output = popen(command, "r");
  std::string lines;
  while (output != nullptr && std::fgets(line, sizeof line, output) != nullptr) {
    const std::string text(line);
    lines += (lines.empty() ? "" : ", from ") + text.substr(0, text.find_first_of(" \n"));
  }
  if (output != nullptr) pclose(output);
  return lines;
}

std::string describe(const char* kind, const Access& access) {
  return std::string("\n  ") + kind + " by block " + std::to_string(block_of(access.thread)) + " thread " +
         std::to_string(number_of(access.thread)) + " at " + source_lines_of(access.code);
}

const char* name_of(Kind kind) {
  return kind == Kind::read ? "read" : kind == Kind::write ? "write" : "atomic";
}

[[noreturn]] void report(uintptr_t address, const std::string& first, const std::string& second) {
  fail(EXIT_RACE, "race: %s%s%s", name_of_address(address).c_str(), first.c_str(), second.c_str());
}

void check(const AccessSet& earlier, Kind kind_of_earlier, const Knowledge& who, uintptr_t address, Kind kind, uint32_t code) {
  const Access unknown = earlier.unknown_to(who);
  if (unknown.thread == NOBODY) return;
  report(address, describe(name_of(kind_of_earlier), unknown), describe(name_of(kind), {who.self, code}));
}

void touch(History& history, const Knowledge& who, uintptr_t address, Kind kind, uint32_t code) {
  AccessSet& own = kind == Kind::read ? history.reads : kind == Kind::write ? history.writes : history.atomics;
  if (kind != Kind::write && own.ends_with(who.self, now)) return;  // nothing came since
  check(history.writes, Kind::write, who, address, kind, code);
  if (kind != Kind::atomic) check(history.atomics, Kind::atomic, who, address, kind, code);
  if (kind != Kind::read) check(history.reads, Kind::read, who, address, kind, code);
  if (kind == Kind::write) history.clear();
  own.add(who, now, code);
}

}  // namespace

void begin_launch() {
  shadow.clear();
  lane_times_pool.clear();
  now = 1;
}

void begin_cluster() {
  cluster_time = 0;
  block_times.assign(static_cast<size_t>(cluster.num_blocks), 0);
  lane_times.assign(static_cast<size_t>(cluster.num_threads()), {});
  has_ended.assign(static_cast<size_t>(cluster.num_blocks), false);
  has_any_ended = false;
  for (const Block& block : cluster.blocks) {
    const auto first = reinterpret_cast<uintptr_t>(block.shared_memory);
    for (uintptr_t address = first; address < first + cluster.shared_bytes; address += WORD_BYTES) {
      shadow.word_at(address).clear();
    }
  }
}

void pass_block_barrier(int rank) { block_times[static_cast<size_t>(rank)] = ++now; }

void pass_cluster_barrier() {
  cluster_time = ++now;
  for (Time& time : block_times) time = now;
}

void pass_warp_barrier(int rank, int first_thread, unsigned mask) {
  LaneTimes* warp = &lane_times[static_cast<size_t>(rank * cluster.threads_per_block + first_thread)];
  ++now;
  LaneTimes joined{};
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    const LaneTimes& own = warp[__builtin_ctz(rest)];
    for (size_t lane = 0; lane < own.size(); ++lane) joined[lane] = own[lane] > joined[lane] ? own[lane] : joined[lane];
  }
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) joined[static_cast<size_t>(__builtin_ctz(rest))] = now;
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) warp[__builtin_ctz(rest)] = joined;
}

// The block's shared memory ends with it: what other blocks of the cluster do there must come before.
void end_block(int rank) {
  has_ended[static_cast<size_t>(rank)] = has_any_ended = true;
  if (cluster.num_blocks == 1) return;
  const Block& block = cluster.blocks[static_cast<size_t>(rank)];
  const Knowledge knowledge = knowledge_of(*cluster.running);
  const auto first = reinterpret_cast<uintptr_t>(block.shared_memory);
  const std::string end = "\n  end of block " + std::to_string(block.index);
  shadow.for_each(first, cluster.shared_bytes, [&](const History& history, uintptr_t address) {
    for (const auto& [set, kind] : {std::pair(&history.writes, Kind::write), std::pair(&history.reads, Kind::read),
                                    std::pair(&history.atomics, Kind::atomic)}) {
      const Access unknown = set->unknown_to_block(knowledge);
      if (unknown.thread != NOBODY) report(address, describe(name_of(kind), unknown), end);
    }
  });
}

void access(const volatile void* pointer, size_t bytes, Kind kind, const void* code_pointer) {
  if (cluster.running == nullptr || is_on_fiber_stack(const_cast<const void*>(pointer))) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const auto code = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(code_pointer));  // linked with -no-pie
  const Knowledge who = knowledge_of(*cluster.running);
  const Block* owner = has_any_ended ? owner_of(address) : nullptr;
  if (owner != nullptr && has_ended[static_cast<size_t>(owner->rank)]) {
    report(address, "\n  end of block " + std::to_string(owner->index), describe(name_of(kind), {who.self, code}));
  }
  shadow.for_each(address, bytes, [&](History& history, uintptr_t at) { touch(history, who, at, kind, code); });
}

}  // namespace emulator::races
