// y = epilogue(x W^T) for few rows of int8 x, with Hopper's warpgroup instructions: launch parameters.
#pragma once

#include "ring_launch.cuh"
#include "w8a8_args.cuh"

namespace lowbit {

enum class W8a8Output : int { kHalf, kBfloat16, kFloat };  // type of y, bias and residual

// cudaErrorInvalidDeviceFunction if the code was not built for sm_90a.
cudaError_t launch_w8a8_gemm(const W8a8Args& args, const RingLaunch& launch, W8a8Output output, cudaStream_t stream);

}  // namespace lowbit
