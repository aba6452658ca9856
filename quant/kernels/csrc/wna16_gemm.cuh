// y = epilogue(x W^T) for some rows of x with Hopper's warpgroup instructions: what the launcher takes.
#pragma once

#include "wna16_args.cuh"

namespace lowbit {

struct Wna16GemmLaunch {
  int device;
  int groups_per_chunk;  // 1, 2 or 4: scales per row in 128 inputs
  int warpgroups;        // that multiply: each has 64 rows of W. 2 to 4, above 64 rows of x 2 or 3
  int cluster;           // blocks that share k
  bool dependent;        // launched with programmatic dependent launch
};

// For code built for sm_90a: elsewhere the kernel is empty, or there is none (extension.reason_against_90a asks).
template <typename T, int kBits>
cudaError_t launch_wna16_gemm(const Wna16Args& args, const Wna16GemmLaunch& launch, cudaStream_t stream);

}  // namespace lowbit
