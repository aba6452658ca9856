// Arguments of all products of int8 rows with an int8 weight:
// y = (x W^T) * x_scales * scales + bias + residual, with exact int32 sums and float32 for everything after them.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

namespace lowbit {

struct W8a8Args {
  const int8_t* x;        // (m, k), k a multiple of 16
  const float* x_scales;  // (m)
  const int8_t* codes;    // (n, k)
  const float* scales;    // (n)
  const void* bias;       // (n) in y's type or null
  const void* residual;   // (m, n) in y's type or null
  void* y;                // (m, n)
  int m, n, k;
};

}  // namespace lowbit
