// y = epilogue(x W^T) for many rows of int8 x, by CUTLASS on Hopper: launch parameters besides W8a8Args.
#pragma once

#include "w8a8_args.cuh"

namespace lowbit {

struct W8a8CutlassLaunch {
  int device;
  int processors;  // multiprocessors of the device
  int tile;        // 0 or 1: index in w8a8_cutlass.cu's list
  int swizzle;     // adjacent tiles of y in sequence: 1, 2, 4 or 8 rows or columns of them
};

// n must be a multiple of 8; y, bias and residual must start at multiples of 16 bytes. cudaErrorInvalidValue if CUTLASS
// rejects the problem.
template <typename T, int kTile>
cudaError_t launch_w8a8_cutlass(const W8a8Args& args, const W8a8CutlassLaunch& launch, cudaStream_t stream);

}  // namespace lowbit
