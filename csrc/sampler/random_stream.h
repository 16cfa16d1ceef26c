// The random stream: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
//
// Counter based: a number is a function of its address (seed, request id, position, stream) alone. Same stream as
// esr_kernels/sample_tokens/random_stream.py.
#pragma once

#include "host_device.h"

namespace esr {

constexpr uint32_t SAMPLING_STREAM = 0;
constexpr int UNIFORM_BITS = 53;

struct Words4 {
  uint32_t word[4];
};

ESR_INLINE Words4 philox4x32(Words4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * counter.word[0];
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// A uniform number in [0, 1) as an integer of 53 bits: u = uniform_bits / 2^53.
ESR_INLINE uint64_t uniform_bits(uint64_t seed, uint64_t request_id, uint32_t position, uint32_t stream) {
  const Words4 counter = {{static_cast<uint32_t>(request_id), static_cast<uint32_t>(request_id >> 32), position, stream}};
  const Words4 random = philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return (static_cast<uint64_t>(random.word[0]) << 32 | random.word[1]) >> (64 - UNIFORM_BITS);
}

}  // namespace esr
