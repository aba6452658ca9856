// Rows in panels, for a product that reads several: (width / 32, rows, 32), the rows of 32 inputs next to each other.
// quant/kernels/panels.py says why.
#pragma once

#include <cstdint>

namespace lowbit {

constexpr int kPanelK = 32;
constexpr int kPanelRowBytes = kPanelK * 2;

// The index of input `i` of row `row`. panel: the rows of a panel; 0 if the rows, of `width` inputs, follow each other.
__device__ inline int64_t input_index(int panel, int row, int width, int i) {
  if (panel == 0) return static_cast<int64_t>(row) * width + i;
  return (static_cast<int64_t>(i / kPanelK) * panel + row) * kPanelK + i % kPanelK;
}

}  // namespace lowbit
