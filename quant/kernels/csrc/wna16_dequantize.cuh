// Dequantization of a packed weight to a dense half-precision matrix, for products with many rows of x.
#pragma once

#include <cuda_runtime.h>

namespace lowbit {

struct Wna16DequantizeArgs {
  const void* words;   // as in Wna16Args
  const void* scales;
  const void* zeros;
  void* w;             // (n, k), T
  int n, k;
  int pair_block, groups_per_chunk, scale_rows, scale_shift;
};

template <typename T, int kBits>
cudaError_t launch_wna16_dequantize(const Wna16DequantizeArgs& args, int device, cudaStream_t stream);

}  // namespace lowbit
