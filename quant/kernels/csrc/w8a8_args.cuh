// What the products of int8 rows with an int8 weight compute, whichever kernel does:
// y = (x W^T) * x_scales * scales + bias + residual, the sums exact in int32, all that follows in float32.
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
