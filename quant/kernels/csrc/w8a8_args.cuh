// Arguments of all products of rows in codes of eight bits with a weight of the same number, int8 or e4m3:
// y = (x W^T) * x_scales * scales + bias + residual, in float32 after the sums. Those of int8 are exact. With blocks
// the sums of 128 inputs are multiplied with their scales, which x has for 128 inputs and W for 128 x 128.
#pragma once

#include "declare.cuh"

namespace lowbit {

struct W8a8Args {
  LOWBIT_STRUCT(W8a8Args);
  FIELD(const void*, x);          // (m, k), k a multiple of 16
  FIELD(const float*, x_scales);  // (m); with blocks (k / 128, m)
  FIELD(const void*, codes);      // (n, k)
  FIELD(const float*, scales);    // (n); with blocks (n / 128, block_pitch)
  FIELD(int, block_pitch);        // 0 without blocks
  FIELD(const void*, bias);       // (n) in y's type or null
  FIELD(const void*, residual);   // (m, n) in y's type or null
  FIELD(void*, y);                // (m, n)
  FIELD(int, m);
  FIELD(int, n);
  FIELD(int, k);
};

}  // namespace lowbit
