// csrc/multicast.cuh's functions on the CPU.
#pragma once

#include "ptx.cuh"

namespace lowbit {

inline void copy_to_blocks(uint32_t smem, const void* global, uint32_t bytes, uint32_t barrier, uint32_t ranks) {
  for (uint32_t rank = 0; ranks >> rank; ++rank)
    if (ranks >> rank & 1) emulator::copy({smem, bytes, barrier, static_cast<const uint8_t*>(global), 0, 0, 0}, rank);
}
inline void barrier_arrive_at(uint32_t barrier, uint32_t rank) { emulator::barrier_arrive_at(barrier, rank); }

}  // namespace lowbit
