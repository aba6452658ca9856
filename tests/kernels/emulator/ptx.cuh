// csrc/ptx.cuh's functions on the CPU.
#pragma once

#include "emulator.h"

#include <cuda_fp8.h>

// Here, behind all standard headers, because they use the name.
#undef __noinline__
#define __noinline__ __attribute__((noinline))

#define LOWBIT_SHARED(T, name) T& name = *reinterpret_cast<T*>(emulator::shared_memory(sizeof(T)))
#define LOWBIT_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emulator::shared_memory(0))

namespace lowbit {

inline uint32_t smem_address(const void* pointer) { return emulator::shared_address(pointer); }
inline uint4 read_once(const uint4* pointer) { return emulator::load<uint4>(pointer); }
inline uint2 read_once(const uint2* pointer) { return emulator::load<uint2>(pointer); }
template <typename Value>
void keep(const Value*& pointer) {}
inline uint4 read_cached(const void* pointer) { return emulator::load<uint4>(pointer); }
inline void read_cached_if(bool condition, const void* pointer, uint4& value) {
  if (condition) value = read_cached(pointer);
}
template <typename Value>
Value read_shared(uint32_t address) {
  return emulator::load<Value>(emulator::shared_at(address, sizeof(Value)));
}
inline uint32_t and_or(uint32_t value, uint32_t mask, uint32_t bits) { return (value & mask) | bits; }
inline void halves_of_e4m3(uint32_t word, uint32_t (&pairs)[2]) {
  for (int i = 0; i < 2; ++i) {
    const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(word >> (16 * i) & 0xffff, __NV_E4M3);
    pairs[i] = pair.x | static_cast<uint32_t>(pair.y) << 16;
  }
}
inline float max_or_nan(float a, float b) { return a != a || b != b ? NAN : fmaxf(a, b); }
inline float exp2_fast(float value) { return exp2f(value); }
inline float divide_fast(float a, float b) { return a / b; }

template <typename T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply(c, a, b0, b1, std::is_same_v<T, __nv_bfloat16>);
}

inline void mma_bytes_16x8x32(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply_bytes(c, a, b0, b1);
}
template <typename T>
void hide_origin(T*&) {}

inline void allow_next_kernel() {}
inline void wait_for_previous_kernel() { emulator::wait_for_previous_kernel(); }
inline uint32_t cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_arrive_relaxed() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
inline float4 read_cluster_floats(uint32_t smem, uint32_t rank) {
  return emulator::load<float4>(emulator::shared_at(smem, 16, rank));
}
inline float read_cluster_float(uint32_t smem, uint32_t rank) {
  return emulator::load<float>(emulator::shared_at(smem, 4, rank));
}
inline void write_cluster_floats(uint32_t smem, uint32_t rank, float4 value) {
  memcpy(emulator::shared_at(smem, 16, rank), &value, 16);
}

inline uint32_t transpose_matrix(uint32_t pair) {
  uint32_t out;
  emulator::together("movmatrix", &pair, 4, &out, 4, [](const auto& in, auto& results) {
    for (int lane = 0; lane < emulator::kLanes; ++lane)
      for (int i = 0; i < 2; ++i) {
        const int row = lane % 4 * 2 + i, column = lane / 4;  // of what comes in
        memcpy(results[lane] + 2 * i, in[row * 4 + column / 2] + column % 2 * 2, 2);
      }
  });
  return out;
}

inline void store_matrices(uint32_t address, const uint4& values) {
  struct Operands {
    uint4 values;
    uint32_t address;
  } const in = {values, address};
  emulator::together("stmatrix", &in, sizeof(in), nullptr, 0, [](const auto& all, auto&) {
    for (int lane = 0; lane < emulator::kLanes; ++lane) {
      const int matrix = lane / 8, row = lane % 8;
      uint8_t* target = emulator::shared_at(reinterpret_cast<const Operands*>(all[lane])->address, 16);
      for (int i = 0; i < 4; ++i) memcpy(target + 4 * i, all[4 * row + i] + 4 * matrix, 4);
    }
  });
}

inline void barrier_init(uint32_t barrier, int arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void fence_barrier_init() {}
inline void fence_async_proxy() {}
inline void barrier_arrive(uint32_t barrier) { emulator::barrier_arrive(barrier, 0); }
inline void barrier_expect(uint32_t barrier, uint32_t bytes) { emulator::barrier_arrive(barrier, bytes); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) { emulator::barrier_wait(barrier, parity); }
inline void copy_bulk(uint32_t smem, const void* global, uint32_t bytes, uint32_t barrier) {
  emulator::copy({smem, bytes, barrier, static_cast<const uint8_t*>(global), 0, 0, 0, 0, false});
}
inline void copy_16(uint32_t smem, const void* global) { emulator::copy_mine(smem, emulator::load<uint4>(global)); }
inline void wait_for_copies() { emulator::wait_for_mine(); }
inline void prefetch_bulk(const void* global, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; i += 16) read_cached(static_cast<const uint8_t*>(global) + i);
}
inline void named_sync(int barrier, int threads) { emulator::sync(barrier, threads); }

}  // namespace lowbit
