// Numbers that blocks of a cluster send to one another, counted by a barrier in the memory of the block that gets them:
// it alone waits, and no thread's earlier stores have to be visible to all of the GPU, as for a barrier of the cluster.
#pragma once

#include "ptx.cuh"

namespace lowbit {

// Opens a block's barrier for messages of `bytes` in all, by one thread, before the cluster's blocks meet.
__device__ inline void expect_messages(uint64_t* barrier, uint32_t bytes) {
  barrier_init(smem_address(barrier), 1);
  fence_barrier_init();
  barrier_expect(smem_address(barrier), bytes);
}

// Returns when all have come.
__device__ inline void wait_for_messages(uint64_t* barrier) { barrier_wait(smem_address(barrier), 0); }

// Sends four floats, or one, to `target` in the memory of block `rank` of this cluster, whose barrier counts them.
__device__ inline void send_floats(float* target, uint32_t rank, float4 value, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  const uint32_t remote = cluster_address(smem_address(target), rank);
  const uint32_t counter = cluster_address(smem_address(barrier), rank);
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(remote),
               "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(counter)
               : "memory");
#endif
}

__device__ inline void send_float(float* target, uint32_t rank, float value, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  const uint32_t remote = cluster_address(smem_address(target), rank);
  const uint32_t counter = cluster_address(smem_address(barrier), rank);
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(remote), "f"(value),
               "r"(counter)
               : "memory");
#endif
}

}  // namespace lowbit
