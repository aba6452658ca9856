// Compiled once per (T, number): LOWBIT_T and LOWBIT_WHOLE come from units.py. Code for sm_90a alone; empty elsewhere.
//
// Design. y^T = W x^T by parts: 128 rows of W a block, 128, 192 or 256 rows of x. W is wgmma's left operand, expanded
// in registers, x the right one, in shared memory. The copy engine brings both, in stages of 64 inputs: x in its plain
// order under the 128-byte swizzle, W's words, scales and zeros as one box each. Two blocks of a cluster have the same
// rows of x: each asks for half of them, for both. A word of the packed layout has eight adjacent inputs of a row, of
// which wgmma wants two from each of four lanes: every lane reads the words of all four and takes its own pair, which a
// shift brings in place, so that neither x nor W has a second order. Two warpgroups multiply, with 64 rows of W each:
// while one stage's products run, the next one's words are expanded. A third warpgroup asks for boxes and leaves its
// registers to these two. Clusters take one part after another, and share what is left; a warpgroup's sums leave
// through shared memory of its own, beside the ring, while the next part's boxes come.
#include "declare.cuh"
#include "epilogue.cuh"
#include "launch.cuh"
#include "pair_at.cuh"
#include "prefill_ptx.cuh"
#include "transposed.cuh"
#include "wna16_args.cuh"

namespace lowbit {

struct Wna16PrefillLaunch {
  LOWBIT_STRUCT(Wna16PrefillLaunch);
  FIELD(int, device);
  FIELD(int, groups_per_chunk);  // scales per row in 128 inputs; 0: a float with its factors alone
  FIELD(int, columns);           // rows of x in a part: 128, 192 or 256
  FIELD(int, clusters);          // of two blocks
  FIELD(int, whole);             // parts that one cluster takes each, at most; all share the others
  FIELD(void*, partial);         // (clusters, 256, columns) float32 for sums of parts that clusters share, or null
  FIELD(void*, marks);           // (clusters, 4) int64
  FIELD(int64_t, mark);          // of this launch alone: no memory holds it by chance
  FIELD(bool, dependent);        // launched with programmatic dependent launch
};

namespace {

constexpr int kWarpgroups = 2, kConsumers = kWarpgroups * 128, kThreads = kConsumers + 128;
constexpr int kCluster = 2;                                      // blocks that share rows of x
constexpr int kGroupTiles = 4, kTiles = kWarpgroups * kGroupTiles;  // of W, for a warpgroup and a block
constexpr int kSteps = 2;                                        // of 64 inputs, in a chunk
constexpr int kSpan = 64, kFew = 32;                             // columns that leave at once, as halves and as floats
constexpr int kMostShared = 227 << 10;
constexpr int kLeft = 1 + kWarpgroups, kLeaving = 128 + 32;  // named barriers of sums that were left; threads at one

template <typename T_, typename Number_, bool kZeros_, int kGroups_, bool kChannel_, int kColumns_>
struct Shape {
  using T = T_;
  using Number = Number_;
  static constexpr bool kZeros = kZeros_, kChannel = kChannel_;  // kChannel: one scale per row, applied to the sums
  static constexpr int kGroups = kGroups_;                       // scales per row and chunk
  static constexpr int kColumns = kColumns_;                     // rows of x
  static constexpr int kStepGroups = kGroups < 2 ? 1 : kGroups / 2;  // in a step of 64 inputs
  static constexpr int kLoads = Number::kBits / 4;                // 16-byte loads of a lane's words in a step
  static constexpr int kSides = Number::kByteScales ? kStepGroups / 2 : kStepGroups;  // words of its scales
  // Words of a tile: in a step, and beside a chunk.
  static constexpr int kStepWords = kLoads * 128;
  static constexpr int kScaleWords = kChannel ? 0 : (Number::kByteScales ? 4 : 8) * kGroups;
  static constexpr int kZeroWords = kZeros ? 4 * kGroups : 0;
  static constexpr int kXBytes = kColumns * kBoxBytes, kWordBytes = kTiles * kStepWords * 4;
  static constexpr int kScaleBytes = kTiles * kScaleWords * 4, kZeroBytes = kTiles * kZeroWords * 4;
  static constexpr int kStageBytes = kXBytes + kWordBytes + kScaleBytes + kZeroBytes;
  static constexpr int kPitch = kGroupTiles * kTileRows * 2 + 16;  // bytes between columns that leave
  static constexpr int kLeaveBytes = kPitch * kSpan;               // of a warpgroup
  static constexpr int kPadded = (kStageBytes + 1023) / 1024 * 1024;  // the swizzle counts from multiples of 1024
  static constexpr int kStages = (kMostShared - 1024 - 256 - kWarpgroups * kLeaveBytes) / kPadded;
  static constexpr int kBytes = 1024 + kStages * kPadded + kWarpgroups * kLeaveBytes + 16 * kStages;
};

struct Maps {
  CUtensorMap x, words, scales, zeros;
};

// A block's shared memory: stages, then what leaves, then barriers.
template <typename S>
struct Room {
  uint32_t start;
  __device__ uint32_t x(int stage) const { return start + stage * S::kPadded; }
  __device__ uint32_t words(int stage) const { return x(stage) + S::kXBytes; }
  __device__ uint32_t scales(int stage) const { return words(stage) + S::kWordBytes; }
  __device__ uint32_t zeros(int stage) const { return scales(stage) + S::kScaleBytes; }
  __device__ uint32_t leaving(int group) const { return start + S::kStages * S::kPadded + group * S::kLeaveBytes; }
  __device__ uint32_t full(int stage) const { return leaving(kWarpgroups) + stage * 16; }
  __device__ uint32_t empty(int stage) const { return full(stage) + 8; }

  __device__ void init() const {
    for (int stage = 0; stage < S::kStages; ++stage) {
      barrier_init(full(stage), 1);
      barrier_init(empty(stage), kCluster * kConsumers / 32);
    }
    fence_barrier_init();
  }
};

// A stage, and the parity of the phase that fills it.
template <int kStages>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A run of chunks of a part: all inputs, or some of them.
struct Run {
  int part, first, end;
};

// A cluster's runs. `whole` parts are taken one after another by one cluster each. The others, one after another in
// chunks, are cut into as many equal pieces as there are clusters; of its piece a cluster takes the last run first: the
// cluster behind needs those sums, as this one in the end needs those of the cluster before.
struct Work {
  int chunks, columns, whole, shared;  // chunks of a part; parts along x's rows, of the same rows of W; chunks shared
  int part, end;                       // to come: a whole part; the end of the shared chunks
  __device__ Work(const Wna16Args& args, int part_columns, int most_whole)
      : chunks(args.chunks), columns((args.m + part_columns - 1) / part_columns), part(cluster()) {
    const int parts = (args.tiles + kCluster * kTiles - 1) / (kCluster * kTiles) * columns;
    whole = min(most_whole, parts);
    shared = (parts - whole) * chunks;
    end = begin(cluster() + 1);
  }
  __device__ static int cluster() { return blockIdx.x / kCluster; }
  __device__ int tile(const Run& run) const { return (run.part / columns * kCluster + cluster_rank()) * kTiles; }
  __device__ int column(const Run& run) const { return run.part % columns; }
  __device__ int begin(int cluster) const { return int64_t(shared) * cluster / (gridDim.x / kCluster); }

  __device__ bool next(Run& run) {
    if (part < whole) {
      run = {part, 0, chunks};
      part += gridDim.x / kCluster;
      return true;
    }
    const int least = begin(cluster());
    if (end <= least) return false;
    const int behind = (end - 1) / chunks, first = max(least, behind * chunks);
    run = {whole + behind, first - behind * chunks, end - behind * chunks};
    end = first;
    return true;
  }
};

// One lane asks for all boxes of the block's runs, and for its half of x for both blocks.
template <typename S>
__device__ void produce(const Maps& maps, const Wna16Args& args, Work& work, const Room<S>& room) {
  constexpr int kHalfBytes = S::kXBytes / kCluster;
  const int rank = cluster_rank();
  Turn<S::kStages> turn;
  for (Run run; work.next(run);) {
    const int tile = work.tile(run), column = work.column(run) * S::kColumns + rank * (S::kColumns / kCluster);
    for (int step = run.first * kSteps; step < run.end * kSteps; ++step, turn.next()) {
      const int stage = turn.stage, row = step / kSteps >> args.scale_shift;
      const uint32_t full = room.full(stage);
      barrier_wait(room.empty(stage), turn.parity ^ 1);
      barrier_expect(full, S::kStageBytes);
      copy_box_to_all<kCluster>(room.x(stage) + rank * kHalfBytes, maps.x, step * kBoxBytes, column, full);
      copy_box<Reuse::kSome>(room.words(stage), maps.words, step * S::kStepWords, tile, full);
      if (S::kScaleBytes > 0) copy_box<Reuse::kSome>(room.scales(stage), maps.scales, row * S::kScaleWords, tile, full);
      if (S::kZeroBytes > 0) copy_box<Reuse::kSome>(room.zeros(stage), maps.zeros, row * S::kZeroWords, tile, full);
    }
  }
}

// A lane's words of 64 inputs of a tile, with their scales and zeros: words of all four lanes that share its rows.
template <typename S>
struct Words {
  using Number = typename S::Number;
  uint4 parts[S::kLoads][4];  // of each lane's part of a load
  uint32_t scales[S::kSides];  // of rows g and g + 8; bytes: of both blocks of 32 inputs
  uint16_t zeros[S::kStepGroups];

  __device__ void read(const Room<S>& room, int stage, int step, int tile) {
    const int row = threadIdx.x % 32 / 4;
#pragma unroll
    for (int load = 0; load < S::kLoads; ++load)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int word = tile * S::kStepWords + load * 128 + row * 16 + i * 4;
        parts[load][i] = read_shared<uint4>(room.words(stage) + word * 4);
      }
    const int group = S::kGroups == 1 ? 0 : step % 2 * S::kStepGroups;
    if (Number::kByteScales) {
      const int side = (tile * 8 + row) * S::kGroups * 2 + step % 2 * 4;
#pragma unroll
      for (int i = 0; i < S::kSides; ++i) scales[i] = read_shared<uint32_t>(room.scales(stage) + side + i * 8);
      return;
    }
    const int side = (tile * 8 + row) * S::kGroups + group;
#pragma unroll
    for (int i = 0; i < S::kStepGroups; ++i) {
      if (S::kScaleBytes > 0) scales[i] = read_shared<uint32_t>(room.scales(stage) + (side + i) * 4);
      if (S::kZeroBytes > 0) zeros[i] = read_shared<uint16_t>(room.zeros(stage) + (side + i) * 2);
    }
  }

  // The scale, twice, of row g (half 0) or g + 8 in eight inputs, those of lane `i` in a block of 32.
  __device__ uint32_t scale(int block, int half, int i) const {
    if (Number::kByteScales) return byte_scale<typename S::T>(scales[i / 2 * (S::kSides - 1)], block * 2 + half);
    return __byte_perm(scales[block * (S::kSides - 1)], 0, half ? 0x3232 : 0x1010);
  }

  __device__ uint32_t zero(int block, int half) const {
    return S::kZeros ? zeros[block * (S::kStepGroups - 1)] >> (8 * half) & 0xff : 1u << (Number::kBits - 1);
  }
};

using Fragments = uint32_t[4][4];  // left operands of the four products of 64 inputs

// The lane's pairs of 64 inputs, scaled unless there is one scale per row.
template <typename S>
__device__ void expand(const Words<S>& words, Fragments& a) {
  using T = typename S::T;
  using Number = typename S::Number;
  using D = Dequant<T, Number>;
  constexpr int kBlocks = 2 / S::kLoads;  // of 32 inputs, in a load
#pragma unroll
  for (int block = 0; block < 2; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto zeros = D::zeros_of(words.zero(block, half));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t* part = reinterpret_cast<const uint32_t*>(&words.parts[block / kBlocks][i]);
        const uint32_t* words_here = part + (block % kBlocks * 2 + half) * D::kWords;
        const uint32_t pair = PairAt<T, Number>::of(words_here, threadIdx.x % 4, zeros);
        uint32_t& to = a[block * 2 + i / 2][i % 2 * 2 + half];
        to = S::kChannel ? pair : multiply_halves<T>(pair, words.scale(block, half, i));
      }
    }
  }
}

template <typename S>
using Sums = float[S::kColumns / 2];  // of a lane, for 64 rows of W x columns

// Lets both blocks ask for this block's part of a stage again.
__device__ inline void release(uint32_t barrier) {
  const int lane = threadIdx.x % 32;
  if (lane < kCluster) barrier_arrive_at(barrier, lane);
}

// sums = a run of W x, of the warpgroup's rows. A stage is released once the products after it have been issued.
template <typename S>
__device__ void multiply(const Run& run, const Room<S>& room, Turn<S::kStages>& turn, Sums<S>& sums) {
  const int tile = threadIdx.x / 32;
  Fragments a[kSteps];
  Words<S> words;
  uint32_t before = 0;  // the barrier of the stage before
  barrier_wait(room.full(turn.stage), turn.parity);
  words.read(room, turn.stage, 0, tile);
#pragma unroll 1
  for (int chunk = run.first; chunk < run.end; ++chunk) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const SwizzledAt x(room.x(turn.stage));
      const uint32_t done = room.empty(turn.stage);
      expand<S>(words, a[step]);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i)
        wgmma_halves<typename S::T, S::kColumns>(sums, a[step][i], x.after(i * 32),
                                                 i > 0 || step > 0 || chunk > run.first);
      wgmma_commit();
      turn.next();
      if (step + 1 < kSteps || chunk + 1 < run.end) {
        barrier_wait(room.full(turn.stage), turn.parity);
        words.read(room, turn.stage, (step + 1) % kSteps, tile);
      }
      wgmma_wait<1>();  // the registers of the step before are free again
      if (step > 0 || chunk > run.first) release(before);
      before = done;
    }
  }
  wgmma_wait<0>();
  release(before);
}

// A warpgroup's place for sums of a part that another block finishes, of the same rank in its cluster, and its mark.
template <typename S>
struct Shared {
  float4* sums;
  int64_t* mark;
  __device__ Shared(const Wna16PrefillLaunch& launch, int cluster, int group) {
    const int place = (cluster * kCluster + cluster_rank()) * kWarpgroups + group;
    sums = static_cast<float4*>(launch.partial) + place * (S::kColumns / 8 * 128) + threadIdx.x % 128;
    mark = static_cast<int64_t*>(launch.marks) + place;
  }
};

// Leaves the sums for the cluster behind.
template <typename S>
__device__ void leave_sums(const Wna16PrefillLaunch& launch, const Sums<S>& sums) {
  const Shared<S> shared(launch, Work::cluster(), threadIdx.x / 128);
#pragma unroll
  for (int i = 0; i < S::kColumns / 2; i += 4)
    shared.sums[i / 4 * 128] = make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
  named_arrive(kLeft + threadIdx.x / 128, kLeaving);
}

// Sets the marks of what the block's warpgroups leave: a warp of its own, so that no products wait for the stores.
template <typename S>
__device__ void mark_sums(const Wna16PrefillLaunch& launch, Work& work) {
  for (Run run; work.next(run);) {
    if (run.end == work.chunks) continue;
    for (int group = 0; group < kWarpgroups; ++group) {
      named_sync(kLeft + group, kLeaving);
      if (threadIdx.x % 32 == 0) set_mark(Shared<S>(launch, Work::cluster(), group).mark, launch.mark);
    }
  }
}

// Adds the sums of the same part of all clusters before, from the nearest to the one with the part's first inputs. Each
// mark is taken back, so that the launch may be replayed.
template <typename S>
__device__ void add_sums(const Wna16PrefillLaunch& launch, const Work& work, const Run& run, Sums<S>& sums) {
  const int first = (run.part - work.whole) * work.chunks;
  for (int cluster = Work::cluster() - 1, end = work.begin(Work::cluster()); end > first; --cluster) {
    const int begin = work.begin(cluster);
    if (begin == end) continue;
    const Shared<S> shared(launch, cluster, threadIdx.x / 128);
    if (threadIdx.x % 128 == 0) {
      wait_for_mark(shared.mark, launch.mark);
      *shared.mark = 0;
    }
    named_sync(1 + threadIdx.x / 128, 128);
#pragma unroll
    for (int i = 0; i < S::kColumns / 2; i += 4) {
      const float4 value = __ldcg(shared.sums + i / 4 * 128);
      sums[i] += value.x, sums[i + 1] += value.y, sums[i + 2] += value.z, sums[i + 3] += value.w;
    }
    end = begin;
  }
}

// The bias of row `row` of W, or 0.
template <typename T>
__device__ float bias_of(const Wna16Args& args, int row) {
  return args.bias != nullptr && row < args.n ? to_float(static_cast<const T*>(args.bias)[row]) : 0.f;
}

// The two scales of a lane's rows if W has one per row, or their factors, otherwise 1.
template <typename S>
__device__ float2 row_scales(const Wna16Args& args, int place) {
  if (S::Number::kFloat) return __ldg(reinterpret_cast<const float2*>(args.factors) + place);
  if (!S::kChannel) return make_float2(1.f, 1.f);
  const auto* pair = static_cast<const typename S::T*>(args.scales) + place * 2;
  return make_float2(to_float(pair[0]), to_float(pair[1]));
}

// The end of a part: the warpgroup's first tile of W, its first row of x, its room in shared memory.
template <typename S>
struct Leaving {
  const Wna16Args& args;
  int tile, column;
  uint32_t room;
  __device__ void sync() const { named_sync(1 + threadIdx.x / 128, 128); }
  // The first of eight rows of W, of `low` or `high` rows of a tile.
  __device__ int row(int of_tile, bool high) const {
    const int at = tile + of_tile, block_tiles = args.pair_block / kTileRows;
    return at / block_tiles * args.pair_block + at % block_tiles * 8 + high * (args.pair_block / 2);
  }
};

// Calls use(place in shared memory, index in y) for each 16 bytes of kSpan rows of y from `column` on. Of a tile two
// such pieces are in a row, gated one.
template <typename S, bool kGated, typename Use>
__device__ void for_pieces(const Leaving<S>& to, int column, Use use) {
  constexpr int kOfTile = kGated ? 1 : 2, kPieces = kGroupTiles * kOfTile, kAtOnce = 128 / kPieces;
  const int n = kGated ? to.args.n / 2 : to.args.n, thread = threadIdx.x % 128, piece = thread % kPieces;
  const int row = to.row(piece / kOfTile, piece % kOfTile), first = thread / kPieces, m = to.column + column + first;
  if (row >= n) return;
  const int64_t index = int64_t(m) * n + row;
  const uint32_t place = to.room + first * S::kPitch + piece * 16;
#pragma unroll
  for (int i = 0; i < kSpan / kAtOnce; ++i)
    if (m + i * kAtOnce < to.args.m) use(place + i * kAtOnce * S::kPitch, index + int64_t(i * kAtOnce) * n);
}

// Adds a pair of halves to two sums, of low and of high rows.
template <typename T>
__device__ void add_pairs(uint2 pairs, float (&low)[2], float (&high)[2]) {
  const T *lows = reinterpret_cast<const T*>(&pairs.x), *highs = reinterpret_cast<const T*>(&pairs.y);
#pragma unroll
  for (int i = 0; i < 2; ++i) low[i] += to_float(lows[i]), high[i] += to_float(highs[i]);
}

enum class End { kPlain, kResidual, kGated };  // of rows of y that leave as halves

// y of the warpgroup's rows from its sums, kSpan columns at a time: matrices of 8 rows of W by 8 of x are transposed on
// their way to shared memory, whose rows then leave 16 bytes a lane. A residual comes the same way.
template <typename S, End kEnd>
__device__ void store_halves(const Leaving<S>& to, const Sums<S>& sums) {
  using T = typename S::T;
  constexpr bool kGated = kEnd == End::kGated;
  const Wna16Args& args = to.args;
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int second = lane / 8 % 2;  // of the two matrices that a warp stores at once
  const float2 scales = row_scales<S>(args, min(to.tile + warp, args.tiles - 1) * 8 + lane / 4);
  const float2 bias = {bias_of<T>(args, to.row(warp, false) + lane / 4),
                       bias_of<T>(args, to.row(warp, true) + lane / 4)};
  const uint32_t rows = to.room + ((kGated ? second * 8 : 0) + lane % 8) * S::kPitch;
  const uint32_t place = rows + warp * (kGated ? 16 : 32) + (kGated ? 0 : second * 16);
#pragma unroll
  for (int column = 0; column < S::kColumns; column += kSpan) {
    if (to.column + column >= args.m) return;
    to.sync();  // the room is free: all has left that was there before
    if (kEnd == End::kResidual) {
      for_pieces<S, kGated>(to, column, [&](uint32_t place, int64_t index) {
        write_shared(place, *reinterpret_cast<const uint4*>(static_cast<const T*>(args.residual) + index));
      });
      to.sync();
    }
    uint32_t before = 0;
#pragma unroll
    for (int block = 0; block < kSpan / 8; ++block) {
      float low[2], high[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        low[i] = sums[column / 2 + block * 4 + i] * scales.x + bias.x;
        high[i] = sums[column / 2 + block * 4 + 2 + i] * scales.y + bias.y;
      }
      const uint32_t at = place + (kGated ? block - 1 : block) * 8 * S::kPitch;
      if constexpr (kGated) {
        const uint32_t pair = pair_of<T>(silu(low[0]) * high[0], silu(low[1]) * high[1]);
        if (block % 2) store_transposed(at, before, pair);
        before = pair;
      } else {
        if (kEnd == End::kResidual) add_pairs<T>(load_transposed(at), low, high);
        store_transposed(at, pair_of<T>(low[0], low[1]), pair_of<T>(high[0], high[1]));
      }
    }
    to.sync();
    for_pieces<S, kGated>(to, column, [&](uint32_t place, int64_t index) {
      *reinterpret_cast<uint4*>(static_cast<T*>(args.y) + index) = read_shared<uint4>(place);
    });
  }
}

// Four pairs of rows a lane of kFew columns of y from `column` on, whose sums are in shared memory. Not inlined: each
// kFew columns need it.
template <typename S>
__device__ __noinline__ void store_fours(const Leaving<S>& to, int column, int pitch) {
  constexpr int kFours = kGroupTiles * 2;
#pragma unroll 1
  for (int i = threadIdx.x % 128; i < kFew * kFours; i += 128) {
    const int tile = i % kFours / 2, place = i % 2 * 4;
    Pairs<4> pairs = {.low = to.row(tile, false) + place, .high = to.row(tile, true) + place,
                      .column = column + i / kFours, .vectors = to.args.vectors};
    if (pairs.column >= to.args.m || to.tile + tile >= to.args.tiles) continue;
    const uint32_t from = to.room + i / kFours * pitch + (tile * kTileRows + place) * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      pairs.low_sums[j] = __uint_as_float(read_shared<uint32_t>(from + j * 4));
      pairs.high_sums[j] = __uint_as_float(read_shared<uint32_t>(from + 32 + j * 4));
    }
    store_pairs<typename S::T>(to.args, pairs);
  }
}

// The same for activations, heads, y in float32, and rows of y that do not start at multiples of 16 bytes: sums in
// shared memory, and four pairs of rows a lane.
template <typename S>
__device__ void store_floats(const Leaving<S>& to, const Sums<S>& sums) {
  constexpr int kPitch = S::kLeaveBytes / kFew;
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const float2 scales = row_scales<S>(to.args, min(to.tile + warp, to.args.tiles - 1) * 8 + lane / 4);
#pragma unroll
  for (int column = 0; column < S::kColumns; column += kFew) {
    to.sync();  // the room is free: all has left that was there before
#pragma unroll
    for (int i = 0; i < kFew / 2; ++i)
      write_shared(to.room + (i / 4 * 8 + lane % 4 * 2 + i % 2) * kPitch +
                       (warp * kTileRows + lane / 4 + i % 4 / 2 * 8) * 4,
                   sums[column / 2 + i] * (i % 4 / 2 ? scales.y : scales.x));
    to.sync();
    store_fours(to, to.column + column, kPitch);
  }
}

template <typename S>
__device__ void store(const Leaving<S>& to, const Sums<S>& sums) {
  const Wna16Args& args = to.args;
  const bool gated = args.activation == Activation::silu_mul, active = args.activation != Activation::none && !gated;
  if (!args.vectors || args.float32_out || args.positions != nullptr || active) store_floats<S>(to, sums);
  else if (gated) store_halves<S, End::kGated>(to, sums);
  else if (args.residual != nullptr) store_halves<S, End::kResidual>(to, sums);
  else store_halves<S, End::kPlain>(to, sums);
}

template <typename S>
__global__ void __launch_bounds__(kThreads, 1)
    wna16_prefill_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Wna16Args args,
                        const __grid_constant__ Wna16PrefillLaunch launch) {
#if LOWBIT_WGMMA
  LOWBIT_DYNAMIC_SHARED(uint8_t, unaligned);
  const uint32_t smem = smem_address(unaligned);
  const Room<S> room{(smem + 1023) / 1024 * 1024};
  Work work(args, S::kColumns, launch.whole);
  allow_next_kernel();
  if (threadIdx.x == kConsumers) room.init();
  cluster_arrive_relaxed();
  cluster_wait();
  wait_for_previous_kernel();
  if (threadIdx.x >= kConsumers) {
    give_registers<40>();
    if (threadIdx.x == kConsumers) produce<S>(maps, args, work, room);
    if (threadIdx.x / 32 == kConsumers / 32 + 1) mark_sums<S>(launch, work);
    __syncwarp();
  } else {
    take_registers<232>();
    const int group = threadIdx.x / 128;
    Turn<S::kStages> turn;
    for (Run run; work.next(run);) {
      Sums<S> sums;
      multiply<S>(run, room, turn, sums);
      if (run.end < work.chunks) {
        leave_sums<S>(launch, sums);
        continue;
      }
      if (run.first > 0) add_sums<S>(launch, work, run, sums);
      const int tile = work.tile(run) + group * kGroupTiles;
      store(Leaving<S>{args, tile, work.column(run) * S::kColumns, room.leaving(group)}, sums);
    }
  }
  cluster_arrive_relaxed();
  cluster_wait();  // no block leaves while the other writes to it
#endif
}

template <typename S>
cudaError_t launch_shape(const Wna16Args& args, const Wna16PrefillLaunch& launch, cudaStream_t stream) {
  Maps maps = {};
  cudaError_t error =
      make_tensor_map(maps.x, args.x, args.m, args.k * 2, int64_t(args.k) * 2, S::kColumns / kCluster);
  if (error == cudaSuccess)
    error = make_word_map(maps.words, args.words, args.tiles, args.chunks * kSteps * S::kStepWords, S::kStepWords,
                          kTiles);
  if (error == cudaSuccess && S::kScaleWords > 0)
    error = make_word_map(maps.scales, args.scales, args.tiles, args.scale_rows * S::kScaleWords, S::kScaleWords,
                          kTiles);
  if (error == cudaSuccess && S::kZeroWords > 0)
    error = make_word_map(maps.zeros, args.zeros, args.tiles, args.scale_rows * S::kZeroWords, S::kZeroWords, kTiles);
  if (error != cudaSuccess) return error;
  const LaunchPlan plan = {
      .device = launch.device,
      .stream = stream,
      .blocks = dim3(launch.clusters * kCluster),
      .threads = dim3(kThreads),
      .shared_bytes = S::kBytes,
      .cluster = kCluster,
      .dependent = launch.dependent,
  };
  return launch_kernel(wna16_prefill_kernel<S>, plan, maps, args, launch);
}

template <typename T, typename Number, bool kZeros, int kGroups, bool kChannel>
cudaError_t launch_columns(const Wna16Args& args, const Wna16PrefillLaunch& launch, cudaStream_t stream) {
  switch (launch.columns) {
    case 128: return launch_shape<Shape<T, Number, kZeros, kGroups, kChannel, 128>>(args, launch, stream);
    case 192: return launch_shape<Shape<T, Number, kZeros, kGroups, kChannel, 192>>(args, launch, stream);
    case 256: return launch_shape<Shape<T, Number, kZeros, kGroups, kChannel, 256>>(args, launch, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <typename T, typename Number, bool kZeros, int... kGroups>
cudaError_t launch_groups(const Wna16Args& args, const Wna16PrefillLaunch& launch, cudaStream_t stream) {
  if constexpr (!kZeros && !Number::kByteScales)
    if (args.scale_shift == kChannelShift) return launch_columns<T, Number, false, 1, true>(args, launch, stream);
  cudaError_t error = cudaErrorInvalidValue;
  (void)((launch.groups_per_chunk == kGroups &&
          (error = launch_columns<T, Number, kZeros, kGroups, false>(args, launch, stream), true)) || ...);
  return error;
}

}  // namespace

// Needs code built for sm_90a (extension.reason_against_90a checks it): elsewhere the kernel is empty or missing.
template <typename T, typename Number>
cudaError_t launch_wna16_prefill(const Wna16Args& args, const Wna16PrefillLaunch& launch, cudaStream_t stream) {
  if constexpr (Number::kByteScales) return launch_groups<T, Number, false, 4, 8>(args, launch, stream);
  else if constexpr (Number::kFloat) return launch_groups<T, Number, false, 1, 4>(args, launch, stream);
  else return args.zeros == nullptr ? launch_groups<T, Number, false, 1, 2, 4>(args, launch, stream)
                                    : launch_groups<T, Number, true, 1, 2, 4>(args, launch, stream);
}

const Kernel wna16_prefill("wna16_prefill", {name_of<LOWBIT_T>, LOWBIT_WHOLE::kName},
                          launch_wna16_prefill<LOWBIT_T, LOWBIT_WHOLE>);

}  // namespace lowbit
