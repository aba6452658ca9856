// One copy to several blocks of a cluster, and the barriers that count it.
#pragma once

#include "ptx.cuh"

namespace lowbit {

// Starts a copy of `bytes`, a multiple of 16, of global memory that is read again, to this place in every block of the
// cluster whose bit in `ranks` is set; its end counts at the barrier of each. All must have begun.
__device__ inline void copy_to_blocks(uint32_t smem, const void* global, uint32_t bytes, uint32_t barrier,
                                      uint32_t ranks) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(smem),
      "l"(global), "r"(bytes), "r"(barrier), "h"(static_cast<uint16_t>(ranks))
      : "memory");
#endif
}

// Arrives at the barrier of block `rank` of this cluster, which must have begun and not have left.
__device__ inline void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(barrier, rank))
               : "memory");
#endif
}

}  // namespace lowbit
