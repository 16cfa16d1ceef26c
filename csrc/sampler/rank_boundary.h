// Where a filter cuts a row. Ids are ranked by logit, equal logits by id; a filter keeps the first ids of that ranking, so it
// is a boundary: the last logit kept and, among the ids that have it, the last one kept.
//
// Nothing is sorted. The row is read a few times: each time the ids that may be at the boundary fall into 1024 buckets, the
// bucket that holds it is found by adding up from the top, and the next reading divides that bucket.
#pragma once

#include "fixed_point.h"
#include "logit_format.h"

namespace esr {

constexpr int NUM_BUCKETS = 1024;

struct RankBoundary {
  uint32_t order = 0;  // of the last logit kept; the default keeps everything
  int last_id = INT32_MAX;

  template <class Format>
  ESR_INLINE bool keeps(int id, float logit) const {
    const uint32_t own = order_of<Format>(logit);
    return own > order || (own == order && id <= last_id);
  }

  // Both are beginnings of one ranking: so is what both keep.
  ESR_INLINE RankBoundary cut_by(const RankBoundary& other) const {
    if (order != other.order) return order > other.order ? *this : other;
    return {order, last_id < other.last_id ? last_id : other.last_id};
  }
};

// What an id adds to which bucket; buckets from NUM_BUCKETS on are not counted.
struct BucketEntry {
  int bucket;
  uint64_t measure;
};

// The first bucket with which the sum reaches what is needed; index NUM_BUCKETS: no bucket does.
struct BucketFound {
  int index;
  uint64_t before;  // sum of the buckets before it
  uint64_t inside;
};

// The shortest beginning of the ranking whose measure reaches `need` >= 1; everything if none does. `measure(id, logit)` is
// what an id counts; ids with a distance below `lowest` < 0 do not count: they must not be needed.
template <class Row, class Measure>
ESR_INLINE RankBoundary find_boundary(Row& row, const WeightScale& scale, float lowest, uint64_t need, Measure measure) {
  using Format = typename Row::Format;
  // Buckets of equal width in the distance first: equal steps of probability, however the logits are spread.
  const float buckets_per_octave = NUM_BUCKETS / -lowest;
  const auto bucket_of = [=](float logit) {
    const float bucket = -scale.distance(logit) * buckets_per_octave;
    return bucket < NUM_BUCKETS ? static_cast<int>(bucket) : NUM_BUCKETS;
  };
  BucketFound found = row.find_bucket(
      [=](int id, float logit) {
        const int bucket = bucket_of(logit);
        return BucketEntry{bucket, bucket < NUM_BUCKETS ? measure(id, logit) : 0};
      },
      need);
  if (found.index == NUM_BUCKETS) return {};

  // The logits of that bucket, in `order_of`: bucket_of never increases with the logit.
  const auto first_order_within = [=](int bucket) {  // the lowest logit whose bucket is at most `bucket`
    uint32_t low = 0, high = order_of<Format>(scale.top_logit);
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      if (bucket_of(logit_of_order<Format>(middle)) <= bucket) high = middle;
      else low = middle + 1;
    }
    return low;
  };
  uint32_t low = first_order_within(found.index);
  uint32_t high = found.index == 0 ? order_of<Format>(scale.top_logit) : first_order_within(found.index - 1) - 1;
  uint64_t before = found.before;
  while (low < high) {
    int shift = 0;
    while ((high - low) >> shift >= NUM_BUCKETS) ++shift;
    found = row.find_bucket(
        [=](int id, float logit) {
          const uint32_t order = order_of<Format>(logit);
          const bool counts = low <= order && order <= high;
          return BucketEntry{counts ? static_cast<int>((high - order) >> shift) : NUM_BUCKETS,
                             counts ? measure(id, logit) : 0};
        },
        need - before);
    before += found.before;
    high -= static_cast<uint32_t>(found.index) << shift;
    const uint32_t bucket_end = high - ((1u << shift) - 1);
    low = low > bucket_end ? low : bucket_end;
  }

  // Among the ids with this logit, all of one measure, only the lowest may be needed.
  const uint64_t each = measure(0, logit_of_order<Format>(low));
  const uint64_t num_kept = (need - before + each - 1) / each;
  if (num_kept * each == found.inside) return {low, INT32_MAX};
  const auto is_tied = [=](int, float logit) { return Masses{0, order_of<Format>(logit) == low}; };
  row.weigh(is_tied);
  return {low, row.pick(is_tied, num_kept - 1)};
}

}  // namespace esr
