// The emulator's own messages.cuh.
#pragma once

#include "ptx.cuh"

namespace lowbit {

inline void expect_messages(uint64_t* barrier, uint32_t bytes) {
  barrier_init(smem_address(barrier), 1);
  barrier_expect(smem_address(barrier), bytes);
}
inline void wait_for_messages(uint64_t* barrier) { barrier_wait(smem_address(barrier), 0); }
inline void send_floats(float* target, uint32_t rank, float4 value, uint64_t* barrier) {
  emulator::send(smem_address(target), &value, 16, smem_address(barrier), rank);
}
inline void send_float(float* target, uint32_t rank, float value, uint64_t* barrier) {
  emulator::send(smem_address(target), &value, 4, smem_address(barrier), rank);
}

}  // namespace lowbit
