// Compiled once per (T, number): LOWBIT_T and LOWBIT_WHOLE come from units.py. Code for sm_90a alone; empty elsewhere.
//
// Design. W is the left operand of wgmma, dequantized in registers; x, up to 64 rows, is the right one, in shared
// memory. So a weight is expanded once for any number of rows of x, and the tensor cores run at full rate. Each warp
// streams its own 16 rows of W, with their scales, through a ring of shared memory that the copy engine fills: one lane
// requests the next slot as soon as the warp has read one. One more warpgroup loads x, which all others share, and
// reorders it on the way: packed.py gives a lane eight adjacent inputs, wgmma needs two of each eight, and stmatrix
// converts one to the other. Blocks of a cluster split k; each sums its columns of y from the others' shared memory, in
// rank order. A block with all of k and no residual rounds its sums where they are, and stmatrix turns them into rows
// of y. W's stream starts before the previous kernel has finished: W is constant, x is not.
//
// Tried and slower on one H100 (docs/kernels/wna16_gemm.md has figures): scales read to registers one chunk ahead
// (every chunk waited for DRAM), x requested one chunk ahead, two blocks of two warpgroups per multiprocessor, sums
// read from the cluster one float at a time.
#include "declare.cuh"
#include "epilogue.cuh"
#include "launch.cuh"
#include "next_weight.cuh"
#include "transposed.cuh"
#include "wgmma.cuh"
#include "wna16_args.cuh"

namespace lowbit {

struct Wna16GemmLaunch {
  LOWBIT_STRUCT(Wna16GemmLaunch);
  FIELD(int, device);
  FIELD(int, groups_per_chunk);  // scales per row in 128 inputs; 0: a float with its factors alone
  FIELD(int, warpgroups);        // multiplying warpgroups, with 64 rows of W each: 2 to 4
  FIELD(int, cluster);           // blocks that split k
  FIELD(bool, dependent);        // launched with programmatic dependent launch
};

namespace {

template <typename T_, typename Number_, bool kZeros_, int kGroups_, bool kChannel_, int kColumns_, int kWarpgroups_>
struct Shape {
  using T = T_;
  using Number = Number_;
  static constexpr int kBits = Number::kBits;
  static constexpr int kGroups = kGroups_;          // scales per row and chunk
  static constexpr bool kChannel = kChannel_;       // one scale per row: applied to the sums
  static constexpr int kColumns = kColumns_;        // rows of x per block, padded
  static constexpr int kWarpgroups = kWarpgroups_;  // multiplying warpgroups
  static constexpr int kTiles = kWarpgroups * 4;
  static constexpr int kConsumers = kWarpgroups * 128;  // threads
  static constexpr int kThreads = kConsumers + 128;
  // Rows of x, in eights, that a producing warp requests at once, and the number of such requests in flight.
  static constexpr int kBatch = kColumns <= 32 ? kColumns / 8 : 4;
  static constexpr int kBatches = kColumns == 32 ? 3 : 4;
  static constexpr int kLoads = kBits / 2;  // 16-byte loads per lane and chunk
  static constexpr int kChunkBytes = kLoads * 512;
  // Size of a warp's ring without scales and zeros. A slot has words, then scales and zeros, of kSlotChunks chunks.
  static constexpr int kRingBytes = 8192;
  static constexpr int kSlotChunks = 16 / kBits;
  static constexpr int kSides = Number::kByteScales ? 2 : kGroups;  // words of a lane's scales
  static constexpr int kScaleRowBytes = (Number::kByteScales ? 16 : 32) * kGroups;
  static constexpr int kScaleBytes = kChannel ? 0 : kScaleRowBytes;
  static constexpr int kZeroBytes = kZeros_ ? 16 * kGroups : 0;
  static constexpr int kScalesAt = kSlotChunks * kChunkBytes;
  static constexpr int kZerosAt = kScalesAt + kSlotChunks * kScaleBytes;
  static constexpr int kSlotBytes = kZerosAt + kSlotChunks * kZeroBytes;
  static constexpr int kSlots = kRingBytes / kScalesAt;
  static constexpr int kXStages = 4;  // of one chunk each
  static constexpr int kXBytes = kColumns * kChunkK * 2;
  static constexpr int kPitch = kTiles * kTileRows + 4;  // floats between columns of sums: no bank conflicts
};

// Keeps the compiler from recomputing `value` at each use.
__device__ inline uint32_t keep(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// A block's shared memory. The sums reuse the rings' memory once all products are done.
template <typename S>
struct Layout {
  static constexpr int kX = S::kTiles * S::kSlots * S::kSlotBytes;
  static constexpr int kBarriers = kX + S::kXStages * S::kXBytes;
  static constexpr int kBytes = kBarriers + 8 * (2 * S::kXStages + S::kTiles * S::kSlots);
  static_assert(S::kPitch * S::kColumns * 4 <= kBarriers);
  uint32_t rings, x, x_full, x_empty, ring_full;

  __device__ explicit Layout(const uint8_t* smem) : rings(keep(smem_address(smem))) {
    x = rings + kX;
    x_full = rings + kBarriers;
    x_empty = x_full + 8 * S::kXStages;
    ring_full = x_empty + 8 * S::kXStages;
  }
};

// A place in a ring, and the parity of the phase that fills it.
template <int kSlots>
struct Turn {
  int slot = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// This block's chunks of k: [first, end).
struct Share {
  int first, end;
  __device__ explicit Share(const Wna16Args& args)
      : first(args.chunks * blockIdx.x / gridDim.x), end(args.chunks * (blockIdx.x + 1) / gridDim.x) {}
};

// A lane's scales and zeros of one chunk.
template <typename S>
struct Sides {
  uint32_t scales[S::kSides];  // rows g and g + 8; bytes: of each block of 32 inputs
  uint16_t zeros[S::kSides];
};

// One warp's rows of W: a ring that the warp's first lane keeps full.
template <typename S>
struct WeightStream {
  const uint8_t* words;   // of the chunk to request next
  const uint8_t* scales;  // of the tile
  const uint8_t* zeros;
  int next, end;  // chunk to request next; only the first lane requests
  int shift;
  uint32_t ring, full;
  Turn<S::kSlots> turn;

  __device__ WeightStream(const Wna16Args& args, const Share& share, const Layout<S>& smem) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // The last group of tiles may extend beyond the last tile: it then reads that one again, and stores nothing.
    const int64_t tile = min(static_cast<int>(blockIdx.y) * S::kTiles + warp, args.tiles - 1);
    words = static_cast<const uint8_t*>(args.words) + (tile * args.chunks + share.first) * S::kChunkBytes;
    scales = static_cast<const uint8_t*>(args.scales) + tile * args.scale_rows * S::kScaleRowBytes;
    zeros = static_cast<const uint8_t*>(args.zeros) + tile * args.scale_rows * S::kZeroBytes;
    next = lane == 0 ? share.first : share.end;
    end = share.end;
    shift = args.scale_shift;
    ring = keep(smem.rings + warp * (S::kSlots * S::kSlotBytes));
    full = keep(smem.ring_full + warp * (S::kSlots * 8));
    if (lane == 0) {
      for (int slot = 0; slot < S::kSlots; ++slot) barrier_init(full + slot * 8, 1);
      fence_barrier_init();
    }
    __syncwarp();
    for (int slot = 0; slot < S::kSlots; ++slot) refill(slot);
  }

  __device__ void refill(int slot) {
    if (next >= end) return;
    const int chunks = min(end - next, S::kSlotChunks);
    const int row = next >> shift, rows = ((next + chunks - 1) >> shift) + 1 - row;
    const uint32_t target = ring + slot * S::kSlotBytes, barrier = full + slot * 8;
    barrier_expect(barrier, chunks * S::kChunkBytes + rows * (S::kScaleBytes + S::kZeroBytes));
    copy_bulk(target, words, chunks * S::kChunkBytes, barrier);
    if (S::kScaleBytes > 0)
      copy_bulk(target + S::kScalesAt, scales + row * S::kScaleBytes, rows * S::kScaleBytes, barrier);
    if (S::kZeroBytes > 0) copy_bulk(target + S::kZerosAt, zeros + row * S::kZeroBytes, rows * S::kZeroBytes, barrier);
    words += S::kSlotChunks * S::kChunkBytes;
    next += S::kSlotChunks;
  }

  __device__ void wait() const { barrier_wait(full + turn.slot * 8, turn.parity); }

  // Reads the lane's words of chunk `index` of the slot, and its scales and zeros `row` rows on.
  __device__ void read(int index, int row, uint4 (&lane_words)[S::kLoads], Sides<S>& sides) const {
    const int lane = threadIdx.x % 32;
    const uint32_t slot = ring + turn.slot * S::kSlotBytes;
#pragma unroll
    for (int load = 0; load < S::kLoads; ++load)
      lane_words[load] = read_shared<uint4>(slot + index * S::kChunkBytes + load * 512 + lane * 16);
    if (S::Number::kByteScales) {
      const uint32_t place = S::kGroups == 8 ? lane / 4 * 16 + lane % 4 / 2 * 8 : lane / 4 * 8;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        sides.scales[i] = read_shared<uint32_t>(slot + S::kScalesAt + row * S::kScaleBytes + place + i * 4);
      return;
    }
    const uint32_t side = lane / 4 * S::kGroups;
#pragma unroll
    for (int group = 0; group < S::kGroups; ++group) {
      if (S::kScaleBytes > 0)
        sides.scales[group] = read_shared<uint32_t>(slot + S::kScalesAt + row * S::kScaleBytes + (side + group) * 4);
      if (S::kZeroBytes > 0)
        sides.zeros[group] = read_shared<uint16_t>(slot + S::kZerosAt + row * S::kZeroBytes + (side + group) * 2);
    }
  }

  __device__ void release() {
    __syncwarp();
    refill(turn.slot);
    turn.next();
  }

  // The two scales of a lane's rows if W has one per row, or their factors, otherwise 1.
  __device__ float2 channel_scales(const Wna16Args& args) const {
    if (S::Number::kFloat) {
      const int tile = min(static_cast<int>(blockIdx.y * S::kTiles + threadIdx.x / 32), args.tiles - 1);
      return __ldg(reinterpret_cast<const float2*>(args.factors) + tile * 8 + threadIdx.x % 32 / 4);
    }
    if (!S::kChannel) return make_float2(1.f, 1.f);
    const auto* pair = reinterpret_cast<const typename S::T*>(scales) + threadIdx.x % 32 / 4 * 2;
    return make_float2(to_float(pair[0]), to_float(pair[1]));
  }
};

// Loads x batch by batch: each of the four warps loads a block of 32 inputs of kBatch x 8 rows. The reads are issued
// kBatches - 1 batches ahead.
template <typename S>
struct XProducer {
  static constexpr int kParts = S::kColumns / 8 / S::kBatch;  // batches of a chunk
  static_assert(S::kBatches % kParts == 0);
  using Values = uint4[S::kBatch];
  const uint8_t* next;  // the lane's inputs in the chunk to request next
  uint32_t target, full;
  int rows, eight_rows;  // rows left from the lane's first on; bytes from a row to the eighth after it
  int wanted;
  Turn<S::kXStages> turn;

  __device__ XProducer(const Wna16Args& args, const Share& share, const Layout<S>& smem) {
    const int warp = threadIdx.x / 32 - S::kConsumers / 32, lane = threadIdx.x % 32;
    const int row = lane / 4;
    next = static_cast<const uint8_t*>(args.x) + int64_t(row) * args.k * 2 + share.first * (kChunkK * 2) + warp * 64 +
           lane % 4 * 16;
    target = smem.x + warp * 512 + lane * 16;
    full = smem.x_full;
    rows = args.m - row;
    eight_rows = args.k * 16;
    wanted = share.end - share.first;
  }

  // Rows past m are not read: their columns of y are never stored.
  __device__ void read(int part, Values& values) {
#pragma unroll
    for (int i = 0; i < S::kBatch; ++i) {
      const int block = part * S::kBatch + i;
      if (block * 8 < rows && wanted > 0)
        values[i] = __ldcg(reinterpret_cast<const uint4*>(next + block * eight_rows));
    }
    if (part < kParts - 1) return;
    next += kChunkK * 2;
    --wanted;
  }

  __device__ void store(int part, const Values& values) {
    const uint32_t barrier = full + turn.slot * 8;
    if (part == 0) barrier_wait(barrier + S::kXStages * 8, turn.parity ^ 1);  // the stage is empty
#pragma unroll
    for (int i = 0; i < S::kBatch; ++i)
      store_matrices(target + turn.slot * S::kXBytes + (part * S::kBatch + i) * 2048, values[i]);
    if (part < kParts - 1) return;
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
    turn.next();
  }

  __device__ void run() {
    Values values[S::kBatches];
    int left = wanted;
#pragma unroll
    for (int i = 0; i < S::kBatches; ++i) read(i % kParts, values[i]);
    while (left > 0) {
#pragma unroll
      for (int i = 0; i < S::kBatches; ++i) {
        if (i % kParts == 0 && left-- <= 0) break;
        store(i % kParts, values[i]);
        read(i % kParts, values[i]);
      }
    }
  }
};

// The fragments of two products: 16 rows and 32 inputs of W as halves, scaled unless there is one scale per row.
template <typename S>
__device__ void expand_block(const uint4 (&lane_words)[S::kLoads], const Sides<S>& sides, int block,
                             uint32_t (*a)[4]) {
  using D = Dequant<typename S::T, typename S::Number>;
  constexpr int kBlocksPerLoad = 8 / S::kBits;
  const int group = block * S::kGroups / 4;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(&lane_words[block / kBlocksPerLoad]) +
                          block % kBlocksPerLoad * 2 * D::kWords;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t zero = S::kZeroBytes > 0 ? sides.zeros[group] >> (8 * half) & 0xff : 1u << (S::kBits - 1);
    uint32_t values[4];
    D::expand(words + half * D::kWords, D::zeros_of(zero), values);
    if (S::Number::kByteScales) scale_by_byte<typename S::T>(sides.scales[block / 2], block % 2 * 2 + half, values);
    else if (!S::kChannel) {
      const uint32_t scale = __byte_perm(sides.scales[group], 0, half ? 0x3232 : 0x1010);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = multiply_halves<typename S::T>(values[i], scale);
    }
    a[0][half] = values[0];
    a[0][2 + half] = values[1];
    a[1][half] = values[2];
    a[1][2 + half] = values[3];
  }
}

template <typename S>
using Sums = float[S::kColumns / 2];  // of a lane, for 64 rows of W x columns

// sums += the product of one chunk, whose x is at `x_matrix`; for the `first` chunk, sums = it, since registers written
// by anything but wgmma make the compiler wait for every product before the next. After the first products, all of the
// previous chunk are done, and `on_chunk_before` is called.
template <typename S, typename OnChunkBefore>
__device__ void multiply_chunk(const uint4 (&words)[S::kLoads], const Sides<S>& sides, MatrixAt<128, 2048> x_matrix,
                               uint32_t x_full, uint32_t parity, bool first, Sums<S>& sums,
                               OnChunkBefore on_chunk_before) {
  uint32_t a[2][4][4];  // 64 inputs are multiplied while the next 64 are expanded
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    expand_block<S>(words, sides, part * 2, a[part]);
    expand_block<S>(words, sides, part * 2 + 1, a[part] + 2);
    if (part == 0) barrier_wait(x_full, parity);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i)
      wgmma<typename S::T, S::kColumns>(sums, a[part][i], x_matrix.after((part * 4 + i) * 256),
                                        part > 0 || i > 0 || !first);
    wgmma_commit();
    wgmma_wait<1>();  // the registers of the previous part are free again
    if (part == 0) on_chunk_before();
  }
}

template <typename S>
__device__ void clear(Sums<S>& sums) {
#pragma unroll
  for (int e = 0; e < S::kColumns / 2; ++e) sums[e] = 0.f;
}

// sums = the block's share of W x, which must not be empty.
template <typename S>
__device__ void consume(const Share& share, const Layout<S>& smem, WeightStream<S>& stream, Sums<S>& sums) {
  const bool leader = threadIdx.x % 32 == 0;
  uint32_t parity = 0;
  for (int first = share.first; first < share.end; first += S::kXStages, parity ^= 1) {
#pragma unroll
    for (int i = 0; i < S::kXStages; ++i) {
      const int chunk = first + i;
      if (chunk >= share.end) break;
      const int index = i % S::kSlotChunks;  // in the slot
      if (index == 0) stream.wait();
      uint4 words[S::kLoads];
      Sides<S> sides;
      stream.read(index, index == 0 ? 0 : (chunk >> stream.shift) - ((chunk - index) >> stream.shift), words, sides);
      const auto release_x = [&] {
        if (leader && chunk > share.first) barrier_arrive(smem.x_empty + (i + S::kXStages - 1) % S::kXStages * 8);
      };
      multiply_chunk<S>(words, sides, MatrixAt<128, 2048>(smem.x + i * S::kXBytes), smem.x_full + i * 8, parity,
                        chunk == share.first, sums, release_x);
      // Only after its words were used: a copy does not wait for reads in flight.
      if (index == S::kSlotChunks - 1) stream.release();
    }
  }
  wgmma_wait<0>();
}

// Stores a lane's sums to shared memory: partial[column of y][row of the group].
template <typename S>
__device__ void store_partial(const Wna16Args& args, const Sums<S>& sums, float2 scales, float* partial) {
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x / 32 * kTileRows + lane / 4;
#pragma unroll
  for (int e = 0; e < S::kColumns / 2; ++e) {
    const int column = e / 4 * 8 + lane % 4 * 2 + e % 2;
    if (column >= args.m) continue;
    partial[column * S::kPitch + row + e % 4 / 2 * 8] = sums[e] * (e % 4 / 2 ? scales.y : scales.x);
  }
}

// Replaces columns [begin, end) of `partial` by their sums over the cluster's blocks, in rank order.
template <typename S>
__device__ void sum_over_cluster(float* partial, int begin, int end) {
  for (int i = begin * S::kPitch + threadIdx.x * 4; i < end * S::kPitch; i += S::kConsumers * 4) {
    float4 sum = {};
#pragma unroll 4
    for (int rank = 0; rank < gridDim.x; ++rank) {
      const float4 value = read_cluster_floats(smem_address(partial + i), rank);
      sum = make_float4(sum.x + value.x, sum.y + value.y, sum.z + value.z, sum.w + value.w);
    }
    *reinterpret_cast<float4*>(partial + i) = sum;
  }
}

// Sums over the cluster, each block its columns of y, then the epilogue.
template <typename S>
__device__ void finish_group(const Wna16Args& args, float* partial) {
  const int begin = args.m * blockIdx.x / gridDim.x, end = args.m * (blockIdx.x + 1) / gridDim.x;
  if (gridDim.x > 1) {
    cluster_sync();
    sum_over_cluster<S>(partial, begin, end);
    cluster_arrive();
  }
  named_sync(1, S::kConsumers);
  const auto sum_of = [&](int column, int row) { return partial[column * S::kPitch + row]; };
  store_group<typename S::T, 4>(args, S::kTiles, begin, end, threadIdx.x / 32, S::kConsumers / 32, sum_of);
  if (gridDim.x > 1) cluster_wait();  // no block leaves while others read from it
}

// True if y is made of the lanes' own sums: the block has all of k, and y has no other operands than a bias.
__device__ inline bool stores_from_registers(const Wna16Args& args) {
  return gridDim.x == 1 && args.vectors && args.residual == nullptr && args.positions == nullptr && !args.float32_out;
}

// The bias of row `row` of W, or 0.
template <typename T>
__device__ float bias_of(const Wna16Args& args, int row) {
  return args.bias != nullptr && row < args.n ? to_float(static_cast<const T*>(args.bias)[row]) : 0.f;
}

// y of the block from its sums: matrices of 8 rows of W by 8 of x are transposed on their way to shared memory, whose
// rows then leave 16 bytes a lane. A tile has two such matrices for 8 rows of x; gated it has one.
template <typename S, bool kGated>
__device__ void store_from_registers(const Wna16Args& args, const Sums<S>& sums, float2 scales, const uint8_t* smem) {
  using T = typename S::T;
  constexpr int kOfTile = kGated ? 1 : 2, kPieces = S::kTiles * kOfTile, kPitchBytes = kPieces * 16 + 16;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int n = kGated ? args.n / 2 : args.n, first_piece = blockIdx.y * kPieces;
  const int low = (first_piece + warp * kOfTile) * 8 + lane / 4;
  const float2 bias = {bias_of<T>(args, low), bias_of<T>(args, low + (kGated ? n : 8))};
  const int second = lane / 8 % 2;  // of the two matrices that a warp stores at once
  const uint32_t rows = smem_address(smem) + ((kGated ? second * 8 : 0) + lane % 8) * kPitchBytes;
  const uint32_t place = rows + warp * (kOfTile * 16) + (kGated ? 0 : second * 16);
  uint32_t before = 0;
#pragma unroll
  for (int block = 0; block < S::kColumns / 8; ++block) {
    float low_sums[2], high_sums[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      low_sums[i] = sums[block * 4 + i] * scales.x + bias.x;
      high_sums[i] = sums[block * 4 + 2 + i] * scales.y + bias.y;
    }
    if constexpr (kGated) {
      const uint32_t pair = pair_of<T>(silu(low_sums[0]) * high_sums[0], silu(low_sums[1]) * high_sums[1]);
      if (block % 2) store_transposed(place + (block - 1) * 8 * kPitchBytes, before, pair);
      before = pair;
    } else {
#pragma unroll
      for (int i = 0; i < 2 && args.activation != Activation::none; ++i) {
        low_sums[i] = activate(args.activation, low_sums[i]);
        high_sums[i] = activate(args.activation, high_sums[i]);
      }
      store_transposed(place + block * 8 * kPitchBytes, pair_of<T>(low_sums[0], low_sums[1]),
                       pair_of<T>(high_sums[0], high_sums[1]));
    }
  }
  named_sync(1, S::kConsumers);
  for (int i = threadIdx.x; i < S::kColumns * kPieces; i += S::kConsumers) {
    const int column = i / kPieces, piece = i % kPieces, row = (first_piece + piece) * 8;
    if (row >= n || column >= args.m) continue;
    T* target = static_cast<T*>(args.y) + static_cast<int64_t>(column) * n + row;
    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(smem + column * kPitchBytes + piece * 16);
  }
}

// At the end of a warp's loop: earlier, the prefetch would compete with this product's own weight.
template <typename S>
__device__ void ask_for_next_weight(const Wna16Args& args) {
  constexpr int kWarps = S::kConsumers / 32;
  const int block = blockIdx.y * gridDim.x + blockIdx.x;
  const int warp = block * kWarps + threadIdx.x / 32, warps = gridDim.x * gridDim.y * kWarps;
  const int part = part_of(args.next_bytes, warps);
  if (threadIdx.x % 32 == 0) prefetch_part(args.next_weight, args.next_bytes, warp, part);
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1) wna16_gemm_kernel(const __grid_constant__ Wna16Args args) {
#if LOWBIT_WGMMA
  LOWBIT_DYNAMIC_SHARED(uint8_t, smem);
  const Layout<S> layout(smem);
  const Share share(args);
  allow_next_kernel();
  if (threadIdx.x == S::kConsumers) {
    for (int stage = 0; stage < S::kXStages; ++stage) {
      barrier_init(layout.x_full + stage * 8, 4);
      barrier_init(layout.x_empty + stage * 8, S::kConsumers / 32);
    }
  }
  __syncthreads();  // all threads reach this one; barriers for W belong to single warps
  if (threadIdx.x >= S::kConsumers) {
    wait_for_previous_kernel();
    XProducer<S>(args, share, layout).run();
    return;
  }
  WeightStream<S> stream(args, share, layout);
  wait_for_previous_kernel();
  Sums<S> sums;
  if (share.first < share.end) consume<S>(share, layout, stream, sums);
  else clear<S>(sums);
  ask_for_next_weight<S>(args);
  const float2 scales = stream.channel_scales(args);
  named_sync(1, S::kConsumers);  // no warp reads the rings any more
  if (stores_from_registers(args)) {
    if (args.activation == Activation::silu_mul) store_from_registers<S, true>(args, sums, scales, smem);
    else store_from_registers<S, false>(args, sums, scales, smem);
    return;
  }
  float* partial = reinterpret_cast<float*>(smem);
  store_partial<S>(args, sums, scales, partial);
  finish_group<S>(args, partial);
#endif
}

template <typename S>
cudaError_t launch_shape(const Wna16Args& args, const Wna16GemmLaunch& launch, cudaStream_t stream) {
  const LaunchPlan plan = {
      .device = launch.device,
      .stream = stream,
      .blocks = dim3(launch.cluster, (args.tiles + S::kTiles - 1) / S::kTiles),
      .threads = dim3(S::kThreads),
      .shared_bytes = Layout<S>::kBytes,
      .cluster = launch.cluster,
      .dependent = launch.dependent,
  };
  return launch_kernel(wna16_gemm_kernel<S>, plan, args);
}

template <typename T, typename Number, bool kZeros, int kGroups, bool kChannel>
cudaError_t launch_columns(const Wna16Args& args, const Wna16GemmLaunch& launch, cudaStream_t stream) {
  const int columns = args.m <= 16 ? 16 : args.m <= 32 ? 32 : 64;
  switch (columns * 10 + launch.warpgroups) {
    case 162: return launch_shape<Shape<T, Number, kZeros, kGroups, kChannel, 16, 2>>(args, launch, stream);
    case 163: return launch_shape<Shape<T, Number, kZeros, kGroups, kChannel, 16, 3>>(args, launch, stream);
    case 164: return launch_shape<Shape<T, Number, kZeros, kGroups, kChannel, 16, 4>>(args, launch, stream);
    case 322: return launch_shape<Shape<T, Number, kZeros, kGroups, kChannel, 32, 2>>(args, launch, stream);
    case 323: return launch_shape<Shape<T, Number, kZeros, kGroups, kChannel, 32, 3>>(args, launch, stream);
    case 324: return launch_shape<Shape<T, Number, kZeros, kGroups, kChannel, 32, 4>>(args, launch, stream);
    case 642: return launch_shape<Shape<T, Number, kZeros, kGroups, kChannel, 64, 2>>(args, launch, stream);
    case 643: return launch_shape<Shape<T, Number, kZeros, kGroups, kChannel, 64, 3>>(args, launch, stream);
    case 644: return launch_shape<Shape<T, Number, kZeros, kGroups, kChannel, 64, 4>>(args, launch, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <typename T, typename Number, bool kZeros, int... kGroups>
cudaError_t launch_groups(const Wna16Args& args, const Wna16GemmLaunch& launch, cudaStream_t stream) {
  if constexpr (!kZeros && !Number::kByteScales)
    if (args.scale_shift == kChannelShift) return launch_columns<T, Number, kZeros, 1, true>(args, launch, stream);
  cudaError_t error = cudaErrorInvalidValue;
  (void)((launch.groups_per_chunk == kGroups &&
          (error = launch_columns<T, Number, kZeros, kGroups, false>(args, launch, stream), true)) || ...);
  return error;
}

}  // namespace

// Needs code built for sm_90a (extension.reason_against_90a checks it): elsewhere the kernel is empty or missing.
template <typename T, typename Number>
cudaError_t launch_wna16_gemm(const Wna16Args& args, const Wna16GemmLaunch& launch, cudaStream_t stream) {
  if constexpr (Number::kByteScales) return launch_groups<T, Number, false, 4, 8>(args, launch, stream);
  else if constexpr (Number::kFloat) return launch_groups<T, Number, false, 1, 4>(args, launch, stream);
  else return args.zeros == nullptr ? launch_groups<T, Number, false, 1, 2, 4>(args, launch, stream)
                                    : launch_groups<T, Number, true, 1, 2, 4>(args, launch, stream);
}

const Kernel wna16_gemm("wna16_gemm", {name_of<LOWBIT_T>, LOWBIT_WHOLE::kName},
                        launch_wna16_gemm<LOWBIT_T, LOWBIT_WHOLE>);

}  // namespace lowbit
