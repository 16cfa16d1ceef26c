// Probability masses as 64-bit integers: their sums are exact, so a draw depends neither on the order in which a row is
// read nor on how many threads read it. Same arithmetic as esr_kernels/sample_tokens/fixed_point.py.
//
//   distance_v = (z_v - max z) * scale,  scale = log2(e) / temperature                    float32, <= 0
//   weight_v   = round(2^(fraction_bits + distance_v))                                    so the likeliest id has 2^fraction_bits
//
// With 44 fraction bits an id of 30.5 nats below the likeliest still has a weight. A sum over V ids stays within 2^62.
#pragma once

#include "host_device.h"

namespace esr {

constexpr double LOG2_E = 1.4426950408889634;
constexpr double LN_2 = 0.6931471805599453;
constexpr float RAW_SCALE = 1.44269502f;  // log2(e), for temperature 1
constexpr int MOST_FRACTION_BITS = 44;

ESR_INLINE int fraction_bits_for(int vocab_size) {
  const int bits_of_vocab = vocab_size > 1 ? floor_log2(static_cast<uint64_t>(vocab_size - 1)) + 1 : 0;
  return bits_of_vocab <= 18 ? MOST_FRACTION_BITS : 62 - bits_of_vocab;
}

// log2(e) / temperature in float32, kept among the normal numbers; temperature > 0.
ESR_INLINE float scale_of_temperature(double temperature) {
  const double most = 0x1p126, least = 0x1p-126;
  const double scale = LOG2_E / temperature;
  return static_cast<float>(scale > most ? most : scale < least ? least : scale);
}

// 2^x in [sqrt(1/2), sqrt(2)] for x in [-1/2, 1/2]: minimax polynomial in relative error (1.1e-7), exact at 0.
ESR_INLINE float exp2_of_fraction(float x) {
  float y = 0x1.5bba14p-10f;
  y = fused_multiply_add(y, x, 0x1.3cea88p-7f);
  y = fused_multiply_add(y, x, 0x1.c6b752p-5f);
  y = fused_multiply_add(y, x, 0x1.ebf9bcp-3f);
  y = fused_multiply_add(y, x, 0x1.62e42ap-1f);
  return fused_multiply_add(y, x, 1.0f);
}

// Two sums over a row: of the plain softmax (temperature 1, every id), and of what an id is drawn from.
struct Masses {
  uint64_t raw = 0, drawn = 0;
};

struct WeightScale {
  float top_logit;  // finite
  float scale;
  int fraction_bits;

  // log2 of the ratio to the likeliest id. Never decreases with the logit.
  ESR_INLINE float distance(float logit) const { return (logit - top_logit) * scale; }

  ESR_INLINE uint64_t weight(float logit) const {
    const float shifter = 0x1.8p23f;  // a float of this size has no bits after the point: adding it rounds
    float x = distance(logit);
    x = x > -120.0f ? x : -120.0f;
    const float shifted = x + shifter;
    const int exponent = static_cast<int>(bits_of(shifted) - bits_of(shifter)) + fraction_bits;
    const float y = exp2_of_fraction(x - (shifted - shifter));
    const float value = float_of(bits_of(y) + (static_cast<uint32_t>(exponent) << 23));
#if defined(__CUDA_ARCH__)
    return __float2ull_rn(value);
#else
    // value < 2^52, so the double rounds to an integer, half to even, and shows it in its low bits: this vectorises
    return bits_of(static_cast<double>(value) + 0x1p52) & 0xFFFFFFFFFFFFFu;
#endif
  }
};

// floor(fraction * mass), the fraction given as an integer of 53 bits.
ESR_INLINE uint64_t part_of(uint64_t mass, uint64_t fraction_of_2_53) {
  return multiply_high(fraction_of_2_53 << 11, mass);
}

// The least weight that min-p keeps: w >= min_p * 2^fraction_bits.
ESR_INLINE uint64_t least_weight_of(double min_p, int fraction_bits) {
  const double least = min_p * static_cast<double>(uint64_t{1} << fraction_bits);
  const uint64_t whole = static_cast<uint64_t>(least);
  return whole + (static_cast<double>(whole) < least);
}

// ln(mass) in float64, mass > 0; 2 artanh(s) with s = (m - 1) / (m + 1) of the mantissa m, |s| < 0.172.
ESR_INLINE double log_of_mass(uint64_t mass) {
  const uint64_t bits = bits_of(static_cast<double>(mass));
  int exponent = static_cast<int>(bits >> 52) - 1023;
  double mantissa = double_of((bits & 0xFFFFFFFFFFFFFu) | 0x3FF0000000000000u);
  if (mantissa > 1.4142135623730951) {
    mantissa = mantissa * 0.5;
    exponent += 1;
  }
  const double s = (mantissa - 1.0) / (mantissa + 1.0), square = s * s;
  double series = 1.0 / 19;
  for (int odd = 17; odd >= 1; odd -= 2) series = series * square + 1.0 / odd;
  return exponent * LN_2 + 2.0 * s * series;
}

// ln(weight / mass) of an id, from its logit, so that rounding the weight does not show.
ESR_INLINE float logprob_of(double logit, double top_logit, double temperature, uint64_t mass, int fraction_bits) {
  return static_cast<float>((logit - top_logit) / temperature - (log_of_mass(mass) - fraction_bits * LN_2));
}

}  // namespace esr
