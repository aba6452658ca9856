// Arguments of all products of int8 rows with an int8 weight:
// y = (x W^T) * x_scales * scales + bias + residual, with exact int32 sums and float32 for everything after them.
#pragma once

#include "declare.cuh"

namespace lowbit {

struct W8a8Args {
  LOWBIT_STRUCT(W8a8Args);
  FIELD(const int8_t*, x);        // (m, k), k a multiple of 16
  FIELD(const float*, x_scales);  // (m)
  FIELD(const int8_t*, codes);    // (n, k)
  FIELD(const float*, scales);    // (n)
  FIELD(const void*, bias);       // (n) in y's type or null
  FIELD(const void*, residual);   // (m, n) in y's type or null
  FIELD(void*, y);                // (m, n)
  FIELD(int, m);
  FIELD(int, n);
  FIELD(int, k);
};

}  // namespace lowbit
