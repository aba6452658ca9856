// A deferred RMS norm: fused into the product that computes h and the one that reads it, without a kernel in between:
//
//   rms_norm(h) W^T = ((h * weight) W^T) / deviation,  deviation = sqrt(mean(h^2) + eps)
//
// The first product stores z = h * weight, and for each row the sums of kTileRows adjacent squares. The second product
// uses z as its x, and divides its finished sums. Every sum has a fixed order, so results do not depend on timing or
// launch configuration.
#pragma once

#include "dequant.cuh"
#include "panels.cuh"
#include "wna16_args.cuh"

namespace lowbit {

template <typename T>
constexpr float kLargest = 0.f;
template <>
constexpr float kLargest<__half> = 65504.f;
template <>
constexpr float kLargest<__nv_bfloat16> = 3.38953139e38f;

// h * weight, clamped to T's largest number for a finite h. Infinities and NaN are passed on.
template <typename T>
__device__ T weighted(float h, float weight) {
  const float product = h * weight;
  const bool too_large = fabsf(product) > kLargest<T> && fabsf(h) <= kLargest<T>;
  return from_float<T>(too_large ? copysignf(kLargest<T>, product) : product);
}

// 1 / deviation of the row whose `count` sums of squares, a multiple of 4, are four_at(index). All lanes of the warp
// must call it, and each gets the result.
template <typename FourAt>
__device__ float inverse_deviation(int count, float eps, FourAt four_at) {
  float sum = 0.f;
#pragma unroll 2
  for (int i = threadIdx.x % 32 * 4; i < count; i += 128) {
    const float4 four = four_at(i);
    sum += (four.x + four.y) + (four.z + four.w);
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  return rsqrtf(sum / (count * kTileRows) + eps);
}

// Sum of squares of a row over a tile, and z, from four rows of W in each of four adjacent lanes. Args: DenseArgs.
template <typename T, typename Args>
__device__ void store_deferred(const Args& args, int column, int row, const float (&sums)[4]) {
  const int64_t index = static_cast<int64_t>(column) * args.n + row;
  const uint2 raw = *reinterpret_cast<const uint2*>(static_cast<const T*>(args.next_norm) + row);
  const T* weights = reinterpret_cast<const T*>(&raw);
  alignas(8) T z[4];
  float square = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float h = to_float(from_float<T>(sums[i]));  // rounded as in y
    z[i] = weighted<T>(h, to_float(weights[i]));
    square += h * h;
  }
  *reinterpret_cast<uint2*>(static_cast<T*>(args.z) + index) = *reinterpret_cast<const uint2*>(z);
  const unsigned lanes = 0xfu << (threadIdx.x % 32 / 4 * 4);
  for (int offset = 2; offset > 0; offset /= 2) square += __shfl_xor_sync(lanes, square, offset);
  if (threadIdx.x % 4 == 0) args.squares[index / kTileRows] = square;
}

// Sum of squares of a row over a tile, and z. Rows r and r + 8 of the tile are low and high of 8 adjacent lanes. All
// lanes of a warp must call it; lanes without a row are not `stored`.
template <typename T>
__device__ void store_deferred(const Wna16Args& args, bool stored, int column, int low, float2 sums, float2 weights) {
  const T low_h = from_float<T>(sums.x), high_h = from_float<T>(sums.y);  // rounded as in y
  float square = 0.f;
  if (stored) {
    T* z = static_cast<T*>(args.z) + input_index(args.z_panel, column, args.n, low);
    z[0] = weighted<T>(to_float(low_h), weights.x);
    z[8] = weighted<T>(to_float(high_h), weights.y);
    square = to_float(low_h) * to_float(low_h) + to_float(high_h) * to_float(high_h);
  }
  for (int offset = 4; offset > 0; offset /= 2) square += __shfl_xor_sync(~0u, square, offset);
  if (stored && threadIdx.x % 8 == 0)
    args.squares[static_cast<int64_t>(column) * (args.n / kTileRows) + low / kTileRows] = square;
}

}  // namespace lowbit
