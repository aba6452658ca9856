// Prefetch into L2, at the end of a product, of the first bytes of the weight that the next product reads. Memory stays
// busy during this epilogue and the start of the next kernel. Nothing waits for it, and no result depends on it.
#pragma once

#include "ptx.cuh"

namespace lowbit {

// Prefetches the part of `bytes` bytes at `weight`, both multiples of 16, of warp `warp` of `warps`. Called by one
// lane.
__device__ inline void prefetch_next_weight(const void* weight, int bytes, int warp, int warps) {
  const int part = (bytes / 16 + warps - 1) / warps * 16;
  const int begin = warp * part;
  if (begin < bytes) prefetch_bulk(static_cast<const uint8_t*>(weight) + begin, min(part, bytes - begin));
}

}  // namespace lowbit
