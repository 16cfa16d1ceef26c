// A row of logits read by all threads of a RowThreads together: see Row in sample_row.h.
//
// A row is cut into vectors of 16 bytes, aligned in memory; every block has a range of them, every warp a range of the
// block's: its segment. So the order of blocks, warps and lanes is that of the ids, and an id is found by adding up masses of
// blocks, then of warps, then by the one warp that has it reading its segment again. All sums are of integers: how a row is
// spread changes no result.
#pragma once

#include "row_threads.h"
#include "sample_row.h"

namespace esr {

constexpr int MOST_THREADS = 512;
constexpr int MOST_WARPS = MOST_THREADS / 32;

// What the threads of a block tell each other and the other blocks of the row. Every call uses one of two copies in turn:
// each call has a barrier of the row, so nobody is still reading the copy that the call after the next writes.
struct alignas(16) RowExchange {
  uint64_t warp_raw[2][MOST_WARPS], warp_drawn[2][MOST_WARPS];
  Masses block_masses[2];
  float warp_top[2][MOST_WARPS], block_top[2];
  int warp_has_nan[2][MOST_WARPS], block_has_nan[2];
  int picked[2];
  uint64_t warp_buckets[2][MOST_WARPS];
  BucketFound found[2];
  uint64_t buckets[2][NUM_BUCKETS];
};

// IN_SHARED: `top` copies the block's range into shared memory (after the RowExchange), from where it is read afterwards.
template <class LogitFormat, bool IN_SHARED>
struct CooperativeRow {
  using Format = LogitFormat;
  using Bits = typename Format::Bits;
  static constexpr int VECTOR = 16 / sizeof(Bits);

  struct alignas(16) Vector {
    Bits bits[VECTOR];
  };

  const Bits* row;
  int vocab_size;
  RowThreads threads;
  RowExchange* exchange;
  Vector* copied;      // of this block's first vector
  int first_id;        // of the row's first vector; negative where the row starts inside it
  int block_vector;    // this block's first vector
  int first, last;     // this warp's segment, in vectors
  int turn = 0;

  ESR_INLINE CooperativeRow(const Bits* row, int vocab_size) : row(row), vocab_size(vocab_size) {
    exchange = static_cast<RowExchange*>(shared_memory());
    copied = reinterpret_cast<Vector*>(exchange + 1);
    first_id = -static_cast<int>(reinterpret_cast<uintptr_t>(row) % sizeof(Vector) / sizeof(Bits));
    const int num_vectors = (vocab_size - first_id + VECTOR - 1) / VECTOR;
    const int per_block = (num_vectors + threads.num_ranks - 1) / threads.num_ranks;
    block_vector = min(threads.rank * per_block, num_vectors);
    const int block_end = min(block_vector + per_block, num_vectors);
    const int per_warp = (per_block + threads.num_warps - 1) / threads.num_warps;
    first = min(block_vector + threads.warp * per_warp, block_end);
    last = min(first + per_warp, block_end);
  }

  ESR_INLINE float logit(int id) const { return Format::to_float(row[id]); }

  // From memory; what lies outside the row is -infinity.
  ESR_INLINE Vector load(int vector) const {
    const int id = first_id + vector * VECTOR;
    if (id >= 0 && id + VECTOR <= vocab_size) return *reinterpret_cast<const Vector*>(row + id);
    Vector loaded;
    for (int i = 0; i < VECTOR; ++i) {
      const bool is_inside = 0 <= id + i && id + i < vocab_size;
      loaded.bits[i] = is_inside ? row[id + i] : Format::MINUS_INFINITY;
    }
    return loaded;
  }

  ESR_INLINE Vector read(int vector) const { return IN_SHARED ? copied[vector - block_vector] : load(vector); }

  // f(id, logit) for the ids of this thread in rising order. The lanes of a warp stay together: outside the segment they get
  // -infinity, which has no weight, with ids outside the row.
  template <class F>
  ESR_INLINE void for_each(F f) const {
    for (int start = first; start < last; start += 32) {
      const int vector = start + threads.lane;
      int id = vocab_size;
      Vector own;
      if (vector < last) {
        id = first_id + vector * VECTOR;
        own = read(vector);
      } else {
        for (int i = 0; i < VECTOR; ++i) own.bits[i] = Format::MINUS_INFINITY;
      }
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) f(id + i, Format::to_float(own.bits[i]));
    }
  }

  ESR_INLINE RowTop top() {
    turn ^= 1;
    float largest = float_of(0xFF800000u);
    bool has_nan = false;
    for (int vector = first + threads.lane; vector < last; vector += 32) {
      const Vector own = load(vector);
      if (IN_SHARED) copied[vector - block_vector] = own;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        const float logit = Format::to_float(own.bits[i]);
        largest = logit > largest ? logit : largest;
        has_nan |= logit != logit;
      }
    }
    for (int step = 16; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(WHOLE_WARP, largest, step);
      largest = other > largest ? other : largest;
    }
    has_nan = __any_sync(WHOLE_WARP, has_nan);
    if (threads.lane == 0) {
      exchange->warp_top[turn][threads.warp] = largest;
      exchange->warp_has_nan[turn][threads.warp] = has_nan;
    }
    threads.sync_block();
    if (threads.thread == 0) {
      for (int warp = 1; warp < threads.num_warps; ++warp) {
        const float other = exchange->warp_top[turn][warp];
        largest = other > largest ? other : largest;
        has_nan |= exchange->warp_has_nan[turn][warp] != 0;
      }
      exchange->block_top[turn] = largest;
      exchange->block_has_nan[turn] = has_nan;
    }
    threads.sync_row();
    RowTop top{exchange->block_top[turn], exchange->block_has_nan[turn] != 0};
    for (int rank = 0; rank < threads.num_ranks; ++rank) {
      const float other = *threads.at_rank(&exchange->block_top[turn], rank);
      top.logit = other > top.logit ? other : top.logit;
      top.has_nan |= *threads.at_rank(&exchange->block_has_nan[turn], rank) != 0;
    }
    return top;
  }

  template <class F>
  ESR_INLINE Masses weigh(F f) {
    turn ^= 1;
    Masses own;
    for_each([&](int id, float logit) {
      const Masses one = f(id, logit);
      own.raw += one.raw;
      own.drawn += one.drawn;
    });
    own = {warp_sum(own.raw), warp_sum(own.drawn)};
    if (threads.lane == 0) {
      exchange->warp_raw[turn][threads.warp] = own.raw;
      exchange->warp_drawn[turn][threads.warp] = own.drawn;
    }
    threads.sync_block();
    if (threads.thread == 0) {
      for (int warp = 1; warp < threads.num_warps; ++warp) {
        own.raw += exchange->warp_raw[turn][warp];
        own.drawn += exchange->warp_drawn[turn][warp];
      }
      exchange->block_masses[turn] = own;
    }
    threads.sync_row();
    Masses total;
    for (int rank = 0; rank < threads.num_ranks; ++rank) {
      const Masses* block = threads.at_rank(&exchange->block_masses[turn], rank);
      total.raw += block->raw;
      total.drawn += block->drawn;
    }
    return total;
  }

  template <class F>
  ESR_INLINE int pick(F f, uint64_t target) {
    const int weighed = turn;
    turn ^= 1;
    int rank = 0;
    for (; rank < threads.num_ranks - 1; ++rank) {
      const uint64_t mass = threads.at_rank(&exchange->block_masses[weighed], rank)->drawn;
      if (target < mass) break;
      target -= mass;
    }
    if (rank == threads.rank) {
      int warp = 0;
      for (; warp < threads.num_warps - 1; ++warp) {
        const uint64_t mass = exchange->warp_drawn[weighed][warp];
        if (target < mass) break;
        target -= mass;
      }
      if (warp == threads.warp) pick_in_segment(f, target);
    }
    threads.sync_row();
    return exchange->picked[turn];
  }

  template <class F>
  ESR_INLINE void pick_in_segment(F f, uint64_t target) {
    for (int start = first; start < last; start += 32) {
      const int vector = start + threads.lane, id = first_id + vector * VECTOR;
      Vector own;
      uint64_t mass = 0;
      if (vector < last) {
        own = read(vector);
        for (int i = 0; i < VECTOR; ++i) mass += f(id + i, Format::to_float(own.bits[i])).drawn;
      }
      const uint64_t upto = warp_inclusive_sum(mass, threads.lane);
      const unsigned above = __ballot_sync(WHOLE_WARP, upto > target);
      if (above != 0) {
        if (threads.lane == __ffs(static_cast<int>(above)) - 1) {
          uint64_t left = target - (upto - mass);
          int i = 0;
          for (; i < VECTOR - 1; ++i) {
            const uint64_t one = f(id + i, Format::to_float(own.bits[i])).drawn;
            if (left < one) break;
            left -= one;
          }
          for (int rank = 0; rank < threads.num_ranks; ++rank) *threads.at_rank(&exchange->picked[turn], rank) = id + i;
        }
        return;
      }
      target -= __shfl_sync(WHOLE_WARP, upto, 31);
    }
  }

  template <class F>
  ESR_INLINE BucketFound find_bucket(F f, uint64_t need) {
    turn ^= 1;
    uint64_t* buckets = exchange->buckets[turn];
    for (int bucket = threads.thread; bucket < NUM_BUCKETS; bucket += threads.num_threads) buckets[bucket] = 0;
    if (threads.thread == 0) exchange->found[turn] = {NUM_BUCKETS, 0, 0};
    threads.sync_block();
    for_each([&](int id, float logit) { add_to_bucket(buckets, f(id, logit)); });
    threads.sync_row();

    // every thread adds up its buckets over all blocks of the row, then the threads find where the need is reached
    const int per_thread = (NUM_BUCKETS + threads.num_threads - 1) / threads.num_threads;
    const int own_first = min(threads.thread * per_thread, NUM_BUCKETS);
    const int own_last = min(own_first + per_thread, NUM_BUCKETS);
    uint64_t own = 0;
    for (int bucket = own_first; bucket < own_last; ++bucket) own += row_bucket(buckets, bucket);
    const uint64_t upto = warp_inclusive_sum(own, threads.lane);
    if (threads.lane == 31) exchange->warp_buckets[turn][threads.warp] = upto;
    threads.sync_block();
    uint64_t before = upto - own;
    for (int warp = 0; warp < threads.warp; ++warp) before += exchange->warp_buckets[turn][warp];
    if (before < need && need <= before + own) {
      for (int bucket = own_first; bucket < own_last; ++bucket) {
        const uint64_t inside = row_bucket(buckets, bucket);
        if (need <= before + inside) {
          exchange->found[turn] = {bucket, before, inside};
          break;
        }
        before += inside;
      }
    }
    threads.sync_block();
    return exchange->found[turn];
  }

  ESR_INLINE uint64_t row_bucket(const uint64_t* buckets, int bucket) const {
    uint64_t sum = 0;
    for (int rank = 0; rank < threads.num_ranks; ++rank) sum += *threads.at_rank(&buckets[bucket], rank);
    return sum;
  }

  // The lanes of a warp add together where they meet in one bucket (flat rows), and not at all where none counts.
  ESR_INLINE void add_to_bucket(uint64_t* buckets, BucketEntry entry) const {
    const bool counts = entry.bucket < NUM_BUCKETS && entry.measure > 0;
    const unsigned counting = __ballot_sync(WHOLE_WARP, counts);
    if (counting == 0) return;
    const int leader = __ffs(static_cast<int>(counting)) - 1;
    const int leading_bucket = __shfl_sync(WHOLE_WARP, entry.bucket, leader);
    if (__all_sync(WHOLE_WARP, !counts || entry.bucket == leading_bucket)) {
      const uint64_t sum = warp_sum(counts ? entry.measure : 0);
      if (threads.lane == leader) add(&buckets[leading_bucket], sum);
    } else if (counts) {
      add(&buckets[entry.bucket], entry.measure);
    }
  }

  // In two halves with a carry: devices add 32 bits in shared memory at once, 64 bits only by comparing and trying again.
  static ESR_INLINE void add(uint64_t* sum, uint64_t value) {
    auto* halves = reinterpret_cast<unsigned*>(sum);
    const unsigned low = static_cast<unsigned>(value);
    const unsigned old = atomicAdd(&halves[0], low);
    const unsigned high = static_cast<unsigned>(value >> 32) + (old + low < low ? 1u : 0u);
    if (high != 0) atomicAdd(&halves[1], high);
  }
};

}  // namespace esr
