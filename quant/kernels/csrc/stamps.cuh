// When a block begins, has waited, has multiplied and ends, by the GPU's clock of nanoseconds (which ticks every 32):
// for benchmarks/layer_times.py, in builds with -DLOWBIT_STAMPS=name alone, whose object exports `name` to read them.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

namespace lowbit {

enum class Stage : int { kBegun, kWaited, kComputed, kEnded };

#ifdef LOWBIT_STAMPS

struct StampRow {
  int n, k, block, threads;
  unsigned long long at[4];
};
constexpr int kStampRows = 1 << 17;
static __device__ StampRow stamp_rows[kStampRows];
static __device__ int stamp_count;

__device__ inline unsigned long long* block_stamps() {
  __shared__ unsigned long long at[4];
  return at;
}

__device__ inline void stamp(Stage stage) {
  if (threadIdx.x != 0 || threadIdx.y != 0 || threadIdx.z != 0) return;
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  block_stamps()[static_cast<int>(stage)] = now;
}

// The block's stages as one row. n, k: of the product, or what tells a kernel from others.
__device__ inline void leave_stamps(int n, int k) {
  stamp(Stage::kEnded);
  if (threadIdx.x != 0 || threadIdx.y != 0 || threadIdx.z != 0) return;
  const int index = atomicAdd(&stamp_count, 1);
  if (index >= kStampRows) return;
  StampRow& row = stamp_rows[index];
  row.n = n, row.k = k, row.threads = blockDim.x * blockDim.y * blockDim.z;
  row.block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  for (int i = 0; i < 4; ++i) row.at[i] = block_stamps()[i];
}

// Copies the rows, `most` at most, and forgets them. Returns how many there are, or -1.
extern "C" __attribute__((visibility("default"))) int LOWBIT_STAMPS(StampRow* rows, int most) {
  int count = 0;
  const int none = 0;
  if (cudaDeviceSynchronize() != cudaSuccess) return -1;
  if (cudaMemcpyFromSymbol(&count, stamp_count, sizeof count) != cudaSuccess) return -1;
  if (count > kStampRows) count = kStampRows;
  if (count > most) count = most;
  if (cudaMemcpyFromSymbol(rows, stamp_rows, size_t(count) * sizeof(StampRow)) != cudaSuccess) return -1;
  return cudaMemcpyToSymbol(stamp_count, &none, sizeof none) == cudaSuccess ? count : -1;
}

#else

__device__ inline void stamp(Stage) {}
__device__ inline void leave_stamps(int, int) {}

#endif

}  // namespace lowbit
