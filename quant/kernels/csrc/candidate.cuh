// A score and its index in one number, so that the largest does not depend on the order of comparisons.
#pragma once

#include <cstdint>

namespace lowbit {

// A key that is larger for a larger score, largest for NaN (as in torch), and larger for the lower of equal scores'
// indices. Never 0.
__device__ inline uint64_t candidate_of(float score, uint32_t index) {
  const uint32_t bits = __float_as_uint(score + 0.f);  // -0 is 0
  const uint32_t order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t(score == score ? order : ~0u) << 32 | ~index;
}

__device__ inline uint32_t index_of(uint64_t candidate) { return ~static_cast<uint32_t>(candidate); }

__device__ inline uint64_t best_of_warp(uint64_t best) {
  for (int offset = 16; offset > 0; offset /= 2) best = max(best, __shfl_xor_sync(~0u, best, offset));
  return best;
}

}  // namespace lowbit
