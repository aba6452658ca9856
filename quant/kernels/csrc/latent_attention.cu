// Compiled once per T: LOWBIT_T comes from units.py.
//
// Attention of single tokens over compressed rows of keys and values (multi-head latent attention, DeepSeek-V2 and V3).
// Each head scores the same row of a position, and the row is its value too: 16 heads are the 16 rows of the tensor
// instruction for scores, and two times its 8 columns for values. A block takes 64 positions at a time: each warp
// scores 8 of them, then all warps add up an eighth of the row's width over all 64. The newest position's row is
// normed, rotated and stored here; no other launch has it. The blocks of a cluster share a sequence, and merge by the
// log-sum-exp rule in a fixed order.
#include "declare.cuh"
#include "dequant.cuh"
#include "launch.cuh"

namespace lowbit {

// All but q, q_turned, compressed and turned must not be written by a kernel that this one may overlap.
struct LatentAttentionArgs {
  LOWBIT_STRUCT(LatentAttentionArgs);
  FIELD(const void*, q);             // (heads, m, 512): each head's q times the weight of its keys
  FIELD(const void*, q_turned);      // (m, heads, 64) with pitches, to be rotated
  FIELD(const void*, compressed);    // (m, 512) with a pitch, of the newest positions
  FIELD(const void*, turned);        // (m, 64) with a pitch, to be rotated
  FIELD(const void*, norm);          // (512) weight of the norm of compressed, or null
  FIELD(const float*, cosines);      // (positions, table_pitch), of which the first 32 of a row are used
  FIELD(const float*, sines);
  FIELD(const int64_t*, turns);      // (m) each row's place in the tables
  FIELD(const int64_t*, starts);     // (m) slot of position 0
  FIELD(const int64_t*, positions);  // (m) each row is the last position of a sequence of its own
  FIELD(void*, k);                   // (slots, 512) compressed rows
  FIELD(void*, v);                   // (slots, 64) rotated rows
  FIELD(void*, out);                 // (heads, m, 512): the mean of the compressed rows
  FIELD(int, m);
  FIELD(int, heads);
  FIELD(int, q_row_pitch);           // elements
  FIELD(int, q_head_pitch);
  FIELD(int, compressed_pitch);
  FIELD(int, turned_pitch);
  FIELD(int, table_pitch);
  FIELD(float, norm_eps);
  FIELD(float, scale);
};

struct LatentAttentionLaunch {
  LOWBIT_STRUCT(LatentAttentionLaunch);
  FIELD(int, device);
  FIELD(int, splits);      // blocks of a cluster that share a sequence, at most 8; more than 1 needs sm_90
  FIELD(bool, dependent);  // launched with programmatic dependent launch
};

namespace {

constexpr int kRank = 512, kTurned = 64, kWidth = kRank + kTurned;
constexpr int kHeads = 16;              // of a block
constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kTile = 8 * kWarps;       // positions
constexpr int kPitch = kWidth + 32;     // of queries: 64 bytes more than a multiple of 128, against bank conflicts
constexpr int kWeightPitch = kTile + 8;
constexpr int kMostSplits = 8;
constexpr int kSlice = kRank / kWarps;  // of the row's width, that a warp adds up
constexpr float kNothing = -1e30f;      // a maximum below any score; finite, so that differences are finite
constexpr float kLog2E = 1.44269504f;

// A block's shared memory. `out`, `maximum` and `sum` are read by the cluster's other blocks at the end.
template <typename T>
struct Memory {
  alignas(16) T q[kHeads][kPitch];
  alignas(16) T newest[kWidth];             // the row of the newest position
  alignas(16) T weights[kHeads][kWeightPitch];
  float maxima[kWarps][kHeads], sums[kWarps][kHeads];
  float maximum[kHeads], shrink[kHeads], sum[kHeads];
  float shares[kMostSplits][kHeads], totals[kHeads];  // of the cluster's blocks, in each of them
  alignas(16) float out[kHeads][kRank];
};

// The positions of a row's sequence.
template <typename T>
struct Sequence {
  const T* k;
  const T* v;
  const T* newest;
  int length;

  // A position's compressed row and its rotated one; of the newest both in shared memory.
  __device__ const T* key(int position) const {
    return position == length - 1 ? newest : k + static_cast<int64_t>(position) * kRank;
  }
  __device__ const T* turned(int position) const {
    return position == length - 1 ? newest + kRank : v + static_cast<int64_t>(position) * kTurned;
  }
};

// A lane's cosine (x) and sine of the row's position.
__device__ inline float2 read_turn(const LatentAttentionArgs& args, int row) {
  const int64_t place = args.turns[row] * args.table_pitch + threadIdx.x % (kTurned / 2);
  return make_float2(args.cosines[place], args.sines[place]);
}

// The lane's pair of a head's last 64 inputs, rotated: inputs `lane` and `lane` + 32.
template <typename T>
__device__ void rotate_pair(float2 turn, const T* source, T* target) {
  const int pair = threadIdx.x % (kTurned / 2);
  const float low = to_float(source[pair]), high = to_float(source[pair + kTurned / 2]);
  target[pair] = from_float<T>(low * turn.x - high * turn.y);
  target[pair + kTurned / 2] = from_float<T>(high * turn.x + low * turn.y);
}

// Copies the queries of the block's heads to shared memory, their last 64 inputs rotated; those of no head are zero.
template <typename T>
__device__ void read_queries(const LatentAttentionArgs& args, int row, int first_head, float2 turn, Memory<T>& memory) {
  for (int i = threadIdx.x; i < kHeads * (kRank / 8); i += kThreads) {
    const int head = i / (kRank / 8), vector = i % (kRank / 8);
    uint4 value = {};
    if (first_head + head < args.heads) {
      const int64_t index = static_cast<int64_t>(first_head + head) * args.m + row;
      value = __ldcg(reinterpret_cast<const uint4*>(static_cast<const T*>(args.q) + index * kRank) + vector);
    }
    *reinterpret_cast<uint4*>(&memory.q[head][vector * 8]) = value;
  }
  for (int i = threadIdx.x; i < kHeads * (kTurned / 2); i += kThreads) {
    const int head = i / (kTurned / 2), pair = i % (kTurned / 2);
    T* target = &memory.q[head][kRank];
    if (first_head + head < args.heads) {
      const T* source = static_cast<const T*>(args.q_turned) + static_cast<int64_t>(row) * args.q_row_pitch +
                        (first_head + head) * args.q_head_pitch;
      rotate_pair(turn, source, target);
    } else {
      target[pair] = target[pair + kTurned / 2] = from_float<T>(0.f);
    }
  }
}

// Makes the newest position's row in shared memory: warp 0 norms, warp 1 rotates.
template <typename T>
__device__ void make_newest(const LatentAttentionArgs& args, int row, float2 turn, Memory<T>& memory) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == 1) {
    const T* source = static_cast<const T*>(args.turned) + static_cast<int64_t>(row) * args.turned_pitch;
    rotate_pair(turn, source, memory.newest + kRank);
  }
  if (warp > 0) return;
  constexpr int kEach = kRank / 32;
  const T* source = static_cast<const T*>(args.compressed) + static_cast<int64_t>(row) * args.compressed_pitch;
  float values[kEach], sum = 0.f;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    values[i] = to_float(source[lane + 32 * i]);
    sum += values[i] * values[i];
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  const float factor = rsqrtf(sum / kRank + args.norm_eps);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = lane + 32 * i;
    if (args.norm != nullptr) values[i] *= factor * to_float(static_cast<const T*>(args.norm)[at]);
    memory.newest[at] = from_float<T>(values[i]);
  }
}

// Stores the newest position's row in the cache.
template <typename T>
__device__ void store_newest(const LatentAttentionArgs& args, int64_t slot, const Memory<T>& memory) {
  const int i = threadIdx.x;
  const uint4* source = reinterpret_cast<const uint4*>(memory.newest);
  if (i < kRank / 8) reinterpret_cast<uint4*>(static_cast<T*>(args.k) + slot * kRank)[i] = source[i];
  else if (i < kWidth / 8)
    reinterpret_cast<uint4*>(static_cast<T*>(args.v) + slot * kTurned)[i - kRank / 8] = source[i];
}

// scores += q k of 16 heads and 8 positions over `count` blocks of 32 inputs. A lane's 8 inputs are the same ones of q
// and of k, so that their order does not matter.
template <typename T, int kCount>
__device__ void add_products(const T* q, const T* key, bool seen, float (&even)[4], float (&odd)[4]) {
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  uint4 keys[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    keys[i] = seen ? *reinterpret_cast<const uint4*>(key + 32 * i + 8 * member) : uint4{};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint4 low = *reinterpret_cast<const uint4*>(q + group * kPitch + 32 * i + 8 * member);
    const uint4 high = *reinterpret_cast<const uint4*>(q + (group + 8) * kPitch + 32 * i + 8 * member);
    mma_16x8x16<T>(even, {low.x, high.x, low.y, high.y}, keys[i].x, keys[i].y);
    mma_16x8x16<T>(odd, {low.z, high.z, low.w, high.w}, keys[i].z, keys[i].w);
  }
}

// The warp's scores of its 8 positions from `first` on, as powers of 2: heads group (0, 1) and group + 8 (2, 3),
// positions 2 member and 2 member + 1.
template <typename T>
__device__ void score(const LatentAttentionArgs& args, const Sequence<T>& sequence, int first, const Memory<T>& memory,
                      float (&scores)[4]) {
  const int position = first + threadIdx.x % 32 / 4;
  const bool seen = position < sequence.length;
  float odd[4] = {};
  for (float& each : scores) each = 0.f;
  add_products<T, kRank / 32>(memory.q[0], sequence.key(position), seen, scores, odd);
  add_products<T, kTurned / 32>(memory.q[0] + kRank, sequence.turned(position), seen, scores, odd);
  for (int i = 0; i < 4; ++i) {
    const int column = first + threadIdx.x % 4 * 2 + i % 2;
    scores[i] = column < sequence.length ? (scores[i] + odd[i]) * (args.scale * kLog2E) : -INFINITY;
  }
}

// A lane's sums. `out`: of tile i, rows group (0, 1) and group + 8 (2, 3) are inputs 8 group + i and 8 group + i + 4 of
// the warp's slice; of heads 2 member and 2 member + 1 in the first half, and of those 8 on in the second.
struct Running {
  float sum[2] = {};  // of weights of heads group and group + 8
  float out[4][2][4] = {};
};

// Replaces the warp's scores by weights relative to the new maxima of all warps, which it leaves to values.
template <typename T>
__device__ void weigh(Memory<T>& memory, float (&scores)[4], Running& running) {
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  for (int h = 0; h < 2; ++h) {
    float most = max_or_nan(scores[2 * h], scores[2 * h + 1]);
    for (int offset = 1; offset < 4; offset *= 2) most = max_or_nan(most, __shfl_xor_sync(~0u, most, offset));
    if (member == 0) memory.maxima[warp][group + 8 * h] = most;
  }
  __syncthreads();
  if (threadIdx.x < kHeads) {
    const float before = memory.maximum[threadIdx.x];
    float most = before;
    for (int w = 0; w < kWarps; ++w) most = max_or_nan(most, memory.maxima[w][threadIdx.x]);
    memory.maximum[threadIdx.x] = most;
    memory.shrink[threadIdx.x] = exp2_fast(before - most);
  }
  __syncthreads();
  for (int h = 0; h < 2; ++h) {
    const int head = group + 8 * h;
    const float most = memory.maximum[head];
    const float first = exp2_fast(scores[2 * h] - most), second = exp2_fast(scores[2 * h + 1] - most);
    running.sum[h] = running.sum[h] * memory.shrink[head] + (first + second);
    T* target = &memory.weights[head][8 * warp + 2 * member];
    target[0] = from_float<T>(first), target[1] = from_float<T>(second);
  }
  __syncthreads();
}

// out += values weights, over the tile's positions from `first` on.
template <typename T>
__device__ void add_values(const Sequence<T>& sequence, int first, const Memory<T>& memory, Running& running) {
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4, at = threadIdx.x / 32 * kSlice + 8 * group;
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half)
      for (int e = 0; e < 4; ++e) running.out[i][half][e] *= memory.shrink[8 * half + 2 * member + e % 2];
#pragma unroll
  for (int chunk = 0; chunk < kTile / 16; ++chunk) {
    uint4 rows[4];
    for (int r = 0; r < 4; ++r) {
      const int position = first + 16 * chunk + 2 * member + r % 2 + r / 2 * 8;
      rows[r] = position < sequence.length ? *reinterpret_cast<const uint4*>(sequence.key(position) + at) : uint4{};
    }
    uint32_t weights[2][2];
    for (int half = 0; half < 2; ++half)
      for (int part = 0; part < 2; ++part)
        weights[half][part] = *reinterpret_cast<const uint32_t*>(
            &memory.weights[group + 8 * half][16 * chunk + 2 * member + 8 * part]);
    const auto word = [&](int r, int i) { return reinterpret_cast<const uint32_t*>(&rows[r])[i / 2]; };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t order = i % 2 ? 0x7632 : 0x5410;
      const uint32_t values[4] = {
          __byte_perm(word(0, i), word(1, i), order), __byte_perm(word(0, i + 4), word(1, i + 4), order),
          __byte_perm(word(2, i), word(3, i), order), __byte_perm(word(2, i + 4), word(3, i + 4), order)};
      for (int half = 0; half < 2; ++half)
        mma_16x8x16<T>(running.out[i][half], values, weights[half][0], weights[half][1]);
    }
  }
}

// Leaves the block's sums where the cluster's other blocks read them.
template <typename T>
__device__ void leave(const Running& running, Memory<T>& memory) {
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  for (int h = 0; h < 2; ++h) {
    float sum = running.sum[h];
    for (int offset = 1; offset < 4; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (member == 0) memory.sums[warp][group + 8 * h] = sum;
  }
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half)
      for (int e = 0; e < 4; ++e)
        memory.out[8 * half + 2 * member + e % 2][warp * kSlice + 8 * group + i + e / 2 * 4] = running.out[i][half][e];
  __syncthreads();
  if (threadIdx.x < kHeads) {
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += memory.sums[w][threadIdx.x];
    memory.sum[threadIdx.x] = sum;
  }
}

__device__ inline float of_block(const float& value, int rank) {
  return gridDim.x > 1 ? read_cluster_float(smem_address(&value), rank) : value;
}

__device__ inline float4 four_of_block(const float* values, int rank) {
  return gridDim.x > 1 ? read_cluster_floats(smem_address(values), rank) : *reinterpret_cast<const float4*>(values);
}

// The weights of all blocks' sums, and the sum of all weights, of each head: one thread has one.
template <typename T>
__device__ void share_out(Memory<T>& memory) {
  const int head = threadIdx.x, splits = gridDim.x;
  if (head < kHeads) {
    float maxima[kMostSplits], sums[kMostSplits], most = kNothing, total = 0.f;
#pragma unroll
    for (int rank = 0; rank < kMostSplits; ++rank) {
      if (rank >= splits) continue;
      maxima[rank] = of_block(memory.maximum[head], rank);
      sums[rank] = of_block(memory.sum[head], rank);
    }
#pragma unroll
    for (int rank = 0; rank < kMostSplits; ++rank)
      if (rank < splits) most = max_or_nan(most, maxima[rank]);
#pragma unroll
    for (int rank = 0; rank < kMostSplits; ++rank) {
      if (rank >= splits) continue;
      const float weight = exp2_fast(maxima[rank] - most);
      total += weight * sums[rank];
      memory.shares[rank][head] = weight;
    }
    memory.totals[head] = total;
  }
  __syncthreads();
}

// Merges every splits-th four elements of the result from all blocks of the cluster, in their order.
template <typename T>
__device__ void merge(const LatentAttentionArgs& args, int row, int first_head, Memory<T>& memory) {
  constexpr int kFours = kRank / 4;
  const int splits = gridDim.x, heads = min(kHeads, args.heads - first_head);
  share_out<T>(memory);
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < heads * kFours; i += splits * kThreads) {
    const int head = i / kFours, at = i % kFours * 4;
    float4 parts[kMostSplits];
#pragma unroll
    for (int rank = 0; rank < kMostSplits; ++rank)
      if (rank < splits) parts[rank] = four_of_block(&memory.out[head][at], rank);
    float out[4] = {};
#pragma unroll
    for (int rank = 0; rank < kMostSplits; ++rank) {
      if (rank >= splits) continue;
      const float weight = memory.shares[rank][head];
      const float values[4] = {parts[rank].x, parts[rank].y, parts[rank].z, parts[rank].w};
      for (int e = 0; e < 4; ++e) out[e] += weight * values[e];
    }
    T results[4];
    for (int e = 0; e < 4; ++e) results[e] = from_float<T>(out[e] / memory.totals[head]);
    const int64_t index = (static_cast<int64_t>(first_head + head) * args.m + row) * kRank + at;
    *reinterpret_cast<uint2*>(static_cast<T*>(args.out) + index) = *reinterpret_cast<const uint2*>(results);
  }
}

// Asks L2 for the block's first positions, but for the newest, which is made here.
template <typename T>
__device__ void ask_for_first(const Sequence<T>& sequence) {
  const int position = blockIdx.x * kTile + threadIdx.x;
  if (threadIdx.x >= kTile || position >= sequence.length - 1) return;
  prefetch_bulk(sequence.key(position), kRank * sizeof(T));
  prefetch_bulk(sequence.turned(position), kTurned * sizeof(T));
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    latent_attention_kernel(const __grid_constant__ LatentAttentionArgs args) {
  LOWBIT_DYNAMIC_SHARED(uint8_t, bytes);
  Memory<T>& memory = *reinterpret_cast<Memory<T>*>(bytes);
  const int row = blockIdx.z, first_head = blockIdx.y * kHeads, length = static_cast<int>(args.positions[row]) + 1;
  const int64_t start = args.starts[row];
  const Sequence<T> sequence = {static_cast<const T*>(args.k) + start * kRank,
                                static_cast<const T*>(args.v) + start * kTurned, memory.newest, length};
  allow_next_kernel();
  if (threadIdx.x < kHeads) memory.maximum[threadIdx.x] = kNothing;
  ask_for_first(sequence);
  const float2 turn = read_turn(args, row);
  wait_for_previous_kernel();
  read_queries<T>(args, row, first_head, turn, memory);
  const bool owns = (length - 1) / kTile % gridDim.x == blockIdx.x;  // the block has the newest position
  if (owns) make_newest<T>(args, row, turn, memory);
  __syncthreads();
  if (owns && first_head == 0) store_newest<T>(args, start + length - 1, memory);
  Running running;
  for (int first = blockIdx.x * kTile; first < length; first += gridDim.x * kTile) {
    float scores[4];
    score<T>(args, sequence, first + threadIdx.x / 32 * 8, memory, scores);
    weigh<T>(memory, scores, running);
    add_values<T>(sequence, first, memory, running);
  }
  leave<T>(running, memory);
  if (gridDim.x > 1) cluster_sync();
  else __syncthreads();
  merge<T>(args, row, first_head, memory);
  if (gridDim.x > 1) cluster_sync();  // no block leaves while others read from it
}

}  // namespace

template <typename T>
cudaError_t launch_latent_attention(const LatentAttentionArgs& args, const LatentAttentionLaunch& launch,
                                    cudaStream_t stream) {
  if (launch.splits < 1 || launch.splits > kMostSplits || args.heads < 1) return cudaErrorInvalidValue;
  const LaunchPlan plan = {
      .device = launch.device,
      .stream = stream,
      .blocks = dim3(launch.splits, (args.heads + kHeads - 1) / kHeads, args.m),
      .threads = dim3(kThreads),
      .shared_bytes = sizeof(Memory<T>),
      .cluster = launch.splits > 1 ? launch.splits : 0,
      .dependent = launch.dependent,
  };
  return launch_kernel(latent_attention_kernel<T>, plan, args);
}

const Kernel latent_attention("latent_attention", {name_of<LOWBIT_T>}, launch_latent_attention<LOWBIT_T>);

}  // namespace lowbit
