// Stubs for launchers named in bindings.cpp that the emulator is built without. Linked last, after the built ones.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "w8a8_cutlass.cuh"

namespace lowbit {

template <typename T, int kTile>
cudaError_t launch_w8a8_cutlass(const W8a8Args&, const W8a8CutlassLaunch&, cudaStream_t) {
  return cudaErrorNotSupported;
}

#define LOWBIT_LEAVE_OUT(T, TILE) \
  template cudaError_t launch_w8a8_cutlass<T, TILE>(const W8a8Args&, const W8a8CutlassLaunch&, cudaStream_t);
LOWBIT_LEAVE_OUT(__half, 0)
LOWBIT_LEAVE_OUT(__half, 1)
LOWBIT_LEAVE_OUT(__nv_bfloat16, 0)
LOWBIT_LEAVE_OUT(__nv_bfloat16, 1)

}  // namespace lowbit
