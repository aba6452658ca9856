// Compiled once per T: LOWBIT_T comes from units.py. Code for sm_90a alone; empty elsewhere.
//
// Design. The ring of ring.cuh, but for W in 4 bits, which is wgmma's left operand in registers: a warp reads its
// tile's words and makes int8 of them, three instructions for eight codes. packed.py's word of eight inputs has inputs
// 0, 4, 1 and 5 in the low halves of its bytes and 2, 6, 3 and 7 in the high ones, so that x comes in this order too:
// its kernel, row_norm.cu, stores it so. A nibble in the upper half of a byte, with the top bit turned, is 16 times the
// code. Sums of a group of inputs are exact in int32; a warpgroup multiplies them with the group's scales and adds them
// to its own in float32, while others multiply. The next chunk's codes are expanded behind the products that were asked
// for. The epilogue is wna16_gemm's.
#include "declare.cuh"
#include "epilogue.cuh"
#include "next_weight.cuh"
#include "ring.cuh"
#include "wna16_args.cuh"

namespace lowbit {

struct W4a8Args {
  LOWBIT_STRUCT(W4a8Args);
  FIELD(Wna16Args, product);      // x (m, k) is int8, each 32 inputs in the order above, k a multiple of 32; no zeros
  FIELD(const float*, x_scales);  // (m)
};

struct W4a8Launch {
  LOWBIT_STRUCT(W4a8Launch);
  FIELD(int, device);
  FIELD(int, groups_per_chunk);  // scales per row in 128 inputs
  FIELD(int, warpgroups);        // multiplying warpgroups per block, with 64 rows of W each
  FIELD(int, cluster);           // blocks that split k
  FIELD(int, stages);            // of the ring: chunks of 128 inputs in flight per block
  FIELD(bool, dependent);        // launched with programmatic dependent launch
};

namespace {

constexpr int kTileWords = 256;    // of a tile in a chunk
constexpr float kLifted = 16.f;    // by which codes are multiplied

template <typename T_, int kColumns, int kWarpgroups, int kGroups_>
struct Shape : RingShape<Nibbles, kColumns, kWarpgroups> {
  using T = T_;
  static constexpr int kGroups = kGroups_;  // scales per row and chunk
  static constexpr int kTiles = 4 * kWarpgroups, kTilePairs = kTileRows / 2;
  // Columns multiplied at once. With 64 at once three warpgroups' registers fit on a multiprocessor, else four.
  static constexpr int kSpan = kWarpgroups == 2 && kColumns == 64 ? 32 : kColumns;
  static constexpr int kMinBlocks = (kSpan == 64 ? 3 : 4) / kWarpgroups;
  static constexpr int kScaleWords = 8 * kGroups;  // of a tile: rows g and g + 8 are a word
  static constexpr int kScaleBytes = kTiles * kScaleWords * 4;
};

// In shared memory behind the ring and its barriers: the scales of x's rows, then those of W in each stage.
template <typename S>
struct Behind {
  static size_t bytes(int stages) { return 256 + S::kColumns * 4 + size_t(stages) * S::kScaleBytes; }
  uint32_t x_scales, scales;
  __device__ explicit Behind(const Ring<S>& ring)
      : x_scales((ring.full(ring.stages) + 127) / 128 * 128), scales(x_scales + (S::kColumns * 4 + 127) / 128 * 128) {}
  __device__ uint32_t of(int stage) const { return scales + stage * S::kScaleBytes; }
};

struct Maps {
  CUtensorMap w, scales, x;
};

// 16 times the codes of eight inputs of a row. `nibbles` is 0xf0f0f0f0, unknown to the compiler: with
// two constants the second statement alone is two instructions.
__device__ inline void expand(uint32_t word, uint32_t nibbles, uint32_t& low, uint32_t& high) {
  low = (word << 4 & nibbles) ^ 0x80808080u;
  high = (word & nibbles) ^ 0x80808080u;
}

using Fragments = uint32_t[4][4];  // left operands of the four products of a chunk

// The lane's codes of a chunk, whose first word is at `words`.
__device__ inline void read_fragments(uint32_t words, uint32_t nibbles, Fragments& a) {
#pragma unroll
  for (int load = 0; load < 2; ++load) {
    const uint4 four = read_shared<uint4>(words + load * 512);
    expand(four.x, nibbles, a[2 * load][0], a[2 * load][2]);
    expand(four.y, nibbles, a[2 * load][1], a[2 * load][3]);
    expand(four.z, nibbles, a[2 * load + 1][0], a[2 * load + 1][2]);
    expand(four.w, nibbles, a[2 * load + 1][1], a[2 * load + 1][3]);
  }
}

// The scales of the lane's two rows in a group.
template <typename T>
__device__ float2 scales_at(uint32_t address) {
  const uint32_t pair = read_shared<uint32_t>(address);
  const auto* scales = reinterpret_cast<const T*>(&pair);
  return make_float2(to_float(scales[0]), to_float(scales[1]));
}

// sums += products of a group, whose scales are given, for all columns of x from `first` on.
template <typename S>
__device__ void add_products(const int (&products)[S::kSpan / 2], float2 scales, int first, RingSums<S>& sums) {
#pragma unroll
  for (int i = 0; i < S::kSpan / 2; ++i)
    sums[first / 2 + i] += static_cast<float>(products[i]) * (i % 4 / 2 ? scales.y : scales.x);
}

// sums = 16 times the block's share of W x.
template <typename S>
__device__ void consume_nibbles(const RingShare& share, const Ring<S>& ring, const Behind<S>& behind,
                                uint32_t nibbles, RingSums<S>& sums) {
  constexpr int kProducts = 4 / S::kGroups;  // of a group
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t words = warp * (kTileWords * 4) + lane * 16, scales = (warp * 8 + lane / 4) * S::kGroups * 4;
  Fragments a[2];
  Turn turn{ring.stages};
  if (share.first == share.end) return;
  barrier_wait(ring.full(0), 0);
  read_fragments(ring.w(0) + words, nibbles, a[0]);
  for (int first = share.first; first < share.end; first += 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (first + i >= share.end) break;
      const SwizzledAt x(ring.x(turn.stage));
      const uint32_t done = ring.empty(turn.stage), scales_here = behind.of(turn.stage) + scales;
#pragma unroll
      for (int group = 0; group < S::kGroups; ++group) {
        const float2 pair = scales_at<typename S::T>(scales_here + group * 4);
#pragma unroll
        for (int column = 0; column < S::kColumns; column += S::kSpan) {
          const bool last = group == S::kGroups - 1 && column + S::kSpan == S::kColumns;
          int products[S::kSpan / 2];
          wgmma_fence();
#pragma unroll
          for (int j = 0; j < kProducts; ++j)
            wgmma_bytes<S::kSpan>(products, a[i][group * kProducts + j],
                                  x.after(column * kBoxBytes + 32 * (group * kProducts + j)), j > 0);
          wgmma_commit();
          if (last) {
            turn.next();
            if (first + i + 1 < share.end) {
              barrier_wait(ring.full(turn.stage), turn.parity);
              read_fragments(ring.w(turn.stage) + words, nibbles, a[1 - i]);
            }
          }
          wgmma_wait<0>();
          if (last && lane == 0) barrier_arrive(done);
          add_products<S>(products, pair, column, sums);
        }
      }
    }
  }
}

// Sums of four pairs of rows over the cluster, in rank order. The next block's are asked for before one's are used.
__device__ inline void sum_pairs(const float* partial, float (&low)[4], float (&high)[4]) {
  if (gridDim.x == 1) {
    add_bits(low, *reinterpret_cast<const float4*>(partial));
    return add_bits(high, *reinterpret_cast<const float4*>(partial + kTileRows / 2));
  }
  const uint32_t low_at = smem_address(partial), high_at = smem_address(partial + kTileRows / 2);
  const auto ask = [&](int rank, float4 (&pair)[2]) {
    if (rank >= gridDim.x) return;
    pair[0] = read_cluster_floats(low_at, rank);
    pair[1] = read_cluster_floats(high_at, rank);
  };
  float4 even[2], odd[2];
  ask(0, even);
#pragma unroll 1
  for (int rank = 0; rank < gridDim.x; rank += 2) {
    ask(rank + 1, odd);
    add_bits(low, even[0]), add_bits(high, even[1]);
    ask(rank + 2, even);
    if (rank + 1 < gridDim.x) add_bits(low, odd[0]), add_bits(high, odd[1]);
  }
}

// Sums over the cluster, each block its columns of y, then the epilogue. A thread has four pairs of rows.
template <typename S>
__device__ void finish(const Wna16Args& args, const float* partial, const float* x_scales) {
  constexpr int kFours = S::kTiles * S::kTilePairs / 4;
  const int first = blockIdx.z * S::kColumns, columns = min(args.m - first, S::kColumns);
  const int begin = share_begin(columns, blockIdx.x), end = share_begin(columns, blockIdx.x + 1);
  const int pair = threadIdx.x % kFours * 4, row = pair / S::kTilePairs * kTileRows + pair % S::kTilePairs;
  const int tile = blockIdx.y * S::kTiles + pair / S::kTilePairs, block_tiles = args.pair_block / kTileRows;
  if (tile >= args.tiles) return;
  Pairs<4> pairs = {.column = 0, .vectors = args.vectors, .low_sums = {}, .high_sums = {}};
  pairs.low = tile / block_tiles * args.pair_block + tile % block_tiles * S::kTilePairs + pair % S::kTilePairs;
  pairs.high = pairs.low + args.pair_block / 2;
#pragma unroll 1
  for (int column = begin + threadIdx.x / kFours; column < end; column += S::kConsumers / kFours) {
    const float* sums = partial + column * S::kPitch + row;
    float low[4] = {}, high[4] = {};
    sum_pairs(sums, low, high);
    const float scale = x_scales[column] / kLifted;
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs.low_sums[j] = low[j] * scale, pairs.high_sums[j] = high[j] * scale;
    pairs.column = first + column;
    store_pairs<typename S::T>(args, pairs);
  }
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::kMinBlocks)
    w4a8_gemm_kernel(const __grid_constant__ Maps maps, const __grid_constant__ W4a8Args args, int stages,
                     uint32_t nibbles) {
#if LOWBIT_WGMMA
  LOWBIT_DYNAMIC_SHARED(uint8_t, unaligned);
  uint8_t* smem = unaligned + (1024 - smem_address(unaligned) % 1024) % 1024;
  const Ring<S> ring{smem_address(smem), stages};
  const Behind<S> behind(ring);
  const RingShare share(args.product.k, blockIdx.y * S::kTiles);
  stamp(Stage::kBegun);
  allow_next_kernel();
  if (threadIdx.x == S::kConsumers) ring.init();
  __syncthreads();
  if (threadIdx.x >= S::kConsumers) {
    if (threadIdx.x != S::kConsumers) return;
    prefetch_map(maps.scales);
    produce_as<S>(maps.x, share, ring, [&](int chunk, int stage) {
      const int row = chunk >> args.product.scale_shift;
      barrier_expect(ring.full(stage), S::kStageBytes + S::kScaleBytes);
      copy_box<Reuse::kNone>(ring.w(stage), maps.w, chunk * kTileWords, share.row, ring.full(stage));
      copy_box<Reuse::kSome>(behind.of(stage), maps.scales, row * S::kScaleWords, share.row, ring.full(stage));
    });
    return;
  }
  float* x_scales = reinterpret_cast<float*>(smem + (behind.x_scales - ring.start));
  const int column = blockIdx.z * S::kColumns + threadIdx.x;
  wait_for_previous_kernel();
  if (threadIdx.x < S::kColumns && column < args.product.m) x_scales[threadIdx.x] = __ldcg(args.x_scales + column);
  stamp(Stage::kWaited);
  RingSums<S> sums = {};
  consume_nibbles<S>(share, ring, behind, nibbles, sums);
  stamp(Stage::kComputed);
  auto* partial = reinterpret_cast<float*>(smem);
  share_sums<S>(sums, partial, [&] { finish<S>(args.product, partial, x_scales); });
  leave_stamps(args.product.n, args.product.k);
#endif
}

template <typename S>
cudaError_t launch_shape(const W4a8Args& args, const W4a8Launch& launch, cudaStream_t stream) {
  const Wna16Args& product = args.product;
  const int stages = max(launch.stages, S::kLeastStages), scale_words = product.scale_rows * S::kScaleWords;
  Maps maps;
  cudaError_t error = make_word_map(maps.w, product.words, product.tiles, product.chunks * kTileWords, kTileWords,
                                    S::kTiles);
  if (error == cudaSuccess)
    error = make_word_map(maps.scales, product.scales, product.tiles, scale_words, S::kScaleWords, S::kTiles);
  if (error == cudaSuccess) error = make_tensor_map(maps.x, product.x, product.m, product.k, product.k, S::kColumns);
  if (error != cudaSuccess) return error;
  const size_t bytes = ring_bytes<S>(stages, Behind<S>::bytes(stages));
  const LaunchPlan plan = ring_plan<S>(launch, (product.tiles + S::kTiles - 1) / S::kTiles, product.m, bytes, stream);
  return launch_kernel(w4a8_gemm_kernel<S>, plan, maps, args, stages, 0xf0f0f0f0u);
}

template <typename T, int kColumns, int kGroups>
cudaError_t launch_warpgroups(const W4a8Args& args, const W4a8Launch& launch, cudaStream_t stream) {
  switch (launch.warpgroups) {
    case 1: return launch_shape<Shape<T, kColumns, 1, kGroups>>(args, launch, stream);
    case 2: return launch_shape<Shape<T, kColumns, 2, kGroups>>(args, launch, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <typename T, int kGroups>
cudaError_t launch_columns(const W4a8Args& args, const W4a8Launch& launch, cudaStream_t stream) {
  const int m = args.product.m;
  if (m <= 8) return launch_warpgroups<T, 8, kGroups>(args, launch, stream);
  if (m <= 16) return launch_warpgroups<T, 16, kGroups>(args, launch, stream);
  if (m <= 32) return launch_warpgroups<T, 32, kGroups>(args, launch, stream);
  return launch_warpgroups<T, 64, kGroups>(args, launch, stream);
}

}  // namespace

// cudaErrorInvalidDeviceFunction if the code was not built for sm_90a.
template <typename T>
cudaError_t launch_w4a8_gemm(const W4a8Args& args, const W4a8Launch& launch, cudaStream_t stream) {
  switch (launch.groups_per_chunk) {
    case 1: return launch_columns<T, 1>(args, launch, stream);
    case 2: return launch_columns<T, 2>(args, launch, stream);
    case 4: return launch_columns<T, 4>(args, launch, stream);
    default: return cudaErrorInvalidValue;
  }
}

const Kernel w4a8_gemm("w4a8_gemm", {name_of<LOWBIT_T>}, launch_w4a8_gemm<LOWBIT_T>);

}  // namespace lowbit
