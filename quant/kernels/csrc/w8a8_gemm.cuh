// y = epilogue(x W^T) for few rows of int8 x with Hopper's warpgroup instructions: what the launcher takes.
#pragma once

#include "w8a8_args.cuh"

namespace lowbit {

enum class W8a8Output : int { kHalf, kBfloat16, kFloat };  // y's type, and bias's and residual's

struct W8a8GemmLaunch {
  int device;
  int warpgroups;  // of a block that multiply: each has 64 rows of W
  int cluster;     // blocks that share k
  int stages;      // of the ring: chunks of 128 inputs that a block has asked for at most
  W8a8Output output;
  bool dependent;  // launched with programmatic dependent launch
};

// cudaErrorInvalidDeviceFunction where the code was not built for sm_90a.
cudaError_t launch_w8a8_gemm(const W8a8Args& args, const W8a8GemmLaunch& launch, cudaStream_t stream);

}  // namespace lowbit
