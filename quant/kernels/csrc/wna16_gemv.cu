// Compiled once per (T, bits): LOWBIT_T and LOWBIT_BITS come from setup.py, so that the four build in parallel.
//
// Design. W's rows are the 16 rows of mma.m16n8k16's A operand and x's rows its 8 columns, so 1 to 8 rows of x cost
// the same. Each warp streams its own chunks (16 rows x 128 inputs) through a private ring in shared memory with
// cp.async: no barrier stands in the main loop. Warps split k, and blocks of a cluster split it further; partial sums
// meet in shared memory in a fixed order, so a result does not depend on timing. Only W's stream is started before the
// previous kernel has finished: W is constant, x is not.
#include "dequant.cuh"
#include "wna16_gemv.cuh"

namespace lowbit {
namespace {

template <typename T_, int kBits_, int kGroups_, int kRowTiles_, int kColBlocks_>
struct Shape {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr int kGroups = kGroups_;        // scales per row and chunk
  static constexpr int kRowTiles = kRowTiles_;    // tiles per warp
  static constexpr int kColBlocks = kColBlocks_;  // blocks of 8 rows of x
  static constexpr int kWeightBytes = kTileRows * kChunkK * kBits / 8;
  static constexpr int kScaleBytes = kTileRows * kGroups * 2;
  static constexpr int kZeroBytes = kTileRows * kGroups;
  static constexpr int kTileBytes = kWeightBytes + kScaleBytes + kZeroBytes;
  static constexpr int kSlotBytes = kRowTiles * kTileBytes;
  // About 4 KB of weights per warp on their way: 5 slots of 1 KB or 3 of 2 KB and more.
  static constexpr int kStages = kWeightBytes * kRowTiles <= 1024 ? 5 : 3;
};

// Which part of the problem a warp has: tiles of the row group, and every `chunk_step`-th chunk of [begin, end).
struct Share {
  int lane, row_warp, k_warp, k_warps;
  int group, group_step, groups;  // row groups: what one cluster computes at a time
  int group_tiles;                // tiles in a row group
  int tiles, chunks;
  int begin, end;                 // chunks of this block
};

__device__ inline Share share_of(const Wna16GemvArgs& args, const Wna16GemvLaunch& launch) {
  Share share;
  const int warp = threadIdx.x / 32;
  const int rank = blockIdx.x % launch.cluster;
  share.lane = threadIdx.x % 32;
  share.row_warp = warp % launch.row_warps;
  share.k_warp = warp / launch.row_warps;
  share.k_warps = blockDim.x / 32 / launch.row_warps;
  share.tiles = (args.n + kTileRows - 1) / kTileRows;
  share.chunks = (args.k + kChunkK - 1) / kChunkK;
  share.group_tiles = launch.row_warps * launch.row_tiles;
  share.group = blockIdx.x / launch.cluster;
  share.group_step = launch.blocks;
  share.groups = (share.tiles + share.group_tiles - 1) / share.group_tiles;
  share.begin = share.chunks * rank / launch.cluster;
  share.end = share.chunks * (rank + 1) / launch.cluster;
  return share;
}

// A warp's ring of slots in shared memory, and the position of the next chunk to ask for.
template <typename S>
struct Stream {
  const Wna16GemvArgs& args;
  const Share& share;
  uint8_t* slots;
  int group, chunk, fill_slot, read_slot;

  __device__ Stream(const Wna16GemvArgs& args, const Share& share, uint8_t* slots)
      : args(args), share(share), slots(slots), group(share.group), chunk(share.begin + share.k_warp), fill_slot(0),
        read_slot(0) {}

  // Asks for one chunk of each of the warp's tiles; an empty group once the work is all asked for.
  __device__ void fetch() {
    if (group < share.groups && chunk < share.end) {
      for (int i = 0; i < S::kRowTiles; ++i) fetch_tile(i);
      chunk += share.k_warps;
      if (chunk >= share.end) {
        chunk = share.begin + share.k_warp;
        group += share.group_step;
      }
    }
    copy_async_commit();
    fill_slot = fill_slot + 1 == S::kStages ? 0 : fill_slot + 1;
  }

  __device__ void fetch_tile(int i) {
    // The last row group may reach past the last tile: it reads that one again, and nothing is stored.
    const int tile = min(group * share.group_tiles + share.row_warp * S::kRowTiles + i, share.tiles - 1);
    const uint32_t slot = smem_address(slots + fill_slot * S::kSlotBytes + i * S::kTileBytes);
    const int64_t index = static_cast<int64_t>(tile) * share.chunks + chunk;
    const uint8_t* words = static_cast<const uint8_t*>(args.words) + index * S::kWeightBytes;
    for (int load = 0; load < S::kWeightBytes / 512; ++load) {
      const int offset = load * 512 + share.lane * 16;
      copy_async_16(slot + offset, words + offset);
    }
    const int64_t row = static_cast<int64_t>(tile) * args.scale_rows + (chunk >> args.scale_shift);
    const int side = share.lane * 16;
    if (side < S::kScaleBytes)
      copy_async_16(slot + S::kWeightBytes + side,
                    static_cast<const uint8_t*>(args.scales) + row * S::kScaleBytes + side);
    if (args.zeros != nullptr && side < S::kZeroBytes)
      copy_async_16(slot + S::kWeightBytes + S::kScaleBytes + side,
                    static_cast<const uint8_t*>(args.zeros) + row * S::kZeroBytes + side);
  }

  // The oldest slot, arrived and visible to the whole warp; the slot before it is refilled.
  __device__ const uint8_t* next() {
    copy_async_wait<S::kStages - 2>();
    __syncwarp();
    const uint8_t* slot = slots + read_slot * S::kSlotBytes;
    read_slot = read_slot + 1 == S::kStages ? 0 : read_slot + 1;
    fetch();
    return slot;
  }
};

// Rows of x in shared memory are this far apart: 64 bytes more than a multiple of 128, so that the eight lanes that
// read together, four from each of two rows, touch all banks once.
__host__ __device__ inline int x_pitch(int chunks) { return chunks * kChunkK * 2 + 64; }

// Mean (0 for RMS) and 1 / deviation of each row of x, float32, one warp a row.
template <typename T>
__device__ void norm_statistics(const Wna16GemvArgs& args, float2* statistics) {
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < args.m; row += kThreads / 32) {
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

// Inputs [begin, end) chunks of every row of x to shared memory, normalized where asked; zeros past k.
// x is read past L1: the previous kernel may have left an older copy of it there.
template <typename T>
__device__ void stage_x(const Wna16GemvArgs& args, int begin, int end, uint8_t* x_smem, const float2* statistics) {
  const int vectors = (end - begin) * (kChunkK / 8);
  const int pitch = x_pitch(end - begin);
  for (int i = threadIdx.x; i < args.m * vectors; i += kThreads) {
    const int row = i / vectors;
    const int column = i - row * vectors;
    const int k = begin * kChunkK + column * 8;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (k < args.k) {
      value = __ldcg(reinterpret_cast<const uint4*>(static_cast<const T*>(args.x) + int64_t(row) * args.k + k));
      if (args.norm != Norm::kNone) value = normalized<T>(args, value, statistics[row], k);
    }
    *reinterpret_cast<uint4*>(x_smem + row * pitch + column * 16) = value;
  }
}

template <typename S>
using Sums = float[S::kRowTiles][S::kColBlocks][4];

// The two scales (rows g and g + 8) of group `group` of the chunk, as float32.
template <typename S>
__device__ float2 scales_of(const uint8_t* tile, int lane, int group) {
  using T = typename S::T;
  const T* scales = reinterpret_cast<const T*>(tile + S::kWeightBytes) + ((lane / 4) * S::kGroups + group) * 2;
  return make_float2(to_float(scales[0]), to_float(scales[1]));
}

template <typename S>
__device__ auto zeros_of(const Wna16GemvArgs& args, const uint8_t* tile, int lane, int group, int half) {
  int zero = 1 << (S::kBits - 1);
  if (args.zeros != nullptr)
    zero = tile[S::kWeightBytes + S::kScaleBytes + ((lane / 4) * S::kGroups + group) * 2 + half];
  return Dequant<typename S::T, S::kBits>::zeros_of(zero);
}

// Eight columns of x a block: the lane's 8 inputs of each, in the order that expand() gives the weights.
template <typename S>
__device__ void load_x(const uint8_t* x_lane, int pitch, int last_row, int lane, uint4 (&values)[S::kColBlocks]) {
#pragma unroll
  for (int j = 0; j < S::kColBlocks; ++j) {
    const int row = min(j * 8 + lane / 4, last_row);  // columns past m are computed and dropped
    values[j] = *reinterpret_cast<const uint4*>(x_lane + row * pitch);
  }
}

// products += (codes - zeros) x for 16 rows and 32 inputs: `words` holds row g's codes, then row g + 8's.
template <typename S, typename Zeros>
__device__ void multiply_block(const uint32_t* words, const Zeros (&zeros)[2], const uint4 (&x)[S::kColBlocks],
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

// sums += scale * (codes - zeros) x for one chunk. The scale is applied in float32 once a group is summed.
template <typename S>
__device__ void multiply_chunk(const Wna16GemvArgs& args, const uint8_t* slot, const uint8_t* x, int pitch, int lane,
                               Sums<S>& sums) {
  using D = Dequant<typename S::T, S::kBits>;
  constexpr int kBlocks = kChunkK / 32 / S::kGroups;   // of 32 inputs, in a group
  constexpr int kBlocksPerLoad = 8 / S::kBits;         // whose codes are in a lane's 16 bytes
  uint4 raw[S::kRowTiles], x_values[S::kColBlocks];
#pragma unroll
  for (int group = 0; group < S::kGroups; ++group) {
    Sums<S> products = {};
    decltype(D::zeros_of(0)) zeros[S::kRowTiles][2];
#pragma unroll
    for (int i = 0; i < 2 * S::kRowTiles; ++i)
      zeros[i / 2][i % 2] = zeros_of<S>(args, slot + i / 2 * S::kTileBytes, lane, group, i % 2);
#pragma unroll
    for (int block = group * kBlocks; block < (group + 1) * kBlocks; ++block) {
      load_x<S>(x + block * 64 + lane % 4 * 16, pitch, args.m - 1, lane, x_values);
#pragma unroll
      for (int i = 0; i < S::kRowTiles; ++i) {
        if (block % kBlocksPerLoad == 0)
          raw[i] = reinterpret_cast<const uint4*>(slot + i * S::kTileBytes)[block / kBlocksPerLoad * 32 + lane];
        const uint32_t* words = reinterpret_cast<const uint32_t*>(&raw[i]) + block % kBlocksPerLoad * 2 * D::kWords;
        multiply_block<S>(words, zeros[i], x_values, products[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) {
      const float2 scales = scales_of<S>(slot + i * S::kTileBytes, lane, group);
#pragma unroll
      for (int e = 0; e < S::kColBlocks * 4; ++e)
        sums[i][e / 4][e % 4] += (e % 4 < 2 ? scales.x : scales.y) * products[i][e / 4][e % 4];
    }
  }
}

// A warp's sums to shared memory: partial[k_warp][column of y][row of the group].
template <typename S>
__device__ void store_partial(const Share& share, int m, const Sums<S>& sums, float* partial) {
  const int rows = share.group_tiles * kTileRows;
  for (int i = 0; i < S::kRowTiles; ++i) {
    for (int j = 0; j < S::kColBlocks; ++j) {
      for (int e = 0; e < 4; ++e) {
        const int row = (share.row_warp * S::kRowTiles + i) * kTileRows + share.lane / 4 + (e / 2) * 8;
        const int column = j * 8 + (share.lane % 4) * 2 + e % 2;
        if (column < m) partial[(share.k_warp * m + column) * rows + row] = sums[i][j][e];
      }
    }
  }
}

// partial[0] becomes the sum over the block's warps, in warp order.
__device__ inline void sum_over_warps(int k_warps, int count, float* partial) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    float sum = partial[i];
    for (int w = 1; w < k_warps; ++w) sum += partial[w * count + i];
    partial[i] = sum;
  }
}

// The sum over the cluster's blocks of partial[index], in rank order.
__device__ inline float sum_over_cluster(int cluster, const float* partial, int index) {
  float sum = partial[index];
  for (int rank = 1; rank < cluster; ++rank) sum += read_cluster_float(smem_address(partial + index), rank);
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

// The group's results from the blocks' partial sums to y.
template <typename T>
__device__ void store_group(const Wna16GemvArgs& args, const Share& share, int cluster, int group,
                            const float* partial) {
  const int rows = share.group_tiles * kTileRows;
  const int block_tiles = args.pair_block / kTileRows;
  for (int i = threadIdx.x; i < share.group_tiles * 8 * args.m; i += kThreads) {
    const int local = i / 8 % share.group_tiles;
    const int tile = group * share.group_tiles + local;
    if (tile >= share.tiles) continue;
    Pair pair;
    pair.column = i / (8 * share.group_tiles);
    pair.low = tile / block_tiles * args.pair_block + tile % block_tiles * 8 + i % 8;
    pair.high = pair.low + args.pair_block / 2;
    const int index = pair.column * rows + local * kTileRows + i % 8;
    pair.low_sum = sum_over_cluster(cluster, partial, index);
    pair.high_sum = sum_over_cluster(cluster, partial, index + 8);
    store_pair<T>(args, pair);
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads)
    wna16_gemv_kernel(const __grid_constant__ Wna16GemvArgs args, const __grid_constant__ Wna16GemvLaunch launch) {
  using T = typename S::T;
  extern __shared__ __align__(128) uint8_t smem[];
  const Share share = share_of(args, launch);
  const int count = share.group_tiles * kTileRows * args.m;  // results of a row group
  uint8_t* slots = smem;
  float* partial = reinterpret_cast<float*>(slots + kThreads / 32 * S::kStages * S::kSlotBytes);
  float2* statistics = reinterpret_cast<float2*>(partial + count * share.k_warps);
  uint8_t* x_smem = reinterpret_cast<uint8_t*>(statistics + (args.m + 1) / 2 * 2);

  allow_next_kernel();
  Stream<S> stream(args, share, slots + threadIdx.x / 32 * S::kStages * S::kSlotBytes);
  for (int i = 0; i < S::kStages - 1; ++i) stream.fetch();
  wait_for_previous_kernel();
  if (args.norm != Norm::kNone) norm_statistics<T>(args, statistics);

  const bool resident = share.end - share.begin <= launch.chunks_per_pass;
  for (int group = share.group; group < share.groups; group += share.group_step) {
    Sums<S> sums = {};
    for (int pass = share.begin; pass < share.end; pass += launch.chunks_per_pass) {
      const int pass_end = min(pass + launch.chunks_per_pass, share.end);
      if (!resident || group == share.group) {
        __syncthreads();
        stage_x<T>(args, pass, pass_end, x_smem, statistics);
        __syncthreads();
      }
      for (int chunk = pass + share.k_warp; chunk < pass_end; chunk += share.k_warps) {
        const uint8_t* slot = stream.next();
        multiply_chunk<S>(args, slot, x_smem + (chunk - pass) * kChunkK * 2, x_pitch(pass_end - pass), share.lane,
                          sums);
      }
    }
    store_partial<S>(share, args.m, sums, partial);
    __syncthreads();
    sum_over_warps(share.k_warps, count, partial);
    if (launch.cluster > 1) cluster_sync();
    else __syncthreads();
    if (blockIdx.x % launch.cluster == 0) store_group<T>(args, share, launch.cluster, group, partial);
    if (launch.cluster > 1) cluster_sync();  // rank 0 has read before anyone writes again or leaves
    else __syncthreads();
  }
}

template <typename S>
cudaError_t launch_shape(const Wna16GemvArgs& args, const Wna16GemvLaunch& launch, cudaStream_t stream) {
  const int rows = launch.row_warps * S::kRowTiles * kTileRows;
  const int k_warps = kThreads / 32 / launch.row_warps;
  const size_t bytes = kThreads / 32 * S::kStages * S::kSlotBytes + size_t(rows) * args.m * k_warps * 4 +
                       (args.m + 1) / 2 * 16 + size_t(args.m) * x_pitch(launch.chunks_per_pass);
  auto kernel = wna16_gemv_kernel<S>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.blocks * launch.cluster;
  config.blockDim = kThreads;
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
  return cudaLaunchKernelEx(&config, kernel, args, launch);
}

template <typename T, int kBits, int kGroups>
cudaError_t launch_groups(const Wna16GemvArgs& args, const Wna16GemvLaunch& launch, cudaStream_t stream) {
  const int columns = args.m <= 8 ? 8 : args.m <= 16 ? 16 : args.m <= 32 ? 32 : 64;
  switch (columns * 10 + launch.row_tiles) {
    case 81: return launch_shape<Shape<T, kBits, kGroups, 1, 1>>(args, launch, stream);
    case 82: return launch_shape<Shape<T, kBits, kGroups, 2, 1>>(args, launch, stream);
    case 161: return launch_shape<Shape<T, kBits, kGroups, 1, 2>>(args, launch, stream);
    case 162: return launch_shape<Shape<T, kBits, kGroups, 2, 2>>(args, launch, stream);
    case 322: return launch_shape<Shape<T, kBits, kGroups, 2, 4>>(args, launch, stream);
    case 642: return launch_shape<Shape<T, kBits, kGroups, 2, 8>>(args, launch, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

template <typename T, int kBits>
cudaError_t launch_wna16_gemv(const Wna16GemvArgs& args, const Wna16GemvLaunch& launch, cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(launch.device);
  if (error != cudaSuccess) return error;
  switch (launch.groups_per_chunk) {
    case 1: return launch_groups<T, kBits, 1>(args, launch, stream);
    case 2: return launch_groups<T, kBits, 2>(args, launch, stream);
    case 4: return launch_groups<T, kBits, 4>(args, launch, stream);
    default: return cudaErrorInvalidValue;
  }
}

template cudaError_t launch_wna16_gemv<LOWBIT_T, LOWBIT_BITS>(const Wna16GemvArgs&, const Wna16GemvLaunch&,
                                                              cudaStream_t);

}  // namespace lowbit
