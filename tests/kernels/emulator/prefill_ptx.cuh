// csrc/prefill_ptx.cuh's functions on the CPU.
#pragma once

#include "shared_wgmma.cuh"
#include "tensor_map.cuh"

namespace lowbit {

template <typename Value>
void write_shared(uint32_t address, const Value& value) {
  memcpy(emulator::shared_at(address, sizeof(value)), &value, sizeof(value));
}

inline void store_transposed(uint32_t address, uint32_t first, uint32_t second) {
  struct Operands {
    uint32_t matrices[2], address;
  } const in = {{first, second}, address};
  emulator::together("stmatrix", &in, sizeof(in), nullptr, 0, [](const auto& all, auto&) {
    for (int lane = 0; lane < 16; ++lane) {
      const int matrix = lane / 8, column = lane % 8;
      uint8_t* target = emulator::shared_at(reinterpret_cast<const Operands*>(all[lane])->address, 16);
      for (int row = 0; row < 8; ++row)
        memcpy(target + 2 * row, all[row * 4 + column / 2] + 4 * matrix + column % 2 * 2, 2);
    }
  });
}

inline uint2 load_transposed(uint32_t address) {
  uint2 out;
  emulator::together("ldmatrix", &address, 4, &out, sizeof(out), [](const auto& all, auto& results) {
    for (int lane = 0; lane < 16; ++lane) {
      const int matrix = lane / 8, column = lane % 8;
      const uint8_t* source = emulator::shared_at(emulator::load<uint32_t>(all[lane]), 16);
      for (int row = 0; row < 8; ++row)
        memcpy(results[row * 4 + column / 2] + 4 * matrix + column % 2 * 2, source + 2 * row, 2);
    }
  });
  return out;
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
