// Arguments of decode attention and of the cache append before it. quant/kernels/decode_attention.py describes the
// tensors; all are contiguous, T is half precision.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

namespace lowbit {

// One layer's keys and values: (slots, kv_heads, head_dim) in T, or int8 with scales (slots, kv_heads) in T.
struct KvCache {
  void* k;
  void* v;
  void* k_scales;  // null: k and v are T
  void* v_scales;
  int kv_heads, head_dim;
};

struct AppendHeadsArgs {
  const void* qkv;           // (m, heads + 2 kv_heads, head_dim)
  const int64_t* positions;  // (m)
  const int64_t* slots;      // (m)
  const float* cosines;      // (positions, head_dim / 2)
  const float* sines;
  const void* q_norm;        // (head_dim) or null
  const void* k_norm;
  void* q;                   // (m, heads, head_dim)
  KvCache cache;
  int m, heads;
  float norm_eps;
};

// Positions of a sequence before its last m must not be written by a kernel that this one may overlap.
struct DecodeAttentionArgs {
  const void* q;             // (m, heads, head_dim)
  const int64_t* starts;     // (m) slot of position 0
  const int64_t* positions;  // (m)
  void* out;                 // (m, heads, head_dim)
  KvCache cache;
  int m, heads;
  float scale, softcap;      // softcap 0: none
  int window;                // 0: none
};

struct DecodeAttentionLaunch {
  int device;
  int splits;      // blocks of a cluster that share a sequence; more than 1 needs sm_90
  bool dependent;  // launched with programmatic dependent launch
};

template <typename T>
cudaError_t launch_append_heads(const AppendHeadsArgs& args, int device, bool dependent, cudaStream_t stream);

template <typename T>
cudaError_t launch_decode_attention(const DecodeAttentionArgs& args, const DecodeAttentionLaunch& launch,
                                    cudaStream_t stream);

}  // namespace lowbit
