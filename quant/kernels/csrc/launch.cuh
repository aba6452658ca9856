// Launch of all kernels except CUTLASS's.
#pragma once

#include "declare.cuh"

namespace lowbit {

// Launches with nothing to choose.
struct DeviceLaunch {
  LOWBIT_STRUCT(DeviceLaunch);
  FIELD(int, device);
};

struct PlainLaunch {
  LOWBIT_STRUCT(PlainLaunch);
  FIELD(int, device);
  FIELD(bool, dependent);  // launched with programmatic dependent launch
};

struct LaunchPlan {
  int device;
  cudaStream_t stream;
  dim3 blocks, threads;
  size_t shared_bytes = 0;  // dynamic shared memory, which depends on stages, rows, ...
  int cluster = 0;          // blocks per cluster along x; 0: a launch without clusters, which GPUs before sm_90 lack
  bool dependent = false;   // programmatic dependent launch, if the GPU has it
};

// True if the GPU has programmatic dependent launch. NVIDIA does not document the effect of requesting it elsewhere,
// and code for other GPUs has no wait for the previous kernel.
inline bool has_dependent_launch(int device) {
  int major = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), const LaunchPlan& plan, const Args&... args) {
  cudaError_t error = cudaSetDevice(plan.device);
  const int bytes = static_cast<int>(plan.shared_bytes);
  if (error == cudaSuccess && bytes > 0)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {plan.blocks, plan.threads, plan.shared_bytes, plan.stream, attributes, 0};
  if (plan.cluster > 0) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {unsigned(plan.cluster), 1, 1};
  }
  if (plan.dependent && has_dependent_launch(plan.device)) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace lowbit
