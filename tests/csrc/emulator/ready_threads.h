// The threads of a cluster that can run, and the choice among them.
#pragma once

#include <cstdint>
#include <vector>

#include "settings.h"

namespace emulator {

class ReadyThreads {
 public:
  void reset(int num_threads, Order order, uint64_t seed) {
    words_.assign(static_cast<size_t>(num_threads + 63) / 64, 0);
    count_ = 0;
    order_ = order;
    state_ = seed;
  }

  bool is_empty() const { return count_ == 0; }

  void add(int thread) {
    words_[thread / 64] |= uint64_t{1} << thread % 64;
    ++count_;
  }

  // Not empty: takes one out.
  int take() {
    size_t word = 0;
    int bit = 0;
    if (order_ == Order::ascending) {
      while (words_[word] == 0) ++word;
      bit = __builtin_ctzll(words_[word]);
    } else if (order_ == Order::descending) {
      word = words_.size() - 1;
      while (words_[word] == 0) --word;
      bit = 63 - __builtin_clzll(words_[word]);
    } else {
      int skipped = static_cast<int>(random() % static_cast<uint64_t>(count_));
      for (; skipped >= __builtin_popcountll(words_[word]); ++word) skipped -= __builtin_popcountll(words_[word]);
      uint64_t rest = words_[word];
      for (; skipped > 0; --skipped) rest &= rest - 1;
      bit = __builtin_ctzll(rest);
    }
    words_[word] &= ~(uint64_t{1} << bit);
    --count_;
    return static_cast<int>(word) * 64 + bit;
  }

 private:
  uint64_t random() {  // splitmix64
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }

  std::vector<uint64_t> words_;
  int count_ = 0;
  Order order_ = Order::ascending;
  uint64_t state_ = 0;
};

}  // namespace emulator
