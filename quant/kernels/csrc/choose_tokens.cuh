// Arguments of the token selection at the end of a decode step. quant/kernels/choose_tokens.py describes it.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

namespace lowbit {

struct ChooseTokensArgs {
  const float* scores;       // (m, n)
  const float* temperature;  // (m), 0 for a row without noise; null, with seed, if no row has noise
  const int64_t* seed;       // (m)
  int64_t* tokens;           // (m): the index of each row's largest score
  int64_t* written;          // (m): incremented
  int64_t* positions;        // (m): incremented up to `last`; null, with slots, if rows do not move
  int64_t* slots;            // (m): moved with the position
  int64_t last;
  int m, n;
};

struct ChooseTokensLaunch {
  int device;
  int blocks;      // that share a row: at most 8; more than 1 needs sm_90
  bool dependent;  // launched with programmatic dependent launch
};

cudaError_t launch_choose_tokens(const ChooseTokensArgs& args, const ChooseTokensLaunch& launch, cudaStream_t stream);

}  // namespace lowbit
