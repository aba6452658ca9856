// wgmma with both operands in shared memory (sm_90a): c (64 x kColumns) += a (64 rows) * b (kColumns rows), with 32
// bytes per row: 32 inputs of int8 and int32 sums, 32 of e4m3 and float32 sums, or 16 halves and float32 sums.
//
// Operands have the layout of the copy engine's boxes of 128 bytes per row with 128-byte swizzle: eight rows (1024
// bytes) form an atom, atoms follow each other. c is as in wgmma.cuh: warp w of the four has rows 16 w to 16 w + 15, as
// kColumns / 8 of mma.m16n8's C operands.
#pragma once

#include <cuda_fp8.h>

#include "wgmma.cuh"

namespace lowbit {

// The type of the sums for an operand's type.
template <typename Operand>
struct SumOf {
  using Type = float;
};
template <>
struct SumOf<int8_t> {
  using Type = int;
};

// The location of an operand. Adding to it moves along its inputs, within the 128 bytes of a row.
struct SwizzledAt {
  uint32_t low;
  // The address without the block's rank in its cluster. Taken from one lane, so that it may stay in a uniform
  // register.
  __device__ explicit SwizzledAt(uint32_t smem) : low(__shfl_sync(~0u, smem % (1u << 18) / 16 | 1u << 16, 0)) {}
  __device__ uint64_t after(int bytes) const { return uint64_t(1u << 30 | 1024 / 16) << 32 | (low + bytes / 16); }
};

template <typename Operand, int kColumns>
__device__ inline void wgmma_shared(typename SumOf<Operand>::Type (&c)[kColumns / 2], uint64_t a, uint64_t b);

// The same for int8 with the left operand in registers, as fragments of mma.m16n8k32: row g, row g + 8, and both again
// 16 inputs on. Without `add`, c = a * b, whatever c contained.
template <int kColumns>
__device__ inline void wgmma_bytes(int (&c)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add);

#if LOWBIT_WGMMA
// One specialization: kColumns, wgmma's name of the types, the numbers of c's kColumns / 2 registers and of the
// operands after them, the end of the instruction, and c's operands.
#define LOWBIT_WGMMA_SHARED(OPERAND, NAME, COLUMNS, C, AB, END, ...)                                              \
  template <>                                                                                                     \
  __device__ inline void wgmma_shared<OPERAND, COLUMNS>(typename SumOf<OPERAND>::Type (&c)[COLUMNS / 2],          \
                                                        uint64_t a, uint64_t b) {                                 \
    asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS NAME " {" C "}, " AB ", add" END ";\n}"             \
                 : __VA_ARGS__                                                                                    \
                 : "l"(a), "l"(b));                                                                               \
  }
#define LOWBIT_WGMMA_BYTES(COLUMNS, C, AB, ...) \
  LOWBIT_WGMMA_SHARED(int8_t, "k32.s32.s8.s8", COLUMNS, C, AB, "", __VA_ARGS__)
#define LOWBIT_WGMMA_FLOATS(COLUMNS, C, AB, ...) \
  LOWBIT_WGMMA_SHARED(__nv_fp8_e4m3, "k32.f32.e4m3.e4m3", COLUMNS, C, AB, ", 1, 1", __VA_ARGS__)
#define LOWBIT_WGMMA_HALVES(COLUMNS, C, AB, ...)                                                            \
  LOWBIT_WGMMA_SHARED(__half, "k16.f32.f16.f16", COLUMNS, C, AB, ", 1, 1, 0, 0", __VA_ARGS__)               \
  LOWBIT_WGMMA_SHARED(__nv_bfloat16, "k16.f32.bf16.bf16", COLUMNS, C, AB, ", 1, 1, 0, 0", __VA_ARGS__)
#define LOWBIT_I4(i) "+r"(c[i]), "+r"(c[i + 1]), "+r"(c[i + 2]), "+r"(c[i + 3])
#define LOWBIT_I8(i) LOWBIT_I4(i), LOWBIT_I4(i + 4)
#define LOWBIT_I16(i) LOWBIT_I8(i), LOWBIT_I8(i + 8)
#define LOWBIT_I32(i) LOWBIT_I16(i), LOWBIT_I16(i + 16)
#define LOWBIT_FIRST_4 "%0,%1,%2,%3"
#define LOWBIT_NEXT_32                                                                                          \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
  "%59,%60,%61,%62,%63"
LOWBIT_WGMMA_BYTES(8, LOWBIT_FIRST_4, "%4, %5", LOWBIT_I4(0))
LOWBIT_WGMMA_BYTES(16, LOWBIT_FIRST_8, "%8, %9", LOWBIT_I8(0))
LOWBIT_WGMMA_BYTES(32, LOWBIT_FIRST_16, "%16, %17", LOWBIT_I16(0))
LOWBIT_WGMMA_BYTES(64, LOWBIT_FIRST_32, "%32, %33", LOWBIT_I32(0))
LOWBIT_WGMMA_BYTES(128, LOWBIT_FIRST_32 LOWBIT_NEXT_32, "%64, %65", LOWBIT_I32(0), LOWBIT_I32(32))
LOWBIT_WGMMA_FLOATS(8, LOWBIT_FIRST_4, "%4, %5", "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]))
LOWBIT_WGMMA_FLOATS(16, LOWBIT_FIRST_8, "%8, %9", LOWBIT_C8(0))
LOWBIT_WGMMA_FLOATS(32, LOWBIT_FIRST_16, "%16, %17", LOWBIT_C16(0))
LOWBIT_WGMMA_FLOATS(64, LOWBIT_FIRST_32, "%32, %33", LOWBIT_C32(0))
LOWBIT_WGMMA_FLOATS(128, LOWBIT_FIRST_32 LOWBIT_NEXT_32, "%64, %65", LOWBIT_C32(0), LOWBIT_C32(32))
LOWBIT_WGMMA_HALVES(8, LOWBIT_FIRST_4, "%4, %5", "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]))
LOWBIT_WGMMA_HALVES(16, LOWBIT_FIRST_8, "%8, %9", LOWBIT_C8(0))
LOWBIT_WGMMA_HALVES(32, LOWBIT_FIRST_16, "%16, %17", LOWBIT_C16(0))
LOWBIT_WGMMA_HALVES(64, LOWBIT_FIRST_32, "%32, %33", LOWBIT_C16(0), LOWBIT_C16(16))

#define LOWBIT_WGMMA_LEFT(COLUMNS, C, AB, ADD, ...)                                                                 \
  template <>                                                                                                       \
  __device__ inline void wgmma_bytes<COLUMNS>(int (&c)[COLUMNS / 2], const uint32_t (&a)[4], uint64_t b, bool add) { \
    asm volatile("{\n.reg .pred add;\nsetp.ne.u32 add, " ADD ", 0;\n"                                               \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k32.s32.s8.s8 {" C "}, " AB ", add;\n}"               \
                 : __VA_ARGS__                                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(uint32_t(add)));                         \
  }
LOWBIT_WGMMA_LEFT(8, LOWBIT_FIRST_4, "{%4,%5,%6,%7}, %8", "%9", LOWBIT_I4(0))
LOWBIT_WGMMA_LEFT(16, LOWBIT_FIRST_8, "{%8,%9,%10,%11}, %12", "%13", LOWBIT_I8(0))
LOWBIT_WGMMA_LEFT(32, LOWBIT_FIRST_16, "{%16,%17,%18,%19}, %20", "%21", LOWBIT_I16(0))
LOWBIT_WGMMA_LEFT(64, LOWBIT_FIRST_32, "{%32,%33,%34,%35}, %36", "%37", LOWBIT_I32(0))
#else
template <int kColumns>
__device__ inline void wgmma_bytes(int (&)[kColumns / 2], const uint32_t (&)[4], uint64_t, bool) {}
template <typename Operand, int kColumns>
__device__ inline void wgmma_shared(typename SumOf<Operand>::Type (&)[kColumns / 2], uint64_t, uint64_t) {}
#endif

}  // namespace lowbit
