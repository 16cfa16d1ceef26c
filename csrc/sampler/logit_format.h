// The dtypes of logits, and the order of floats as unsigned integers.
#pragma once

#include "host_device.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace esr {

// Bits: how a logit lies in memory. UNUSED_BITS: low bits of its float32 that carry nothing.
struct Float32 {
  using Bits = uint32_t;
  static constexpr int UNUSED_BITS = 0;
  static constexpr Bits MINUS_INFINITY = 0xFF800000u;
  static ESR_INLINE float to_float(Bits bits) { return float_of(bits); }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr int UNUSED_BITS = 16;
  static constexpr Bits MINUS_INFINITY = 0xFF80u;
  static ESR_INLINE float to_float(Bits bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr int UNUSED_BITS = 13;
  static constexpr Bits MINUS_INFINITY = 0xFC00u;
  static ESR_INLINE float to_float(Bits bits) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, magnitude = (bits & 0x7FFFu) << 13;
    // the exponent's bias grows by 112; a product does it also for subnormal numbers
    const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
    return float_of(sign | ((bits & 0x7C00u) == 0x7C00u ? magnitude | 0x7F800000u : scaled));
#endif
  }
};

// Unsigned integers in the order of the floats; 0.0 and -0.0 are one. For logits that are not NaN.
template <class Format>
ESR_INLINE uint32_t order_of(float logit) {
  const uint32_t bits = bits_of(logit + 0.0f);
  return (bits >> 31 ? ~bits : bits | 0x80000000u) >> Format::UNUSED_BITS;
}

template <class Format>
ESR_INLINE float logit_of_order(uint32_t order) {
  const uint32_t bits = order << Format::UNUSED_BITS;
  return float_of(bits >> 31 ? bits & 0x7FFFFFFFu : ~(bits | ((1u << Format::UNUSED_BITS) - 1)));
}

}  // namespace esr
