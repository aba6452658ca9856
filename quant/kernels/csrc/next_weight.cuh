// What a product asks L2 for while it ends: the first bytes of the weight that the next product reads, so that memory
// works through this one's epilogue and the next one's start. A hint: nothing waits for it, no result depends on it.
#pragma once

#include "ptx.cuh"

namespace lowbit {

// The part of `bytes` bytes at `weight`, both multiples of 16, that falls to warp `warp` of `warps`. One lane calls.
__device__ inline void prefetch_next_weight(const void* weight, int bytes, int warp, int warps) {
  const int part = (bytes / 16 + warps - 1) / warps * 16;
  const int begin = warp * part;
  if (begin < bytes) prefetch_bulk(static_cast<const uint8_t*>(weight) + begin, min(part, bytes - begin));
}

}  // namespace lowbit
