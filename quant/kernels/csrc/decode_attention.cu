// Compiled once per T: LOWBIT_T comes from units.py.
//
// Attention of few tokens over a long cache is bound by reading the cache. A warp takes 16 positions at a time on the
// tensor cores: keys are the left operand of scores = K q, values (transposed on the way, by pairing rows) that of out
// += V^T weights. Up to 8 query heads that share a key head are the 8 columns, at the cost of one. Nothing passes
// through shared memory in the loop. Rows are read before the previous kernel has finished, except those that it may
// still write. At the end, warps and blocks of a cluster merge by the log-sum-exp rule: every warp sends each block the
// elements that this block merges, in a fixed order, so equal inputs give equal bits.
//
// FlashDecoding++'s unified maximum would avoid the running maximum, but overflows if a score strays from its estimate;
// docs/kernels/decode_attention.md has the saving.
#include <type_traits>

#include "declare.cuh"
#include "dequant.cuh"
#include "launch.cuh"
#include "stamps.cuh"

namespace lowbit {

// One layer's keys and values: (slots, kv_heads, head_dim) in T, or int8 with scales (slots, kv_heads) in T.
struct KvCache {
  LOWBIT_STRUCT(KvCache);
  FIELD(void*, k);
  FIELD(void*, v);
  FIELD(void*, k_scales);  // null: k and v are T
  FIELD(void*, v_scales);
  FIELD(int, kv_heads);
  FIELD(int, head_dim);
};

struct AppendHeadsArgs {
  LOWBIT_STRUCT(AppendHeadsArgs);
  FIELD(const void*, qkv);           // (m, heads + 2 kv_heads, head_dim)
  FIELD(const int64_t*, positions);  // (m)
  FIELD(const int64_t*, slots);      // (m)
  FIELD(const float*, cosines);      // (positions, head_dim / 2)
  FIELD(const float*, sines);
  FIELD(const void*, q_norm);        // (head_dim) or null
  FIELD(const void*, k_norm);
  FIELD(void*, q);                   // (m, heads, head_dim)
  FIELD(KvCache, cache);
  FIELD(int, m);
  FIELD(int, heads);
  FIELD(float, norm_eps);
};

// Positions of a sequence before its last m must not be written by a kernel that this one may overlap.
struct DecodeAttentionArgs {
  LOWBIT_STRUCT(DecodeAttentionArgs);
  FIELD(const void*, q);             // (m, heads, head_dim)
  FIELD(const int64_t*, starts);     // (m) slot of position 0
  FIELD(const int64_t*, positions);  // (m)
  FIELD(void*, out);                 // (m, heads, head_dim)
  FIELD(KvCache, cache);
  FIELD(int, m);
  FIELD(int, heads);
  FIELD(float, scale);
  FIELD(float, softcap);             // 0: none
  FIELD(int, window);                // 0: none
  FIELD(const void*, sinks);         // (heads) scores of one more position without a value, or null
  FIELD(int, adjacent);              // adjacent rows that are consecutive positions of one sequence; 1 with a window
};

struct DecodeAttentionLaunch {
  LOWBIT_STRUCT(DecodeAttentionLaunch);
  FIELD(int, device);
  FIELD(int, splits);      // blocks of a cluster that share a sequence; more than 1 needs sm_90
  FIELD(int, warps);       // of a block: 4; or 8 for an int8 cache, heads of up to 128 and up to 4 splits
  FIELD(bool, dependent);  // launched with programmatic dependent launch
};

namespace {

constexpr int kAppendThreads = 128;
constexpr int kHeads = 8;               // most query heads per block, of all rows: columns of the tensor instruction
constexpr int kRows = 16;               // positions per chunk of a warp
constexpr int kGroup = 8;               // adjacent elements of the result that are merged together
constexpr float kNothing = -1e30f;      // a maximum below any score; finite, so that differences are finite
constexpr float kLog2E = 1.44269504f;
constexpr float kInt8Limit = 127.f;
constexpr float kLeastScale = 7.8886e-31f;  // 2^-100: its inverse can still be summed

__device__ inline float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value = max_or_nan(value, __shfl_xor_sync(~0u, value, offset));
  return value;
}

// ---- append ----

constexpr int kPairs = 4;  // per lane: heads are at most 256 wide

// A head in a warp: a lane's pair i has inputs j and j + head_dim / 2, with j = lane + 32 i.
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

// A head as int8, by absmax / 127 rounded to T and clamped to T's normal range; NaN if an input is NaN.
template <typename T>
__device__ void store_int8(const Head& head, int8_t* target, T* scale, int half, int lane) {
  float largest = 0.f;
  for (int i = 0; i < kPairs; ++i) largest = max_or_nan(largest, max_or_nan(fabsf(head.low[i]), fabsf(head.high[i])));
  constexpr float kTiny = std::is_same_v<T, __half> ? 6.103515625e-05f : 1.17549435e-38f;
  const T stored = from_float<T>(max_or_nan(warp_max(largest) / kInt8Limit, kTiny));
  const float divisor = to_float(stored);
  if (lane == 0) *scale = stored;
  store_head(head, target, half, lane, [divisor](float value) {
    return static_cast<int8_t>(fminf(fmaxf(rintf(value / divisor), -kInt8Limit), kInt8Limit));
  });
}

template <typename T>
__global__ void __launch_bounds__(kAppendThreads) append_heads_kernel(const __grid_constant__ AppendHeadsArgs args) {
  const KvCache& cache = args.cache;
  const int lane = threadIdx.x % 32, half = cache.head_dim / 2;
  const int heads = args.heads + 2 * cache.kv_heads;
  const int unit = blockIdx.x * (kAppendThreads / 32) + threadIdx.x / 32;
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

template <typename T_, bool kInt8_, int kDim_, int kWarps_ = 4>
struct Shape {
  using T = T_;
  // The type of the product: int8 codes are exact in float16, and q is then converted to float16.
  using Product = std::conditional_t<kInt8_, __half, T_>;
  static constexpr bool kInt8 = kInt8_;
  static constexpr int kDim = kDim_;                        // at least head_dim
  static constexpr int kWarps = kWarps_, kThreads = kWarps * 32;
  static constexpr int kMostSplits = 32 / kWarps;           // a cluster that fits everywhere, in 48 KB a block
  static constexpr int kVector = kInt8 ? 16 : 8;            // elements in 16 bytes
  static constexpr int kKeyVectors = kDim / kVector / 4;    // vectors of one position per lane
  static constexpr int kValueVectors = kDim / kVector / 8;
  static constexpr int kWords = kValueVectors * 4;          // words of a row of values per lane
  static constexpr int kPairs = kInt8 ? 4 : 2;              // pairs of elements from two rows' words
  static constexpr int kBlocks = kDim / 16;                 // blocks of 16 elements of the result
  static constexpr bool kAhead = kDim <= 128;               // True if the next chunk is read while this one is computed
  static constexpr int kMinBlocks = kWarps > 4 || !kAhead ? 2 : 3;  // 128, 168 or 255 registers a thread
};

// The lane's place in mma fragments: rows `group` and group + 8 of the left operand, columns 2 member and 2 member + 1.
struct Lane {
  int group, member;
  __device__ Lane() : group(threadIdx.x % 32 / 4), member(threadIdx.x % 4) {}
};

// The block's columns: query heads of one key head, of all adjacent rows, in the order of rows.
struct Columns {
  int64_t first_row;
  int kv_head, group;  // query heads per key head
  int first, count;    // of the group * adjacent columns

  __device__ explicit Columns(const DecodeAttentionArgs& args) : group(args.heads / args.cache.kv_heads) {
    const int all = group * args.adjacent, chunks = (all + kHeads - 1) / kHeads;
    kv_head = blockIdx.y / chunks;
    first = blockIdx.y % chunks * kHeads;
    count = min(kHeads, all - first);
    first_row = static_cast<int64_t>(blockIdx.z) * args.adjacent;
  }
  // A division only where there is more than one row.
  __device__ int row_of(const DecodeAttentionArgs& args, int column) const {
    return args.adjacent == 1 ? 0 : (first + column) / group;
  }
  // The index of a column's head among those of all rows.
  __device__ int64_t head_of(const DecodeAttentionArgs& args, int column) const {
    const int row = row_of(args, column);
    return (first_row + row) * args.heads + kv_head * group + first + column - row * group;
  }
};

// The positions of one token's sequence that a warp processes, relative to the first visible one.
struct Span {
  const char* k;  // of position 0 of the span
  const char* v;
  const void* k_scales;
  const void* v_scales;
  int64_t pitch;        // bytes between positions
  int scale_pitch;      // scales between positions
  int length, settled;  // positions of the last row; positions that no running kernel writes
  int head_dim;
};

template <typename S>
__device__ Span span_of(const DecodeAttentionArgs& args, int kv_head) {
  const KvCache& cache = args.cache;
  const int first_row = blockIdx.z * args.adjacent, position = args.positions[first_row + args.adjacent - 1];
  const int begin = args.window > 0 ? max(0, position + 1 - args.window) : 0;
  const int64_t first = (args.starts[first_row] + begin) * cache.kv_heads + kv_head;
  constexpr int kBytes = S::kInt8 ? 1 : 2;
  Span span;
  span.k = static_cast<const char*>(cache.k) + first * cache.head_dim * kBytes;
  span.v = static_cast<const char*>(cache.v) + first * cache.head_dim * kBytes;
  if constexpr (S::kInt8) {
    span.k_scales = static_cast<const typename S::T*>(cache.k_scales) + first;
    span.v_scales = static_cast<const typename S::T*>(cache.v_scales) + first;
  }
  span.pitch = static_cast<int64_t>(cache.kv_heads) * cache.head_dim * kBytes;
  span.scale_pitch = cache.kv_heads;
  span.length = position + 1 - begin;
  span.settled = span.length - args.m;  // a step of m rows writes at most the last m positions of a sequence
  span.head_dim = cache.head_dim;
  return span;
}

// A chunk of 16 positions in registers, as each lane's part of the fragments. `read_` loads the rows in [from, to).
template <typename S>
struct Chunk {
  uint4 k[2][S::kKeyVectors];      // rows group, group + 8; vector `member` of each four
  uint4 v[4][S::kValueVectors];    // rows 2 member, + 1, + 8, + 9; vector `group` of each eight
  float scale;                     // int8: of k for lanes 0 to 15, the others log2 of v's: position lane % 16

  __device__ void read_keys(const Span& span, Lane lane, int first, int from, int to) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first + lane.group + 8 * r;
      if (row < from || row >= to) continue;
#pragma unroll
      for (int i = 0; i < S::kKeyVectors; ++i) {
        const int vector = 4 * i + lane.member;
        if (vector * S::kVector < span.head_dim)
          k[r][i] = __ldcg(reinterpret_cast<const uint4*>(span.k + row * span.pitch) + vector);
      }
    }
  }

  __device__ void read_values(const Span& span, Lane lane, int first, int from, int to) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = first + 2 * lane.member + r % 2 + r / 2 * 8;
      if (row < from || row >= to) continue;
#pragma unroll
      for (int i = 0; i < S::kValueVectors; ++i) {
        const int vector = 8 * i + lane.group;
        if (vector * S::kVector < span.head_dim)
          v[r][i] = __ldcg(reinterpret_cast<const uint4*>(span.v + row * span.pitch) + vector);
      }
    }
  }

  __device__ void read_scales(const Span& span, int first, int from, int to) {
    if constexpr (S::kInt8) {
      using T = typename S::T;
      const int lane = threadIdx.x % 32, row = first + lane % kRows;
      if (row < from || row >= to) return;
      const void* scales = lane < kRows ? span.k_scales : span.v_scales;
      // Bypasses L1, which may hold an outdated line from a read of a neighbour before the wait.
      scale = to_float(__ldcg(static_cast<const T*>(scales) + static_cast<int64_t>(row) * span.scale_pitch));
      if (lane >= kRows) scale = __log2f(max_or_nan(scale, kLeastScale));
    }
  }

  __device__ void clear_keys() {
    for (auto& row : k)
      for (uint4& vector : row) vector = {};
  }
  __device__ void clear_values() {
    for (auto& row : v)
      for (uint4& vector : row) vector = {};
  }
};

// Four one-byte codes as two pairs of float16: 0x6400 | u is 1024 + u, and u is the code + 128.
__device__ inline void widen_codes(uint32_t word, uint32_t (&pairs)[2]) {
  const __half2 bias = as_half2(0x64806480u);
  word ^= 0x80808080u;
  pairs[0] = bits_of(__hsub2(as_half2(__byte_perm(word, 0x64646464u, 0x4140)), bias));
  pairs[1] = bits_of(__hsub2(as_half2(__byte_perm(word, 0x64646464u, 0x4342)), bias));
}

// Pairs of element i of one row with element i of another, for the elements of one word of each.
template <bool kInt8, int kPairs>
__device__ void pair_rows(uint32_t first, uint32_t second, uint32_t (&pairs)[kPairs]) {
  if constexpr (kInt8) {
    uint32_t low[2], high[2];
    widen_codes(__byte_perm(first, second, 0x5140), low);
    widen_codes(__byte_perm(first, second, 0x7362), high);
    pairs[0] = low[0], pairs[1] = low[1], pairs[2] = high[0], pairs[3] = high[1];
  } else {
    pairs[0] = __byte_perm(first, second, 0x5410);
    pairs[1] = __byte_perm(first, second, 0x7632);
  }
}

// The query heads as the right operand: head `group`, in pairs of the inputs that the lane has of a key.
template <typename S>
struct Queries {
  uint32_t pairs[S::kDim / 8];

  __device__ void read(const DecodeAttentionArgs& args, const Columns& columns, Lane lane) {
    using T = typename S::T;
    const int head_dim = args.cache.head_dim;
    const T* head = static_cast<const T*>(args.q) + columns.head_of(args, lane.group) * head_dim;
#pragma unroll
    for (int i = 0; i < S::kDim / 32; ++i) {
      constexpr int kQuads = S::kVector / 8;  // 16-byte vectors of q per one of k
      const int d = (i / kQuads * 4 + lane.member) * S::kVector + i % kQuads * 8;
      uint4 raw = {};
      if (lane.group < columns.count && d < head_dim) raw = __ldcg(reinterpret_cast<const uint4*>(head + d));
      const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) pairs[4 * i + w] = product_pair(words[w]);
    }
  }

  // A pair of T as a pair of Product. Numbers beyond float16 are clamped to its largest, which no real q reaches. NaN
  // stays.
  __device__ static uint32_t product_pair(uint32_t word) {
    if constexpr (std::is_same_v<typename S::T, typename S::Product>) {
      return word;
    } else {
      const __half2 most = as_half2(0x7bff7bffu), least = as_half2(0xfbfffbffu);  // 65504, -65504
      return bits_of(__hmax2_nan(__hmin2_nan(__float22half2_rn(__bfloat1622float2(as_bfloat162(word))), most), least));
    }
  }
};

// The lane's scores: rows group (0, 1) and group + 8 (2, 3), heads 2 member (0, 2) and 2 member + 1 (1, 3).
template <typename S>
__device__ void multiply_keys(const Chunk<S>& chunk, const Queries<S>& q, float (&scores)[4]) {
  float odd[4] = {};  // two chains: the latency of a tensor instruction is several issue slots
  for (float& score : scores) score = 0.f;
#pragma unroll
  for (int i = 0; i < S::kKeyVectors; ++i) {
    const uint32_t* low = reinterpret_cast<const uint32_t*>(&chunk.k[0][i]);
    const uint32_t* high = reinterpret_cast<const uint32_t*>(&chunk.k[1][i]);
    if constexpr (S::kInt8) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        uint32_t a[2], b[2];
        widen_codes(low[w], a);
        widen_codes(high[w], b);
        const int step = 4 * i + w;
        mma_16x8x16<__half>(w % 2 ? odd : scores, {a[0], b[0], a[1], b[1]}, q.pairs[2 * step], q.pairs[2 * step + 1]);
      }
    } else {
#pragma unroll
      for (int w = 0; w < 4; w += 2) {
        const int step = 2 * i + w / 2;
        mma_16x8x16<typename S::Product>(w ? odd : scores, {low[w], high[w], low[w + 1], high[w + 1]},
                                         q.pairs[2 * step], q.pairs[2 * step + 1]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) scores[i] += odd[i];
}

// A warp's sums for heads 2 member and 2 member + 1. Weights are relative to 2^maximum. `sum` is per lane.
template <typename S>
struct Running {
  float maximum[2] = {kNothing, kNothing}, sum[2] = {};
  float out[S::kBlocks][4] = {};  // elements i (0, 1) and i + kBlocks (2, 3) of the lane's 2 kBlocks, for both heads
};

// Converts scores to weights of the values, and adds these to the sums: exp2 of score (with int8, of score + log2 of
// v's scale) minus the maximum, so that float16 can hold them for any scale. `lengths`: positions that the lane's two
// columns see.
template <typename S>
__device__ void weigh(const DecodeAttentionArgs& args, const Chunk<S>& chunk, Lane lane, int first,
                      const int (&lengths)[2], float (&scores)[4], Running<S>& running) {
  float sides[2] = {};  // log2 of v's scale
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane.group + 8 * r;
    float k_scale = args.scale;
    if constexpr (S::kInt8) {
      k_scale *= __shfl_sync(~0u, chunk.scale, row);
      sides[r] = __shfl_sync(~0u, chunk.scale, row + kRows);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float value = scores[2 * r + h] * k_scale;
      if (args.softcap > 0.f) value = args.softcap * tanhf(value / args.softcap);
      scores[2 * r + h] = first + row < lengths[h] ? value * kLog2E + sides[r] : -INFINITY;
    }
  }
  float shrink[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float maximum = fmaxf(scores[h], scores[h + 2]);
    for (int offset = 4; offset < 32; offset *= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, offset));
    maximum = fmaxf(maximum, running.maximum[h]);
    shrink[h] = exp2_fast(running.maximum[h] - maximum);
    running.maximum[h] = maximum;
    running.sum[h] *= shrink[h];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float exponent = scores[2 * r + h] - maximum;
      scores[2 * r + h] = exp2_fast(exponent);
      running.sum[h] += S::kInt8 ? exp2_fast(exponent - sides[r]) : scores[2 * r + h];
    }
  }
  if (!__any_sync(~0u, shrink[0] != 1.f || shrink[1] != 1.f)) return;
#pragma unroll
  for (int i = 0; i < 4 * S::kBlocks; ++i) running.out[i / 4][i % 4] *= shrink[i % 2];
}

// out += V^T weights.
template <typename S>
__device__ void multiply_values(const Chunk<S>& chunk, const float (&weights)[4], Running<S>& running) {
  using P = typename S::Product;
  const uint32_t low = transpose_matrix(pair_of<P>(weights[0], weights[1]));
  const uint32_t high = transpose_matrix(pair_of<P>(weights[2], weights[3]));
  constexpr int kHalf = S::kWords / 2;
  const uint32_t* rows[4];
  for (int r = 0; r < 4; ++r) rows[r] = reinterpret_cast<const uint32_t*>(chunk.v[r]);
#pragma unroll
  for (int w = 0; w < kHalf; ++w) {
    uint32_t pairs[4][S::kPairs];  // in the order of the left operand's registers
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int word = i % 2 * kHalf + w;
      pair_rows<S::kInt8>(rows[i / 2 * 2][word], rows[i / 2 * 2 + 1][word], pairs[i]);
    }
#pragma unroll
    for (int p = 0; p < S::kPairs; ++p)
      mma_16x8x16<P>(running.out[w * S::kPairs + p], {pairs[0][p], pairs[1][p], pairs[2][p], pairs[3][p]}, low, high);
  }
}

// Shared memory for merging a cluster's warps. Block r merges groups r, r + blocks, ... of kGroup elements, of every
// head.
template <typename S>
struct Meeting {
  static constexpr int kGroups = S::kDim / kGroup;
  // (warp of the cluster, group, head, element)
  float out[S::kWarps * (kGroups + S::kMostSplits - 1) * kHeads * kGroup];
  float maximum[S::kMostSplits * S::kWarps * kHeads], sum[S::kMostSplits * S::kWarps * kHeads];

  __device__ static int groups_of_block(int blocks) { return (kGroups + blocks - 1) / blocks; }
};

// Sends part `part` (8 elements) of the lane's 2 kBlocks elements of head h to the block that merges them.
template <typename S>
__device__ void send_part(Meeting<S>& meeting, const Running<S>& running, Lane lane, int heads, int part, int h) {
  const int blocks = gridDim.x, slot = blockIdx.x * S::kWarps + threadIdx.x / 32;
  const int vector = part * kGroup / S::kVector * 8 + lane.group;
  const int group = (vector * S::kVector + part * kGroup % S::kVector) / kGroup;
  const int place = (slot * Meeting<S>::groups_of_block(blocks) + group / blocks) * heads + 2 * lane.member + h;
  float values[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const int element = part * kGroup + i;
    values[i] = running.out[element % S::kBlocks][element / S::kBlocks * 2 + h];
  }
  const uint32_t address = smem_address(&meeting.out[place * kGroup]);
  write_cluster_floats(address, group % blocks, make_float4(values[0], values[1], values[2], values[3]));
  write_cluster_floats(address + 16, group % blocks, make_float4(values[4], values[5], values[6], values[7]));
}

template <typename S>
__device__ void send(Meeting<S>& meeting, Running<S>& running, Lane lane, int heads) {
  const int slot = blockIdx.x * S::kWarps + threadIdx.x / 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    for (int offset = 4; offset < 32; offset *= 2) running.sum[h] += __shfl_xor_sync(~0u, running.sum[h], offset);
    if (2 * lane.member + h >= heads) continue;
    const int place = slot * heads + 2 * lane.member + h;
    if (lane.group < gridDim.x) {
      write_cluster_float(smem_address(&meeting.maximum[place]), lane.group, running.maximum[h]);
      write_cluster_float(smem_address(&meeting.sum[place]), lane.group, running.sum[h]);
    }
#pragma unroll
    for (int part = 0; part < 2 * S::kBlocks / kGroup; ++part) send_part<S>(meeting, running, lane, heads, part, h);
  }
}

// The weight of a head's sink, relative to 2^maximum. first_head counts the heads of all rows.
template <typename T>
__device__ float sink_weight(const DecodeAttentionArgs& args, int64_t head, float maximum) {
  const float sink = to_float(static_cast<const T*>(args.sinks)[head % args.heads]);
  return exp2_fast(sink * kLog2E - maximum);
}

// Merges the block's elements of the result from all warps' contributions.
template <typename S>
__device__ void merge(const DecodeAttentionArgs& args, const Meeting<S>& meeting, const Columns& columns) {
  using T = typename S::T;
  const int heads = columns.count;
  const int blocks = gridDim.x, slots = blocks * S::kWarps, groups = Meeting<S>::groups_of_block(blocks);
  for (int i = threadIdx.x; i < groups * heads * kGroup; i += S::kThreads) {
    const int head = i / kGroup % heads, group = i / kGroup / heads * blocks + blockIdx.x;
    const int d = group * kGroup + i % kGroup;
    if (d >= args.cache.head_dim) continue;
    float maximum = kNothing, sum = 0.f, out = 0.f;
#pragma unroll 8
    for (int slot = 0; slot < slots; ++slot) maximum = fmaxf(maximum, meeting.maximum[slot * heads + head]);
#pragma unroll 8
    for (int slot = 0; slot < slots; ++slot) {
      const float weight = exp2_fast(meeting.maximum[slot * heads + head] - maximum);
      sum += weight * meeting.sum[slot * heads + head];
      out += weight * meeting.out[slot * groups * heads * kGroup + i];
    }
    if (args.sinks != nullptr) sum += sink_weight<T>(args, columns.head_of(args, head), maximum);
    static_cast<T*>(args.out)[columns.head_of(args, head) * args.cache.head_dim + d] = from_float<T>(out / sum);
  }
}

// Rows [from, to) of a chunk, except values that are read behind the products with its keys.
template <typename S>
__device__ void read_ahead(const Span& span, Lane lane, int first, int from, int to, Chunk<S>& chunk) {
  chunk.read_keys(span, lane, first, from, to);
  if (S::kAhead) chunk.read_values(span, lane, first, from, to);
  chunk.read_scales(span, first, from, to);
}

// Adds the chunk at `first`, and reads the one at `next` into its registers.
template <typename S>
__device__ void attend_chunk(const DecodeAttentionArgs& args, const Span& span, Lane lane, const Queries<S>& q,
                             const int (&lengths)[2], int first, int next, Chunk<S>& chunk, Running<S>& running) {
  float scores[4];
  multiply_keys<S>(chunk, q, scores);
  if (S::kAhead) chunk.read_keys(span, lane, next, 0, span.length);
  else chunk.clear_values(), chunk.read_values(span, lane, first, 0, span.length);
  weigh<S>(args, chunk, lane, first, lengths, scores, running);
  chunk.read_scales(span, next, 0, span.length);
  multiply_values<S>(chunk, scores, running);
  if (S::kAhead) chunk.clear_values(), chunk.read_values(span, lane, next, 0, span.length);
  else chunk.read_keys(span, lane, next, 0, span.length);
}

// The loop over the warp's chunks: every `step` rows from `first` on.
template <typename S>
__device__ void attend_span(const DecodeAttentionArgs& args, const Span& span, Lane lane, const Columns& columns,
                            Running<S>& running) {
  const int step = gridDim.x * S::kWarps * kRows;
  int first = (blockIdx.x * S::kWarps + threadIdx.x / 32) * kRows;
  Chunk<S> chunk;
  chunk.clear_keys(), chunk.clear_values();
  chunk.scale = 0.f;
  read_ahead<S>(span, lane, first, 0, span.settled, chunk);
  wait_for_previous_kernel();
  stamp(Stage::kWaited);
  read_ahead<S>(span, lane, first, max(span.settled, 0), span.length, chunk);
  Queries<S> q;
  q.read(args, columns, lane);
  int lengths[2];
  for (int h = 0; h < 2; ++h)
    lengths[h] = span.length - (args.adjacent - 1 - columns.row_of(args, 2 * lane.member + h));
  for (; first < span.length; first += step)
    attend_chunk<S>(args, span, lane, q, lengths, first, first + step, chunk, running);
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::kMinBlocks)
    decode_attention_kernel(const __grid_constant__ DecodeAttentionArgs args) {
  LOWBIT_SHARED(Meeting<S>, meeting);
  const Columns columns(args);
  const Lane lane;
  stamp(Stage::kBegun);
  allow_next_kernel();
  const bool cluster = gridDim.x > 1;
  if (cluster) cluster_arrive_relaxed();  // other blocks may write to a block's memory once it has started

  // positions and starts are inputs of the step, not of the previous kernel: they are read before it has finished
  const Span span = span_of<S>(args, columns.kv_head);
  Running<S> running;
  attend_span<S>(args, span, lane, columns, running);

  stamp(Stage::kComputed);
  if (cluster) cluster_wait();
  send<S>(meeting, running, lane, columns.count);
  if (cluster) cluster_sync();
  else __syncthreads();
  merge<S>(args, meeting, columns);
  leave_stamps(args.heads, args.cache.head_dim);
}

// ---- launches ----

template <typename S>
cudaError_t launch_shape(const DecodeAttentionArgs& args, const DecodeAttentionLaunch& launch, cudaStream_t stream) {
  if (launch.splits < 1 || launch.splits > S::kMostSplits) return cudaErrorInvalidConfiguration;
  if (args.adjacent < 1 || args.m % args.adjacent != 0 || (args.adjacent > 1 && args.window > 0))
    return cudaErrorInvalidValue;
  const int columns = args.heads / args.cache.kv_heads * args.adjacent;
  const unsigned chunks = (columns + kHeads - 1) / kHeads;
  const LaunchPlan plan = {
      .device = launch.device,
      .stream = stream,
      .blocks = dim3(launch.splits, args.cache.kv_heads * chunks, args.m / args.adjacent),
      .threads = dim3(S::kThreads),
      .cluster = launch.splits > 1 ? launch.splits : 0,
      .dependent = launch.dependent,
  };
  return launch_kernel(decode_attention_kernel<S>, plan, args);
}

}  // namespace

template <typename T>
cudaError_t launch_append_heads(const AppendHeadsArgs& args, const PlainLaunch& launch, cudaStream_t stream) {
  const int units = args.m * (args.heads + 2 * args.cache.kv_heads), warps = kAppendThreads / 32;
  const LaunchPlan plan = {
      .device = launch.device,
      .stream = stream,
      .blocks = dim3((units + warps - 1) / warps),
      .threads = dim3(kAppendThreads),
      .dependent = launch.dependent,
  };
  return launch_kernel(append_heads_kernel<T>, plan, args);
}

template <typename T>
cudaError_t launch_decode_attention(const DecodeAttentionArgs& args, const DecodeAttentionLaunch& launch,
                                    cudaStream_t stream) {
  const bool int8 = args.cache.k_scales != nullptr;
  const int head_dim = args.cache.head_dim;
  if (head_dim % (int8 ? 16 : 8) != 0 || head_dim > 256) return cudaErrorInvalidValue;
  if (launch.warps != 4 && !(launch.warps == 8 && int8 && head_dim <= 128)) return cudaErrorInvalidConfiguration;
  if (launch.warps == 8) return launch_shape<Shape<T, true, 128, 8>>(args, launch, stream);
  if (int8 && head_dim <= 128) return launch_shape<Shape<T, true, 128>>(args, launch, stream);
  if (int8) return launch_shape<Shape<T, true, 256>>(args, launch, stream);
  if (head_dim <= 64) return launch_shape<Shape<T, false, 64>>(args, launch, stream);
  if (head_dim <= 128) return launch_shape<Shape<T, false, 128>>(args, launch, stream);
  return launch_shape<Shape<T, false, 256>>(args, launch, stream);
}

const Kernel append_heads("append_heads", {name_of<LOWBIT_T>}, launch_append_heads<LOWBIT_T>);
const Kernel decode_attention("decode_attention", {name_of<LOWBIT_T>}, launch_decode_attention<LOWBIT_T>);

}  // namespace lowbit
