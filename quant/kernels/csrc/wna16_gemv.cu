// Compiled once per (T, number): LOWBIT_T and LOWBIT_NUMBER come from units.py, so that they build in parallel.
//
// Design. W's rows are the 16 rows of mma.m16n8k16's A operand, and x's rows its 8 columns, so that 1 to 8 rows of x
// cost the same. Each warp streams its own chunks (16 rows x 128 inputs) from global memory into registers, with a
// refill after each use, so the main loop has no barrier. Warps split k, and blocks of a cluster split it further;
// partial sums are added in shared memory in a fixed order, so results do not depend on timing. Only W's stream starts
// before the previous kernel has finished: W is constant, x is not.
//
// Tried and slower on one H100: a ring of shared memory filled by cp.async (more instructions per chunk), x copied to
// shared memory first (its latency delays everything), x read one chunk ahead. docs/kernels/wna16_gemv.md has the
// figures. Remaining loss: reads of x from L2, and tensor instructions, in whose time no other is issued.
#include <memory>

#include "declare.cuh"
#include "launch.cuh"
#include "next_weight.cuh"
#include "pair_ends.cuh"
#include "panels.cuh"
#include "stamps.cuh"
#include "wna16_args.cuh"

namespace lowbit {

// The activation of an expert's gate, times up. clamped: gate * sigmoid(alpha * gate) * (up + 1), both within limits.
LOWBIT_ENUM(Gate, silu, gelu_tanh, clamped)

struct Wna16GemvLaunch {
  LOWBIT_STRUCT(Wna16GemvLaunch);
  FIELD(int, device);
  FIELD(int, groups_per_chunk);  // scales per row in 128 inputs; 0: a float with its factors alone
  FIELD(int, row_tiles);         // tiles that a warp multiplies per read of x
  FIELD(int, row_warps);         // warps of a block along n, a power of two
  FIELD(int, k_warps);           // warps of a block that split k
  FIELD(int, cluster);           // blocks that split k; more than 1 needs sm_90
  FIELD(int, room);              // warps of a multiprocessor: 16; with one tile a warp and 8 rows of x 24, or 28 for 4
                                 // bits; 24 with 16 rows for integers of 4 bits with one scale a chunk; of one row also
                                 // with two tiles 24 for 2 and 3 bits, 24 or 28 for floats of 4
  FIELD(bool, dependent);        // launched with programmatic dependent launch
};

// The products of rows with the experts that they chose. W has the tiles of all experts, one after another.
//
// up    y (m, top, y_pitch): of each row and each of its experts weight * activation(x W^T + bias), the rows of W being
//       an expert's gate and up; zero from an expert's outputs to y_pitch
// down  y (m, n): of each row the sum over its experts of x W^T + weight * bias, x (m, top, k)
struct Wna16ExpertsArgs {
  LOWBIT_STRUCT(Wna16ExpertsArgs);
  FIELD(Wna16Args, product);      // one expert's sizes, and no bias
  FIELD(const int*, experts);     // (m, top)
  FIELD(const float*, weights);   // (m, top)
  FIELD(const void*, bias);       // (count, n) or null
  FIELD(int, count);              // experts of W
  FIELD(int, top);
  FIELD(bool, down);
  FIELD(Gate, gate);              // the activation of up
  FIELD(float, limit);            // of Gate::clamped: of gate from above, of up on both sides
  FIELD(float, alpha);            // of Gate::clamped: factor in the sigmoid
  FIELD(int, y_pitch);
  FIELD(int, parts);              // of k in up, each with every parts-th chunk; of one row each has a warp
  FIELD(int64_t, words_stride);   // of an expert, in 16 bytes
  FIELD(int64_t, sides_stride);   // of an expert: scales in 4 bytes, zeros in 2
  FIELD(int64_t, next_stride);    // bytes of an expert at product.next_weight, of which up prefetches next_bytes
};

namespace {

// Shapes with more than 16 rows of x have no code on Hopper, so some of their members are unused.
#pragma nv_diag_suppress 177

// Least bytes of codes per warp for a prefetch into L2, beyond its registers, while it waits.
constexpr int kLongShare = 32 << 10;

template <typename T_, typename Number_, bool kZeros_, int kGroups_, int kRowTiles_, int kColBlocks_, int kRoom_ = 16,
          bool kPanels_ = false, bool kOne_ = false>
struct Shape {
  using T = T_;
  using Number = Number_;
  static constexpr int kBits = Number::kBits;
  static constexpr bool kZeros = kZeros_;
  static constexpr int kGroups = kGroups_;        // scales per row and chunk
  static constexpr bool kScaledSums = kGroups > 0 && !Number::kByteScales;
  // Scales of 32 inputs, a block's, multiply its sums; of bfloat16, whose sums would be subnormal, its values.
  static constexpr bool kBlockSums =
      Number::kByteScales && kGroups == 4 && kColBlocks_ == 1 && std::is_same_v<T, __half>;
  static constexpr int kSides = Number::kByteScales ? 2 : kGroups > 0 ? kGroups : 1;  // words of a lane's scales
  static constexpr int kRowTiles = kRowTiles_;    // tiles per warp
  static constexpr int kColBlocks = kColBlocks_;  // blocks of 8 rows of x
  static constexpr bool kPanels = kPanels_;       // x is in panels of 8 * kColBlocks rows
  static constexpr bool kOne = kOne_;             // one row of x: kRaised or kSpread
  static constexpr bool kStream = Number::kStream;
  static constexpr bool kRaised = kOne && kStream;              // codes with their offsets: multiply_raised
  static constexpr bool kSpread = kOne && Number::kByteScales;  // a column for each group of inputs: SpreadX
  static constexpr int kLoads = (kBits + 1) / 2;  // 16-byte loads per lane and chunk; of odd bits the last is half
  static constexpr int kChunkBytes = kBits * 256;
  static constexpr int kChunkVectors = kChunkBytes / 16;
  static constexpr int kRoom = kRoom_;            // warps of a multiprocessor
  static constexpr bool kCrowded = kRoom_ > 16;  // more warps, each with less of W in flight
  static constexpr int kMaxThreads = kRoom_ * 16;  // of which two blocks, or as many warps in smaller ones
  // Loads of W in flight per lane: the most that fit in 128 registers, or 80 or 72, with x and the sums.
  static constexpr int kRing = kCrowded ? 4 : kColBlocks == 1 ? 12 : kColBlocks == 2 ? 8 : 4;
  static constexpr int kAhead = kRing >= 4 * kLoads * kRowTiles ? 4 : (kRing - 1) / (kLoads * kRowTiles) + 1;  // chunks
  // Of multiply_share. Measured on an H200 with up to 8 rows of x and 24 warps: floats gain 2 to 5%; integers of 2 to 4
  // bits lose up to 12%, and int8 gains with 8 rows alone.
  static constexpr bool kLong = Number::kFloat && kCrowded && kColBlocks == 1 && !kPanels;
  static constexpr int kRounds = !kLong ? 0 : kBits == 4 ? 1 : 2;
  static constexpr int kXBlocks = kColBlocks >= 4 ? 1 : 4 / kColBlocks;  // blocks of 32 inputs of x read together
  static constexpr int kChains = kColBlocks == 1 ? 2 : 1;     // chains of tensor instructions per sum
  static constexpr int kMinBlocks = kColBlocks <= 2 ? 2 : 1;  // 128 registers per thread, 80 or 72 if crowded, or 255
};

// A warp's part of the problem: `tile` and the tiles after it, every `step`-th chunk of [first, end).
struct Share {
  int tile, first, end, step;
  int group_tiles;  // tiles that the block's cluster computes
};

template <typename S>
__device__ Share share_of(const Wna16Args& args) {
  Share share;
  share.group_tiles = blockDim.y * S::kRowTiles;
  share.tile = blockIdx.y * share.group_tiles + threadIdx.y * S::kRowTiles;
  share.first = threadIdx.z;
  share.end = args.chunks;
  if (gridDim.x > 1) {  // a division before the first load only where it is needed
    share.first += (args.chunks * blockIdx.x) / gridDim.x;
    share.end = (args.chunks * (blockIdx.x + 1)) / gridDim.x;
  }
  share.step = blockDim.z;
  return share;
}

// A lane's part of one chunk of one tile.
template <typename S>
struct Chunk {
  uint4 words[S::kLoads];
  uint32_t scales[S::kSides];  // rows g and g + 8; bytes: of each block of 32 inputs
  uint16_t zeros[S::kSides];
};

// Reads a warp's chunks of one tile in order. Pointers are the lane's own. `words` is at the next chunk to read:
// computed anew for each chunk, its address would cost a tenth of the loop's instructions.
template <typename S>
struct WeightStream {
  const uint4* words;
  const uint32_t* scales;
  const uint16_t* zeros;

  __device__ void open(const Wna16Args& args, int tile, int chunk, int lane) {
    // The last group of tiles may extend beyond the last tile: it then reads that one again, and stores nothing.
    tile = min(tile, args.tiles - 1);
    const int64_t first = static_cast<int64_t>(tile) * args.chunks + chunk;
    words = static_cast<const uint4*>(args.words) + first * S::kChunkVectors + lane;
    const int64_t side = (static_cast<int64_t>(tile) * args.scale_rows * 8 + lane / 4) * S::kGroups;
    scales = static_cast<const uint32_t*>(args.scales) + side;
    if (S::Number::kByteScales)  // two groups to a word, and of groups of 16 the first of each block before the second
      scales = static_cast<const uint32_t*>(args.scales) + side / 2 + (S::kGroups == 8 ? lane % 4 / 2 * 2 : 0);
    zeros = static_cast<const uint16_t*>(args.zeros) + side;
    if (S::kSpread) scales = reinterpret_cast<const uint32_t*>(reinterpret_cast<const uint16_t*>(
        static_cast<const uint32_t*>(args.scales) + side / 2) + lane % 4);
    if (S::kOne) keep(scales);
  }

  __device__ void read_words(int load, Chunk<S>& into) const {
    if (load < S::kBits / 2) {
      into.words[load] = read_once(words + load * 32);
      return;
    }
    const uint2 half = read_once(reinterpret_cast<const uint2*>(words + load * 32 - threadIdx.x) + threadIdx.x);
    into.words[load].x = half.x;
    into.words[load].y = half.y;
  }

  __device__ void skip(int chunks) { words += chunks * S::kChunkVectors; }

  __device__ void prefetch(int ahead) const {
    if (threadIdx.x == 0) prefetch_bulk(words + ahead * S::kChunkVectors, S::kChunkBytes);
  }

  __device__ void read_sides(int chunk, int shift, Chunk<S>& into) const {
    if (S::kSpread) {  // of the block whose sums the lane has
      const auto* own = reinterpret_cast<const uint16_t*>(scales + chunk * (4 * S::kGroups));
      into.scales[0] = __ldg(own);
      if (S::kGroups == 8) into.scales[1] = __ldg(own + 4);
      return;
    }
    if (S::Number::kByteScales) {
      const uint2 pair = __ldg(reinterpret_cast<const uint2*>(scales + chunk * (4 * S::kGroups)));
      into.scales[0] = pair.x;
      into.scales[S::kSides - 1] = pair.y;
      return;
    }
    const int row = (chunk >> shift) * (8 * S::kGroups);
#pragma unroll
    for (int group = 0; group < S::kGroups; ++group) {
      into.scales[group] = __ldg(scales + row + group);
      if (S::kZeros) into.zeros[group] = __ldg(zeros + row + group);
    }
  }
};

// Pitch of rows of x in shared memory: 64 bytes more than a multiple of 128, so that eight lanes that read together,
// four from each of two rows, touch all banks once.
__host__ __device__ inline int staged_pitch(int chunks) { return chunks * kChunkK * 2 + 64; }

// The largest number of chunks of a cluster's block.
__host__ __device__ inline int largest_slice(int chunks, int cluster) { return (chunks + cluster - 1) / cluster; }

// A block is 32 lanes x row warps x k warps, so that no index below needs a division.
__device__ inline int warp_of_block() { return threadIdx.z * blockDim.y + threadIdx.y; }
__device__ inline int thread_of_block() { return warp_of_block() * 32 + threadIdx.x; }
__device__ inline int threads_of_block() { return 32 * blockDim.y * blockDim.z; }

// Mean (0 for RMS) and 1 / deviation of each row of x, float32, one warp per row.
template <typename T>
__device__ void norm_statistics(const Wna16Args& args, float2* statistics) {
  const int lane = threadIdx.x;
  for (int row = warp_of_block(); row < args.m; row += blockDim.y * blockDim.z) {
    const T* x = static_cast<const T*>(args.x) + static_cast<int64_t>(row) * args.k;
    float mean = 0.f;
    for (int pass = args.norm == Norm::layer ? 0 : 1; pass < 2; ++pass) {
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
__device__ uint4 normalized(const Wna16Args& args, uint4 raw, float2 statistics, int k) {
  T* values = reinterpret_cast<T*>(&raw);
  for (int j = 0; j < 8; ++j) {
    float value = (to_float(values[j]) - statistics.x) * statistics.y;
    value *= to_float(static_cast<const T*>(args.norm_weight)[k + j]);
    if (args.norm_bias != nullptr) value += to_float(static_cast<const T*>(args.norm_bias)[k + j]);
    values[j] = from_float<T>(value);
  }
  return raw;
}

// Copies the block's inputs, chunks [begin, end) of every row of x, to shared memory, normalized if requested.
template <typename T>
__device__ void stage_x(const Wna16Args& args, int begin, int end, uint8_t* x_smem, const float2* statistics) {
  const int vectors = (end - begin) * (kChunkK / 8);
  for (int row = 0; row < args.m; ++row) {
    const T* x = static_cast<const T*>(args.x) + static_cast<int64_t>(row) * args.k + begin * kChunkK;
    uint8_t* target = x_smem + row * staged_pitch(largest_slice(args.chunks, gridDim.x));
    for (int i = thread_of_block(); i < vectors; i += threads_of_block()) {
      uint4 value = __ldcg(reinterpret_cast<const uint4*>(x) + i);
      if (args.norm != Norm::none) value = normalized<T>(args, value, statistics[row], begin * kChunkK + i * 8);
      *reinterpret_cast<uint4*>(target + i * 16) = value;
    }
  }
}

template <typename S>
using Sums = float[S::kRowTiles][S::kColBlocks][4];

// The chains of sums without scales, added at the end of the loop.
template <typename S>
using ChainSums = Sums<S>[S::kChains];

template <typename S>
using Chunks = Chunk<S>[S::kRowTiles];

template <typename T>
__device__ float2 halves_of(uint32_t bits) {
  const T* values = reinterpret_cast<const T*>(&bits);
  return make_float2(to_float(values[0]), to_float(values[1]));
}

// Zero point of row g (half 0) or g + 8 (half 1), in the form for expand().
template <typename S>
__device__ auto zeros_of(const Chunk<S>& chunk, int group, int half) {
  int zero = 1 << (S::kBits - 1);
  if (S::kZeros) zero = chunk.zeros[group] >> (8 * half) & 0xff;
  return Dequant<typename S::T, typename S::Number>::zeros_of(zero);
}

// The words of a stream's blocks `block` and `block` + 1.
template <typename S>
__device__ void words_of_two(const Chunk<S>& chunk, int block, uint32_t (&words)[S::kBits]) {
#pragma unroll
  for (int j = 0; j < S::kBits; ++j)
    words[j] = reinterpret_cast<const uint32_t*>(chunk.words)[block / 2 * S::kBits + j];
}

// The values of a stream's two blocks: of block, row g or g + 8, and pair of inputs.
using TwoBlocks = uint32_t[2][2][4];

// Expands blocks `block` and `block` + 1 of a stream.
template <typename S>
__device__ void expand_two(const Chunk<S>& chunk, int block, TwoBlocks& values) {
  uint32_t words[S::kBits], zeros[2][2];
  words_of_two(chunk, block, words);
#pragma unroll
  for (int i = 0; i < 4; ++i) zeros[i / 2][i % 2] = zeros_of<S>(chunk, (block + i / 2) * S::kGroups / 4, i % 2);
  Stream<typename S::T, S::kBits>::expand(words, zeros, values);
}

// The lane's 8 inputs of a block of x for each 8 columns, in the order that expand() gives the weights.
template <typename S>
using XBlock = uint4[S::kColBlocks];

// x as read by a lane through L1: from global memory, or from the normalized copy in shared memory. `lane` is at the
// lane's inputs of the current chunk.
template <typename S>
struct LaneX {
  const uint8_t* lane;
  int row_offsets[S::kColBlocks];

  __device__ LaneX(const uint8_t* x, int pitch, int m) : lane(x + threadIdx.x % 4 * 16) {
    for (int j = 0; j < S::kColBlocks; ++j)  // columns past m are dropped
      row_offsets[j] = S::kOne ? 0 : min(j * 8 + static_cast<int>(threadIdx.x) / 4, m - 1) * pitch;
  }
  __device__ void skip(int chunks) { lane += chunks * (kChunkK * 2); }

  // kXBlocks blocks at once: otherwise the compiler places each read next to its use, and every block waits for L1.
  __device__ void read(int block, XBlock<S> (&values)[S::kXBlocks]) const {
    const uint8_t* first = lane + block * 64;
#pragma unroll
    for (int b = 0; b < S::kXBlocks; ++b)
      for (int j = 0; j < S::kColBlocks; ++j) values[b][j] = read_cached(first + row_offsets[j] + b * 64);
  }

  // Of one row: the block that columns g and g + 4 of a tensor instruction have for offset_sums.
  __device__ uint4 read_own() const { return read_cached(lane + threadIdx.x / 4 % 4 * 64); }
};

// x in panels. One warp's read of 32 inputs is one piece of memory, and all its addresses differ by constants.
template <typename S>
struct PanelX {
  static constexpr int kRowsBytes = 8 * kPanelRowBytes;
  static constexpr int kPanelBytes = S::kColBlocks * kRowsBytes;
  const uint8_t* lane;

  // Of 8 columns those past m read the last row: less of a panel. Of 16 they read what is there, and are dropped.
  __device__ explicit PanelX(const Wna16Args& args) {
    const int row = min(static_cast<int>(threadIdx.x) / 4, args.m - 1);
    lane = static_cast<const uint8_t*>(args.x) + row * kPanelRowBytes + threadIdx.x % 4 * 16;
  }
  __device__ void skip(int chunks) { lane += chunks * (kChunkK / kPanelK * kPanelBytes); }

  __device__ void read(int block, XBlock<S> (&values)[S::kXBlocks]) const {
#pragma unroll
    for (int b = 0; b < S::kXBlocks; ++b)
      for (int j = 0; j < S::kColBlocks; ++j)
        values[b][j] = read_cached(lane + (block + b) * kPanelBytes + j * kRowsBytes);
  }
};

// One row of x that may end within a chunk, after whole blocks of 32 inputs. Blocks behind its end are read from within
// it: their scales are 0, so that finite values add nothing.
template <typename S>
struct RaggedX : LaneX<S> {
  int left;  // bytes from the current chunk's start to the start of the row's last block

  __device__ RaggedX(const uint8_t* x, int k) : LaneX<S>(x, 0, 1), left((k - 32) * 2) {}  // x: the lane's row
  __device__ void skip(int chunks) {
    LaneX<S>::skip(chunks);
    left -= chunks * (kChunkK * 2);
  }
  __device__ void read(int block, XBlock<S> (&values)[S::kXBlocks]) const {
#pragma unroll
    for (int b = 0; b < S::kXBlocks; ++b) values[b][0] = read_cached(this->lane + min((block + b) * 64, left));
  }
};

// One row of x for scales of groups of 16 or 32 inputs. Each group has a column of the tensor instructions to itself,
// so that one chain of them leaves the sums of all groups apart: column 2 * block, of groups of 16 plus 1 for the
// second. A lane has inputs of one block at most; its registers of the others stay zero.
template <typename S>
struct SpreadX : LaneX<S> {
  int block;  // that the lane reads; 4: none
  XBlock<S> values[4];

  __device__ explicit SpreadX(const LaneX<S>& x) : LaneX<S>(x), values{} {
    const int column = threadIdx.x / 4, half = threadIdx.x % 4 / 2;
    block = column % 2 == (S::kGroups == 8 ? half : 0) ? column / 2 : 4;
  }
  __device__ void read_all() {
#pragma unroll
    for (int b = 0; b < 4; ++b) read_cached_if(block == b, this->lane + b * 64, values[b][0]);
  }
};

// Sums of a tile.
template <typename S>
using TileSums = float[S::kColBlocks][4];

// even + odd += values x for 16 rows and 32 inputs: of rows g, then of rows g + 8.
template <typename S>
__device__ void multiply_values(const uint32_t (&top)[4], const uint32_t (&bottom)[4], const XBlock<S>& x,
                                TileSums<S>& even, TileSums<S>& odd) {
  const uint32_t first[4] = {top[0], bottom[0], top[1], bottom[1]};
  const uint32_t second[4] = {top[2], bottom[2], top[3], bottom[3]};
#pragma unroll
  for (int j = 0; j < S::kColBlocks; ++j) {
    mma_16x8x16<typename S::T>(even[j], first, x[j].x, x[j].y);
    mma_16x8x16<typename S::T>(odd[j], second, x[j].z, x[j].w);
  }
}

// even + odd += (codes - zeros) x for 16 rows and 32 inputs; `words` has row g's codes, then row g + 8's. even and odd
// may be the same; if not, their tensor instructions do not wait for each other. `scales`: the chunk's, of bytes.
template <typename S, typename Zeros>
__device__ void multiply_block(const uint32_t* words, const Zeros (&zeros)[2], const uint32_t (&scales)[S::kSides],
                               int block, const XBlock<S>& x, TileSums<S>& even, TileSums<S>& odd) {
  using D = Dequant<typename S::T, typename S::Number>;
  uint32_t top[4], bottom[4];
  D::expand(words, zeros[0], top);
  D::expand(words + D::kWords, zeros[1], bottom);
  if constexpr (S::Number::kByteScales) {
    const uint32_t pair = scales[block / 2];
    scale_by_byte<typename S::T>(pair, block % 2 * 2, top);
    scale_by_byte<typename S::T>(pair, block % 2 * 2 + 1, bottom);
  }
  multiply_values<S>(top, bottom, x, even, odd);
}

// sums += scales * values x for 16 rows and a block of 32 inputs that have them; `scales`: of two blocks.
template <typename S>
__device__ void multiply_scaled_block(const uint32_t* words, uint32_t scales, int second, const XBlock<S>& x,
                                      TileSums<S>& sums) {
  using D = Dequant<typename S::T, typename S::Number>;
  uint32_t top[4], bottom[4];
  D::expand(words, {}, top);
  D::expand(words + D::kWords, {}, bottom);
  TileSums<S> products = {};
  multiply_values<S>(top, bottom, x, products, products);
  const float2 factors = byte_scales_of_sums(scales, second * 2);
#pragma unroll
  for (int e = 0; e < 4; ++e) sums[0][e] += (e < 2 ? factors.x : factors.y) * products[0][e];
}

// sums += scale * (codes - zeros) x for one chunk; the scale is applied in float32 once a group is summed, to the first
// chain of sums. The registers of each load are refilled as soon as they were used, from the streams' next chunk.
template <typename S, typename X>
__device__ void multiply_chunk(Chunks<S>& chunks, const WeightStream<S>* streams, bool refill, const X& lane_x,
                               ChainSums<S>& sums) {
  using D = Dequant<typename S::T, typename S::Number>;
  constexpr int kGroups = S::kScaledSums ? S::kGroups : 1;
  constexpr int kBlocks = kChunkK / 32 / kGroups;  // blocks of 32 inputs in a group
  constexpr int kBlocksPerLoad = 8 / S::kBits;     // blocks with codes in a lane's 16 bytes
  XBlock<S> x[S::kXBlocks];
  TwoBlocks two[S::kRowTiles];  // of a stream
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    ChainSums<S> products = {};
    decltype(D::zeros_of(0)) zeros[S::kRowTiles][2];
#pragma unroll
    for (int i = 0; i < 2 * S::kRowTiles; ++i) zeros[i / 2][i % 2] = zeros_of<S>(chunks[i / 2], group, i % 2);
#pragma unroll
    for (int block = group * kBlocks; block < (group + 1) * kBlocks; ++block) {
      if (block % S::kXBlocks == 0) lane_x.read(block, x);
#pragma unroll
      for (int i = 0; i < S::kRowTiles; ++i) {
        ChainSums<S>& chains = S::kScaledSums ? products : sums;
        TileSums<S>& even = chains[0][i];
        TileSums<S>& odd = chains[S::kChains - 1][i];
        if constexpr (S::kStream) {
          if (block % 2 == 0) expand_two<S>(chunks[i], block, two[i]);
          multiply_values<S>(two[i][block % 2][0], two[i][block % 2][1], x[block % S::kXBlocks], even, odd);
#pragma unroll
          for (int load = block == 3 ? S::kBits / 4 : 0; load < (block == 3 ? S::kLoads : S::kBits / 4); ++load)
            if (refill && block % 2 == 1) streams[i].read_words(load, chunks[i]);
          continue;
        }
        uint4& load = chunks[i].words[block / kBlocksPerLoad];
        const uint32_t* words = reinterpret_cast<const uint32_t*>(&load) + block % kBlocksPerLoad * 2 * D::kWords;
        if constexpr (S::kBlockSums)
          multiply_scaled_block<S>(words, chunks[i].scales[block / 2], block % 2, x[block % S::kXBlocks], sums[0][i]);
        else multiply_block<S>(words, zeros[i], chunks[i].scales, block, x[block % S::kXBlocks], even, odd);
        if (refill && (block + 1) % kBlocksPerLoad == 0)
          streams[i].read_words(block / kBlocksPerLoad, chunks[i]);
      }
    }
#pragma unroll
    for (int i = 0; S::kScaledSums && i < S::kRowTiles; ++i) {
      const float2 scales = halves_of<typename S::T>(chunks[i].scales[group]);
#pragma unroll
      for (int e = 0; e < S::kColBlocks * 4; ++e) {
        float product = products[0][i][e / 4][e % 4];
        if (S::kChains == 2) product += products[1][i][e / 4][e % 4];
        sums[0][i][e / 4][e % 4] += (e % 4 < 2 ? scales.x : scales.y) * product;
      }
    }
  }
}

// One row of x times what raised codes of a group have too much, in rows g and g + 8, for the lanes with column 0. `x`:
// LaneX::read_own's. Each block has a column, so two tensor instructions do what takes 32 subtractions.
template <typename S>
__device__ float2 offset_sums(const uint4& x, const Chunk<S>& chunk, int group) {
  using Codes = Stream<typename S::T, S::kBits, true>;
  const uint32_t top = zeros_of<S>(chunk, group, 0), bottom = zeros_of<S>(chunk, group, 1);
  float sums[4] = {};
#pragma unroll
  for (int pair = 0; pair < 4; pair += 2) {
    const uint32_t away[4] = {Codes::away(pair, top), Codes::away(pair + 4, bottom), Codes::away(pair + 1, top),
                              Codes::away(pair + 5, bottom)};
    mma_16x8x16<typename S::T>(sums, away, pair == 0 ? x.x : x.z, pair == 0 ? x.y : x.w);
  }
  const auto sum_of = [&](float even, float odd) {  // lanes with columns 0 and 1 have neighbours with 2 and 3
    const float own = S::kGroups < 4 ? even + odd : group % 2 == 0 ? even : odd;
    const float other = __shfl_xor_sync(~0u, own, 1);
    return S::kGroups == 1 ? own + other : group < S::kGroups / 2 ? own : other;
  };
  return make_float2(sum_of(sums[0], sums[1]), sum_of(sums[2], sums[3]));
}

// multiply_chunk for one row of x and a stream, whose codes are multiplied as they are raised.
template <typename S, typename X>
__device__ void multiply_raised(Chunks<S>& chunks, const WeightStream<S>* streams, bool refill, const X& lane_x,
                                ChainSums<S>& sums) {
  using Codes = Stream<typename S::T, S::kBits, true>;
  constexpr int kBlocks = kChunkK / 32 / S::kGroups;  // blocks of 32 inputs in a group
  XBlock<S> x[S::kXBlocks];
  const uint4 own = lane_x.read_own();
  lane_x.read(0, x);
  float2 offsets[S::kGroups];
#pragma unroll
  for (int i = 0; i < S::kRowTiles; ++i) {
    uint32_t words[S::kBits];
    TileSums<S> products;
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      const int group = block / kBlocks;
      if (block % kBlocks == 0) {
        if (i == 0 || S::kZeros) offsets[group] = offset_sums<S>(own, chunks[i], group);
        products[0][0] = offsets[group].x;
        products[0][2] = offsets[group].y;
        products[0][1] = products[0][3] = 0.f;  // of columns that are dropped
      }
      if (block % 2 == 0) words_of_two(chunks[i], block, words);
      uint32_t values[2][4];
#pragma unroll
      for (int pair = 0; pair < 8; ++pair) values[pair / 4][pair % 4] = Codes::raised(words, block % 2 * 8 + pair);
      multiply_values<S>(values[0], values[1], x[block], products, products);
      if ((block + 1) % kBlocks > 0) continue;
      const float2 scales = halves_of<typename S::T>(chunks[i].scales[group]);
      sums[0][i][0][0] += scales.x * products[0][0];
      sums[0][i][0][2] += scales.y * products[0][2];
    }
#pragma unroll
    for (int load = 0; load < S::kLoads; ++load)
      if (refill) streams[i].read_words(load, chunks[i]);
  }
}

// Expands eight codes of e2m1 to 2^-14 of their values.
template <typename T>
__device__ void expand_fp4(const uint32_t* word, uint32_t (&values)[4]) {
  Dequant<T, Fp4>::expand(word, {}, values);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    for (int i = 0; i < 4; ++i) values[i] = multiply_halves<T>(values[i], 0x77807780u);
  }
}

// multiply_chunk for SpreadX. A lane's sums are those of one block's groups: join_lanes adds them up.
template <typename S>
__device__ void multiply_spread(Chunks<S>& chunks, const WeightStream<S>* streams, bool refill, SpreadX<S>& x,
                                ChainSums<S>& sums) {
  x.read_all();
#pragma unroll
  for (int i = 0; i < S::kRowTiles; ++i) {
    TileSums<S> products = {};
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      uint4& load = chunks[i].words[block / 2];
      const uint32_t* words = reinterpret_cast<const uint32_t*>(&load) + block % 2 * 2;
      uint32_t top[4], bottom[4];
      expand_fp4<typename S::T>(words, top);
      expand_fp4<typename S::T>(words + 1, bottom);
      multiply_values<S>(top, bottom, x.values[block], products, products);
      if (refill && block % 2 == 1) streams[i].read_words(block / 2, chunks[i]);
    }
#pragma unroll
    for (int group = 0; group < S::kGroups / 4; ++group) {
      const float2 scales = byte_scales_of_sums(chunks[i].scales[group], 0);
      sums[0][i][0][0] += scales.x * products[0][group];
      sums[0][i][0][2] += scales.y * products[0][group + 2];
    }
  }
}

// The sums of all blocks, for the lanes with column 0.
template <typename S>
__device__ void join_lanes(Sums<S>& sums) {
  for (int i = 0; i < 2 * S::kRowTiles; ++i) {
    float& sum = sums[i / 2][0][i % 2 * 2];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
  }
}

// x in rows: in shared memory after staging, or in global memory.
template <typename S>
__device__ LaneX<S> rows_of_x(const Wna16Args& args, const Share& share, uint8_t* free_smem) {
  if (!args.stage_x) return LaneX<S>(static_cast<const uint8_t*>(args.x), args.k * 2, args.m);
  const int begin = share.first - threadIdx.z;
  float2* statistics = reinterpret_cast<float2*>(free_smem);
  uint8_t* staged = free_smem + (args.m + 1) / 2 * 16;
  if (args.norm != Norm::none) norm_statistics<typename S::T>(args, statistics);
  __syncthreads();
  stage_x<typename S::T>(args, begin, share.end, staged, statistics);
  __syncthreads();
  return LaneX<S>(staged - begin * (kChunkK * 2), staged_pitch(largest_slice(args.chunks, gridDim.x)), args.m);
}

// The source of x for this block.
template <typename S>
using BlockX = std::conditional_t<S::kPanels, PanelX<S>, std::conditional_t<S::kSpread, SpreadX<S>, LaneX<S>>>;

template <typename S>
__device__ BlockX<S> prepare_x(const Wna16Args& args, const Share& share, uint8_t* free_smem) {
  if constexpr (S::kPanels) return PanelX<S>(args);
  else if constexpr (S::kSpread) return SpreadX<S>(rows_of_x<S>(args, share, free_smem));
  else return rows_of_x<S>(args, share, free_smem);
}

// The factors of a lane's rows.
template <typename S>
using Factors = float2[S::kRowTiles];

template <typename S>
__device__ void read_factors(const Wna16Args& args, int tile, Factors<S>& factors) {
  for (int i = 0; i < S::kRowTiles; ++i)
    factors[i] = __ldg(reinterpret_cast<const float2*>(args.factors) + min(tile + i, args.tiles - 1) * 8 +
                       threadIdx.x / 4);
}

template <typename S>
__device__ void multiply_sums(const Factors<S>& factors, Sums<S>& sums) {
  for (int i = 0; i < S::kRowTiles; ++i)
    for (int e = 0; e < S::kColBlocks * 4; ++e) sums[i][e / 4][e % 4] *= e % 4 < 2 ? factors[i].x : factors[i].y;
}

// Adds the second chain of sums to the first.
template <typename S>
__device__ void join_chains(ChainSums<S>& sums) {
  for (int i = 0; i < S::kRowTiles; ++i)
    for (int e = 0; e < S::kColBlocks * 4; ++e) sums[0][i][e / 4][e % 4] += sums[S::kChains - 1][i][e / 4][e % 4];
}

// Stores a warp's sums to shared memory: partial[k warp][column of y][row of the group].
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

// The sum of `parts` sets of `count` sums at `index`, in order. Left to itself the compiler unrolls this loop by 16, 8
// and 4, and code that runs once takes as long as its instructions take to fetch.
template <int kMost>
__device__ float sum_of_parts(const float* sets, int parts, int count, int index) {
  float sum = sets[index];
#pragma unroll
  for (int part = 1; part < kMost; ++part)
    if (part < parts) sum += sets[part * count + index];
  return sum;
}

// The same of up to 24 parts, with the code of 8.
__device__ inline float sum_of_many_parts(const float* sets, int parts, int count, int index) {
  float sum = 0.f;
#pragma unroll 1
  for (int first = 0; first < parts; first += 8) {
#pragma unroll
    for (int part = 0; part < 8; ++part)
      if (first + part < parts) sum += sets[(first + part) * count + index];
  }
  return sum;
}

// The sum over the cluster's blocks of totals[index], in rank order.
__device__ inline float sum_over_cluster(const float* totals, int index) {
  float sum = totals[index];
#pragma unroll 1
  for (int rank = 1; rank < gridDim.x; ++rank) sum += read_cluster_float(smem_address(totals + index), rank);
  return sum;
}

// A deferred norm to finish: each row's sums of squares are copied to `squares` during the main loop, and later
// replaced by 1 / deviation in the first place. A lane copies only what it will add up. The last warp has the first
// row, since the first warp has that row's epilogue.
__device__ inline int last_warp_first() { return blockDim.y * blockDim.z - 1 - warp_of_block(); }

template <typename RowOf>
__device__ void copy_squares(const Wna16Args& args, float* squares, RowOf row_of) {
#pragma unroll 1
  for (int column = last_warp_first(); column < args.m; column += blockDim.y * blockDim.z) {
    const float* row = args.x_squares + row_of(column) * args.x_parts;
#pragma unroll 1
    for (int i = threadIdx.x * 4; i < args.x_parts; i += 128)
      copy_16(smem_address(squares + column * args.x_parts + i), row + i);
  }
}

__device__ inline int same_row(int column) { return column; }

__device__ inline void finish_squares(const Wna16Args& args, float* squares) {
  wait_for_copies();
#pragma unroll 1
  for (int row = last_warp_first(); row < args.m; row += blockDim.y * blockDim.z) {
    float* parts = squares + row * args.x_parts;
    const auto four_at = [&](int i) { return *reinterpret_cast<const float4*>(parts + i); };
    const float inverse = inverse_deviation(args.x_parts, args.norm_eps, four_at);
    if (threadIdx.x == 0) *parts = inverse;
  }
}

// Sums over warps and cluster, then the epilogue. `partial` has the warps' sums, room for one more set, and the results
// of finish_squares.
template <typename S>
__device__ void finish_group(const Wna16Args& args, int group_tiles, float* partial) {
  constexpr int kMost = S::kMaxThreads / 32;
  const int rows = group_tiles * kTileRows;
  const int count = rows * args.m;
  const float* inverses = partial + (blockDim.z + 1) * count;
  int parts = blockDim.z, columns = args.m;
  if (gridDim.x > 1) {
    float* totals = partial + blockDim.z * count;
    __syncthreads();
#pragma unroll 1
    for (int i = thread_of_block(); i < count; i += threads_of_block())
      totals[i] = sum_of_parts<kMost>(partial, parts, count, i);
    __syncthreads();  // orders nothing that the next line does not, but racecheck knows no cluster barriers
    cluster_sync();
    if (blockIdx.x > 0) columns = 0;
#pragma unroll 1
    for (int i = thread_of_block(); i < rows * columns; i += threads_of_block())
      partial[i] = sum_over_cluster(totals, i);
    parts = 1;
  }
  const auto sum_of = [&](int column, int row) {
    const float sum = sum_of_parts<kMost>(partial, parts, count, column * rows + row);
    return args.x_squares == nullptr ? sum : sum * inverses[column * args.x_parts];
  };
  meet_and_store<typename S::T>(args, group_tiles, columns, warp_of_block(), blockDim.y * blockDim.z, sum_of);
  if (gridDim.x > 1) cluster_sync();  // no block leaves while rank 0 reads from it
}

// Prefetches into L2 as many chunks again as the registers hold, once these are asked for.
template <typename S>
__device__ void prefetch_chunks(const WeightStream<S>* streams, const Share& share) {
  for (int a = S::kAhead; a < 2 * S::kAhead; ++a) {
    const int chunk = share.first + a * share.step;
    if (chunk >= share.end) return;
    for (int i = 0; i < S::kRowTiles; ++i) streams[i].prefetch((a - S::kAhead) * share.step);
  }
}

// At the end of a warp's loop: earlier, the prefetch would compete with this product's own weight.
__device__ inline void ask_for_next_weight(const Wna16Args& args, int part) {
  const int warp = (blockIdx.y * gridDim.x + blockIdx.x) * (blockDim.y * blockDim.z) + warp_of_block();
  if (threadIdx.x == 0) prefetch_part(args.next_weight, args.next_bytes, warp, part);
}

// The next norm's weight is constant, and is evicted by the time that epilogues read it: one lane prefetches all of it.
// If each block prefetched its own part, the address terms shared with the epilogue would occupy registers in the main
// loop.
__device__ inline void ask_for_next_norm(const Wna16Args& args) {
  if (args.next_norm == nullptr || blockIdx.y > 0) return;
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) prefetch_bulk(args.next_norm, args.n * 2);
}

// Reads as many of a warp's chunks as its registers hold.
template <typename S>
__device__ void begin_share(const Wna16Args& args, const Share& share, WeightStream<S>* streams, Chunks<S>* chunks) {
#pragma unroll
  for (int a = 0; a < S::kAhead; ++a) {
    const int chunk = share.first + a * share.step;
    if (chunk >= share.end) break;
    for (int i = 0; i < S::kRowTiles; ++i) {
      for (int load = 0; load < S::kLoads; ++load) streams[i].read_words(load, chunks[a][i]);
      streams[i].read_sides(chunk, args.scale_shift, chunks[a][i]);
      streams[i].skip(share.step);
    }
  }
}

// sums += all of a warp's chunks times x.
//
// kRounds: rounds of kAhead chunks in the main loop without a test between them.
template <typename S, typename X, int kRounds = 0>
__device__ void multiply_share(const Wna16Args& args, const Share& share, WeightStream<S>* streams, Chunks<S>* chunks,
                               X& x, ChainSums<S>& sums) {
  x.skip(share.first);
  int next = share.first + S::kAhead * share.step;      // the chunk that refills the registers of the current one
  const int end = share.end + S::kAhead * share.step;  // of `next`, once the current chunk is the last
  const auto multiply = [&](Chunks<S>& chunk, bool refill) {
    if constexpr (S::kSpread) multiply_spread<S>(chunk, streams, refill, x, sums);
    else if constexpr (S::kRaised) multiply_raised<S, X>(chunk, streams, refill, x, sums);
    else multiply_chunk<S, X>(chunk, streams, refill, x, sums);
    for (int i = 0; refill && i < S::kRowTiles; ++i) {
      streams[i].read_sides(next, args.scale_shift, chunk[i]);
      streams[i].skip(share.step);
    }
    x.skip(share.step);
    next += share.step;
  };
#pragma unroll 1
  while (kRounds > 0 && next + (kRounds * S::kAhead - 1) * share.step < share.end) {
#pragma unroll
    for (int i = 0; i < kRounds * S::kAhead; ++i) multiply(chunks[i % S::kAhead], true);
  }
  while (next < end) {
#pragma unroll
    for (int a = 0; a < S::kAhead; ++a) {
      if (next >= end) break;
      multiply(chunks[a], next < share.end);
    }
  }
}

template <typename S>
__device__ void compute_group(const Wna16Args& args, bool prefetch, int next_part, uint8_t* smem) {
  const Share share = share_of<S>(args);
  const int lane = threadIdx.x;
  const int count = share.group_tiles * kTileRows * args.m;
  float* partial = reinterpret_cast<float*>(smem);

  stamp(Stage::kBegun);
  allow_next_kernel();
  ask_for_next_norm(args);
  WeightStream<S> streams[S::kRowTiles];
  for (int i = 0; i < S::kRowTiles; ++i) streams[i].open(args, share.tile + i, share.first, lane);
  Chunks<S> chunks[S::kAhead];
  begin_share<S>(args, share, streams, chunks);
  Factors<S> factors;
  if constexpr (S::Number::kFloat) read_factors<S>(args, share.tile, factors);
  if (prefetch) prefetch_chunks<S>(streams, share);
  wait_for_previous_kernel();
  stamp(Stage::kWaited);

  float* squares = partial + count * (blockDim.z + 1);  // or the memory of prepare_x: never both
  if (args.x_squares != nullptr) copy_squares(args, squares, same_row);
  BlockX<S> x = prepare_x<S>(args, share, reinterpret_cast<uint8_t*>(squares));
  ChainSums<S> sums = {};
  multiply_share<S, BlockX<S>, S::kRounds>(args, share, streams, chunks, x, sums);
  stamp(Stage::kComputed);
  if constexpr (S::kSpread) join_lanes<S>(sums[0]);
  else if constexpr (!S::kScaledSums && S::kChains > 1) join_chains<S>(sums);
  if constexpr (S::Number::kFloat) multiply_sums<S>(factors, sums[0]);
  store_partial<S>(share.group_tiles, args.m, sums[0], partial);
  if (args.x_squares != nullptr) finish_squares(args, squares);
  ask_for_next_weight(args, next_part);
  finish_group<S>(args, share.group_tiles, partial);
  leave_stamps(args.n, args.k);
}

// A warp's part of the products of one row with experts. blockIdx.z is the row. Of up blockIdx.x is a place among its
// experts; of down the experts are dealt to the warps along k by turns.
struct Pair {
  int row, index, expert;  // index: row * top + place
};

// a / b of numbers below 1000, in fewer instructions than of all.
__device__ inline int divide_small(int a, int b) { return static_cast<int>(divide_fast(a + 0.5f, b)); }

// Of the pair all but its expert.
template <bool kDown>
__device__ Pair pair_of(const Wna16ExpertsArgs& args, int turn) {
  Pair pair = {};
  pair.row = blockIdx.z;
  pair.index = blockIdx.z * args.top + (kDown ? threadIdx.z - turn * args.top : blockIdx.x);
  return pair;
}

__device__ inline int expert_of(const Wna16ExpertsArgs& args, int index) {
  return min(max(__ldcg(args.experts + index), 0), args.count - 1);  // no read beyond W, whatever is there
}

template <typename T>
__device__ const void* moved(const void* pointer, int64_t elements) {
  return pointer == nullptr ? nullptr : static_cast<const T*>(pointer) + elements;
}

// Moves `stream` from expert 0 to the pair's.
template <typename S>
__device__ void move_to_expert(const Wna16ExpertsArgs& args, int expert, WeightStream<S>& stream) {
  stream.words += expert * args.words_stride;
  stream.scales += expert * args.sides_stride;
  stream.zeros += expert * args.sides_stride;
}

// The product of one row with expert 0.
template <typename S, bool kDown>
__device__ Wna16Args product_of(const Wna16ExpertsArgs& args, const Pair& pair) {
  using T = typename S::T;
  Wna16Args one = args.product;
  one.m = 1;
  one.x = moved<T>(one.x, static_cast<int64_t>(kDown ? pair.index : pair.row) * one.k);
  if (one.x_squares != nullptr) one.x_squares += static_cast<int64_t>(pair.row) * one.x_parts;
  const int64_t rows = static_cast<int64_t>(pair.row) * one.n;
  if (kDown) {
    one.residual = moved<T>(one.residual, rows);
    one.y = static_cast<T*>(one.y) + rows;
    one.z = const_cast<void*>(moved<T>(one.z, rows));
    if (one.squares != nullptr) one.squares += static_cast<int64_t>(pair.row) * (one.n / kTileRows);
  } else {
    one.y = static_cast<T*>(one.y) + static_cast<int64_t>(pair.index) * args.y_pitch;
  }
  return one;
}

// `turn`: of down the place of a warp among those of its expert.
template <typename S, bool kDown>
__device__ Share share_of_expert(const Wna16ExpertsArgs& args, int turn) {
  Share share;
  share.group_tiles = blockDim.y * S::kRowTiles;
  share.tile = blockIdx.y * share.group_tiles + threadIdx.y * S::kRowTiles;
  share.first = kDown ? turn : threadIdx.z;
  share.end = args.product.chunks;
  share.step = kDown ? divide_small(blockDim.z, args.top) : blockDim.z;
  return share;
}

__device__ inline float gated(const Wna16ExpertsArgs& args, float gate, float up) {
  if (args.gate == Gate::silu) return silu(gate) * up;
  if (args.gate == Gate::gelu_tanh) return activate(Activation::gelu_tanh, gate) * up;
  gate = args.limit < gate ? args.limit : gate;  // NaN stays
  up = up > args.limit ? args.limit : up < -args.limit ? -args.limit : up;
  return divide_fast(gate, 1.f + __expf(-args.alpha * gate)) * (up + 1.f);
}

template <typename T>
__device__ float bias_of(const Wna16ExpertsArgs& args, int expert, int row) {
  return to_float(static_cast<const T*>(args.bias)[static_cast<int64_t>(expert) * args.product.n + row]);
}

// Sums over `parts` parts, then activation and weight, of the pairs that multiply one expert: pairs[column of the
// sums]. kKnown: all threads know the pairs before they meet, so that weights and biases are on their way by then.
template <typename S, bool kKnown>
__device__ void finish_up(const Wna16ExpertsArgs& args, int expert, const int* pairs, int columns, int parts,
                          int group_tiles, const float* partial) {
  using T = typename S::T;
  const int rows = group_tiles * kTileRows, count = rows * columns, inner = args.product.n / 2;
  const float* inverses = partial + (parts + 1) * count;
  bool met = false;
  for (int i = thread_of_block(); !met || i < group_tiles * 8 * columns; i += threads_of_block()) {
    const int column = columns == 1 ? 0 : divide_small(i, group_tiles * 8), place = i - column * group_tiles * 8;
    const int low = (blockIdx.y * group_tiles + place / 8) * 8 + place % 8;
    const bool stored = i < group_tiles * 8 * columns && low < inner;
    if (!kKnown && !met) __syncthreads();
    const int pair = stored ? pairs[column] : 0;
    const float weight = stored ? args.weights[pair] : 0.f;
    const Loaded<T> bias = stored ? pair_at<T>(args.bias, static_cast<int64_t>(expert) * args.product.n, low, inner,
                                               args.product.n)
                                  : Loaded<T>();
    if (kKnown && !met) __syncthreads();
    met = true;
    if (!stored) continue;
    const int row = column * rows + place / 8 * kTileRows + place % 8;
    const float inverse = args.product.x_squares == nullptr ? 1.f : inverses[column * args.product.x_parts];
    const float2 added = bias.floats();
    const float gate = sum_of_many_parts(partial, parts, count, row) * inverse + added.x;
    const float up = sum_of_many_parts(partial, parts, count, row + 8) * inverse + added.y;
    static_cast<T*>(args.product.y)[static_cast<int64_t>(pair) * args.y_pitch + low] =
        from_float<T>(gated(args, gate, up) * weight);
  }
  if (blockIdx.y + 1 < gridDim.y) return;
  for (int column = 0; column < columns; ++column) {
    T* y = static_cast<T*>(args.product.y) + static_cast<int64_t>(pairs[column]) * args.y_pitch;
    for (int i = inner + thread_of_block(); i < args.y_pitch; i += threads_of_block()) y[i] = from_float<T>(0.f);
  }
}

// Sums over `parts` parts, and so over the experts of each of `columns` rows from `first` on, then residual and the
// next norm.
template <typename S>
__device__ void finish_down(const Wna16ExpertsArgs& args, const Wna16Args& one, int first, int columns, int parts,
                            int group_tiles, const float* partial) {
  using T = typename S::T;
  const int rows = group_tiles * kTileRows, count = rows * columns;
  const auto sum_of = [&](int column, int place) {
    float sum = sum_of_many_parts(partial, parts, count, column * rows + place);
    const int low = blockIdx.y * rows + place;
    for (int i = 0; args.bias != nullptr && low < args.product.n && i < args.top; ++i) {
      const int pair = (first + column) * args.top + i;
      sum += args.weights[pair] * bias_of<T>(args, expert_of(args, pair), low);
    }
    return sum;
  };
  meet_and_store<T>(one, group_tiles, columns, warp_of_block(), blockDim.y * blockDim.z, sum_of);
}

// Down's weights of the pair's expert, so that memory stays busy until down's blocks have started.
__device__ inline void ask_for_next_expert(const Wna16ExpertsArgs& args, const Pair& pair, int part) {
  const int warp = blockIdx.y * (blockDim.y * blockDim.z) + warp_of_block();
  const void* weight = moved<uint8_t>(args.product.next_weight, pair.expert * args.next_stride);
  if (threadIdx.x == 0) prefetch_part(weight, args.product.next_bytes, warp, part);
}

// x of a pair. Rows of up that end within a chunk are known for groups of 32 inputs or less.
template <typename S, bool kDown>
using PairX = std::conditional_t<!kDown && (S::kGroups >= 4), RaggedX<S>, LaneX<S>>;

template <typename S, bool kDown>
__device__ PairX<S, kDown> x_of(const Wna16Args& one) {
  const uint8_t* x = static_cast<const uint8_t*>(one.x);
  if constexpr (!kDown && S::kGroups >= 4) return RaggedX<S>(x, one.k);
  else return LaneX<S>(x, one.k * 2, 1);
}

// A block may fill a multiprocessor: a row's down has as many warps as that, whose first chunks are all on their way
// while they wait. Of up the choice of experts must be known, so that all waits for it. The next kernel, down, may
// start once it is: all that it reads before its own wait, the choice among it, is older than this kernel.
template <typename S, bool kDown>
__global__ void __launch_bounds__(S::kRoom * 32, 1)
    wna16_experts_kernel(const __grid_constant__ Wna16ExpertsArgs args, int next_part) {
  LOWBIT_DYNAMIC_SHARED(uint8_t, smem);
  float* partial = reinterpret_cast<float*>(smem);
  stamp(Stage::kBegun);
  if (kDown) allow_next_kernel();
  const int turn = kDown ? divide_small(threadIdx.z, args.top) : 0;
  Pair pair = pair_of<kDown>(args, turn);
  Wna16Args one = product_of<S, kDown>(args, pair);
  const Share share = share_of_expert<S, kDown>(args, turn);
  WeightStream<S> streams[S::kRowTiles];
  for (int i = 0; i < S::kRowTiles; ++i) streams[i].open(one, share.tile + i, share.first, threadIdx.x);
  if (!kDown) {
    wait_for_previous_kernel();
    stamp(Stage::kWaited);
    allow_next_kernel();
  }
  pair.expert = expert_of(args, pair.index);
  for (int i = 0; i < S::kRowTiles; ++i) move_to_expert<S>(args, pair.expert, streams[i]);
  if (one.factors != nullptr) one.factors += static_cast<int64_t>(pair.expert) * one.tiles * kTileRows;
  Chunks<S> chunks[S::kAhead];
  begin_share<S>(one, share, streams, chunks);
  Factors<S> factors;
  if constexpr (S::Number::kFloat) read_factors<S>(one, share.tile, factors);
  if (kDown) wait_for_previous_kernel();
  if (kDown) stamp(Stage::kWaited);
  float* squares = partial + share.group_tiles * kTileRows * (blockDim.z + 1);
  if (!kDown && one.x_squares != nullptr) copy_squares(one, squares, same_row);
  PairX<S, kDown> x = x_of<S, kDown>(one);
  ChainSums<S> sums = {};
  multiply_share<S, PairX<S, kDown>>(one, share, streams, chunks, x, sums);
  stamp(Stage::kComputed);
  if constexpr (!S::kScaledSums && S::kChains > 1) join_chains<S>(sums);
  if constexpr (S::Number::kFloat) multiply_sums<S>(factors, sums[0]);
  store_partial<S>(share.group_tiles, 1, sums[0], partial);
  if (!kDown && one.x_squares != nullptr) finish_squares(one, squares);
  if (!kDown) ask_for_next_expert(args, pair, next_part);
  else if (blockIdx.z == 0) ask_for_next_weight(args.product, next_part);
  if (kDown) finish_down<S>(args, one, pair.row, 1, blockDim.z, share.group_tiles, partial);
  else finish_up<S, true>(args, pair.expert, &pair.index, 1, blockDim.z, share.group_tiles, partial);
  leave_stamps(one.n, one.k);
}

// The same of several rows, of which up to kColumns that chose an expert are multiplied at once: each expert's weight
// is read once. Every sum has the order that it has for one row alone.
constexpr int kColumns = 8;

// The pairs of one expert, of which lane c has that of column c.
struct Columns {
  int pair, count;  // count 0: pairs before these are of the same expert, and another block has them
};

// Columns from the pair `index` on. The block that begins with every eighth pair of an expert has them.
__device__ inline Columns columns_of(const Wna16ExpertsArgs& args, int index, int expert) {
  constexpr int kLoads = 4;  // of each lane at once
  const int pairs = args.product.m * args.top;
  Columns columns = {index, 0};
  int before = 0;
#pragma unroll 1
  for (int base = 0; base < pairs; base += 32 * kLoads) {
    int chosen[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = base + i * 32 + threadIdx.x;
      chosen[i] = at < pairs ? expert_of(args, at) : -1;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int behind = index - (base + i * 32);  // the bits of pairs before `index`
      const uint32_t earlier = behind <= 0 ? 0 : behind >= 32 ? ~0u : (1u << behind) - 1;
      uint32_t same = __ballot_sync(~0u, chosen[i] == expert);
      before += __popc(same & earlier);
      same &= ~earlier;
#pragma unroll 1
      for (; same != 0 && columns.count < kColumns; same &= same - 1) {
        if (threadIdx.x == columns.count) columns.pair = base + i * 32 + __ffs(same) - 1;
        ++columns.count;
      }
    }
  }
  if (before % kColumns > 0) columns.count = 0;
  return columns;
}

// A lane's x in columns of any rows: `x` is at the row of the lane's column.
template <typename S, bool kDown>
__device__ PairX<S, kDown> x_at(const Wna16ExpertsArgs& args, int row) {
  const uint8_t* x = static_cast<const uint8_t*>(args.product.x) + static_cast<int64_t>(row) * args.product.k * 2;
  if constexpr (!kDown && S::kGroups >= 4) return RaggedX<S>(x, args.product.k);
  else return LaneX<S>(x, 0, 1);
}

// A warp takes the parts of k by turns: with fewer warps a block has more tiles for the search of its columns.
template <typename S>
__global__ void __launch_bounds__(S::kRoom * 32, 1)
    wna16_experts_up_kernel(const __grid_constant__ Wna16ExpertsArgs args, int next_part) {
  LOWBIT_DYNAMIC_SHARED(uint8_t, smem);
  Pair pair = pair_of<false>(args, 0);
  Wna16Args one = args.product;
  Share share = share_of_expert<S, false>(args, 0);
  share.step = args.parts;
  wait_for_previous_kernel();
  allow_next_kernel();
  pair.expert = expert_of(args, pair.index);
  const Columns columns = columns_of(args, pair.index, pair.expert);
  if (columns.count == 0) return;
  one.m = columns.count;
  if (one.factors != nullptr) one.factors += static_cast<int64_t>(pair.expert) * one.tiles * kTileRows;
  const int height = share.group_tiles * kTileRows * columns.count;
  float* partial = reinterpret_cast<float*>(smem);
  float* squares = partial + height * (args.parts + 1);
  int* pairs = reinterpret_cast<int*>(squares + (one.x_squares == nullptr ? 0 : columns.count * one.x_parts));
  if (warp_of_block() == 0 && threadIdx.x < columns.count) pairs[threadIdx.x] = columns.pair;
  const auto row_of = [&](int column) { return divide_small(__shfl_sync(~0u, columns.pair, column), args.top); };
  if (one.x_squares != nullptr) copy_squares(one, squares, row_of);
  const int row = row_of(min(static_cast<int>(threadIdx.x) / 4, columns.count - 1));
  for (int part = threadIdx.z; part < args.parts; part += blockDim.z) {
    share.first = part;
    WeightStream<S> streams[S::kRowTiles];
    for (int i = 0; i < S::kRowTiles; ++i) {
      streams[i].open(one, share.tile + i, part, threadIdx.x);
      move_to_expert<S>(args, pair.expert, streams[i]);
    }
    Chunks<S> chunks[S::kAhead];
    begin_share<S>(one, share, streams, chunks);
    Factors<S> factors;
    if constexpr (S::Number::kFloat) read_factors<S>(one, share.tile, factors);
    PairX<S, false> x = x_at<S, false>(args, row);
    ChainSums<S> sums = {};
    multiply_share<S, PairX<S, false>>(one, share, streams, chunks, x, sums);
    if constexpr (!S::kScaledSums && S::kChains > 1) join_chains<S>(sums);
    if constexpr (S::Number::kFloat) multiply_sums<S>(factors, sums[0]);
    store_partial<S>(share.group_tiles, columns.count, sums[0], partial + (part - int(threadIdx.z)) * height);
  }
  if (one.x_squares != nullptr) finish_squares(one, squares);
  ask_for_next_expert(args, pair, next_part);
  finish_up<S, false>(args, pair.expert, pairs, columns.count, args.parts, share.group_tiles, partial);
}

// The distinct experts of up to kColumns rows from `first` on, and each row's place for each of them, or -1.
struct Distinct {
  int* chosen;    // (rows * top) the expert of each pair
  int* leaders;   // the first pair of the same expert; of leaders later the expert's number
  int* experts;   // (count)
  int8_t* places; // (count, kColumns)
  int count;

  __host__ __device__ static size_t bytes(int pairs) { return size_t(pairs) * (3 * 4 + kColumns) + 16; }

  __device__ Distinct(const Wna16ExpertsArgs& args, int first, int rows, void* memory) {
    const int pairs = rows * args.top, thread = thread_of_block();
    chosen = static_cast<int*>(memory), leaders = chosen + pairs, experts = leaders + pairs;
    int* total = experts + pairs;
    places = reinterpret_cast<int8_t*>(total + 1);
    for (int p = thread; p < pairs; p += threads_of_block()) chosen[p] = expert_of(args, first * args.top + p);
    for (int i = thread; i < pairs * kColumns; i += threads_of_block()) places[i] = -1;
    __syncthreads();
    for (int p = thread; p < pairs; p += threads_of_block()) {
      int q = 0;
      while (chosen[q] != chosen[p]) ++q;
      leaders[p] = q;
    }
    __syncthreads();
    if (warp_of_block() == 0) number_leaders(pairs, total);
    __syncthreads();
    for (int p = thread; p < pairs; p += threads_of_block()) {
      const int row = divide_small(p, args.top), led = leaders[p] < 0 ? leaders[p] : leaders[leaders[p]];
      places[(-1 - led) * kColumns + row] = static_cast<int8_t>(p - row * args.top);
    }
    __syncthreads();
    count = *total;
  }

  // Replaces each leader's own index by -1 - the number of its expert.
  __device__ void number_leaders(int pairs, int* total) {
    int found = 0;
    for (int base = 0; base < pairs; base += 32) {
      const int p = base + threadIdx.x;
      const bool leads = p < pairs && leaders[p] == p;
      const uint32_t mask = __ballot_sync(~0u, leads);
      const int number = found + __popc(mask & ((1u << threadIdx.x) - 1));
      if (leads) {
        experts[number] = chosen[p];
        leaders[p] = -1 - number;
      }
      found += __popc(mask);
    }
    if (threadIdx.x == 0) *total = found;
  }
};

// Stores a warp's sums of an expert: partial[turn * top + place of the expert in the row][row][row of the group].
template <typename S>
__device__ void store_places(int group_tiles, int rows, int first_part, const int8_t* places, const Sums<S>& sums,
                             float* partial) {
  const int height = group_tiles * kTileRows, lane = threadIdx.x;
#pragma unroll
  for (int i = 0; i < S::kRowTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = lane % 4 * 2 + e % 2, place = places[column];
      const int row = (threadIdx.y * S::kRowTiles + i) * kTileRows + lane / 4 + e / 2 * 8;
      if (place >= 0) partial[((first_part + place) * rows + column) * height + row] = sums[i][0][e];
    }
  }
}

// A warp takes an expert of the rows, and of its chunks the share that a warp has where a row is alone; then the next.
template <typename S>
__global__ void __launch_bounds__(S::kRoom * 32, 1)
    wna16_experts_down_kernel(const __grid_constant__ Wna16ExpertsArgs args, int next_part) {
  LOWBIT_DYNAMIC_SHARED(uint8_t, smem);
  allow_next_kernel();
  const int first = blockIdx.z * kColumns, rows = min(kColumns, args.product.m - first);
  float* partial = reinterpret_cast<float*>(smem);
  Share share = share_of_expert<S, true>(args, 0);
  const int height = share.group_tiles * kTileRows;
  const Distinct distinct(args, first, rows, partial + height * rows * blockDim.z);
  const int items = distinct.count * share.step;
  bool waited = false;
  for (int item = threadIdx.z; item < items; item += blockDim.z) {
    const int number = divide_small(item, share.step), expert = distinct.experts[number];
    share.first = item - number * share.step;
    WeightStream<S> streams[S::kRowTiles];
    for (int i = 0; i < S::kRowTiles; ++i) {
      streams[i].open(args.product, share.tile + i, share.first, threadIdx.x);
      move_to_expert<S>(args, expert, streams[i]);
    }
    Chunks<S> chunks[S::kAhead];
    begin_share<S>(args.product, share, streams, chunks);
    Factors<S> factors;
    if constexpr (S::Number::kFloat) {
      Wna16Args one = args.product;
      one.factors += static_cast<int64_t>(expert) * one.tiles * kTileRows;
      read_factors<S>(one, share.tile, factors);
    }
    if (!waited) wait_for_previous_kernel();
    waited = true;
    const int8_t* places = distinct.places + number * kColumns;
    const int column = threadIdx.x / 4, place = places[column];
    // a row that did not choose the expert reads what is there, and its sums are dropped
    LaneX<S> x = x_at<S, true>(args, first * args.top + (place < 0 ? 0 : column * args.top + place));
    ChainSums<S> sums = {};
    multiply_share<S, LaneX<S>>(args.product, share, streams, chunks, x, sums);
    if constexpr (!S::kScaledSums && S::kChains > 1) join_chains<S>(sums);
    if constexpr (S::Number::kFloat) multiply_sums<S>(factors, sums[0]);
    store_places<S>(share.group_tiles, rows, share.first * args.top, places, sums[0], partial);
  }
  if (!waited) wait_for_previous_kernel();
  if (blockIdx.z == 0) ask_for_next_weight(args.product, next_part);
  Pair pair = {first, first * args.top, 0};
  Wna16Args some = product_of<S, true>(args, pair);
  finish_down<S>(args, some, first, rows, blockDim.z, share.group_tiles, partial);
}

template <typename S, bool kDown>
cudaError_t launch_experts(const Wna16ExpertsArgs& args, const Wna16GemvLaunch& launch, cudaStream_t stream) {
  const Wna16Args& product = args.product;
  const int group_tiles = launch.row_warps * S::kRowTiles;
  const int most = product.m == 1 || kDown ? product.m : product.m * args.top;
  const int columns = most < kColumns ? most : kColumns;
  if (launch.row_warps * launch.k_warps > S::kRoom) return cudaErrorInvalidConfiguration;
  if (kDown && launch.k_warps % args.top > 0) return cudaErrorInvalidConfiguration;
  const int parts = kDown || product.m == 1 ? launch.k_warps : args.parts;
  size_t bytes = size_t(group_tiles) * kTileRows * columns * (parts + 1) * 4;
  if (product.x_squares != nullptr) bytes += size_t(product.x_parts) * columns * 4;
  bytes += kDown ? Distinct::bytes(columns * args.top) : kColumns * 4;
  const int row_groups = kDown ? (product.m + kColumns - 1) / kColumns : product.m;
  const LaunchPlan plan = {
      .device = launch.device,
      .stream = stream,
      .blocks = dim3(kDown ? 1 : args.top, (product.tiles + group_tiles - 1) / group_tiles, row_groups),
      .threads = dim3(32, launch.row_warps, launch.k_warps),
      .shared_bytes = bytes,
      .dependent = launch.dependent,
  };
  const int warps = plan.blocks.y * launch.row_warps * launch.k_warps;
  const int part = part_of(product.next_bytes, warps);
  if (product.m == 1) return launch_kernel(wna16_experts_kernel<S, kDown>, plan, args, part);
  if constexpr (kDown) return launch_kernel(wna16_experts_down_kernel<S>, plan, args, part);
  else return launch_kernel(wna16_experts_up_kernel<S>, plan, args, part);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr int kMostColBlocks = 2;  // more rows of x go to wna16_gemm
#else
constexpr int kMostColBlocks = 8;
#endif

template <typename S>
__global__ void __launch_bounds__(S::kMaxThreads, S::kMinBlocks)
    wna16_gemv_kernel(const __grid_constant__ Wna16Args args, bool prefetch, int next_part) {
  LOWBIT_DYNAMIC_SHARED(uint8_t, smem);
  if constexpr (S::kColBlocks <= kMostColBlocks) compute_group<S>(args, prefetch, next_part, smem);
  else __trap();
}

template <typename S>
cudaError_t launch_shape(const Wna16Args& args, const Wna16GemvLaunch& launch, cudaStream_t stream) {
  const int group_tiles = launch.row_warps * S::kRowTiles;
  if (launch.row_warps * launch.k_warps * 32 > S::kMaxThreads) return cudaErrorInvalidConfiguration;
  if (args.x_panel != (S::kPanels ? 8 * S::kColBlocks : 0) || (S::kPanels && args.stage_x))
    return cudaErrorInvalidValue;
  size_t bytes = size_t(group_tiles) * kTileRows * args.m * (launch.k_warps + 1) * 4;
  const int slice = largest_slice(args.chunks, launch.cluster);
  if (args.x_squares != nullptr) bytes += size_t(args.m) * args.x_parts * 4;
  if (args.stage_x) bytes += (args.m + 1) / 2 * 16 + size_t(args.m) * staged_pitch(slice);
  const LaunchPlan plan = {
      .device = launch.device,
      .stream = stream,
      .blocks = dim3(launch.cluster, (args.tiles + group_tiles - 1) / group_tiles),
      .threads = dim3(32, launch.row_warps, launch.k_warps),
      .shared_bytes = bytes,
      .cluster = launch.cluster > 1 ? launch.cluster : 0,
      .dependent = launch.dependent,
  };
  // Measured for one tile per warp and up to 8 rows of x, where it gains up to 3%; with a shorter share it loses as
  // much.
  const bool prefetch = launch.dependent && S::kRowTiles == 1 && S::kColBlocks == 1 &&
                        args.chunks / (launch.cluster * launch.k_warps) * S::kChunkBytes >= kLongShare;
  const int warps = plan.blocks.x * plan.blocks.y * launch.row_warps * launch.k_warps;
  return launch_kernel(wna16_gemv_kernel<S>, plan, args, prefetch, part_of(args.next_bytes, warps));
}

// One tile a warp and more than 16 warps: with as many, a warp waits for x, which panels bring in half the time.
template <typename T, typename Number, bool kZeros, int kGroups, int kColBlocks, int kRoom>
cudaError_t launch_crowded(const Wna16Args& args, const Wna16GemvLaunch& launch, cudaStream_t stream) {
  if (args.x_panel > 0)
    return launch_shape<Shape<T, Number, kZeros, kGroups, 1, kColBlocks, kRoom, true>>(args, launch, stream);
  return launch_shape<Shape<T, Number, kZeros, kGroups, 1, kColBlocks, kRoom>>(args, launch, stream);
}

template <typename T, typename Number, bool kZeros, int kGroups>
cudaError_t launch_groups(const Wna16Args& args, const Wna16GemvLaunch& launch, cudaStream_t stream) {
  if constexpr (Number::kStream && Number::kBits <= 3) {
    if (launch.row_tiles == 2 && (args.m > 1 || args.x_panel > 0)) return cudaErrorInvalidValue;
    if (launch.row_tiles == 2 && launch.room == 24)
      return launch_shape<Shape<T, Number, kZeros, kGroups, 2, 1, 24, false, true>>(args, launch, stream);
    if (launch.row_tiles == 2 && launch.room == 16)
      return launch_shape<Shape<T, Number, kZeros, kGroups, 2, 1, 16, false, true>>(args, launch, stream);
  }
  if constexpr (Number::kByteScales) {
    if (args.m == 1 && args.x_panel == 0) {
      switch (launch.room * 10 + launch.row_tiles) {
        case 241: return launch_shape<Shape<T, Number, kZeros, kGroups, 1, 1, 24, false, true>>(args, launch, stream);
        case 242: return launch_shape<Shape<T, Number, kZeros, kGroups, 2, 1, 24, false, true>>(args, launch, stream);
        case 282: return launch_shape<Shape<T, Number, kZeros, kGroups, 2, 1, 28, false, true>>(args, launch, stream);
      }
    }
  }
  const int columns = args.m <= 8 ? 8 : args.m <= 16 ? 16 : args.m <= 32 ? 32 : 64;
  if (launch.room > 16) {
    if (columns > 16 || launch.row_tiles > 1) return cudaErrorInvalidValue;
    if constexpr (Number::kBits == 4 && !Number::kFloat && kGroups == 1) {
      if (columns == 16 && launch.room == 24)
        return launch_crowded<T, Number, kZeros, kGroups, 2, 24>(args, launch, stream);
    }
    if (columns > 8) return cudaErrorInvalidValue;
    if constexpr (Number::kBits == 4) {
      if (launch.room == 28) return launch_crowded<T, Number, kZeros, kGroups, 1, 28>(args, launch, stream);
    }
    if (launch.room != 24) return cudaErrorInvalidValue;
    return launch_crowded<T, Number, kZeros, kGroups, 1, 24>(args, launch, stream);
  }
  if constexpr (Number::kBits == 4 && !Number::kFloat && kGroups == 1) {
    if (columns == 16 && launch.row_tiles == 2 && args.x_panel > 0)
      return launch_shape<Shape<T, Number, kZeros, kGroups, 2, 2, 16, true>>(args, launch, stream);
  }
  if constexpr (!Number::kStream) {
    if (columns <= 16 && launch.row_tiles == 2)
      return columns == 8 ? launch_shape<Shape<T, Number, kZeros, kGroups, 2, 1>>(args, launch, stream)
                          : launch_shape<Shape<T, Number, kZeros, kGroups, 2, 2>>(args, launch, stream);
  }
  switch (columns * 10 + launch.row_tiles) {
    case 81: return launch_shape<Shape<T, Number, kZeros, kGroups, 1, 1>>(args, launch, stream);
    case 161: return launch_shape<Shape<T, Number, kZeros, kGroups, 1, 2>>(args, launch, stream);
    case 322: return launch_shape<Shape<T, Number, kZeros, kGroups, 2, 4>>(args, launch, stream);
    case 642: return launch_shape<Shape<T, Number, kZeros, kGroups, 2, 8>>(args, launch, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <typename T, typename Number, bool kZeros, int... kGroups>
cudaError_t launch_zeros(const Wna16Args& args, const Wna16GemvLaunch& launch, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  (void)((launch.groups_per_chunk == kGroups &&
          (error = launch_groups<T, Number, kZeros, kGroups>(args, launch, stream), true)) || ...);
  return error;
}

template <typename T, typename Number, bool kZeros, int kGroups>
cudaError_t launch_experts_groups(const Wna16ExpertsArgs& args, const Wna16GemvLaunch& launch, cudaStream_t stream) {
  using Plain = Shape<T, Number, kZeros, kGroups, 1, 1>;
  using Crowded = Shape<T, Number, kZeros, kGroups, 1, 1, 24>;
  if (launch.row_tiles != 1 || launch.cluster != 1) return cudaErrorInvalidValue;
  if (launch.room > 16)
    return args.down ? launch_experts<Crowded, true>(args, launch, stream)
                     : launch_experts<Crowded, false>(args, launch, stream);
  return args.down ? launch_experts<Plain, true>(args, launch, stream)
                   : launch_experts<Plain, false>(args, launch, stream);
}

template <typename T, typename Number, bool kZeros, int... kGroups>
cudaError_t launch_experts_zeros(const Wna16ExpertsArgs& args, const Wna16GemvLaunch& launch, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  (void)((launch.groups_per_chunk == kGroups &&
          (error = launch_experts_groups<T, Number, kZeros, kGroups>(args, launch, stream), true)) || ...);
  return error;
}

}  // namespace

template <typename T, typename Number>
cudaError_t launch_wna16_gemv(const Wna16Args& args, const Wna16GemvLaunch& launch, cudaStream_t stream) {
  if constexpr (Number::kByteScales) return launch_zeros<T, Number, false, 4, 8>(args, launch, stream);
  else if constexpr (Number::kFloat) return launch_zeros<T, Number, false, 0, 1, 4>(args, launch, stream);
  else return args.zeros == nullptr ? launch_zeros<T, Number, false, 1, 2, 4>(args, launch, stream)
                                    : launch_zeros<T, Number, true, 1, 2, 4>(args, launch, stream);
}

template <typename T, typename Number>
cudaError_t launch_wna16_experts(const Wna16ExpertsArgs& args, const Wna16GemvLaunch& launch, cudaStream_t stream) {
  if constexpr (Number::kStream) return cudaErrorInvalidValue;
  else if constexpr (Number::kByteScales) return launch_experts_zeros<T, Number, false, 4, 8>(args, launch, stream);
  else if constexpr (Number::kFloat) return launch_experts_zeros<T, Number, false, 0, 1, 4>(args, launch, stream);
  else return args.product.zeros == nullptr ? launch_experts_zeros<T, Number, false, 1, 2, 4>(args, launch, stream)
                                            : launch_experts_zeros<T, Number, true, 1, 2, 4>(args, launch, stream);
}

// Known for numbers that divide a word evenly alone: the others would double the time of compilation.
const auto wna16_experts = [] {
  const std::initializer_list<std::string> variant = {name_of<LOWBIT_T>, LOWBIT_NUMBER::kName};
  if constexpr (LOWBIT_NUMBER::kStream) return std::unique_ptr<Kernel>();
  else return std::make_unique<Kernel>("wna16_experts", variant, launch_wna16_experts<LOWBIT_T, LOWBIT_NUMBER>);
}();

const Kernel wna16_gemv("wna16_gemv", {name_of<LOWBIT_T>, LOWBIT_NUMBER::kName},
                        launch_wna16_gemv<LOWBIT_T, LOWBIT_NUMBER>);

}  // namespace lowbit
