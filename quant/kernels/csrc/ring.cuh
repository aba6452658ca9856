// Products of few rows of x with a W in its plain order, for sm_90a alone: w8a8_gemm.cu and dense_gemv.cu.
//
// Design. W's rows are the 64 rows of wgmma's left operand, and x's rows its 8 to 128 columns, so that few rows of x
// waste only columns. The copy engine brings both, in boxes of 128 bytes per row, from their plain order to shared
// memory, where the tensor cores read them: no instruction touches a weight. One warp requests boxes, and one or more
// warpgroups multiply; several such blocks share a multiprocessor, so that one reads while another finishes. Blocks of
// a cluster split k and sum through distributed shared memory, in a fixed order. W's stream starts before the previous
// kernel has finished: W is constant, x is not.
#pragma once

#include "launch.cuh"
#include "ring_launch.cuh"
#include "shared_wgmma.cuh"
#include "stamps.cuh"
#include "tensor_map.cuh"

namespace lowbit {

constexpr int kGroupRows = 64;  // of W per warpgroup

// Codes of 4 bits in packed.py's order: the Operand of W that warps expand themselves, each its own tile of 16 rows.
struct Nibbles {};
template <typename Operand>
constexpr int kRowBytes = kBoxBytes;  // of a row of W in a chunk
template <>
constexpr int kRowBytes<Nibbles> = kBoxBytes / 2;

// kParts: runs of adjacent rows of W per block.
template <typename Operand_, int kColumns_, int kWarpgroups_, int kParts_ = 1>
struct RingShape {
  using Operand = Operand_;  // int8_t, e4m3, a half or Nibbles
  using Sum = typename SumOf<Operand>::Type;
  static constexpr int kColumns = kColumns_;        // rows of x, padded
  static constexpr int kWarpgroups = kWarpgroups_;  // multiplying warpgroups
  static constexpr int kParts = kParts_;
  static constexpr int kRows = kWarpgroups * kGroupRows;
  static constexpr int kConsumers = kWarpgroups * 128;  // threads
  static constexpr int kThreads = kConsumers + 32;
  static constexpr int kMinBlocks = 4 / kWarpgroups;
  static constexpr int kArrivals = std::is_same_v<Operand, Nibbles> ? kWarpgroups * 4 : kWarpgroups;  // of a stage
  static constexpr int kWeightBytes = kRows * kRowBytes<Operand>;
  static constexpr int kStageBytes = kWeightBytes + kColumns * kBoxBytes;
  static constexpr int kPitch = kRows + 4;  // numbers between columns of sums: no bank conflicts
  // A stage is released once the next is in use; at the end, the sums reuse the ring's memory.
  static constexpr int kSumStages = (kPitch * kColumns * 4 + kStageBytes - 1) / kStageBytes;
  static constexpr int kLeastStages = kSumStages > 2 ? kSumStages : 2;
};

// W in boxes of the rows of a part, x in boxes of kColumns rows.
struct RingMaps {
  CUtensorMap w, x;
};

// The first item of block `rank`, if the cluster shares `count` items. A division costs forty instructions,
// and clusters of one block are common.
__device__ inline int share_begin(unsigned count, unsigned rank) {
  return gridDim.x == 1 ? count * rank : count * rank / gridDim.x;
}

// This block's chunks of 128 bytes per row, [first, end), and the first row of its first part of W.
struct RingShare {
  int first, end, row;
  __device__ RingShare(int row_bytes, int row) : row(row) {
    const int chunks = (row_bytes + kBoxBytes - 1) / kBoxBytes;
    first = share_begin(chunks, blockIdx.x);
    end = share_begin(chunks, blockIdx.x + 1);
  }
};

// The first row of the block's first part of W. Two parts are half a pair block apart: of the whole weight, or of one
// head, if outputs are heads to be turned.
template <typename S>
__device__ int first_row(bool turned, int pair_block) {
  constexpr int kPartRows = S::kRows / S::kParts;
  if (S::kParts == 1 || !turned) return blockIdx.y * kPartRows;
  const int blocks = pair_block / S::kRows, head = blockIdx.y / blocks;
  return head * pair_block + (blockIdx.y - head * blocks) * kPartRows;
}

// A stage of the ring, and the parity of the phase that fills it.
struct Turn {
  int stages;
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <typename S>
struct Ring {
  uint32_t start;
  int stages;
  __device__ uint32_t w(int stage) const { return start + stage * S::kStageBytes; }
  __device__ uint32_t x(int stage) const { return w(stage) + S::kWeightBytes; }
  __device__ uint32_t full(int stage) const { return w(stages) + stage * 16; }
  __device__ uint32_t empty(int stage) const { return full(stage) + 8; }

  __device__ void init() const {
    for (int stage = 0; stage < stages; ++stage) {
      barrier_init(full(stage), 1);
      barrier_init(empty(stage), S::kArrivals);
    }
    fence_barrier_init();
  }
};

// A block's shared memory: the ring, two barriers per stage, kernel-specific data behind them, and padding to align to
// 1024.
template <typename S>
size_t ring_bytes(int stages, size_t behind) {
  return stages * size_t(S::kStageBytes + 16) + behind + 1024;
}

// One lane keeps the ring full. The first boxes of W are requested before the previous kernel has ended, those of x
// after it. ask_w(chunk, stage) announces the bytes of both, and requests W.
template <typename S, typename AskW>
__device__ void produce_as(const CUtensorMap& x, const RingShare& share, const Ring<S>& ring, AskW ask_w) {
  const auto ask_x = [&](int chunk, int stage) {
    copy_box<Reuse::kSome>(ring.x(stage), x, chunk * kBoxBytes, blockIdx.z * S::kColumns, ring.full(stage));
  };
  const int ahead = min(share.end - share.first, ring.stages);
  prefetch_map(x);
  for (int i = 0; i < ahead; ++i) ask_w(share.first + i, i);
  wait_for_previous_kernel();
  for (int i = 0; i < ahead; ++i) ask_x(share.first + i, i);
  Turn turn{ring.stages};
  for (int chunk = share.first + ring.stages; chunk < share.end; ++chunk, turn.next()) {
    barrier_wait(ring.empty(turn.stage), turn.parity);
    ask_w(chunk, turn.stage);
    ask_x(chunk, turn.stage);
  }
}

// The same for W in its plain order, whose parts are `part_rows` apart.
template <typename S>
__device__ void produce(const RingMaps& maps, const RingShare& share, int part_rows, const Ring<S>& ring) {
  produce_as<S>(maps.x, share, ring, [&](int chunk, int stage) {
    barrier_expect(ring.full(stage), S::kStageBytes);
#pragma unroll
    for (int part = 0; part < S::kParts; ++part)
      copy_box<Reuse::kNone>(ring.w(stage) + part * (S::kWeightBytes / S::kParts), maps.w, chunk * kBoxBytes,
                             share.row + part * part_rows, ring.full(stage));
  });
}

template <typename S>
using RingSums = typename S::Sum[S::kColumns / 2];  // of a lane, for 64 rows of W x columns

// sums = the block's share of W x. A stage is released once the products after it have been issued.
template <typename S>
__device__ void consume(const RingShare& share, const Ring<S>& ring, RingSums<S>& sums) {
  const bool leader = threadIdx.x % 128 == 0;
  const int group = threadIdx.x / 128;
  Turn turn{ring.stages};
  uint32_t before = 0;  // the barrier of the previous stage
  for (int chunk = share.first; chunk < share.end; ++chunk) {
    const SwizzledAt w(ring.w(turn.stage) + group * (kGroupRows * kBoxBytes)), x(ring.x(turn.stage));
    barrier_wait(ring.full(turn.stage), turn.parity);
    wgmma_fence();
#pragma unroll
    for (int byte = 0; byte < kBoxBytes; byte += 32)
      wgmma_shared<typename S::Operand, S::kColumns>(sums, w.after(byte), x.after(byte));
    wgmma_commit();
    wgmma_wait<1>();
    if (leader && chunk > share.first) barrier_arrive(before);
    before = ring.empty(turn.stage);
    turn.next();
  }
  wgmma_wait<0>();
}

// Sums of a chunk that are added as they are.
struct NoFactors {
  __device__ void load(int) {}
  __device__ float of(int) const { return 1.f; }
};

// The same with sums of each chunk's own, added in float32: the tensor cores add up products of e4m3 with some 14 bits.
// Factors::of(i) multiplies sum i of the chunk that was loaded last.
template <typename S, typename Factors>
__device__ void consume_apart(const RingShare& share, const Ring<S>& ring, Factors factors, RingSums<S>& sums) {
  constexpr int kSpan = S::kColumns == 128 ? 32 : S::kColumns;  // columns at once: more sums do not fit in registers
  const int group = threadIdx.x / 128;
  Turn turn{ring.stages};
  for (int chunk = share.first; chunk < share.end; ++chunk, turn.next()) {
    const SwizzledAt w(ring.w(turn.stage) + group * (kGroupRows * kBoxBytes)), x(ring.x(turn.stage));
    factors.load(chunk);
    barrier_wait(ring.full(turn.stage), turn.parity);
#pragma unroll
    for (int column = 0; column < S::kColumns; column += kSpan) {
      typename S::Sum part[kSpan / 2] = {};
      wgmma_fence();
#pragma unroll
      for (int byte = 0; byte < kBoxBytes; byte += 32)
        wgmma_shared<typename S::Operand, kSpan>(part, w.after(byte), x.after(column * kBoxBytes + byte));
      wgmma_commit();
      wgmma_wait<0>();
      if (threadIdx.x % 128 == 0 && column + kSpan == S::kColumns) barrier_arrive(ring.empty(turn.stage));
#pragma unroll
      for (int i = 0; i < kSpan / 2; ++i) sums[column / 2 + i] += factors.of(column / 2 + i) * part[i];
    }
  }
}

// Stores a lane's sums to shared memory: partial[row of x][row of W in the block].
template <typename S>
__device__ void store_partial(const RingSums<S>& sums, typename S::Sum* partial) {
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < S::kColumns / 2; ++i)
    partial[(i / 4 * 8 + lane % 4 * 2 + i % 2) * S::kPitch + row + i % 4 / 2 * 8] = sums[i];
}

__device__ inline void add_bits(int (&sums)[4], const float4& bits) {
  sums[0] += __float_as_int(bits.x), sums[1] += __float_as_int(bits.y);
  sums[2] += __float_as_int(bits.z), sums[3] += __float_as_int(bits.w);
}
__device__ inline void add_bits(float (&sums)[4], const float4& bits) {
  sums[0] += bits.x, sums[1] += bits.y, sums[2] += bits.z, sums[3] += bits.w;
}

// sums += four adjacent sums of all blocks in the cluster, in rank order. The number of rows of x decides which block
// adds them, but must not change a sum of floats.
__device__ inline void sum_over_cluster(const float* partial, float (&sums)[4]) {
#pragma unroll 1
  for (int rank = 0; rank < gridDim.x; ++rank) {
    if (rank == blockIdx.x) add_bits(sums, *reinterpret_cast<const float4*>(partial));
    else add_bits(sums, read_cluster_floats(smem_address(partial), rank));
  }
}
__device__ inline void sum_over_cluster(const int* partial, int (&sums)[4]) {
  add_bits(sums, *reinterpret_cast<const float4*>(partial));
#pragma unroll 1
  for (int i = 1; i < gridDim.x; ++i) {
    const int rank = (blockIdx.x + i) % gridDim.x;
    add_bits(sums, read_cluster_floats(smem_address(partial), rank));
  }
}

// Calls store(column of the block, row of the block) for this thread's share of `fours` times four rows in each of
// `columns` columns. The cluster's blocks split them in runs of 16 rows, which four adjacent lanes share.
template <typename S, typename Store>
__device__ void for_fours(int columns, int fours, Store store) {
  const int runs = columns * fours / 4;
  const int begin = 4 * share_begin(runs, blockIdx.x), end = 4 * share_begin(runs, blockIdx.x + 1);
#pragma unroll 1
  for (int i = begin + threadIdx.x; i < end; i += S::kConsumers) store(i / fours, i % fours * 4);
}

// Stores the block's sums to `partial`, which reuses the ring's memory, and calls finish() once the whole cluster's are
// there.
template <typename S, typename Finish>
__device__ void share_sums(const RingSums<S>& sums, typename S::Sum* partial, Finish finish) {
  named_sync(1, S::kConsumers);  // no warpgroup reads the ring any more
  store_partial<S>(sums, partial);
  if (gridDim.x > 1) cluster_sync();
  else named_sync(1, S::kConsumers);
  finish();
  if (gridDim.x > 1) cluster_sync();  // no block leaves while others read from it
}

// The grid and shared memory of a ring's launch: blocks along the cluster, `row_blocks`, and x's `m` rows.
template <typename S, typename Launch>
LaunchPlan ring_plan(const Launch& launch, int row_blocks, int m, size_t bytes, cudaStream_t stream) {
  return {
      .device = launch.device,
      .stream = stream,
      .blocks = dim3(launch.cluster, row_blocks, (m + S::kColumns - 1) / S::kColumns),
      .threads = dim3(S::kThreads),
      .shared_bytes = bytes,
      .cluster = launch.cluster,
      .dependent = launch.dependent,
  };
}

}  // namespace lowbit
