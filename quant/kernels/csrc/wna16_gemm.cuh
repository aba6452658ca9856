// y = epilogue(x W^T) for some rows of x, with Hopper's warpgroup instructions: launch parameters.
#pragma once

#include "wna16_args.cuh"

namespace lowbit {

struct Wna16GemmLaunch {
  int device;
  int groups_per_chunk;  // 1, 2 or 4: scales per row in 128 inputs
  int warpgroups;        // multiplying warpgroups, with 64 rows of W each: 2 to 4, or 2 to 3 above 64 rows of x
  int cluster;           // blocks that split k
  bool dependent;        // launched with programmatic dependent launch
};

// Needs code built for sm_90a (extension.reason_against_90a checks it): elsewhere the kernel is empty or missing.
template <typename T, int kBits>
cudaError_t launch_wna16_gemm(const Wna16Args& args, const Wna16GemmLaunch& launch, cudaStream_t stream);

}  // namespace lowbit
