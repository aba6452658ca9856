// csrc/wgmma.cuh's functions on the CPU. A matrix's description is its address, and the distances of its blocks.
#pragma once

#include "ptx.cuh"

#define LOWBIT_WGMMA 1

namespace lowbit {

template <int kAlongInputs, int kAlongColumns>
struct MatrixAt {
  uint32_t low;
  explicit MatrixAt(uint32_t smem) : low(__shfl_sync(~0u, smem, 0)) {}
  uint64_t after(int bytes) const {
    return uint64_t(kAlongColumns) << 48 | uint64_t(kAlongInputs) << 32 | (low + bytes);
  }
};

inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::commit_products(); }
template <int kPending>
void wgmma_wait() {
  emulator::wait_products(kPending);
}
template <typename T, int kColumns>
void wgmma(float (&c)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulator::multiply_later(c, kColumns, a, b, add, std::is_same_v<T, __nv_bfloat16>);
}

}  // namespace lowbit
