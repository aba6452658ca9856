// csrc/shared_wgmma.cuh's functions on the CPU. An operand's description is its address before the swizzle.
#pragma once

#include "wgmma.cuh"

namespace lowbit {

template <typename Operand>
struct SumOf {
  using Type = float;
};
template <>
struct SumOf<int8_t> {
  using Type = int;
};

struct SwizzledAt {
  uint32_t low;
  explicit SwizzledAt(uint32_t smem) : low(__shfl_sync(~0u, smem, 0)) {}
  uint64_t after(int bytes) const { return low + bytes; }
};

template <typename Operand, int kColumns>
void wgmma_shared(typename SumOf<Operand>::Type (&c)[kColumns / 2], uint64_t a, uint64_t b) {
  emulator::multiply_shared_later<Operand>(c, kColumns, uint32_t(a), uint32_t(b));
}

template <int kColumns>
void wgmma_bytes(int (&c)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulator::multiply_bytes_later(c, kColumns, a, uint32_t(b), add);
}

}  // namespace lowbit
