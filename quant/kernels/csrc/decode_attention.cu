// Compiled once per T: LOWBIT_T comes from setup.py.
//
// Attention of few tokens over a long cache is a read of the cache. A block serves one token and one key head, for all
// query heads that share it, so keys and values are read once. Its threads are cut into streams of as many lanes as a
// head has vectors of 8; each stream runs its own online softmax over every kStreams-th position, so nothing is
// exchanged inside the loop but the sum of a score. Streams meet in shared memory, blocks of a cluster in each other's,
// both by the log-sum-exp rule and in a fixed order: the same input gives the same bits, without atomics.
//
// FlashDecoding++'s unified maximum would save the running one, but overflows where a score strays from its guess.
#include <type_traits>

#include "decode_attention.cuh"
#include "dequant.cuh"

namespace lowbit {
namespace {

constexpr int kThreads = 128;
constexpr int kVector = 8;              // elements of a head that a lane has
constexpr int kMostSplits = 8;          // a cluster that fits everywhere
constexpr float kNothing = -1e30f;      // a maximum that any score exceeds; finite, so that differences are
constexpr float kLog2E = 1.44269504f;
constexpr float kInt8Limit = 127.f;

__device__ inline float exp2_fast(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

__device__ inline float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
  return value;
}

// ---- append ----

constexpr int kPairs = 4;  // that a lane has: heads are at most 256 wide

// A head as a warp holds it: lane's pair i is inputs j and j + head_dim / 2, j = lane + 32 i.
struct Head {
  float low[kPairs], high[kPairs];
};

template <typename T>
__device__ void norm_head(Head& head, const void* weight, float eps, int half, int lane) {
  if (weight == nullptr) return;
  float sum = 0.f;
  for (int i = 0; i < kPairs; ++i) sum += head.low[i] * head.low[i] + head.high[i] * head.high[i];
  const float factor = rsqrtf(warp_sum(sum) / (2 * half) + eps);
  for (int i = 0; i < kPairs; ++i) {
    const int j = lane + 32 * i;
    if (j >= half) break;
    head.low[i] *= factor * to_float(static_cast<const T*>(weight)[j]);
    head.high[i] *= factor * to_float(static_cast<const T*>(weight)[j + half]);
  }
}

__device__ inline void rotate_head(Head& head, const AppendHeadsArgs& args, int64_t position, int half, int lane) {
  for (int i = 0; i < kPairs; ++i) {
    const int j = lane + 32 * i;
    if (j >= half) break;
    const float cosine = args.cosines[position * half + j], sine = args.sines[position * half + j];
    const float low = head.low[i] * cosine - head.high[i] * sine;
    head.high[i] = head.high[i] * cosine + head.low[i] * sine;
    head.low[i] = low;
  }
}

template <typename Target, typename Convert>
__device__ void store_head(const Head& head, Target* target, int half, int lane, Convert convert) {
  for (int i = 0; i < kPairs; ++i) {
    const int j = lane + 32 * i;
    if (j >= half) break;
    target[j] = convert(head.low[i]);
    target[j + half] = convert(head.high[i]);
  }
}

// The head as int8, by absmax / 127 rounded to T and kept in T's normal range.
template <typename T>
__device__ void store_int8(const Head& head, int8_t* target, T* scale, int half, int lane) {
  float largest = 0.f;
  for (int i = 0; i < kPairs; ++i) largest = fmaxf(largest, fmaxf(fabsf(head.low[i]), fabsf(head.high[i])));
  constexpr float kTiny = std::is_same_v<T, __half> ? 6.103515625e-05f : 1.17549435e-38f;
  const T stored = from_float<T>(fmaxf(warp_max(largest) / kInt8Limit, kTiny));
  const float divisor = to_float(stored);
  if (lane == 0) *scale = stored;
  store_head(head, target, half, lane, [divisor](float value) {
    return static_cast<int8_t>(fminf(fmaxf(rintf(value / divisor), -kInt8Limit), kInt8Limit));
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) append_heads_kernel(const __grid_constant__ AppendHeadsArgs args) {
  const KvCache& cache = args.cache;
  const int lane = threadIdx.x % 32, half = cache.head_dim / 2;
  const int heads = args.heads + 2 * cache.kv_heads;
  const int unit = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  const int row = unit / heads, index = unit % heads;
  allow_next_kernel();
  wait_for_previous_kernel();
  if (row >= args.m) return;
  const T* source = static_cast<const T*>(args.qkv) + static_cast<int64_t>(unit) * cache.head_dim;
  Head head = {};
  for (int i = 0; i < kPairs; ++i) {
    const int j = lane + 32 * i;
    if (j >= half) break;
    head.low[i] = to_float(source[j]);
    head.high[i] = to_float(source[j + half]);
  }
  const bool is_q = index < args.heads, is_k = !is_q && index < args.heads + cache.kv_heads;
  if (is_q || is_k) {
    norm_head<T>(head, is_q ? args.q_norm : args.k_norm, args.norm_eps, half, lane);
    rotate_head(head, args, args.positions[row], half, lane);
  }
  const auto rounded = [](float value) { return from_float<T>(value); };
  if (is_q) {
    T* q = static_cast<T*>(args.q) + (static_cast<int64_t>(row) * args.heads + index) * cache.head_dim;
    return store_head(head, q, half, lane, rounded);
  }
  const int64_t place = args.slots[row] * cache.kv_heads + (index - args.heads) % cache.kv_heads;
  void* values = is_k ? cache.k : cache.v;
  if (cache.k_scales == nullptr)
    return store_head(head, static_cast<T*>(values) + place * cache.head_dim, half, lane, rounded);
  T* scales = static_cast<T*>(is_k ? cache.k_scales : cache.v_scales);
  store_int8(head, static_cast<int8_t*>(values) + place * cache.head_dim, scales + place, half, lane);
}

// ---- attention ----

template <typename T_, bool kInt8_, int kLanes_, int kHeads_>
struct Shape {
  using T = T_;
  static constexpr bool kInt8 = kInt8_;
  static constexpr int kLanes = kLanes_;  // that share a position
  static constexpr int kHeads = kHeads_;  // query heads of the block
  static constexpr int kDim = kLanes * kVector;
  static constexpr int kStreams = kThreads / kLanes;
  static constexpr int kTokens = kHeads <= 2 ? 8 : 4;  // positions of a stream that are read together
  static constexpr bool kAhead = kHeads <= 2;          // the next ones are read before these are used
  using Raw = std::conditional_t<kInt8, uint2, uint4>;
};

// A lane's 8 elements as float32.
template <typename T>
__device__ void widen(const uint4& raw, float (&values)[kVector]) {
  const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = to_float(elements[i]);
}

// Bytes under the exponent of 2^23: 0x4b000000 | u is 8388608 + u, and u is the code + 128.
template <typename T>
__device__ void widen(const uint2& raw, float (&values)[kVector]) {
  const uint32_t words[2] = {raw.x ^ 0x80808080u, raw.y ^ 0x80808080u};
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    values[i] = __uint_as_float(__byte_perm(words[i / 4], 0x4b000000u, 0x7440 + i % 4)) - 8388736.f;
}

// What a stream has summed: weights relative to 2^maximum.
template <typename S>
struct Running {
  float maximum[S::kHeads], sum[S::kHeads], out[S::kHeads][kVector];
};

// A tile of positions in registers: kTokens of them, `step` apart.
template <typename S>
struct Tile {
  typename S::Raw k[S::kTokens], v[S::kTokens];
  float k_scales[S::kTokens], v_scales[S::kTokens];

  __device__ void read(const KvCache& cache, int64_t start, int token, int end, int head, int lane) {
    using T = typename S::T;
    const bool active = lane * kVector < cache.head_dim;
#pragma unroll
    for (int u = 0; u < S::kTokens; ++u) {
      const int offset = u * S::kStreams;
      const int64_t place = (start + token + offset) * cache.kv_heads + head;
      const int64_t element = place * cache.head_dim + lane * kVector;
      constexpr int kBytes = S::kInt8 ? 1 : 2;
      const bool inside = token + offset < end;
      k[u] = v[u] = typename S::Raw{};
      if (inside && active) {
        k[u] = __ldcg(reinterpret_cast<const typename S::Raw*>(static_cast<const char*>(cache.k) + element * kBytes));
        v[u] = __ldcg(reinterpret_cast<const typename S::Raw*>(static_cast<const char*>(cache.v) + element * kBytes));
      }
      if (S::kInt8 && inside) {
        k_scales[u] = to_float(static_cast<const T*>(cache.k_scales)[place]);
        v_scales[u] = to_float(static_cast<const T*>(cache.v_scales)[place]);
      } else {
        k_scales[u] = v_scales[u] = 1.f;
      }
    }
  }
};

// Scores of the tile, times log2(e): what 2 is raised to. Equal in all lanes of a stream; -inf past the end.
template <typename S>
__device__ void score(const DecodeAttentionArgs& args, const Tile<S>& tile, const float (&q)[S::kHeads][kVector],
                      int token, int end, float (&scores)[S::kTokens][S::kHeads]) {
#pragma unroll
  for (int u = 0; u < S::kTokens; ++u) {
    float k[kVector];
    widen<typename S::T>(tile.k[u], k);
#pragma unroll
    for (int g = 0; g < S::kHeads; ++g) {
      float dot = 0.f;
#pragma unroll
      for (int i = 0; i < kVector; ++i) dot += q[g][i] * k[i];
      scores[u][g] = dot;
    }
  }
#pragma unroll
  for (int offset = S::kLanes / 2; offset > 0; offset /= 2)
#pragma unroll
    for (int i = 0; i < S::kTokens * S::kHeads; ++i)
      scores[i / S::kHeads][i % S::kHeads] += __shfl_xor_sync(~0u, scores[i / S::kHeads][i % S::kHeads], offset);
#pragma unroll
  for (int i = 0; i < S::kTokens * S::kHeads; ++i) {
    const int u = i / S::kHeads, g = i % S::kHeads;
    float value = scores[u][g] * tile.k_scales[u] * args.scale;
    if (args.softcap > 0.f) value = args.softcap * tanhf(value / args.softcap);
    scores[u][g] = token + u * S::kStreams < end ? value * kLog2E : -INFINITY;
  }
}

// The tile's values, weighted, join the running sums.
template <typename S>
__device__ void accumulate(const Tile<S>& tile, float (&scores)[S::kTokens][S::kHeads], Running<S>& running) {
#pragma unroll
  for (int g = 0; g < S::kHeads; ++g) {
    float maximum = running.maximum[g];
#pragma unroll
    for (int u = 0; u < S::kTokens; ++u) maximum = fmaxf(maximum, scores[u][g]);
    const float shrink = exp2_fast(running.maximum[g] - maximum);
    running.maximum[g] = maximum;
    running.sum[g] *= shrink;
#pragma unroll
    for (int i = 0; i < kVector; ++i) running.out[g][i] *= shrink;
#pragma unroll
    for (int u = 0; u < S::kTokens; ++u) {
      scores[u][g] = exp2_fast(scores[u][g] - maximum);
      running.sum[g] += scores[u][g];
      scores[u][g] *= tile.v_scales[u];
    }
  }
#pragma unroll
  for (int u = 0; u < S::kTokens; ++u) {
    float v[kVector];
    widen<typename S::T>(tile.v[u], v);
#pragma unroll
    for (int g = 0; g < S::kHeads; ++g)
#pragma unroll
      for (int i = 0; i < kVector; ++i) running.out[g][i] += scores[u][g] * v[i];
  }
}

// The block's part of the result, where the cluster's first block reads it.
template <typename S>
struct Partial {
  float out[S::kStreams][S::kHeads][S::kDim];  // of each stream; then [0] is the block's
  float maximum[S::kStreams][S::kHeads], sum[S::kStreams][S::kHeads];
  float block_maximum[S::kHeads], block_sum[S::kHeads];
};

// Streams to one: out relative to the block's maximum.
template <typename S>
__device__ void merge_streams(const Running<S>& running, Partial<S>& partial) {
  const int stream = threadIdx.x / S::kLanes, lane = threadIdx.x % S::kLanes;
#pragma unroll
  for (int g = 0; g < S::kHeads; ++g) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) partial.out[stream][g][lane * kVector + i] = running.out[g][i];
    if (lane == 0) {
      partial.maximum[stream][g] = running.maximum[g];
      partial.sum[stream][g] = running.sum[g];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < S::kHeads * S::kDim; i += kThreads) {
    const int g = i / S::kDim, d = i % S::kDim;
    float maximum = kNothing, sum = 0.f, out = 0.f;
    for (int s = 0; s < S::kStreams; ++s) maximum = fmaxf(maximum, partial.maximum[s][g]);
    for (int s = 0; s < S::kStreams; ++s) {
      const float weight = exp2_fast(partial.maximum[s][g] - maximum);
      sum += weight * partial.sum[s][g];
      out += weight * partial.out[s][g][d];
    }
    partial.out[0][g][d] = out;
    if (d == 0) {
      partial.block_maximum[g] = maximum;
      partial.block_sum[g] = sum;
    }
  }
  __syncthreads();
}

// One element of the result from every block of the cluster: all that is remote is asked for before any of it is used.
template <typename S>
__device__ float merge_blocks(const Partial<S>& partial, int g, int d) {
  const int blocks = gridDim.x;
  if (blocks == 1) return partial.out[0][g][d] / partial.block_sum[g];
  const uint32_t maximum_address = smem_address(&partial.block_maximum[g]);
  const uint32_t sum_address = smem_address(&partial.block_sum[g]), out_address = smem_address(&partial.out[0][g][d]);
  float maxima[kMostSplits], sums[kMostSplits], outs[kMostSplits];
#pragma unroll
  for (int rank = 0; rank < kMostSplits; ++rank) {
    if (rank >= blocks) break;
    maxima[rank] = read_cluster_float(maximum_address, rank);
    sums[rank] = read_cluster_float(sum_address, rank);
    outs[rank] = read_cluster_float(out_address, rank);
  }
  float maximum = kNothing, sum = 0.f, out = 0.f;
#pragma unroll
  for (int rank = 0; rank < kMostSplits; ++rank)
    if (rank < blocks) maximum = fmaxf(maximum, maxima[rank]);
#pragma unroll
  for (int rank = 0; rank < kMostSplits; ++rank) {
    if (rank >= blocks) break;
    const float weight = exp2_fast(maxima[rank] - maximum);
    sum += weight * sums[rank];
    out += weight * outs[rank];
  }
  return out / sum;
}

template <typename S>
__global__ void __launch_bounds__(kThreads) decode_attention_kernel(const __grid_constant__ DecodeAttentionArgs args) {
  using T = typename S::T;
  __shared__ Partial<S> partial;
  const KvCache& cache = args.cache;
  const int group = args.heads / cache.kv_heads, chunks = (group + S::kHeads - 1) / S::kHeads;
  const int kv_head = blockIdx.y / chunks, member = blockIdx.y % chunks * S::kHeads;
  const int row = blockIdx.z, stream = threadIdx.x / S::kLanes, lane = threadIdx.x % S::kLanes;
  const int64_t first_head = static_cast<int64_t>(row) * args.heads + kv_head * group + member;
  const int heads = min(S::kHeads, group - member);
  allow_next_kernel();

  // positions and starts are a step's, not the previous kernel's: they are read before it has finished
  const int position = args.positions[row];
  const int64_t start = args.starts[row];
  const int begin = args.window > 0 ? max(0, position + 1 - args.window) : 0;
  const int share = (position + 1 - begin + gridDim.x - 1) / gridDim.x;
  const int span = (share + S::kStreams - 1) / S::kStreams * S::kStreams;
  const int first = begin + blockIdx.x * span, end = min(first + span, position + 1);
  wait_for_previous_kernel();

  float q[S::kHeads][kVector] = {};
#pragma unroll
  for (int g = 0; g < S::kHeads; ++g) {
    if (g >= heads || lane * kVector >= cache.head_dim) continue;
    const T* head = static_cast<const T*>(args.q) + (first_head + g) * cache.head_dim;
    widen<T>(__ldcg(reinterpret_cast<const uint4*>(head) + lane), q[g]);
  }
  Running<S> running = {};
#pragma unroll
  for (int g = 0; g < S::kHeads; ++g) running.maximum[g] = kNothing;
  constexpr int kStep = S::kTokens * S::kStreams;
  Tile<S> tile, next;
  if (S::kAhead) tile.read(cache, start, first + stream, end, kv_head, lane);
  for (int base = first; base < end; base += kStep) {
    const int token = base + stream;
    if (!S::kAhead) tile.read(cache, start, token, end, kv_head, lane);
    else if (base + kStep < end) next.read(cache, start, token + kStep, end, kv_head, lane);
    float scores[S::kTokens][S::kHeads];
    score<S>(args, tile, q, token, end, scores);
    accumulate<S>(tile, scores, running);
    if (S::kAhead) tile = next;
  }
  merge_streams<S>(running, partial);

  if (gridDim.x > 1) cluster_sync();
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < S::kHeads * S::kDim; i += kThreads) {
      const int g = i / S::kDim, d = i % S::kDim;
      if (g >= heads || d >= cache.head_dim) continue;
      static_cast<T*>(args.out)[(first_head + g) * cache.head_dim + d] = from_float<T>(merge_blocks(partial, g, d));
    }
  }
  if (gridDim.x > 1) cluster_sync();  // no block leaves while the first reads from it
}

// ---- launches ----

// A launch whose attributes outlive the call that fills them in.
struct Launcher {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};

  Launcher(dim3 grid, int cluster, bool dependent, cudaStream_t stream) {
    config.gridDim = grid;
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    config.attrs = attributes;
    if (dependent) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {unsigned(cluster), 1, 1};
    }
  }
};

template <typename S>
cudaError_t launch_shape(const DecodeAttentionArgs& args, const DecodeAttentionLaunch& launch, cudaStream_t stream) {
  if (launch.splits < 1 || launch.splits > kMostSplits) return cudaErrorInvalidConfiguration;
  auto kernel = decode_attention_kernel<S>;
  const int group = args.heads / args.cache.kv_heads;
  const unsigned chunks = (group + S::kHeads - 1) / S::kHeads;
  const dim3 grid(launch.splits, args.cache.kv_heads * chunks, args.m);
  Launcher launcher(grid, launch.splits, launch.dependent, stream);
  return cudaLaunchKernelEx(&launcher.config, kernel, args);
}

template <typename T, bool kInt8, int kLanes>
cudaError_t launch_heads(const DecodeAttentionArgs& args, const DecodeAttentionLaunch& launch, cudaStream_t stream) {
  switch (launch.block_heads) {
    case 1: return launch_shape<Shape<T, kInt8, kLanes, 1>>(args, launch, stream);
    case 2: return launch_shape<Shape<T, kInt8, kLanes, 2>>(args, launch, stream);
    case 4: return launch_shape<Shape<T, kInt8, kLanes, 4>>(args, launch, stream);
    case 8: return launch_shape<Shape<T, kInt8, kLanes, 8>>(args, launch, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <typename T, bool kInt8>
cudaError_t launch_lanes(const DecodeAttentionArgs& args, const DecodeAttentionLaunch& launch, cudaStream_t stream) {
  const int vectors = args.cache.head_dim / kVector;
  if (args.cache.head_dim % kVector != 0 || vectors > 32) return cudaErrorInvalidValue;
  if (vectors <= 8) return launch_heads<T, kInt8, 8>(args, launch, stream);
  if (vectors <= 16) return launch_heads<T, kInt8, 16>(args, launch, stream);
  return launch_heads<T, kInt8, 32>(args, launch, stream);
}

}  // namespace

template <typename T>
cudaError_t launch_append_heads(const AppendHeadsArgs& args, int device, bool dependent, cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const int units = args.m * (args.heads + 2 * args.cache.kv_heads), warps = kThreads / 32;
  Launcher launcher(dim3((units + warps - 1) / warps), 1, dependent, stream);
  return cudaLaunchKernelEx(&launcher.config, append_heads_kernel<T>, args);
}

template <typename T>
cudaError_t launch_decode_attention(const DecodeAttentionArgs& args, const DecodeAttentionLaunch& launch,
                                    cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(launch.device);
  if (error != cudaSuccess) return error;
  return args.cache.k_scales == nullptr ? launch_lanes<T, false>(args, launch, stream)
                                        : launch_lanes<T, true>(args, launch, stream);
}

template cudaError_t launch_append_heads<LOWBIT_T>(const AppendHeadsArgs&, int, bool, cudaStream_t);
template cudaError_t launch_decode_attention<LOWBIT_T>(const DecodeAttentionArgs&, const DecodeAttentionLaunch&,
                                                       cudaStream_t);

}  // namespace lowbit
