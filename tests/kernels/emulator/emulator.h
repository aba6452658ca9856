// The environment of a kernel on a GPU, for g++: included before every source of csrc that the emulator compiles.
//
// Every thread is a fiber, which runs until it waits for others; scheduler.cpp says in which order. What PTX has beside
// CUDA C++ is in the headers of csrc's names (ptx.cuh, wgmma.cuh, ...), which stand in their place.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <cuda_runtime.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

// The running fiber's.
extern uint3 threadIdx, blockIdx;
extern dim3 gridDim, blockDim;

namespace emulator {

constexpr int kLanes = 32, kSlot = 64;  // bytes of a lane's operands, and of its result, at most
using Slots = uint8_t[kLanes][kSlot];

// Ends the process with the message and the place, in blocks and threads, where it happened.
[[noreturn]] void fail(const char* format, ...);

// Calls `combine` once all 32 lanes of the warp have come with their operands; then each takes its result.
using Combine = void (*)(const Slots& in, Slots& out);
void together(const char* operation, const void* in, size_t in_bytes, void* out, size_t out_bytes, Combine combine,
              unsigned lanes = ~0u);

// Waits until `threads` threads of the block have come to its barrier of that number.
void sync(int barrier, int threads);
// Comes to it, without waiting.
void arrive(int barrier, int threads);

void cluster_arrive();
void cluster_wait();
uint32_t cluster_rank();

// Shared memory: the block's own, and any block's of the cluster by the address that kernels compute with.
uint8_t* shared_memory(size_t static_bytes);
uint32_t shared_address(const void* pointer);
uint8_t* shared_at(uint32_t address, size_t bytes);
uint8_t* shared_at(uint32_t address, size_t bytes, uint32_t rank);

// mbarriers, and copies that end at one. A copy lands some time between its start and the end of its barrier's phase,
// by land(what); until then its target holds NaN.
struct Copy {
  uint32_t target, bytes, barrier;
  const uint8_t* source;
  int rows, pitch, row_bytes;  // a box of `rows` rows, of which `row_bytes` are there; pitch 0: a run of bytes
  int box_bytes;               // of a row in the box
  bool swizzled;
};
void barrier_init(uint32_t barrier, int arrivals);
void barrier_arrive(uint32_t barrier, uint32_t bytes);
void barrier_arrive_at(uint32_t barrier, uint32_t rank);
void barrier_wait(uint32_t barrier, uint32_t parity);
void copy(const Copy& copy);
// To the memory of block `rank` of the cluster, whose barrier counts it.
void copy(const Copy& copy, uint32_t rank);
// Writes to the memory of block `rank` of the cluster, whose barrier counts the bytes.
void send(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier, uint32_t rank);
// A thread's own copies of 16 bytes: the target holds NaN until the thread waits for them all.
void copy_mine(uint32_t target, uint4 value);
void wait_for_mine();
// The place of byte `address` of a box with rows of 128 bytes, under the copy engine's 128-byte swizzle.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Products of a warpgroup, the calling lane's share: computed as late as a wait allows. tensor.cpp has the arithmetic.
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bfloat16);
void multiply_bytes(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void multiply_later(float* c, int columns, const uint32_t (&a)[4], uint64_t b, bool add, bool bfloat16);
void multiply_halves_later(float* c, int columns, const uint32_t (&a)[4], uint32_t b, bool add, bool bfloat16);
void multiply_bytes_later(int* c, int columns, const uint32_t (&a)[4], uint32_t b, bool add);
template <typename Operand, typename Sum>
void multiply_shared_later(Sum* c, int columns, uint32_t a, uint32_t b);
void commit_products();
void wait_products(size_t pending);

void wait_for_previous_kernel();

// Runs body(context) in every thread.
cudaError_t launch(const cudaLaunchConfig_t& config, void (*body)(const void*), const void* context);

template <typename... Params, typename... Args>
cudaError_t launch_typed(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Args&... args) {
  const auto call = [&] { kernel(args...); };
  return launch(*config, [](const void* context) { (*static_cast<const decltype(call)*>(context))(); }, &call);
}

// The number at `pointer`, which must be aligned as a GPU's loads need it.
template <typename T>
T load(const void* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T)) fail("%zu bytes are read at %p", sizeof(T), pointer);
  T value;
  memcpy(&value, pointer, sizeof(T));
  return value;
}

}  // namespace emulator

#define cudaLaunchKernelEx emulator::launch_typed
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return bytes <= 227 << 10 ? cudaSuccess : cudaErrorInvalidValue;
}

using std::max;
using std::min;

inline void __syncthreads() { emulator::sync(0, blockDim.x * blockDim.y * blockDim.z); }
inline void __syncwarp() { emulator::together("syncwarp", nullptr, 0, nullptr, 0, [](const auto&, auto&) {}); }
inline void __trap() { emulator::fail("trap"); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  struct Operands {
    T value;
    int from;
  } const in = {value, from};
  T out;
  emulator::together("shfl", &in, sizeof(in), &out, sizeof(out), [](const auto& all, auto& results) {
    for (int lane = 0; lane < emulator::kLanes; ++lane) {
      const int source = emulator::load<Operands>(all[lane]).from % emulator::kLanes;
      memcpy(results[lane], all[source], sizeof(T));
    }
  }, mask);
  return out;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  return __shfl_sync(mask, value, (thread ^ offset) % emulator::kLanes);
}
inline uint32_t __ballot_sync(unsigned, bool value) {
  uint32_t out;
  emulator::together("ballot", &value, 1, &out, sizeof(out), [](const auto& all, auto& results) {
    uint32_t mask = 0;
    for (int lane = 0; lane < emulator::kLanes; ++lane) mask |= uint32_t(all[lane][0] != 0) << lane;
    for (auto& result : results) memcpy(result, &mask, sizeof(mask));
  });
  return out;
}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(uint32_t bits) { return __builtin_ffs(bits); }
inline bool __any_sync(unsigned, bool value) {
  bool out;
  emulator::together("vote", &value, 1, &out, 1, [](const auto& all, auto& results) {
    for (auto& result : results) result[0] = std::any_of(all, all + emulator::kLanes, [](auto& in) { return in[0]; });
  });
  return out;
}

template <typename T>
T __ldg(const T* pointer) { return emulator::load<T>(pointer); }
template <typename T>
T __ldcg(const T* pointer) { return emulator::load<T>(pointer); }

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selectors) {
  const uint64_t bytes = low | uint64_t(high) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> 8 * (selectors >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline float __uint_as_float(uint32_t bits) { return emulator::load<float>(&bits); }
inline float __int_as_float(int bits) { return emulator::load<float>(&bits); }
inline uint32_t __float_as_uint(float value) { return emulator::load<uint32_t>(&value); }
inline int __float_as_int(float value) { return emulator::load<int>(&value); }
inline float __expf(float x) { return expf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const float2 x = __half22float2(a), y = __half22float2(b), z = __half22float2(c);
  return __floats2half2_rn(fmaf(x.x, y.x, z.x), fmaf(x.y, y.y, z.y));
}
