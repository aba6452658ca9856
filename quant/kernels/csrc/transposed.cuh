// Matrices of eight by eight halves that go to shared memory and back transposed (PTX ISA: stmatrix, ldmatrix).
#pragma once

#include "ptx.cuh"

namespace lowbit {

// Stores two matrices of halves, as mma's sums have them once rounded, transposed: lane l's registers have columns
// 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; the address from lane 8 i + r is that of the 16 bytes of matrix i's column
// r.
__device__ inline void store_transposed(uint32_t address, uint32_t first, uint32_t second) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(address), "r"(first), "r"(second)
               : "memory");
#endif
}

// The inverse: what store_transposed stored.
__device__ inline uint2 load_transposed(uint32_t address) {
  uint2 matrices;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(matrices.x), "=r"(matrices.y)
               : "r"(address)
               : "memory");
  return matrices;
}

}  // namespace lowbit
