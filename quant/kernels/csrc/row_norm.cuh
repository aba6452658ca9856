// Arguments of the preparation of a product's input rows. quant/kernels/row_norm.py describes it.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

#include "wna16_gemv.cuh"

namespace lowbit {

struct RowNormArgs {
  const void* x;             // (m, k), k a multiple of 8; (m, 2 k), gate followed by up, for silu_mul
  const void* weight;        // (k), null without a norm
  const void* bias;          // (k) or null
  const float* input_scale;  // one number for all tokens, or null: each token's absmax / 127
  void* y;                   // (m, k), or null to get codes and scales
  int8_t* codes;             // (m, k)
  float* scales;             // (m)
  int m, k;
  Norm norm;
  float eps;
  Activation activation;  // before the norm
  bool int8;              // round to multiples of the scale, -128 to 127
};

template <typename T>
cudaError_t launch_row_norm(const RowNormArgs& args, int device, bool dependent, cudaStream_t stream);

}  // namespace lowbit
