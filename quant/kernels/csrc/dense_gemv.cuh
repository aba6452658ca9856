// y = epilogue(x W^T) for few rows of x and a half-precision W in its plain order.
#pragma once

#include "ring_launch.cuh"
#include "wna16_args.cuh"

namespace lowbit {

struct DenseArgs {
  const void* x;         // (m, k)
  const void* w;         // (n, k)
  const void* bias;      // (n) or null
  const void* residual;  // (m, n) or null: added after the activation
  const float* x_squares;  // (m, k / 16), or null: deferred_norm.cuh; k is then a multiple of 64
  float norm_eps;
  void* y;               // (m, n), or (m, n / 2) for the gated epilogue
  int m, n, k;           // k a multiple of 8; n of 8 for the gated epilogue
  int64_t x_pitch, w_pitch;  // bytes from one row to the next, multiples of 16
  Activation activation;
  bool float32_out;
  bool vectors;  // n is a multiple of 4, and tensors of y's type start at multiples of 8 bytes
};

// For 1 to 64 rows of x. cudaErrorInvalidDeviceFunction if the code was not built for sm_90a.
template <typename T>
cudaError_t launch_dense_gemv(const DenseArgs& args, const RingLaunch& launch, cudaStream_t stream);

}  // namespace lowbit
