// From float32 sums to y: bias, activation, residual; gate times up; rotary embedding and cache append.
#pragma once

#include "dequant.cuh"
#include "wna16_args.cuh"

namespace lowbit {

__device__ inline float silu(float value) { return divide_fast(value, 1.f + __expf(-value)); }

// Not inlined: eight neighbours need it at once, and most calls have no activation.
static __device__ __noinline__ float activate(Activation activation, float value) {
  switch (activation) {
    case Activation::gelu: return 0.5f * value * (1.f + erff(value * 0.70710678f));
    case Activation::gelu_tanh:
      return 0.5f * value * (1.f + tanhf(0.79788456f * (value + 0.044715f * value * value * value)));
    case Activation::quick_gelu: return value / (1.f + __expf(-1.702f * value));
    default: return value;
  }
}

// kWidth adjacent numbers: 1, or 4 halves in one 8-byte access if `vectors` allows it.
template <typename T, int kWidth>
__device__ void add_halves(const void* values, int64_t index, bool vectors, int count, float (&sums)[kWidth]) {
  if (values == nullptr) return;
  const T* first = static_cast<const T*>(values) + index;
  alignas(8) T loaded[kWidth];
  if (kWidth == 4 && vectors) *reinterpret_cast<uint2*>(loaded) = *reinterpret_cast<const uint2*>(first);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (!(kWidth == 4 && vectors) && i < count) loaded[i] = first[i];
    if (i < count) sums[i] += to_float(loaded[i]);
  }
}

template <typename T, int kWidth>
__device__ void store_halves(void* values, int64_t index, bool vectors, int count, const float (&sums)[kWidth]) {
  T* first = static_cast<T*>(values) + index;
  alignas(8) T rounded[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) rounded[i] = from_float<T>(sums[i]);
  if (kWidth == 4 && vectors) {
    *reinterpret_cast<uint2*>(first) = *reinterpret_cast<const uint2*>(rounded);
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    if (i < count) first[i] = rounded[i];
}

// One column of y's sums for kWidth adjacent rows of W from `low` on, and kWidth from `high` on, which share lanes.
template <int kWidth>
struct Pairs {
  int low, high, column;
  bool vectors;  // rows start at multiples of 16 bytes, in bias, residual and y
  float low_sums[kWidth], high_sums[kWidth];
};

// y of row `column` of x and kWidth rows of W from `row` on. Args: Wna16Args or DenseArgs.
template <typename T, int kWidth, typename Args>
__device__ void store_rows(const Args& args, int column, int row, bool vectors, float (&sums)[kWidth]) {
  const int count = min(args.n - row, kWidth);
  if (count <= 0) return;
  add_halves<T>(args.bias, row, vectors, count, sums);
  if (args.activation != Activation::none) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[i] = activate(args.activation, sums[i]);
  }
  const int64_t index = static_cast<int64_t>(column) * args.n + row;
  add_halves<T>(args.residual, index, vectors, count, sums);
  if (!args.float32_out) return store_halves<T>(args.y, index, vectors, count, sums);
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    if (i < count) static_cast<float*>(args.y)[index + i] = sums[i];
}

// silu(gate) * up; the gate's rows are the lower half of W.
template <typename T, int kWidth, typename Args>
__device__ void store_gated(const Args& args, Pairs<kWidth>& pairs) {
  add_halves<T>(args.bias, pairs.low, pairs.vectors, kWidth, pairs.low_sums);
  add_halves<T>(args.bias, pairs.high, pairs.vectors, kWidth, pairs.high_sums);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) pairs.low_sums[i] = silu(pairs.low_sums[i]) * pairs.high_sums[i];
  const int64_t index = static_cast<int64_t>(pairs.column) * (args.n / 2) + pairs.low;
  store_halves<T>(args.y, index, pairs.vectors, kWidth, pairs.low_sums);
}

// Rotates q and k by their position, and writes q to y, k and v to the caches. Heads of W: q, then k, then v.
template <typename T, int kWidth, typename Args>
__device__ void store_rotated(const Args& args, Pairs<kWidth>& pairs) {
  add_halves<T>(args.bias, pairs.low, pairs.vectors, kWidth, pairs.low_sums);
  add_halves<T>(args.bias, pairs.high, pairs.vectors, kWidth, pairs.high_sums);
  const int head = pairs.low / args.pair_block;
  const int half = args.pair_block / 2;
  const int d = pairs.low % args.pair_block;
  if (head < args.q_heads + args.kv_heads) {
    const int64_t angle = args.positions[pairs.column] * half + d;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float cosine = args.cosines[angle + i], sine = args.sines[angle + i];
      const float low = pairs.low_sums[i] * cosine - pairs.high_sums[i] * sine;
      pairs.high_sums[i] = pairs.high_sums[i] * cosine + pairs.low_sums[i] * sine;
      pairs.low_sums[i] = low;
    }
  }
  void* target = args.y;
  int64_t first = (static_cast<int64_t>(pairs.column) * args.q_heads + head) * args.pair_block;
  if (head >= args.q_heads) {
    const int kv_head = (head - args.q_heads) % args.kv_heads;
    target = head < args.q_heads + args.kv_heads ? args.k_cache : args.v_cache;
    first = (args.slots[pairs.column] * args.kv_heads + kv_head) * args.pair_block;
  }
  store_halves<T>(target, first + d, pairs.vectors, kWidth, pairs.low_sums);
  store_halves<T>(target, first + d + half, pairs.vectors, kWidth, pairs.high_sums);
}

template <typename T, int kWidth>
__device__ void store_pairs(const Wna16Args& args, Pairs<kWidth>& pairs) {
  if (args.positions != nullptr) return store_rotated<T>(args, pairs);
  if (args.activation == Activation::silu_mul) return store_gated<T>(args, pairs);
  store_rows<T>(args, pairs.column, pairs.low, pairs.vectors, pairs.low_sums);
  store_rows<T>(args, pairs.column, pairs.high, pairs.vectors, pairs.high_sums);
}

// Stores results of `group_tiles` tiles of this group, blockIdx.y, in columns [begin, end) of y: one column per warp,
// kWidth pairs of rows per lane. sum_of(column of y, row of the group) returns a finished sum.
template <typename T, int kWidth, typename SumOf>
__device__ void store_group(const Wna16Args& args, int group_tiles, int begin, int end, int warp, int warps,
                            SumOf sum_of) {
  const int block_tiles = args.pair_block / kTileRows;
  for (int first = 0; first < group_tiles * 8; first += 32 * kWidth) {
    const int pair = first + threadIdx.x % 32 * kWidth;
    const int tile = blockIdx.y * group_tiles + pair / 8;
    if (pair >= group_tiles * 8 || tile >= args.tiles) continue;
    Pairs<kWidth> pairs;
    pairs.low = tile / block_tiles * args.pair_block + tile % block_tiles * 8 + pair % 8;
    pairs.high = pairs.low + args.pair_block / 2;
    pairs.vectors = args.vectors;
    const int row = pair / 8 * kTileRows + pair % 8;
    for (int column = begin + warp; column < end; column += warps) {
      pairs.column = column;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        pairs.low_sums[i] = sum_of(column, row + i);
        pairs.high_sums[i] = sum_of(column, row + i + 8);
      }
      store_pairs<T>(args, pairs);
    }
  }
}

}  // namespace lowbit
