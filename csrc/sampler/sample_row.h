// One token for one row: the algorithm, written once for the host (SerialRow) and the device (CooperativeRow).
//
// A Row reads its logits and knows how to
//   top()                  {the largest logit that is not NaN, is there a NaN}; -infinity for an empty row
//   weigh(f)               the sums of f(id, logit) -> Masses
//   pick(f, target)        after weigh(f): the first id, in id order, with which the sum of f.drawn exceeds target
//   find_bucket(f, need)   see rank_boundary.h
//   logit(id)
// On a device all threads of the row call these together, with the same arguments, and get the same answers. A row ends with
// `pick`, whose barrier comes after the last look into the shared memory of another block.
#pragma once

#include "random_stream.h"
#include "rank_boundary.h"
#include "sampler.h"

namespace esr {

struct RowTop {
  float logit;
  bool has_nan;
};

struct RowParameters {
  double temperature;
  int64_t top_k;
  double top_p, min_p;
};

struct RowOutcome {
  int token;
  float logprob, sampling_logprob;
  bool is_invalid;
};

// Which ids can be drawn, and their weights.
template <class Format>
struct KeptWeights {
  WeightScale scale;
  RankBoundary boundary;
  uint64_t least_weight = 0;

  ESR_INLINE uint64_t operator()(int id, float logit) const {
    const uint64_t weight = scale.weight(logit);
    return boundary.template keeps<Format>(id, logit) && weight >= least_weight ? weight : 0;
  }
};

template <class Row>
ESR_INLINE int draw(Row& row, const RowParameters& parameters, const WeightScale& scale, uint64_t mass,
                    uint64_t random, uint64_t& kept_mass) {
  using Format = typename Row::Format;
  const int fraction_bits = scale.fraction_bits, vocab_size = row.vocab_size;
  const float no_weight = -(fraction_bits + 2.0f);  // the weight of a lower distance rounds to 0: never drawn, no mass
  const bool has_top_k = 0 < parameters.top_k && parameters.top_k < vocab_size, has_top_p = parameters.top_p < 1;
  KeptWeights<Format> kept{scale, {}};
  if (!has_top_k && !has_top_p && !(parameters.min_p > 0)) {
    kept_mass = mass;
    return row.pick([=](int, float logit) { return Masses{0, scale.weight(logit)}; }, part_of(mass, random));
  }

  const auto weigh_kept = [&] { return row.weigh([=](int id, float logit) { return Masses{0, kept(id, logit)}; }).drawn; };
  if (has_top_k) {
    const auto one = [](int, float) { return uint64_t{1}; };
    kept.boundary = find_boundary(row, scale, no_weight, static_cast<uint64_t>(parameters.top_k), one);
    if (has_top_p) mass = weigh_kept();
  }
  if (has_top_p) {
    uint64_t need = part_of(mass, static_cast<uint64_t>(parameters.top_p * 0x1p53));
    need = need > 0 ? need : 1;
    // All ids that weigh less than an equal share of what may be dropped are dropped: they need not be counted.
    const uint64_t share = (mass - need) / static_cast<uint64_t>(has_top_k ? parameters.top_k : vocab_size);
    const float lowest = share > 0 ? floor_log2(share) - fraction_bits - 1.0f : no_weight;
    const auto top_k_kept = kept;
    kept.boundary = kept.boundary.cut_by(find_boundary(row, scale, lowest, need, top_k_kept));
  }
  kept.least_weight = least_weight_of(parameters.min_p, fraction_bits);
  kept_mass = weigh_kept();
  return row.pick([=](int id, float logit) { return Masses{0, kept(id, logit)}; }, part_of(kept_mass, random));
}

template <class Row>
ESR_INLINE RowOutcome sample_row(Row& row, const RowParameters& parameters, uint64_t random) {
  const RowTop top = row.top();
  const float infinity = float_of(0x7F800000u), nan = float_of(0x7FC00000u);
  const bool is_invalid = top.has_nan || top.logit == infinity || top.logit == -infinity;
  const int fraction_bits = fraction_bits_for(row.vocab_size);
  const WeightScale plain{top.logit, RAW_SCALE, fraction_bits};

  if (is_invalid || parameters.temperature == 0) {  // the lowest of the largest
    const int vocab_size = row.vocab_size;
    const auto is_top = [=](int id, float logit) {
      const bool is_inside = 0 <= id && id < vocab_size;  // what a row is filled up with may equal a top of -infinity
      return Masses{is_invalid ? 0 : plain.weight(logit), is_inside && logit == top.logit};
    };
    const Masses mass = row.weigh(is_top);
    if (mass.drawn == 0) {  // every logit is NaN
      const auto is_first = [](int id, float) { return Masses{0, id == 0}; };
      row.weigh(is_first);
      return {row.pick(is_first, 0), nan, nan, true};
    }
    const int token = row.pick(is_top, 0);
    if (is_invalid) return {token, nan, nan, true};
    return {token, logprob_of(top.logit, top.logit, 1, mass.raw, fraction_bits), 0, false};
  }

  const WeightScale tempered{top.logit, scale_of_temperature(parameters.temperature), fraction_bits};
  const bool is_plain = tempered.scale == plain.scale;
  const Masses mass = row.weigh([=](int, float logit) {
    const uint64_t weight = plain.weight(logit);
    return Masses{weight, is_plain ? weight : tempered.weight(logit)};
  });
  uint64_t kept_mass;
  const int token = draw(row, parameters, tempered, mass.drawn, random, kept_mass);
  const float logit = row.logit(token);
  return {token, logprob_of(logit, top.logit, 1, mass.raw, fraction_bits),
          logprob_of(logit, top.logit, parameters.temperature, kept_mass, fraction_bits), false};
}

// Token, log-probs and the end of a row; `remove_active` takes the row off the count of running rows.
template <class RemoveActive>
ESR_INLINE void write_outcome(const SamplerArguments& a, int row, const RowOutcome& outcome, RemoveActive remove_active) {
  const int64_t slot = static_cast<int64_t>(row) * a.horizon + a.lengths_B[row];
  a.token_ids_B_K[slot] = outcome.token;
  a.logprobs_B_K[slot] = outcome.logprob;
  a.sampling_logprobs_B_K[slot] = outcome.sampling_logprob;
  if (outcome.is_invalid) a.invalid_B[row] = true;
  const int64_t length = ++a.lengths_B[row];

  bool is_eos = false;
  for (int i = 0; i < a.num_eos_ids; ++i) is_eos |= a.eos_ids_E[i] == outcome.token;
  const bool is_finished = is_eos || length == a.horizon;
  a.stopped_by_eos_B[row] = is_eos;
  a.next_ids_B[row] = is_finished ? a.pad_id : outcome.token;
  if (is_finished) {
    a.finished_B[row] = true;
    remove_active();
  }
}

ESR_INLINE RowParameters parameters_of(const SamplerArguments& a, int row) {
  return {a.sampling_temperature_B[row], a.top_k_B[row], a.top_p_B[row], a.min_p_B[row]};
}

ESR_INLINE uint64_t random_of(const SamplerArguments& a, int row) {
  return uniform_bits(static_cast<uint64_t>(a.seed_B[row]), static_cast<uint64_t>(a.request_ids_B[row]),
                      static_cast<uint32_t>(a.lengths_B[row]), SAMPLING_STREAM);
}

}  // namespace esr
