// Compiled once per type of codes: LOWBIT_CODES comes from units.py. Code for sm_90a alone; empty elsewhere. ring.cuh
// has the design. Sums of int8 are int32, so their order does not matter; those of e4m3 are added in the order of k.
#include "declare.cuh"
#include "epilogue.cuh"
#include "ring.cuh"
#include "ring_launch.cuh"
#include "w8a8_args.cuh"

namespace lowbit {

enum class W8a8Output : int { kHalf, kBfloat16, kFloat };  // type of y, bias and residual

namespace {

// Shared memory behind the ring: the scales of the block's rows of W and of x.
template <typename S>
struct Sides {
  float scales[S::kRows], x_scales[S::kColumns];
};

// y of row `column` of x and four rows of W from `row` on, in half precision; or in float32, without bias and residual.
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

constexpr int kBlock = 128;  // rows and inputs that share a scale

// In shared memory behind the ring: the scales of blocks, of each of the block's chunks those of its rows of W, then
// those of its rows of x. From memory they would cost each chunk more than its products.
template <typename S>
struct BlockSides {
  static constexpr int kParts = (S::kRows + kBlock - 1) / kBlock, kPitch = S::kColumns + kParts + kParts % 2;
  static size_t bytes(int chunks) { return size_t(chunks) * kPitch * sizeof(float); }

  float* scales;
  __device__ float* of(int index) const { return scales + index * kPitch; }

  // Copies those of W before the previous kernel has ended.
  __device__ void load(const W8a8Args& args, const RingShare& share) const {
    const int chunks = share.end - share.first;
    for (int i = threadIdx.x; i < chunks * kParts; i += S::kConsumers) {
      const int chunk = i / kParts, part = i % kParts, row = min(share.row + part * kBlock, args.n - 1);
      of(chunk)[S::kColumns + part] = __ldg(args.scales + row / kBlock * args.block_pitch + share.first + chunk);
    }
    wait_for_previous_kernel();
    for (int i = threadIdx.x; i < chunks * S::kColumns; i += S::kConsumers) {
      const int chunk = i / S::kColumns, column = blockIdx.z * S::kColumns + i % S::kColumns;
      const float* row = args.x_scales + static_cast<int64_t>(share.first + chunk) * args.m;
      of(chunk)[i % S::kColumns] = column < args.m ? __ldcg(row + column) : 0.f;
    }
    named_sync(1, S::kConsumers);
  }
};

// The factors of a chunk's sums.
template <typename S>
struct BlockFactors {
  BlockSides<S> sides;
  int first;
  float scales[S::kColumns / 4];

  __device__ void load(int chunk) {
    const float* found = sides.of(chunk - first);
    const float scale = found[S::kColumns + threadIdx.x / 128 * kGroupRows / kBlock];
#pragma unroll
    for (int i = 0; i < S::kColumns / 8; ++i) {
      const float2 pair = *reinterpret_cast<const float2*>(found + 8 * i + threadIdx.x % 4 * 2);
      scales[2 * i] = scale * pair.x, scales[2 * i + 1] = scale * pair.y;
    }
  }
  __device__ float of(int i) const { return scales[i / 4 * 2 + i % 2]; }
};

// Copies scales to shared memory, those of W before the previous kernel has ended: the epilogue must not wait for
// memory.
template <typename S>
__device__ void load_sides(const W8a8Args& args, const RingShare& share, Sides<S>& sides) {
  const int column = blockIdx.z * S::kColumns + threadIdx.x;
  if (threadIdx.x < S::kRows && share.row + threadIdx.x < args.n)
    sides.scales[threadIdx.x] = args.scales[share.row + threadIdx.x];
  wait_for_previous_kernel();
  if (threadIdx.x < S::kColumns && column < args.m) sides.x_scales[threadIdx.x] = __ldcg(args.x_scales + column);
}

// Sums over the cluster, each block its share of them, then y.
template <typename S, bool kBlocks>
__device__ void finish(const W8a8Args& args, W8a8Output output, const RingShare& share,
                       const typename S::Sum* partial, const Sides<S>& sides) {
  const int first_column = blockIdx.z * S::kColumns;
  for_fours<S>(min(args.m - first_column, S::kColumns), S::kRows / 4, [&](int column, int row) {
    typename S::Sum sum[4] = {};
    sum_over_cluster(partial + column * S::kPitch + row, sum);
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = kBlocks ? sum[i] : sum[i] * (sides.x_scales[column] * sides.scales[row + i]);
    if (output == W8a8Output::kBfloat16)
      store_four<__nv_bfloat16>(args, false, first_column + column, share.row + row, y);
    else store_four<__half>(args, output == W8a8Output::kFloat, first_column + column, share.row + row, y);
  });
}

template <typename S, bool kBlocks>
__global__ void __launch_bounds__(S::kThreads, S::kMinBlocks)
    w8a8_gemm_kernel(const __grid_constant__ RingMaps maps, const __grid_constant__ W8a8Args args, W8a8Output output,
                     int stages) {
#if LOWBIT_WGMMA
  LOWBIT_DYNAMIC_SHARED(uint8_t, unaligned);
  uint8_t* smem = unaligned + (1024 - smem_address(unaligned) % 1024) % 1024;
  const Ring<S> ring{smem_address(smem), stages};
  Sides<S>& sides = *reinterpret_cast<Sides<S>*>(smem + stages * (S::kStageBytes + 16));
  const RingShare share(args.k, blockIdx.y * S::kRows);
  stamp(Stage::kBegun);
  allow_next_kernel();
  if (threadIdx.x == S::kConsumers) ring.init();
  __syncthreads();
  if (threadIdx.x >= S::kConsumers) {
    if (threadIdx.x == S::kConsumers) produce<S>(maps, share, 0, ring);
    return;
  }
  RingSums<S> sums = {};
  if constexpr (kBlocks) {
    const BlockSides<S> blocks{reinterpret_cast<float*>(&sides)};
    blocks.load(args, share);
    stamp(Stage::kWaited);
    consume_apart<S>(share, ring, BlockFactors<S>{blocks, share.first}, sums);
  } else {
    load_sides<S>(args, share, sides);
    stamp(Stage::kWaited);
    if constexpr (std::is_same_v<typename S::Operand, int8_t>) consume<S>(share, ring, sums);
    else consume_apart<S>(share, ring, NoFactors{}, sums);
  }
  stamp(Stage::kComputed);
  auto* partial = reinterpret_cast<typename S::Sum*>(smem);
  share_sums<S>(sums, partial, [&] { finish<S, kBlocks>(args, output, share, partial, sides); });
  leave_stamps(args.n, args.k);
#endif
}

template <typename S, bool kBlocks>
cudaError_t launch_shape(const W8a8Args& args, const RingLaunch& launch, W8a8Output output, cudaStream_t stream) {
  const int chunks = (args.k + kBoxBytes - 1) / kBoxBytes / launch.cluster + 1;  // of a block, at most
  const size_t behind = kBlocks ? BlockSides<S>::bytes(chunks) : sizeof(Sides<S>);
  // scales of blocks take their room from the ring
  const int less = kBlocks ? (behind + S::kStageBytes - 1) / S::kStageBytes : 0;
  const int stages = max(launch.stages - less, S::kLeastStages);
  RingMaps maps;
  cudaError_t error = make_tensor_map(maps.w, args.codes, args.n, args.k, args.k, S::kRows);
  if (error == cudaSuccess) error = make_tensor_map(maps.x, args.x, args.m, args.k, args.k, S::kColumns);
  if (error != cudaSuccess) return error;
  const size_t bytes = ring_bytes<S>(stages, behind);
  const LaunchPlan plan = ring_plan<S>(launch, (args.n + S::kRows - 1) / S::kRows, args.m, bytes, stream);
  return launch_kernel(w8a8_gemm_kernel<S, kBlocks>, plan, maps, args, output, stages);
}

template <typename Codes, int kColumns, bool kBlocks>
cudaError_t launch_warpgroups(const W8a8Args& args, const RingLaunch& launch, W8a8Output output, cudaStream_t stream) {
  switch (launch.warpgroups) {
    case 1: return launch_shape<RingShape<Codes, kColumns, 1>, kBlocks>(args, launch, output, stream);
    case 2: return launch_shape<RingShape<Codes, kColumns, 2>, kBlocks>(args, launch, output, stream);
    case 4: return launch_shape<RingShape<Codes, kColumns, 4>, kBlocks>(args, launch, output, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <typename Codes, bool kBlocks>
cudaError_t launch_columns(const W8a8Args& args, const RingLaunch& launch, W8a8Output output, cudaStream_t stream) {
  if (args.m <= 8) return launch_warpgroups<Codes, 8, kBlocks>(args, launch, output, stream);
  if (args.m <= 16) return launch_warpgroups<Codes, 16, kBlocks>(args, launch, output, stream);
  if (args.m <= 32) return launch_warpgroups<Codes, 32, kBlocks>(args, launch, output, stream);
  if constexpr (!kBlocks) {  // the scales of blocks would not fit in registers
    if (args.m > 64) return launch_warpgroups<Codes, 128, kBlocks>(args, launch, output, stream);
  }
  return launch_warpgroups<Codes, 64, kBlocks>(args, launch, output, stream);
}

}  // namespace

// cudaErrorInvalidDeviceFunction if the code was not built for sm_90a.
template <typename Codes, W8a8Output kOutput>
cudaError_t launch_w8a8_gemm(const W8a8Args& args, const RingLaunch& launch, cudaStream_t stream) {
  if (args.block_pitch == 0) return launch_columns<Codes, false>(args, launch, kOutput, stream);
  if constexpr (std::is_same_v<Codes, int8_t>) return cudaErrorInvalidValue;
  else return launch_columns<Codes, true>(args, launch, kOutput, stream);
}

constexpr auto codes_name = name_of<LOWBIT_CODES>;
const Kernel w8a8_gemm[] = {
    {"w8a8_gemm", {codes_name, name_of<__half>}, launch_w8a8_gemm<LOWBIT_CODES, W8a8Output::kHalf>},
    {"w8a8_gemm", {codes_name, name_of<__nv_bfloat16>}, launch_w8a8_gemm<LOWBIT_CODES, W8a8Output::kBfloat16>},
    {"w8a8_gemm", {codes_name, name_of<float>}, launch_w8a8_gemm<LOWBIT_CODES, W8a8Output::kFloat>},
};

}  // namespace lowbit
