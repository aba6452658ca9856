// y = epilogue(prologue(x) W^T) for few rows of x: launch parameters besides Wna16Args.
#pragma once

#include "wna16_args.cuh"

namespace lowbit {

struct Wna16GemvLaunch {
  int device;
  int groups_per_chunk;  // 1, 2 or 4: scales per row in 128 inputs
  int row_tiles;         // tiles that a warp multiplies per read of x
  int row_warps;         // warps of a block along n, a power of two
  int k_warps;           // warps of a block that split k
  int cluster;           // blocks that split k; more than 1 needs sm_90
  bool dependent;        // launched with programmatic dependent launch
};

template <typename T, int kBits>
cudaError_t launch_wna16_gemv(const Wna16Args& args, const Wna16GemvLaunch& launch, cudaStream_t stream);

}  // namespace lowbit
