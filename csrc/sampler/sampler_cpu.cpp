// The sampler on a CPU: a row is read by one thread, rows are spread over threads by the caller.
#include <memory>

#include "sample_row.h"

namespace esr {
namespace {

constexpr int SEGMENT = 2048;  // ids whose masses are added up together, so that `pick` reads one segment

struct Scratch {
  explicit Scratch(int vocab_size)
      : logits(new float[vocab_size]), segments(new uint64_t[vocab_size / SEGMENT + 1]) {}
  std::unique_ptr<float[]> logits;
  std::unique_ptr<uint64_t[]> segments;
  uint64_t buckets[NUM_BUCKETS];
};

struct SerialRow {
  using Format = Float32;  // whatever the dtype was: rows are converted when they are read
  const float* logits;
  int vocab_size;
  Scratch& scratch;

  float logit(int id) const { return logits[id]; }

  RowTop top() const {
    float largest = -__builtin_inff();
    int num_nan = 0;
    for (int id = 0; id < vocab_size; ++id) {
      largest = logits[id] > largest ? logits[id] : largest;
      num_nan += logits[id] != logits[id];
    }
    return {largest, num_nan > 0};
  }

  template <class F>
  Masses weigh(F f) const {
    Masses total;
    for (int segment = 0; segment * SEGMENT < vocab_size; ++segment) {
      uint64_t raw = 0, drawn = 0;
      const int first = segment * SEGMENT, last = first + SEGMENT < vocab_size ? first + SEGMENT : vocab_size;
      for (int id = first; id < last; ++id) {
        const Masses own = f(id, logits[id]);
        raw += own.raw;
        drawn += own.drawn;
      }
      scratch.segments[segment] = drawn;
      total.raw += raw;
      total.drawn += drawn;
    }
    return total;
  }

  template <class F>
  int pick(F f, uint64_t target) const {
    int segment = 0;
    for (; scratch.segments[segment] <= target; ++segment) target -= scratch.segments[segment];
    for (int id = segment * SEGMENT;; ++id) {
      const uint64_t own = f(id, logits[id]).drawn;
      if (own > target) return id;
      target -= own;
    }
  }

  template <class F>
  BucketFound find_bucket(F f, uint64_t need) const {
    uint64_t* buckets = scratch.buckets;
    std::memset(buckets, 0, sizeof scratch.buckets);
    for (int id = 0; id < vocab_size; ++id) {
      const BucketEntry entry = f(id, logits[id]);
      if (entry.bucket < NUM_BUCKETS) buckets[entry.bucket] += entry.measure;
    }
    uint64_t before = 0;
    for (int bucket = 0; bucket < NUM_BUCKETS; ++bucket) {
      if (before + buckets[bucket] >= need) return {bucket, before, buckets[bucket]};
      before += buckets[bucket];
    }
    return {NUM_BUCKETS, before, 0};
  }
};

__attribute__((flatten)) RowOutcome sample_logits(SerialRow row, RowParameters parameters, uint64_t random) {
  return sample_row(row, parameters, random);
}

#if defined(__x86_64__)
// The same for processors with vectors of 8 floats and fused multiply-adds, several times as fast.
__attribute__((flatten, target("avx2,fma"))) RowOutcome sample_logits_avx2(SerialRow row, RowParameters parameters,
                                                                           uint64_t random) {
  return sample_row(row, parameters, random);
}
#endif

auto* sample_logits_on_this_processor() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return sample_logits_avx2;
#endif
  return sample_logits;
}

template <class Format>
void convert_to_float(const typename Format::Bits* bits, int vocab_size, float* logits) {
  for (int id = 0; id < vocab_size; ++id) logits[id] = Format::to_float(bits[id]);
}

}  // namespace

void sample_rows_on_cpu(const SamplerArguments& a, int64_t first, int64_t last) {
  Scratch scratch(a.vocab_size);
  const auto sample = sample_logits_on_this_processor();
  for (int row = static_cast<int>(first); row < last; ++row) {
    if (a.finished_B[row]) continue;
    const int64_t offset = row * a.row_stride;
    const float* logits = scratch.logits.get();
    switch (a.dtype) {
      case LogitDtype::float32:
        logits = static_cast<const float*>(a.logits_B_V) + offset;
        break;
      case LogitDtype::bfloat16:
        convert_to_float<BFloat16>(static_cast<const uint16_t*>(a.logits_B_V) + offset, a.vocab_size, scratch.logits.get());
        break;
      case LogitDtype::float16:
        convert_to_float<Float16>(static_cast<const uint16_t*>(a.logits_B_V) + offset, a.vocab_size, scratch.logits.get());
        break;
    }
    const RowOutcome outcome =
        sample(SerialRow{logits, a.vocab_size, scratch}, parameters_of(a, row), random_of(a, row));
    write_outcome(a, row, outcome, [&] { __atomic_fetch_sub(a.active, 1, __ATOMIC_RELAXED); });
  }
}

}  // namespace esr
