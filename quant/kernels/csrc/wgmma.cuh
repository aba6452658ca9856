// wgmma, the tensor instruction of a warpgroup (sm_90a): c (64 x kColumns) += a (64 x 16) * b (16 x kColumns).
//
// Warp w of the four has rows 16 w to 16 w + 15 in registers, as fragments of mma.m16n8k16: a as its A operand, c as
// kColumns / 8 of its C operands. b is in shared memory, in blocks of 8 columns x 8 inputs of 128 bytes each.
#pragma once

#include "ptx.cuh"

namespace lowbit {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define LOWBIT_WGMMA 1
#else
#define LOWBIT_WGMMA 0
#endif

// The location of b: units of 16 bytes, kAlongInputs and kAlongColumns bytes between blocks. Adding to it moves b.
template <int kAlongInputs, int kAlongColumns>
struct MatrixAt {
  uint32_t low;
  // The address without the block's rank in its cluster. Taken from one lane, so that it may stay in a uniform
  // register.
  __device__ explicit MatrixAt(uint32_t smem)
      : low(__shfl_sync(~0u, smem % (1u << 18) / 16 | kAlongInputs / 16 << 16, 0)) {}
  __device__ uint64_t after(int bytes) const { return uint64_t(kAlongColumns / 16) << 32 | (low + bytes / 16); }
};

// Needed before the first product, and whenever its registers were written since the last one.
__device__ inline void wgmma_fence() {
#if LOWBIT_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ inline void wgmma_commit() {
#if LOWBIT_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Returns when all but the last kPending groups of products are done with their registers and shared memory.
template <int kPending>
__device__ inline void wgmma_wait() {
#if LOWBIT_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Without `add`, c = a * b, whatever c contained.
template <typename T, int kColumns>
__device__ inline void wgmma(float (&c)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add);

#if LOWBIT_WGMMA
// One specialization: kColumns, wgmma's name of T, the numbers of c's kColumns / 2 registers and of the operands after
// them, and c's operands.
#define LOWBIT_WGMMA_OF(T, NAME, COLUMNS, C, AB, ADD, ...)                                                    \
  template <>                                                                                               \
  __device__ inline void wgmma<T, COLUMNS>(float (&c)[COLUMNS / 2], const uint32_t (&a)[4], uint64_t b,       \
                                           bool add) {                                                      \
    asm volatile("{\n.reg .pred add;\nsetp.ne.u32 add, " ADD ", 0;\n"                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME " {" C "}, " AB       \
                 ", add, 1, 1, 0;\n}"                                                                       \
                 : __VA_ARGS__                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(uint32_t(add)));                 \
  }
#define LOWBIT_WGMMA_FOR(COLUMNS, C, AB, ADD, ...)                              \
  LOWBIT_WGMMA_OF(__half, "f16", COLUMNS, C, AB, ADD, __VA_ARGS__)              \
  LOWBIT_WGMMA_OF(__nv_bfloat16, "bf16", COLUMNS, C, AB, ADD, __VA_ARGS__)
#define LOWBIT_C8(i)                                                                                   \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
      "+f"(c[i + 7])
#define LOWBIT_C16(i) LOWBIT_C8(i), LOWBIT_C8(i + 8)
#define LOWBIT_C32(i) LOWBIT_C16(i), LOWBIT_C16(i + 16)
#define LOWBIT_FIRST_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define LOWBIT_FIRST_16 LOWBIT_FIRST_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LOWBIT_FIRST_32 LOWBIT_FIRST_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LOWBIT_FIRST_64                                                                               \
  LOWBIT_FIRST_32                                                                                    \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55" \
  ",%56,%57,%58,%59,%60,%61,%62,%63"
LOWBIT_WGMMA_FOR(16, LOWBIT_FIRST_8, "{%8,%9,%10,%11}, %12", "%13", LOWBIT_C8(0))
LOWBIT_WGMMA_FOR(32, LOWBIT_FIRST_16, "{%16,%17,%18,%19}, %20", "%21", LOWBIT_C16(0))
LOWBIT_WGMMA_FOR(64, LOWBIT_FIRST_32, "{%32,%33,%34,%35}, %36", "%37", LOWBIT_C32(0))
LOWBIT_WGMMA_FOR(128, LOWBIT_FIRST_64, "{%64,%65,%66,%67}, %68", "%69", LOWBIT_C32(0), LOWBIT_C32(32))

#else
template <typename T, int kColumns>
__device__ inline void wgmma(float (&)[kColumns / 2], const uint32_t (&)[4], uint64_t, bool) {}
#endif

}  // namespace lowbit
