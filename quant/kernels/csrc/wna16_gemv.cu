// Compiled once per (T, bits): LOWBIT_T and LOWBIT_BITS come from setup.py, so that the four build in parallel.
//
// Design. W's rows are the 16 rows of mma.m16n8k16's A operand and x's rows its 8 columns, so 1 to 8 rows of x cost
// the same. Each warp streams its own chunks (16 rows x 128 inputs) from global memory into registers, a refill
// following each use, so no barrier stands in the main loop. Warps split k, and blocks of a cluster split it further;
// partial sums meet in shared memory in a fixed order, so a result does not depend on timing. Only W's stream is
// started before the previous kernel has finished: W is constant, x is not.
//
// Tried and slower on one H100: a ring of shared memory filled by cp.async (more instructions per chunk), x copied to
// shared memory first (its latency stands before everything), x read a chunk ahead. docs/LOG.md has the figures, and
// what is still lost here: the compiler gives all refills one scoreboard, so the oldest waits for the newest.
#include "dequant.cuh"
#include "wna16_gemv.cuh"

namespace lowbit {
namespace {

constexpr int kMaxThreads = 256;

template <typename T_, int kBits_, bool kZeros_, int kGroups_, int kRowTiles_, int kColBlocks_>
struct Shape {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr bool kZeros = kZeros_;
  static constexpr int kGroups = kGroups_;        // scales per row and chunk
  static constexpr int kRowTiles = kRowTiles_;    // tiles per warp
  static constexpr int kColBlocks = kColBlocks_;  // blocks of 8 rows of x
  static constexpr int kLoads = kBits / 2;        // 16-byte loads of a lane that make a chunk
  // Loads of W on their way per lane: what 128 registers leave room for beside x and the sums.
  static constexpr int kRing = kColBlocks == 1 ? 12 : kColBlocks == 2 ? 8 : 4;
  static constexpr int kAhead = kRing >= 4 * kLoads * kRowTiles ? 4 : (kRing - 1) / (kLoads * kRowTiles) + 1;  // chunks
  static constexpr int kXBlocks = kColBlocks >= 4 ? 1 : 4 / kColBlocks;  // blocks of 32 inputs of x read together
  static constexpr int kMinBlocks = kColBlocks <= 2 ? 2 : 1;  // 128 registers a thread, or 255
};

// Which part of the problem a warp has: `tile` and those after it, every `step`-th chunk of [first, end).
struct Share {
  int tile, first, end, step;
  int group_tiles;  // tiles that the block's cluster computes
};

template <typename S>
__device__ Share share_of(const Wna16GemvArgs& args) {
  Share share;
  share.group_tiles = blockDim.y * S::kRowTiles;
  share.tile = blockIdx.y * share.group_tiles + threadIdx.y * S::kRowTiles;
  share.first = (args.chunks * blockIdx.x) / gridDim.x + threadIdx.z;
  share.end = (args.chunks * (blockIdx.x + 1)) / gridDim.x;
  share.step = blockDim.z;
  return share;
}

// A lane's part of one chunk of one tile.
template <typename S>
struct Chunk {
  uint4 words[S::kLoads];
  uint32_t scales[S::kGroups];  // rows g and g + 8
  uint16_t zeros[S::kGroups];
};

// Reads a warp's chunks of one tile in order. Pointers are the lane's own.
template <typename S>
struct Stream {
  const uint4* words;
  const uint32_t* scales;
  const uint16_t* zeros;

  __device__ void open(const Wna16GemvArgs& args, int tile, int lane) {
    // The last group of tiles may reach past the last one: it reads that one again, and nothing is stored.
    tile = min(tile, args.tiles - 1);
    words = static_cast<const uint4*>(args.words) + static_cast<int64_t>(tile) * args.chunks * (S::kLoads * 32) + lane;
    const int64_t side = (static_cast<int64_t>(tile) * args.scale_rows * 8 + lane / 4) * S::kGroups;
    scales = static_cast<const uint32_t*>(args.scales) + side;
    zeros = static_cast<const uint16_t*>(args.zeros) + side;
  }

  __device__ void read_words(int chunk, int load, Chunk<S>& into) const {
    into.words[load] = read_once(words + chunk * (S::kLoads * 32) + load * 32);
  }

  __device__ void read_sides(int chunk, int shift, Chunk<S>& into) const {
    const int row = (chunk >> shift) * (8 * S::kGroups);
#pragma unroll
    for (int group = 0; group < S::kGroups; ++group) {
      into.scales[group] = __ldg(scales + row + group);
      if (S::kZeros) into.zeros[group] = __ldg(zeros + row + group);
    }
  }
};

// Rows of x in shared memory are this far apart: 64 bytes more than a multiple of 128, so that the eight lanes that
// read together, four from each of two rows, touch all banks once.
__host__ __device__ inline int staged_pitch(int chunks) { return chunks * kChunkK * 2 + 64; }

// Chunks of the block of a cluster that has most of them.
__host__ __device__ inline int largest_slice(int chunks, int cluster) { return (chunks + cluster - 1) / cluster; }

// A block is 32 lanes x row warps x k warps: no index below needs a division.
__device__ inline int warp_of_block() { return threadIdx.z * blockDim.y + threadIdx.y; }
__device__ inline int thread_of_block() { return warp_of_block() * 32 + threadIdx.x; }
__device__ inline int threads_of_block() { return 32 * blockDim.y * blockDim.z; }

// Mean (0 for RMS) and 1 / deviation of each row of x, float32, one warp a row.
template <typename T>
__device__ void norm_statistics(const Wna16GemvArgs& args, float2* statistics) {
  const int lane = threadIdx.x;
  for (int row = warp_of_block(); row < args.m; row += blockDim.y * blockDim.z) {
    const T* x = static_cast<const T*>(args.x) + static_cast<int64_t>(row) * args.k;
    float mean = 0.f;
    for (int pass = args.norm == Norm::kLayer ? 0 : 1; pass < 2; ++pass) {
      float sum = 0.f;
      for (int i = lane * 8; i < args.k; i += 256) {
        const uint4 raw = __ldcg(reinterpret_cast<const uint4*>(x + i));
        const T* values = reinterpret_cast<const T*>(&raw);
        for (int j = 0; j < 8; ++j) {
          const float value = to_float(values[j]) - mean;
          sum += pass == 0 ? value : value * value;
        }
      }
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
      if (pass == 0) mean = sum / args.k;
      else if (lane == 0) statistics[row] = make_float2(mean, rsqrtf(sum / args.k + args.norm_eps));
    }
  }
}

template <typename T>
__device__ uint4 normalized(const Wna16GemvArgs& args, uint4 raw, float2 statistics, int k) {
  T* values = reinterpret_cast<T*>(&raw);
  for (int j = 0; j < 8; ++j) {
    float value = (to_float(values[j]) - statistics.x) * statistics.y;
    value *= to_float(static_cast<const T*>(args.norm_weight)[k + j]);
    if (args.norm_bias != nullptr) value += to_float(static_cast<const T*>(args.norm_bias)[k + j]);
    values[j] = from_float<T>(value);
  }
  return raw;
}

// The block's inputs, chunks [begin, end) of every row of x, to shared memory, normalized where asked.
template <typename T>
__device__ void stage_x(const Wna16GemvArgs& args, int begin, int end, uint8_t* x_smem, const float2* statistics) {
  const int vectors = (end - begin) * (kChunkK / 8);
  for (int row = 0; row < args.m; ++row) {
    const T* x = static_cast<const T*>(args.x) + static_cast<int64_t>(row) * args.k + begin * kChunkK;
    uint8_t* target = x_smem + row * staged_pitch(largest_slice(args.chunks, gridDim.x));
    for (int i = thread_of_block(); i < vectors; i += threads_of_block()) {
      uint4 value = __ldcg(reinterpret_cast<const uint4*>(x) + i);
      if (args.norm != Norm::kNone) value = normalized<T>(args, value, statistics[row], begin * kChunkK + i * 8);
      *reinterpret_cast<uint4*>(target + i * 16) = value;
    }
  }
}

template <typename S>
using Sums = float[S::kRowTiles][S::kColBlocks][4];

template <typename S>
using Chunks = Chunk<S>[S::kRowTiles];

template <typename T>
__device__ float2 halves_of(uint32_t bits) {
  const T* values = reinterpret_cast<const T*>(&bits);
  return make_float2(to_float(values[0]), to_float(values[1]));
}

// Zero point of row g (half 0) or g + 8 (half 1), as expand() wants it.
template <typename S>
__device__ auto zeros_of(const Chunk<S>& chunk, int group, int half) {
  int zero = 1 << (S::kBits - 1);
  if (S::kZeros) zero = chunk.zeros[group] >> (8 * half) & 0xff;
  return Dequant<typename S::T, S::kBits>::zeros_of(zero);
}

// The lane's 8 inputs of a block of x, for each 8 columns, in the order that expand() gives the weights.
template <typename S>
using XBlock = uint4[S::kColBlocks];

// x as a lane reads it, through L1: from global memory, or from the copy that a norm made in shared memory.
template <typename S>
struct LaneX {
  const uint8_t* lane;
  int row_offsets[S::kColBlocks];

  __device__ LaneX(const uint8_t* x, int pitch, int m) : lane(x + threadIdx.x % 4 * 16) {
    for (int j = 0; j < S::kColBlocks; ++j)
      row_offsets[j] = min(j * 8 + static_cast<int>(threadIdx.x) / 4, m - 1) * pitch;  // columns past m are dropped
  }
  // kXBlocks blocks at once: left alone, the compiler puts each read beside its use, and every block waits for L1.
  __device__ void read(int chunk, int block, XBlock<S> (&values)[S::kXBlocks]) const {
    const uint8_t* first = lane + chunk * (kChunkK * 2) + block * 64;
#pragma unroll
    for (int b = 0; b < S::kXBlocks; ++b)
      for (int j = 0; j < S::kColBlocks; ++j) values[b][j] = read_cached(first + row_offsets[j] + b * 64);
  }
};

// products += (codes - zeros) x for 16 rows and 32 inputs: `words` holds row g's codes, then row g + 8's.
template <typename S, typename Zeros>
__device__ void multiply_block(const uint32_t* words, const Zeros (&zeros)[2], const XBlock<S>& x,
                               float (&products)[S::kColBlocks][4]) {
  using D = Dequant<typename S::T, S::kBits>;
  uint32_t top[4], bottom[4];
  D::expand(words, zeros[0], top);
  D::expand(words + D::kWords, zeros[1], bottom);
  const uint32_t first[4] = {top[0], bottom[0], top[1], bottom[1]};
  const uint32_t second[4] = {top[2], bottom[2], top[3], bottom[3]};
#pragma unroll
  for (int j = 0; j < S::kColBlocks; ++j) {
    mma_16x8x16<typename S::T>(products[j], first, x[j].x, x[j].y);
    mma_16x8x16<typename S::T>(products[j], second, x[j].z, x[j].w);
  }
}

// sums += scale * (codes - zeros) x for one chunk; the scale is applied in float32 once a group is summed. Each load's
// registers are refilled from chunk `next` as soon as they are used up.
template <typename S>
__device__ void multiply_chunk(Chunks<S>& chunks, const Stream<S>* streams, int current, int next, bool refill,
                               const LaneX<S>& lane_x, Sums<S>& sums) {
  using D = Dequant<typename S::T, S::kBits>;
  constexpr int kBlocks = kChunkK / 32 / S::kGroups;  // of 32 inputs, in a group
  constexpr int kBlocksPerLoad = 8 / S::kBits;        // whose codes are in a lane's 16 bytes
  XBlock<S> x[S::kXBlocks];
#pragma unroll
  for (int group = 0; group < S::kGroups; ++group) {
    Sums<S> products = {};
    decltype(D::zeros_of(0)) zeros[S::kRowTiles][2];
#pragma unroll
    for (int i = 0; i < 2 * S::kRowTiles; ++i) zeros[i / 2][i % 2] = zeros_of<S>(chunks[i / 2], group, i % 2);
#pragma unroll
    for (int block = group * kBlocks; block < (group + 1) * kBlocks; ++block) {
      if (block % S::kXBlocks == 0) lane_x.read(current, block, x);
#pragma unroll
      for (int i = 0; i < S::kRowTiles; ++i) {
        uint4& load = chunks[i].words[block / kBlocksPerLoad];
        const uint32_t* words = reinterpret_cast<const uint32_t*>(&load) + block % kBlocksPerLoad * 2 * D::kWords;
        multiply_block<S>(words, zeros[i], x[block % S::kXBlocks], products[i]);
        if (refill && (block + 1) % kBlocksPerLoad == 0)
          streams[i].read_words(next, block / kBlocksPerLoad, chunks[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) {
      const float2 scales = halves_of<typename S::T>(chunks[i].scales[group]);
#pragma unroll
      for (int e = 0; e < S::kColBlocks * 4; ++e)
        sums[i][e / 4][e % 4] += (e % 4 < 2 ? scales.x : scales.y) * products[i][e / 4][e % 4];
    }
  }
}

// x where this block reads it: its shared memory, after staging, or global memory.
template <typename S>
__device__ LaneX<S> prepare_x(const Wna16GemvArgs& args, const Share& share, uint8_t* free_smem) {
  if (!args.stage_x) return LaneX<S>(static_cast<const uint8_t*>(args.x), args.k * 2, args.m);
  const int begin = share.first - threadIdx.z;
  float2* statistics = reinterpret_cast<float2*>(free_smem);
  uint8_t* staged = free_smem + (args.m + 1) / 2 * 16;
  if (args.norm != Norm::kNone) norm_statistics<typename S::T>(args, statistics);
  __syncthreads();
  stage_x<typename S::T>(args, begin, share.end, staged, statistics);
  __syncthreads();
  return LaneX<S>(staged - begin * (kChunkK * 2), staged_pitch(largest_slice(args.chunks, gridDim.x)), args.m);
}

// A warp's sums to shared memory: partial[k warp][column of y][row of the group].
template <typename S>
__device__ void store_partial(int group_tiles, int m, const Sums<S>& sums, float* partial) {
  const int rows = group_tiles * kTileRows;
  const int lane = threadIdx.x;
#pragma unroll
  for (int i = 0; i < S::kRowTiles; ++i) {
#pragma unroll
    for (int e = 0; e < S::kColBlocks * 4; ++e) {
      const int row = (threadIdx.y * S::kRowTiles + i) * kTileRows + lane / 4 + (e % 4 / 2) * 8;
      const int column = e / 4 * 8 + (lane % 4) * 2 + e % 2;
      if (column < m) partial[(threadIdx.z * m + column) * rows + row] = sums[i][e / 4][e % 4];
    }
  }
}

// The sum over the block's k warps of partial[index], in warp order.
__device__ inline float sum_over_warps(const float* partial, int count, int index) {
  float sum = partial[index];
  for (int warp = 1; warp < blockDim.z; ++warp) sum += partial[warp * count + index];
  return sum;
}

// The sum over the cluster's blocks of totals[index], in rank order.
__device__ inline float sum_over_cluster(const float* totals, int index) {
  float sum = totals[index];
  for (int rank = 1; rank < gridDim.x; ++rank) sum += read_cluster_float(smem_address(totals + index), rank);
  return sum;
}

__device__ inline float silu(float value) { return value / (1.f + __expf(-value)); }

__device__ inline float activate(Activation activation, float value) {
  switch (activation) {
    case Activation::kGelu: return 0.5f * value * (1.f + erff(value * 0.70710678f));
    case Activation::kGeluTanh:
      return 0.5f * value * (1.f + tanhf(0.79788456f * (value + 0.044715f * value * value * value)));
    case Activation::kQuickGelu: return value / (1.f + __expf(-1.702f * value));
    default: return value;
  }
}

// Two rows of W that share a lane: `low` is the first one's index, `high` the other's.
struct Pair {
  int low, high, column;
  float low_sum, high_sum;
};

template <typename T>
__device__ float half_at(const void* values, int64_t index) {
  return to_float(static_cast<const T*>(values)[index]);
}

template <typename T>
__device__ void store_element(const Wna16GemvArgs& args, int column, int row, float sum) {
  if (row >= args.n) return;
  if (args.bias != nullptr) sum += half_at<T>(args.bias, row);
  float value = activate(args.activation, sum);
  const int64_t index = static_cast<int64_t>(column) * args.n + row;
  if (args.residual != nullptr) value += half_at<T>(args.residual, index);
  if (args.float32_out) static_cast<float*>(args.y)[index] = value;
  else static_cast<T*>(args.y)[index] = from_float<T>(value);
}

// silu(gate) * up: the gate's rows are the lower half of W.
template <typename T>
__device__ void store_gated(const Wna16GemvArgs& args, Pair pair) {
  if (args.bias != nullptr) {
    pair.low_sum += half_at<T>(args.bias, pair.low);
    pair.high_sum += half_at<T>(args.bias, pair.high);
  }
  const int64_t index = static_cast<int64_t>(pair.column) * (args.n / 2) + pair.low;
  static_cast<T*>(args.y)[index] = from_float<T>(silu(pair.low_sum) * pair.high_sum);
}

// Rotates q and k by their position and writes q to y, k and v to the caches. Heads of W: q, then k, then v.
template <typename T>
__device__ void store_rotated(const Wna16GemvArgs& args, Pair pair) {
  if (args.bias != nullptr) {
    pair.low_sum += half_at<T>(args.bias, pair.low);
    pair.high_sum += half_at<T>(args.bias, pair.high);
  }
  const int head = pair.low / args.pair_block;
  const int half = args.pair_block / 2;
  const int d = pair.low % args.pair_block;
  if (head < args.q_heads + args.kv_heads) {
    const int64_t angle = args.positions[pair.column] * half + d;
    const float cosine = args.cosines[angle], sine = args.sines[angle];
    const float low = pair.low_sum * cosine - pair.high_sum * sine;
    pair.high_sum = pair.high_sum * cosine + pair.low_sum * sine;
    pair.low_sum = low;
  }
  T* target = static_cast<T*>(args.y) + (static_cast<int64_t>(pair.column) * args.q_heads + head) * args.pair_block;
  if (head >= args.q_heads) {
    const int kv_head = (head - args.q_heads) % args.kv_heads;
    void* cache = head < args.q_heads + args.kv_heads ? args.k_cache : args.v_cache;
    target = static_cast<T*>(cache) + (args.slots[pair.column] * args.kv_heads + kv_head) * args.pair_block;
  }
  target[d] = from_float<T>(pair.low_sum);
  target[d + half] = from_float<T>(pair.high_sum);
}

template <typename T>
__device__ void store_pair(const Wna16GemvArgs& args, const Pair& pair) {
  if (args.positions != nullptr) return store_rotated<T>(args, pair);
  if (args.activation == Activation::kSiluMul) return store_gated<T>(args, pair);
  store_element<T>(args, pair.column, pair.low, pair.low_sum);
  store_element<T>(args, pair.column, pair.high, pair.high_sum);
}

// The group's results to y: `sum_of(index)` is the finished sum of [column of y][row of the group].
template <typename T, typename SumOf>
__device__ void store_group(const Wna16GemvArgs& args, int group_tiles, SumOf sum_of) {
  const int rows = group_tiles * kTileRows;
  const int block_tiles = args.pair_block / kTileRows;
  const int pairs = group_tiles * 8;  // per column: a power of two
  for (int i = thread_of_block(); i < pairs * args.m; i += threads_of_block()) {
    const int column = i >> (__ffs(pairs) - 1);
    const int local = (i & (pairs - 1)) / 8;
    const int tile = blockIdx.y * group_tiles + local;
    if (tile >= args.tiles) continue;
    Pair pair;
    pair.column = column;
    pair.low = tile / block_tiles * args.pair_block + tile % block_tiles * 8 + i % 8;
    pair.high = pair.low + args.pair_block / 2;
    const int index = column * rows + local * kTileRows + i % 8;
    pair.low_sum = sum_of(index);
    pair.high_sum = sum_of(index + 8);
    store_pair<T>(args, pair);
  }
}

// Sums over warps and cluster, then the epilogue. `partial` holds the warps' sums, with room for one more set behind.
template <typename T>
__device__ void finish_group(const Wna16GemvArgs& args, int group_tiles, float* partial) {
  const int count = group_tiles * kTileRows * args.m;
  __syncthreads();
  if (gridDim.x == 1) {
    store_group<T>(args, group_tiles, [&](int index) { return sum_over_warps(partial, count, index); });
    return;
  }
  float* totals = partial + blockDim.z * count;
  for (int i = thread_of_block(); i < count; i += threads_of_block()) totals[i] = sum_over_warps(partial, count, i);
  __syncthreads();  // orders nothing that the next line does not, but racecheck knows no cluster barriers
  cluster_sync();
  if (blockIdx.x == 0) store_group<T>(args, group_tiles, [&](int index) { return sum_over_cluster(totals, index); });
  cluster_sync();  // no block leaves while rank 0 reads from it
}

template <typename S>
__global__ void __launch_bounds__(kMaxThreads, S::kMinBlocks)
    wna16_gemv_kernel(const __grid_constant__ Wna16GemvArgs args) {
  using T = typename S::T;
  extern __shared__ __align__(128) uint8_t smem[];
  const Share share = share_of<S>(args);
  const int lane = threadIdx.x;
  const int count = share.group_tiles * kTileRows * args.m;
  float* partial = reinterpret_cast<float*>(smem);

  allow_next_kernel();
  Stream<S> streams[S::kRowTiles];
  for (int i = 0; i < S::kRowTiles; ++i) streams[i].open(args, share.tile + i, lane);
  Chunks<S> chunks[S::kAhead];
#pragma unroll
  for (int a = 0; a < S::kAhead; ++a) {
    const int chunk = share.first + a * share.step;
    if (chunk >= share.end) break;
    for (int i = 0; i < S::kRowTiles; ++i) {
      for (int load = 0; load < S::kLoads; ++load) streams[i].read_words(chunk, load, chunks[a][i]);
      streams[i].read_sides(chunk, args.scale_shift, chunks[a][i]);
    }
  }
  wait_for_previous_kernel();

  const LaneX<S> x = prepare_x<S>(args, share, smem + count * (blockDim.z + 1) * 4);
  Sums<S> sums = {};
  for (int chunk = share.first; chunk < share.end; chunk += S::kAhead * share.step) {
#pragma unroll
    for (int a = 0; a < S::kAhead; ++a) {
      const int current = chunk + a * share.step;
      if (current >= share.end) break;
      const int next = current + S::kAhead * share.step;
      multiply_chunk<S>(chunks[a], streams, current, next, next < share.end, x, sums);
      if (next < share.end)
        for (int i = 0; i < S::kRowTiles; ++i) streams[i].read_sides(next, args.scale_shift, chunks[a][i]);
    }
  }
  store_partial<S>(share.group_tiles, args.m, sums, partial);
  finish_group<T>(args, share.group_tiles, partial);
}

template <typename S>
cudaError_t launch_shape(const Wna16GemvArgs& args, const Wna16GemvLaunch& launch, cudaStream_t stream) {
  const int group_tiles = launch.row_warps * S::kRowTiles;
  if (launch.row_warps * launch.k_warps * 32 > kMaxThreads) return cudaErrorInvalidConfiguration;
  size_t bytes = size_t(group_tiles) * kTileRows * args.m * (launch.k_warps + 1) * 4;
  const int slice = largest_slice(args.chunks, launch.cluster);
  if (args.stage_x) bytes += (args.m + 1) / 2 * 16 + size_t(args.m) * staged_pitch(slice);
  auto kernel = wna16_gemv_kernel<S>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(launch.cluster, (args.tiles + group_tiles - 1) / group_tiles);
  config.blockDim = dim3(32, launch.row_warps, launch.k_warps);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (launch.dependent) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (launch.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {unsigned(launch.cluster), 1, 1};
    ++config.numAttrs;
  }
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <typename T, int kBits, bool kZeros, int kGroups>
cudaError_t launch_groups(const Wna16GemvArgs& args, const Wna16GemvLaunch& launch, cudaStream_t stream) {
  const int columns = args.m <= 8 ? 8 : args.m <= 16 ? 16 : args.m <= 32 ? 32 : 64;
  switch (columns * 10 + launch.row_tiles) {
    case 81: return launch_shape<Shape<T, kBits, kZeros, kGroups, 1, 1>>(args, launch, stream);
    case 82: return launch_shape<Shape<T, kBits, kZeros, kGroups, 2, 1>>(args, launch, stream);
    case 161: return launch_shape<Shape<T, kBits, kZeros, kGroups, 1, 2>>(args, launch, stream);
    case 162: return launch_shape<Shape<T, kBits, kZeros, kGroups, 2, 2>>(args, launch, stream);
    case 322: return launch_shape<Shape<T, kBits, kZeros, kGroups, 2, 4>>(args, launch, stream);
    case 642: return launch_shape<Shape<T, kBits, kZeros, kGroups, 2, 8>>(args, launch, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <typename T, int kBits, bool kZeros>
cudaError_t launch_zeros(const Wna16GemvArgs& args, const Wna16GemvLaunch& launch, cudaStream_t stream) {
  switch (launch.groups_per_chunk) {
    case 1: return launch_groups<T, kBits, kZeros, 1>(args, launch, stream);
    case 2: return launch_groups<T, kBits, kZeros, 2>(args, launch, stream);
    case 4: return launch_groups<T, kBits, kZeros, 4>(args, launch, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

template <typename T, int kBits>
cudaError_t launch_wna16_gemv(const Wna16GemvArgs& args, const Wna16GemvLaunch& launch, cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(launch.device);
  if (error != cudaSuccess) return error;
  return args.zeros == nullptr ? launch_zeros<T, kBits, false>(args, launch, stream)
                               : launch_zeros<T, kBits, true>(args, launch, stream);
}

template cudaError_t launch_wna16_gemv<LOWBIT_T, LOWBIT_BITS>(const Wna16GemvArgs&, const Wna16GemvLaunch&,
                                                              cudaStream_t);

}  // namespace lowbit
