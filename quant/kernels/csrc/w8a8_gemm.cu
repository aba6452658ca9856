// Code for sm_90a alone; empty elsewhere.
//
// Design. W's rows are the 64 rows of wgmma's left operand and x's rows its 8 to 128 columns, so that few rows of x
// waste nothing but columns. Both come by the copy engine, in boxes of 128 inputs, straight from their plain order
// into shared memory, where the tensor cores read them: no instruction touches a weight. One warp asks for boxes, one
// or more warpgroups multiply; several such blocks share a multiprocessor, so that one reads while another finishes.
// Blocks of a cluster split k and sum through each other's shared memory: sums of int32, so that their order cannot
// matter. W's stream starts before the previous kernel has finished: W is constant, x is not.
#include "epilogue.cuh"
#include "launch.cuh"
#include "tensor_map.cuh"
#include "w8a8_gemm.cuh"
#include "w8a8_wgmma.cuh"

namespace lowbit {
namespace {

constexpr int kGroupRows = 64;  // of W, that a warpgroup has

template <int kColumns_, int kWarpgroups_>
struct Shape {
  static constexpr int kColumns = kColumns_;        // rows of x, padded
  static constexpr int kWarpgroups = kWarpgroups_;  // that multiply
  static constexpr int kRows = kWarpgroups * kGroupRows;
  static constexpr int kConsumers = kWarpgroups * 128;  // threads
  static constexpr int kThreads = kConsumers + 32;
  static constexpr int kWeightBytes = kRows * kBoxBytes;
  static constexpr int kStageBytes = kWeightBytes + kColumns * kBoxBytes;
  static constexpr int kPitch = kRows + 4;  // numbers between columns of sums: no bank conflicts
  // A stage is given back when the next is in use, and in the end the sums take the ring's place.
  static constexpr int kSumStages = (kPitch * kColumns * 4 + kStageBytes - 1) / kStageBytes;
  static constexpr int kLeastStages = kSumStages > 2 ? kSumStages : 2;
};

// What lies behind the ring: the scales of the block's rows of W and of x.
template <typename S>
struct Sides {
  float scales[S::kRows], x_scales[S::kColumns];
};

// A block's shared memory: the ring, two barriers a stage, and Sides; room to start at a multiple of 1024.
template <typename S>
size_t bytes_of(int stages) {
  return stages * size_t(S::kStageBytes + 16) + sizeof(Sides<S>) + 1024;
}

struct Maps {
  CUtensorMap codes, x;
};

// The chunks of 128 inputs that this block has, [first, end), and its first row of W.
struct Share {
  int first, end, row;
  __device__ Share(const W8a8Args& args, int rows) {
    const int chunks = (args.k + kBoxBytes - 1) / kBoxBytes;
    first = chunks * blockIdx.x / gridDim.x;
    end = chunks * (blockIdx.x + 1) / gridDim.x;
    row = blockIdx.y * rows;
  }
};

// A stage of the ring and the parity of the phase that fills it.
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
  __device__ uint32_t codes(int stage) const { return start + stage * S::kStageBytes; }
  __device__ uint32_t x(int stage) const { return codes(stage) + S::kWeightBytes; }
  __device__ uint32_t full(int stage) const { return codes(stages) + stage * 16; }
  __device__ uint32_t empty(int stage) const { return full(stage) + 8; }

  __device__ void init() const {
    for (int stage = 0; stage < stages; ++stage) {
      barrier_init(full(stage), 1);
      barrier_init(empty(stage), S::kWarpgroups);
    }
    fence_barrier_init();
  }
};

// One lane keeps the ring full. W's first boxes are asked for before the previous kernel has ended, x's after it.
template <typename S>
__device__ void produce(const Maps& maps, const Share& share, const Ring<S>& ring) {
  const auto ask_codes = [&](int chunk, int stage) {
    barrier_expect(ring.full(stage), S::kStageBytes);
    copy_box<Reuse::kNone>(ring.codes(stage), maps.codes, chunk * kBoxBytes, share.row, ring.full(stage));
  };
  const auto ask_x = [&](int chunk, int stage) {
    copy_box<Reuse::kSome>(ring.x(stage), maps.x, chunk * kBoxBytes, blockIdx.z * S::kColumns, ring.full(stage));
  };
  const int ahead = min(share.end - share.first, ring.stages);
  prefetch_map(maps.x);
  for (int i = 0; i < ahead; ++i) ask_codes(share.first + i, i);
  wait_for_previous_kernel();
  for (int i = 0; i < ahead; ++i) ask_x(share.first + i, i);
  Turn turn{ring.stages};
  for (int chunk = share.first + ring.stages; chunk < share.end; ++chunk, turn.next()) {
    barrier_wait(ring.empty(turn.stage), turn.parity);
    ask_codes(chunk, turn.stage);
    ask_x(chunk, turn.stage);
  }
}

template <typename S>
using Sums = int[S::kColumns / 2];  // a lane's, of 64 rows of W x columns

// sums = the block's share of W x. A stage is given back once the products after it are on their way.
template <typename S>
__device__ void consume(const Share& share, const Ring<S>& ring, Sums<S>& sums) {
  const bool leader = threadIdx.x % 128 == 0;
  const int group = threadIdx.x / 128;
  Turn turn{ring.stages};
  uint32_t before = 0;  // the barrier of the stage before
  for (int chunk = share.first; chunk < share.end; ++chunk) {
    const SwizzledAt codes(ring.codes(turn.stage) + group * (kGroupRows * kBoxBytes)), x(ring.x(turn.stage));
    barrier_wait(ring.full(turn.stage), turn.parity);
    wgmma_fence();
#pragma unroll
    for (int byte = 0; byte < kBoxBytes; byte += 32) wgmma_bytes<S::kColumns>(sums, codes.after(byte), x.after(byte));
    wgmma_commit();
    wgmma_wait<1>();
    if (leader && chunk > share.first) barrier_arrive(before);
    before = ring.empty(turn.stage);
    turn.next();
  }
  wgmma_wait<0>();
}

// A lane's sums to shared memory: partial[row of x][row of W in the block].
template <typename S>
__device__ void store_partial(const Sums<S>& sums, int* partial) {
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < S::kColumns / 2; ++i)
    partial[(i / 4 * 8 + lane % 4 * 2 + i % 2) * S::kPitch + row + i % 4 / 2 * 8] = sums[i];
}

// Four neighbouring sums of the whole cluster.
__device__ inline int4 sum_over_cluster(const int* partial) {
  int4 sum = *reinterpret_cast<const int4*>(partial);
#pragma unroll 4
  for (int i = 1; i < gridDim.x; ++i) {
    const int rank = (blockIdx.x + i) % gridDim.x;
    const float4 bits = read_cluster_floats(smem_address(partial), rank);
    sum.x += __float_as_int(bits.x), sum.y += __float_as_int(bits.y);
    sum.z += __float_as_int(bits.z), sum.w += __float_as_int(bits.w);
  }
  return sum;
}

// y of row `column` of x and four rows of W from `row` on, in halves; in float, without bias and residual, where
// asked.
template <typename T>
__device__ void store_four(const W8a8Args& args, bool float_out, int column, int row, float (&y)[4]) {
  const int count = min(args.n - row, 4);
  if (count <= 0) return;
  const bool vectors = args.n % 4 == 0;
  const int64_t index = static_cast<int64_t>(column) * args.n + row;
  add_halves<T>(args.bias, row, vectors, count, y);
  add_halves<T>(args.residual, index, vectors, count, y);
  if (!float_out) return store_halves<T>(args.y, index, vectors, count, y);
  for (int i = 0; i < count; ++i) static_cast<float*>(args.y)[index + i] = y[i];
}

// Scales to shared memory, W's before the previous kernel has ended: what comes last must not wait for memory.
template <typename S>
__device__ void load_sides(const W8a8Args& args, const Share& share, Sides<S>& sides) {
  const int column = blockIdx.z * S::kColumns + threadIdx.x;
  if (threadIdx.x < S::kRows && share.row + threadIdx.x < args.n)
    sides.scales[threadIdx.x] = args.scales[share.row + threadIdx.x];
  wait_for_previous_kernel();
  if (threadIdx.x < S::kColumns && column < args.m) sides.x_scales[threadIdx.x] = __ldcg(args.x_scales + column);
}

// Sums over the cluster, each block its share of them, then y.
template <typename S>
__device__ void finish(const W8a8Args& args, W8a8Output output, const Share& share, const int* partial,
                       const Sides<S>& sides) {
  constexpr int kFours = S::kRows / 4;
  const int first_column = blockIdx.z * S::kColumns;
  const int fours = min(args.m - first_column, S::kColumns) * kFours;
  const int begin = fours * blockIdx.x / gridDim.x, end = fours * (blockIdx.x + 1) / gridDim.x;
  for (int i = begin + threadIdx.x; i < end; i += S::kConsumers) {
    const int column = i / kFours, row = i % kFours * 4;
    const int4 sum = sum_over_cluster(partial + column * S::kPitch + row);
    const float x_scale = sides.x_scales[column];
    const float* scales = sides.scales + row;
    float y[4] = {sum.x * (x_scale * scales[0]), sum.y * (x_scale * scales[1]), sum.z * (x_scale * scales[2]),
                  sum.w * (x_scale * scales[3])};
    if (output == W8a8Output::kBfloat16)
      store_four<__nv_bfloat16>(args, false, first_column + column, share.row + row, y);
    else store_four<__half>(args, output == W8a8Output::kFloat, first_column + column, share.row + row, y);
  }
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 4 / S::kWarpgroups)
    w8a8_gemm_kernel(const __grid_constant__ Maps maps, const __grid_constant__ W8a8Args args, W8a8Output output,
                     int stages) {
#if LOWBIT_WGMMA
  LOWBIT_DYNAMIC_SHARED(uint8_t, unaligned);
  uint8_t* smem = unaligned + (1024 - smem_address(unaligned) % 1024) % 1024;
  const Ring<S> ring{smem_address(smem), stages};
  Sides<S>& sides = *reinterpret_cast<Sides<S>*>(smem + stages * (S::kStageBytes + 16));
  const Share share(args, S::kRows);
  allow_next_kernel();
  if (threadIdx.x == S::kConsumers) ring.init();
  __syncthreads();
  if (threadIdx.x >= S::kConsumers) {
    if (threadIdx.x == S::kConsumers) produce<S>(maps, share, ring);
    return;
  }
  load_sides<S>(args, share, sides);
  Sums<S> sums = {};
  consume<S>(share, ring, sums);
  int* partial = reinterpret_cast<int*>(smem);
  named_sync(1, S::kConsumers);  // no warpgroup reads the ring any more
  store_partial<S>(sums, partial);
  if (gridDim.x > 1) cluster_sync();
  else named_sync(1, S::kConsumers);
  finish<S>(args, output, share, partial, sides);
  if (gridDim.x > 1) cluster_sync();  // no block leaves while others read from it
#endif
}

template <typename S>
cudaError_t launch_shape(const W8a8Args& args, const W8a8GemmLaunch& launch, cudaStream_t stream) {
  const int stages = launch.stages > S::kLeastStages ? launch.stages : S::kLeastStages;
  Maps maps;
  cudaError_t error = make_tensor_map(maps.codes, args.codes, args.n, args.k, S::kRows);
  if (error == cudaSuccess) error = make_tensor_map(maps.x, args.x, args.m, args.k, S::kColumns);
  if (error != cudaSuccess) return error;
  const LaunchPlan plan = {
      .device = launch.device,
      .stream = stream,
      .blocks = dim3(launch.cluster, (args.n + S::kRows - 1) / S::kRows, (args.m + S::kColumns - 1) / S::kColumns),
      .threads = dim3(S::kThreads),
      .shared_bytes = bytes_of<S>(stages),
      .cluster = launch.cluster,
      .dependent = launch.dependent,
  };
  return launch_kernel(w8a8_gemm_kernel<S>, plan, maps, args, launch.output, stages);
}

template <int kColumns>
cudaError_t launch_warpgroups(const W8a8Args& args, const W8a8GemmLaunch& launch, cudaStream_t stream) {
  switch (launch.warpgroups) {
    case 1: return launch_shape<Shape<kColumns, 1>>(args, launch, stream);
    case 2: return launch_shape<Shape<kColumns, 2>>(args, launch, stream);
    case 4: return launch_shape<Shape<kColumns, 4>>(args, launch, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_w8a8_gemm(const W8a8Args& args, const W8a8GemmLaunch& launch, cudaStream_t stream) {
  if (args.m <= 8) return launch_warpgroups<8>(args, launch, stream);
  if (args.m <= 16) return launch_warpgroups<16>(args, launch, stream);
  if (args.m <= 32) return launch_warpgroups<32>(args, launch, stream);
  if (args.m <= 64) return launch_warpgroups<64>(args, launch, stream);
  return launch_warpgroups<128>(args, launch, stream);
}

}  // namespace lowbit
