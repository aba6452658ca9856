// PTX instructions that wna16_prefill.cu alone uses, each as a function: see ptx.cuh.
#pragma once

#include "shared_wgmma.cuh"
#include "tensor_map.cuh"

namespace lowbit {

__device__ inline void write_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
__device__ inline void write_shared(uint32_t address, const uint4& value) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// Sets the registers of each thread of a warpgroup, all of which call it: fewer than it has, or more, once others have
// given theirs. What it begins with follows from the launch bounds.
template <int kRegisters>
__device__ inline void give_registers() {
#if LOWBIT_WGMMA
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ inline void take_registers() {
#if LOWBIT_WGMMA
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// Comes to a barrier of named_sync, without waiting for the others.
__device__ inline void named_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Arrives at the barrier of block `rank` of this cluster, which must have begun and not have left. With
// .release.cluster it would wait for all of the GPU (MEMBAR.ALL.GPU).
__device__ inline void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(barrier, rank)) : "memory");
#endif
}

// copy_box to this place in each of the cluster's blocks, at whose barriers it counts.
template <int kBlocks>
__device__ inline void copy_box_to_all(uint32_t smem, const CUtensorMap& map, int place, int row, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(smem),
      "l"(&map), "r"(place), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>((1 << kBlocks) - 1))
      : "memory");
#endif
}

// Sets a mark in global memory, behind all that the threads whose barrier this one has passed wrote before it.
__device__ inline void set_mark(int64_t* mark, int64_t value) {
  __threadfence();
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(mark), "l"(value) : "memory");
}

// Returns when the mark has this value: what was written before it may then be read.
__device__ inline void wait_for_mark(const int64_t* mark, int64_t value) {
  int64_t found;
  do {
    asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(found) : "l"(mark) : "memory");
  } while (found != value);
}

#if LOWBIT_WGMMA
#define LOWBIT_FIRST_96                                                                                        \
  LOWBIT_FIRST_64                                                                                              \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90" \
  ",%91,%92,%93,%94,%95"
#define LOWBIT_FIRST_128                                                                                       \
  LOWBIT_FIRST_96                                                                                              \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117" \
  ",%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
LOWBIT_WGMMA_FOR(192, LOWBIT_FIRST_96, "{%96,%97,%98,%99}, %100", "%101", LOWBIT_C32(0), LOWBIT_C32(32),
                 LOWBIT_C32(64))
LOWBIT_WGMMA_FOR(256, LOWBIT_FIRST_128, "{%128,%129,%130,%131}, %132", "%133", LOWBIT_C32(0), LOWBIT_C32(32),
                 LOWBIT_C32(64), LOWBIT_C32(96))
#endif

// wgmma with the right operand as SwizzledAt describes it.
template <typename T, int kColumns>
__device__ inline void wgmma_halves(float (&c)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  wgmma<T, kColumns>(c, a, b, add);
}

}  // namespace lowbit
