// The floor: reads `bytes` and keeps a sum, one block of 512 threads per 8 x 16 bytes a thread, nothing else. The
// fastest reader of 58 configurations tried on one H100. Plain C interface, loaded with ctypes by measure.py.
#include <cstdint>
#include <cuda_runtime.h>

constexpr int kThreads = 512, kLoads = 8;

__global__ void read_kernel(const uint4* data, int64_t vectors, uint32_t* sink) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kLoads + threadIdx.x;
  uint4 values[kLoads];
  for (int i = 0; i < kLoads; ++i) {
    const int64_t index = first + i * kThreads;
    values[i] = index < vectors ? __ldg(data + index) : make_uint4(0, 0, 0, 0);
  }
  uint32_t sum = 0;
  for (int i = 0; i < kLoads; ++i) sum += values[i].x ^ values[i].y ^ values[i].z ^ values[i].w;
  if (sum == 0x12345678u) *sink = sum;  // all but never: the reads must not be optimized away
}

extern "C" int read_floor(const void* data, int64_t bytes, void* sink, void* stream) {
  const int64_t vectors = bytes / 16;
  const int64_t blocks = (vectors + kThreads * kLoads - 1) / (kThreads * kLoads);
  read_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const uint4*>(data), vectors,
                                                                          static_cast<uint32_t*>(sink));
  return cudaGetLastError();
}
