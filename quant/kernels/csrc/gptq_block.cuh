// Arguments of GPTQ's inner loop over a block of columns, in one launch instead of some hundred.
#pragma once

#include <cuda_runtime.h>

namespace lowbit {

struct GptqBlockArgs {
  const void* w;        // (n, columns) float32, as all below
  const void* factor;   // (columns, columns), upper triangular
  const void* scales;   // (n, columns): scales of each column's group
  const void* zeros;    // (n, columns)
  void* codes;          // (n, columns)
  void* errors;         // (n, columns)
  int n, columns;
  float low, high;        // limits of the codes
  float fineness, least;  // a float's steps: the power of two at or below a value times `fineness`, `least` at least;
                          // fineness 0: integers
};

constexpr int kGptqColumns = 128;  // most columns of a block

cudaError_t launch_gptq_block(const GptqBlockArgs& args, int device, cudaStream_t stream);

}  // namespace lowbit
