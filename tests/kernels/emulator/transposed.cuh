// csrc/transposed.cuh's functions on the CPU.
#pragma once

#include "ptx.cuh"

namespace lowbit {

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

}  // namespace lowbit
