// Prefetch into L2, at the end of a product, of the first bytes of the weight that the next product reads. Memory stays
// busy during this epilogue and the start of the next kernel. Nothing waits for it, and no result depends on it.
#pragma once

#include "ptx.cuh"

namespace lowbit {

// Bytes per warp of `bytes` bytes that `warps` warps share, a multiple of 16.
__host__ __device__ inline int part_of(int bytes, int warps) { return (bytes / 16 + warps - 1) / warps * 16; }

// Prefetches part `index`, `part` bytes, of `bytes` bytes at `weight`. Called by one lane.
__device__ inline void prefetch_part(const void* weight, int bytes, int index, int part) {
  const int begin = index * part;
  if (begin < bytes) prefetch_bulk(static_cast<const uint8_t*>(weight) + begin, min(part, bytes - begin));
}

}  // namespace lowbit
