// y = epilogue(x W^T) for many rows of int8 x by CUTLASS on Hopper: what the launcher takes beside W8a8Args.
#pragma once

#include "w8a8_args.cuh"

namespace lowbit {

struct W8a8CutlassLaunch {
  int device;
  int processors;  // multiprocessors of the device
  int tile;        // 0 or 1: w8a8_cutlass.cu lists them
  int swizzle;     // tiles of y that neighbour each other in time: 1, 2, 4 or 8 rows or columns of them
};

// n must be a multiple of 8 and y, bias and residual start at multiples of 16 bytes. cudaErrorInvalidValue where
// CUTLASS refuses the problem.
template <typename T, int kTile>
cudaError_t launch_w8a8_cutlass(const W8a8Args& args, const W8a8CutlassLaunch& launch, cudaStream_t stream);

}  // namespace lowbit
