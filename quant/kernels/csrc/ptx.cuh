// PTX instructions used by the kernels, each as a function, and dynamic shared memory.
//
// tests/kernels/emulator replaces this header, and those of wgmma and of tensor maps, on the CPU. Everything that is
// not C++ must stay in these headers.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace lowbit {

// Dynamic shared memory named `name`: an array of T, whose size the launch sets.
#define LOWBIT_SHARED(T, name) __shared__ T name
#define LOWBIT_DYNAMIC_SHARED(T, name) extern __shared__ __align__(128) T name[]

__device__ inline uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Reads 16 bytes that are used once: bypasses L1, which keeps x, and is evicted first from L2, which keeps code.
// Volatile, so that the compiler does not delay it.
__device__ inline uint4 read_once(const uint4* pointer) {
  uint4 value;
#if __CUDA_ARCH__ >= 800
  // The value of createpolicy.fractional.L2::evict_first for 1.0. At run time it costs 4 instructions per chunk.
  constexpr uint64_t policy = 0x12F0000000000000;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(pointer), "l"(policy));
#else
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(pointer));
#endif
  return value;
}

// The same for 8 bytes.
__device__ inline uint2 read_once(const uint2* pointer) {
  uint2 value;
#if __CUDA_ARCH__ >= 800
  constexpr uint64_t policy = 0x12F0000000000000;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v2.u32 {%0,%1}, [%2], %3;"
               : "=r"(value.x), "=r"(value.y)
               : "l"(pointer), "l"(policy));
#else
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(pointer));
#endif
  return value;
}

// Keeps the compiler from computing `pointer` anew, from the kernel's arguments, at each use.
template <typename Value>
__device__ void keep(const Value*& pointer) {
  asm volatile("" : "+l"(pointer));
}

// 16 bytes of global or shared memory, through L1. Volatile for the same reason.
__device__ inline uint4 read_cached(const void* pointer) {
  uint4 value;
  asm volatile("ld.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(pointer)
               : "memory");
  return value;
}

// The same where `condition` is true; else `value` stays. No branch, across which the compiler would order all loads.
__device__ inline void read_cached_if(bool condition, const void* pointer, uint4& value) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.v4.u32 {%0,%1,%2,%3}, [%4];}"
               : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w)
               : "l"(pointer), "r"(static_cast<uint32_t>(condition))
               : "memory");
}

// Access to shared memory by address. Volatile, so that it stays between the waits around it.
template <typename Value>
__device__ inline Value read_shared(uint32_t address);
template <>
__device__ inline uint4 read_shared<uint4>(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}
template <>
__device__ inline uint32_t read_shared<uint32_t>(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
template <>
__device__ inline uint16_t read_shared<uint16_t>(uint32_t address) {
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address) : "memory");
  return value;
}

// Not volatile: the compiler may move it among the arithmetic around it.
__device__ inline uint32_t and_or(uint32_t value, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(value), "r"(mask), "r"(bits));
  return result;
}

// Four codes of e4m3 as two pairs of float16; NaN stays. With CUDA's function the compiler shifts the upper half of a
// word down, which costs half as many instructions again. Older GPUs have no conversion: a code's bits under a half's
// exponent are its value over 256, and those of NaN 480 over 256, the only one that 256 * 146 makes infinite.
__device__ inline void halves_of_e4m3(uint32_t word, uint32_t (&pairs)[2]) {
#if __CUDA_ARCH__ >= 890
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}"
      : "=r"(pairs[0]), "=r"(pairs[1])
      : "r"(word));
#else
  for (int i = 0; i < 2; ++i) {
    const uint32_t bytes = __byte_perm(word, 0, i ? 0x3424 : 0x1404);  // in the upper bytes of halves
    const uint32_t bits = (bytes & 0x80008000u) | (bytes >> 1 & 0x3f803f80u);
    const __half2 part = *reinterpret_cast<const __half2*>(&bits);
    const __half2 none = __hmul2(__hmul2(part, __float2half2_rn(37376.f)), __float2half2_rn(0.f));
    const __half2 value = __hfma2(part, __float2half2_rn(256.f), none);
    pairs[i] = *reinterpret_cast<const uint32_t*>(&value);
  }
#endif
}

// The larger number, or NaN if one is NaN: fmaxf would return the other.
__device__ inline float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// a / b within two units in the last place; b is neither subnormal nor above 2^126.
__device__ inline float divide_fast(float a, float b) {
  float quotient;
  asm("div.approx.f32 %0, %1, %2;" : "=f"(quotient) : "f"(a), "f"(b));
  return quotient;
}

// 2^value; subnormal results become zero.
__device__ inline float exp2_fast(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// c (16 x 8, float32) += a (16 x 16) * b (16 x 8). Each lane's registers are the PTX ISA's fragments of mma.m16n8k16:
// a0 row g, a1 row g + 8, a2 and a3 the same rows eight columns on, with g = lane / 4.
template <typename T>
__device__ inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void mma_16x8x16<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma_16x8x16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c (16 x 8, int32) += a (16 x 32, bytes without a sign) * b (32 x 8, bytes with one): the fragments of mma.m16n8k32.
// a0 is row g, a1 row g + 8, a2 and a3 the same rows sixteen columns on.
__device__ inline void mma_bytes_16x8x32(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Hides a pointer's origin, so that the compiler keeps it in a register instead of computing it anew.
template <typename T>
__device__ inline void hide_origin(T*& pointer) {
  asm volatile("" : "+l"(pointer));
}

// Lets the next kernel of the stream start. Until that kernel waits, it may only touch memory that no running kernel
// writes.
__device__ inline void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the previous kernel has finished and its writes are visible. Returns at once after a plain launch.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline uint32_t cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// A barrier over the cluster's blocks that also orders their shared memory; split into arrive and wait.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

// The same without order: for a block that has only begun.
__device__ inline void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

#if __CUDA_ARCH__ >= 900
// The address of what is at `smem` here in the shared memory of block `rank` of this cluster.
__device__ inline uint32_t cluster_address(uint32_t smem, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(smem), "r"(rank));
  return remote;
}
#endif

// Four floats at `smem` in the shared memory of block `rank` of this cluster.
__device__ inline float4 read_cluster_floats(uint32_t smem, uint32_t rank) {
  float4 value = {};
#if __CUDA_ARCH__ >= 900
  const uint32_t remote = cluster_address(smem, rank);
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(remote)
               : "memory");
#endif
  return value;
}

// The float at `smem` in the shared memory of block `rank` of this cluster.
__device__ inline float read_cluster_float(uint32_t smem, uint32_t rank) {
  float value = 0.f;
#if __CUDA_ARCH__ >= 900
  const uint32_t remote = cluster_address(smem, rank);
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
#endif
  return value;
}

// Writes four floats to `smem` in the shared memory of block `rank` of this cluster, which must have started.
__device__ inline void write_cluster_floats(uint32_t smem, uint32_t rank, float4 value) {
#if __CUDA_ARCH__ >= 900
  const uint32_t remote = cluster_address(smem, rank);
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(remote), "f"(value.x), "f"(value.y),
               "f"(value.z), "f"(value.w)
               : "memory");
#else
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(smem), "f"(value.x), "f"(value.y), "f"(value.z),
               "f"(value.w)
               : "memory");
#endif
}

// The warp's 8 x 8 matrix of halves, transposed: lane l gets columns 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
__device__ inline uint32_t transpose_matrix(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// Barriers in shared memory (mbarrier): a phase ends when `arrivals` threads have arrived and all announced bytes are
// in.
__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes this thread's barrier_init visible to the copy engine.
__device__ inline void fence_barrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

// Returns when the phase with parity `parity` (0 for the first, then 1, 0, ...) has ended.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

// Arrives, and announces `bytes` that copies will bring.
__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}

// Starts a copy of `bytes`, a multiple of 16, of global memory that is read once; its end counts at `barrier`.
__device__ inline void copy_bulk(uint32_t smem, const void* global, uint32_t bytes, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
      "policy;\n}" ::"r"(smem),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

// Starts a copy of 16 bytes of global memory, bypassing L1; wait_for_copies of the same thread waits for it.
__device__ inline void copy_16(uint32_t smem, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem), "l"(global) : "memory");
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Prefetches `bytes`, a multiple of 16, of global memory into L2.
__device__ inline void prefetch_bulk(const void* global, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
#endif
}

// Stores four 8 x 8 matrices of halves to shared memory. Lane l's register i has columns 2 (l % 4) and 2 (l % 4) + 1 of
// row l / 4 of matrix i; the address from lane 8 i + r is that of matrix i's 16-byte row r.
__device__ inline void store_matrices(uint32_t address, const uint4& values) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(values.x),
               "r"(values.y), "r"(values.z), "r"(values.w)
               : "memory");
#endif
}

// Orders this thread's writes to shared memory before reads by the copy engine or the tensor cores.
__device__ inline void fence_async_proxy() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// A barrier for some of the block's warps.
__device__ inline void named_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace lowbit
