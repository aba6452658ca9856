// The heads of new tokens: their norm and rotation, and the codes in which a cache holds them. A head has the same bits
// in every kernel and place: products that are added up are fmaf by name, since the compiler may round the same
// expression once in one place and twice in another.
#pragma once

#include <type_traits>

#include "cache_codes.cuh"
#include "declare.cuh"
#include "dequant.cuh"

namespace lowbit {

// One layer's keys and values: (slots, kv_heads, head_dim) of some number type, slots or heads behind one another.
struct KvCache {
  LOWBIT_STRUCT(KvCache);
  FIELD(void*, k);
  FIELD(void*, v);
  FIELD(void*, k_scales);  // (slots, kv_heads) in T, or (kv_heads) float32, or null: see cache_codes.cuh
  FIELD(void*, v_scales);
  FIELD(int, kv_heads);
  FIELD(int, head_dim);
  FIELD(int, slot_step);   // heads from a slot to the next: kv_heads, or 1
  FIELD(int, head_step);   // from a head of a slot to the next: 1, or slots

  __device__ int64_t index_of(int64_t slot, int kv_head) const {
    return slot * slot_step + static_cast<int64_t>(kv_head) * head_step;
  }
};

// The heads of new tokens. All but qkv must not be written by a kernel that the reader may overlap.
struct NewHeadsArgs {
  LOWBIT_STRUCT(NewHeadsArgs);
  FIELD(const void*, qkv);           // (m, heads + 2 kv_heads, head_dim)
  FIELD(const int64_t*, positions);  // (m) in the tables
  FIELD(const float*, cosines);      // (positions, head_dim / 2)
  FIELD(const float*, sines);
  FIELD(const void*, q_norm);        // (head_dim) or null
  FIELD(const void*, k_norm);
  FIELD(bool, v_normed);             // an RMS norm without a weight on heads of v
  FIELD(float, norm_eps);
};

namespace {

constexpr float kInt8Limit = 127.f, kInt4Limit = 8.f;

// The sum over `lanes` adjacent lanes, a power of two.
__device__ inline float lanes_sum(float value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value = max_or_nan(value, __shfl_xor_sync(~0u, value, offset));
  return value;
}

// A head in a warp: a lane's pair i has inputs j and j + head_dim / 2, with j = lane + 32 i.
template <int kPairs>
struct Head {
  float low[kPairs] = {}, high[kPairs] = {};

  __device__ static Head ones() {
    Head head;
    for (int i = 0; i < kPairs; ++i) head.low[i] = head.high[i] = 1.f;
    return head;
  }

  template <typename T>
  __device__ void read(const T* source, int half, int lane) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int j = lane + 32 * i;
      if (j >= half) break;
      low[i] = to_float(source[j]);
      high[i] = to_float(source[j + half]);
    }
  }
};

// A lane's cosines (low) and sines (high) of a row.
template <int kPairs>
__device__ Head<kPairs> read_turns(const NewHeadsArgs& args, int row, int half, int lane) {
  Head<kPairs> turns;
  const int64_t first = args.positions[row] * half;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int j = lane + 32 * i;
    if (j >= half) break;
    turns.low[i] = args.cosines[first + j];
    turns.high[i] = args.sines[first + j];
  }
  return turns;
}

// A lane's part of a head's sum of squares.
template <int kPairs>
__device__ float squares_of(const Head<kPairs>& head) {
  float sum = 0.f;
  for (int i = 0; i < kPairs; ++i) sum = fmaf(head.low[i], head.low[i], fmaf(head.high[i], head.high[i], sum));
  return sum;
}

// The RMS norm of a head, whose weight the lane has, and whose squares sum up to `squares`.
template <int kPairs>
__device__ void norm_head(Head<kPairs>& head, const Head<kPairs>& weight, float squares, float eps, int half) {
  const float factor = rsqrtf(squares / (2 * half) + eps);
  for (int i = 0; i < kPairs; ++i) {
    head.low[i] *= factor * weight.low[i];
    head.high[i] *= factor * weight.high[i];
  }
}

template <int kPairs>
__device__ void rotate_head(Head<kPairs>& head, const Head<kPairs>& turns) {
  for (int i = 0; i < kPairs; ++i) {
    const float low = fmaf(head.low[i], turns.low[i], -head.high[i] * turns.high[i]);
    head.high[i] = fmaf(head.high[i], turns.low[i], head.low[i] * turns.high[i]);
    head.low[i] = low;
  }
}

// A head times the Hadamard matrix of its width, a power of two from 64 on, over its square root.
template <int kPairs>
__device__ void turn_head(Head<kPairs>& head, int half, int lane) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    for (int i = 0; i < kPairs; ++i) {
      const float low = __shfl_xor_sync(~0u, head.low[i], offset), high = __shfl_xor_sync(~0u, head.high[i], offset);
      head.low[i] = lane & offset ? low - head.low[i] : low + head.low[i];
      head.high[i] = lane & offset ? high - head.high[i] : high + head.high[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const float low = head.low[i], high = head.high[i];
    head.low[i] = low + high, head.high[i] = low - high;
  }
#pragma unroll
  for (int step = 1; step < kPairs; step *= 2) {
    if (32 * step >= half) break;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (i & step) continue;
      const float low = head.low[i], high = head.high[i];
      head.low[i] += head.low[i + step], head.low[i + step] = low - head.low[i + step];
      head.high[i] += head.high[i + step], head.high[i + step] = high - head.high[i + step];
    }
  }
  const float factor = rsqrtf(2.f * half);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) head.low[i] *= factor, head.high[i] *= factor;
}

template <typename Target, int kPairs, typename Convert>
__device__ void store_head(const Head<kPairs>& head, Target* target, int half, int lane, Convert convert) {
  for (int i = 0; i < kPairs; ++i) {
    const int j = lane + 32 * i;
    if (j >= half) break;
    target[j] = convert(head.low[i]);
    target[j + half] = convert(head.high[i]);
  }
}

// The place of a token's head in the cache: its elements and, per token and head, its scale.
struct Place {
  void* values;
  void* scales;
  int64_t index;  // of the token and head
  int kv_head;
};

template <typename T, int kPairs>
__device__ void store_codes(SameCache, const Head<kPairs>& head, const Place& place, int half, int lane) {
  T* target = static_cast<T*>(place.values) + place.index * 2 * half;
  store_head(head, target, half, lane, [](float value) { return from_float<T>(value); });
}

// Stores a scale rounded to T and kept within T's normal range, and returns it. NaN stays.
template <typename T>
__device__ float store_scale(float scale, const Place& place, int lane) {
  constexpr float kTiny = std::is_same_v<T, __half> ? 6.103515625e-05f : 1.17549435e-38f;
  const T stored = from_float<T>(copysignf(max_or_nan(fabsf(scale), kTiny), scale));
  if (lane == 0) static_cast<T*>(place.scales)[place.index] = stored;
  return to_float(stored);
}

// By absmax / 127; NaN if an input is NaN.
template <typename T, int kPairs>
__device__ void store_codes(Int8Cache, const Head<kPairs>& head, const Place& place, int half, int lane) {
  float largest = 0.f;
  for (int i = 0; i < kPairs; ++i) largest = max_or_nan(largest, max_or_nan(fabsf(head.low[i]), fabsf(head.high[i])));
  const float divisor = store_scale<T>(warp_max(largest) / kInt8Limit, place, lane);
  store_head(head, static_cast<int8_t*>(place.values) + place.index * 2 * half, half, lane, [divisor](float value) {
    return static_cast<int8_t>(fminf(fmaxf(rintf(value / divisor), -kInt8Limit), kInt8Limit));
  });
}

// By the head's scale; beyond 448 of it clamped, NaN stays.
template <typename T, int kPairs>
__device__ void store_codes(Fp8Cache, const Head<kPairs>& head, const Place& place, int half, int lane) {
  const float divisor = static_cast<const float*>(place.scales)[place.kv_head];
  store_head(head, static_cast<uint8_t*>(place.values) + place.index * 2 * half, half, lane, [divisor](float value) {
    return static_cast<uint8_t>(__nv_cvt_float_to_fp8(value / divisor, __NV_SATFINITE, __NV_E4M3));
  });
}

// The codes of one half of a head: 8 lanes have the elements of a word.
template <int kPairs>
__device__ void store_nibbles(const float (&values)[kPairs], float divisor, uint32_t* target, int half,
                                     int lane) {
  for (int i = 0; i < kPairs; ++i) {
    if (32 * i >= half) break;
    const float code = fminf(fmaxf(rintf(values[i] / divisor), -kInt4Limit), kInt4Limit - 1.f);
    uint32_t word = static_cast<uint32_t>(static_cast<int>(code + kInt4Limit)) << Int4Cache::shift_of(lane % 8);
    for (int offset = 1; offset < 8; offset *= 2) word |= __shfl_xor_sync(~0u, word, offset);
    if (lane % 8 == 0) target[4 * i + lane / 8] = word;
  }
}

// By the number of largest magnitude over -8; NaN if an input is NaN.
template <typename T, int kPairs>
__device__ void store_codes(Int4Cache, const Head<kPairs>& head, const Place& place, int half, int lane) {
  float most = -INFINITY, least = -INFINITY;  // of the head, and of the head times -1
  for (int i = 0; i < kPairs; ++i) {
    if (32 * i >= half) break;
    most = max_or_nan(most, max_or_nan(head.low[i], head.high[i]));
    least = max_or_nan(least, max_or_nan(-head.low[i], -head.high[i]));
  }
  most = warp_max(most), least = warp_max(least);
  const float divisor = store_scale<T>((most >= least ? most : -least) / -kInt4Limit, place, lane);
  uint32_t* words = static_cast<uint32_t*>(place.values) + place.index * (half / 4);
  store_nibbles(head.low, divisor, words, half, lane);
  store_nibbles(head.high, divisor, words + half / 8, half, lane);
}

// Norm and rotation of a head of q or k, whose squares sum up to `squares`.
template <typename Codes, int kPairs>
__device__ void finish_head(Head<kPairs>& head, bool normed, const Head<kPairs>& weight, float squares, float eps,
                            const Head<kPairs>& turns, int half, int lane) {
  if (normed) norm_head(head, weight, squares, eps, half);
  rotate_head(head, turns);
  if (Codes::kRotated) turn_head(head, half, lane);
}

}  // namespace

}  // namespace lowbit
