// The end of a decode step: what the launcher takes. quant/kernels/choose_tokens.py describes it.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

namespace lowbit {

struct ChooseTokensArgs {
  const float* scores;       // (m, n)
  const float* temperature;  // (m), 0 for a row without noise; null with seed where no row has any
  const int64_t* seed;       // (m)
  int64_t* tokens;           // (m): the index of each row's largest score
  int64_t* written;          // (m): one more
  int64_t* positions;        // (m): one on, up to `last`; null with slots where rows do not move
  int64_t* slots;            // (m): as far on as the position
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
