// csrc/prefill_ptx.cuh's functions on the CPU.
#pragma once

#include "shared_wgmma.cuh"
#include "tensor_map.cuh"

namespace lowbit {

template <typename Value>
void write_shared(uint32_t address, const Value& value) {
  memcpy(emulator::shared_at(address, sizeof(value)), &value, sizeof(value));
}

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

inline void named_arrive(int barrier, int threads) { emulator::arrive(barrier, threads); }
inline void barrier_arrive_at(uint32_t barrier, uint32_t rank) { emulator::barrier_arrive_at(barrier, rank); }

template <int kBlocks>
void copy_box_to_all(uint32_t smem, const CUtensorMap& map, int place, int row, uint32_t barrier) {
  for (int rank = 0; rank < kBlocks; ++rank) emulator::copy(copy_of(smem, map, place, row, barrier), rank);
}

// Clusters run one after another, and wait for none behind them.
inline void set_mark(int64_t* mark, int64_t value) { *mark = value; }
inline void wait_for_mark(const int64_t* mark, int64_t value) {
  if (*mark != value) emulator::fail("a mark that no cluster before has set");
}

template <typename T, int kColumns>
void wgmma_halves(float (&c)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulator::multiply_halves_later(c, kColumns, a, uint32_t(b), add, std::is_same_v<T, __nv_bfloat16>);
}

}  // namespace lowbit
