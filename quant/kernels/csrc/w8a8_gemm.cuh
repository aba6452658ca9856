// y = epilogue(x W^T) for few rows of int8 x with Hopper's warpgroup instructions: what the launcher takes.
#pragma once

#include "ring_launch.cuh"
#include "w8a8_args.cuh"

namespace lowbit {

enum class W8a8Output : int { kHalf, kBfloat16, kFloat };  // y's type, and bias's and residual's

// cudaErrorInvalidDeviceFunction where the code was not built for sm_90a.
cudaError_t launch_w8a8_gemm(const W8a8Args& args, const RingLaunch& launch, W8a8Output output, cudaStream_t stream);

}  // namespace lowbit
