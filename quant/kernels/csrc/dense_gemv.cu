// Code for sm_90a alone; empty elsewhere. Compiled once per T: LOWBIT_T comes from units.py. ring.cuh has the design.
//
// For the gated epilogue, half of a block's rows are gate's and half are up's, so that both sums of an output are in
// the same block. For the rotary one, they are of the two halves of one head.
#include "declare.cuh"
#include "deferred_norm.cuh"
#include "epilogue.cuh"
#include "ring.cuh"
#include "ring_launch.cuh"
#include "wna16_args.cuh"

namespace lowbit {

struct DenseArgs {
  LOWBIT_STRUCT(DenseArgs);
  FIELD(const void*, x);           // (m, k)
  FIELD(const void*, w);           // (n, k)
  FIELD(const void*, bias);        // (n) or null
  FIELD(const void*, residual);    // (m, n) or null: added after the activation
  FIELD(const float*, x_squares);  // (m, k / 16), or null: deferred_norm.cuh; k is then a multiple of 64
  FIELD(float, norm_eps);
  FIELD(void*, y);                 // (m, n), or (m, n / 2) for the gated epilogue
  FIELD(int, m);                   // k a multiple of 8; n of 8 for the gated epilogue
  FIELD(int, n);
  FIELD(int, k);
  FIELD(int64_t, x_pitch);         // bytes from one row to the next, multiples of 16
  FIELD(int64_t, w_pitch);
  FIELD(Activation, activation);
  FIELD(bool, float32_out);
  FIELD(bool, vectors);            // n is a multiple of 4, and tensors of y's type start at multiples of 8 bytes
  // Rotary embedding and cache append: all null, or q goes to y, and k and v to their caches.
  FIELD(const int64_t*, positions);  // (m)
  FIELD(const int64_t*, slots);      // (m) row of the caches
  FIELD(const float*, cosines);      // (positions, pair_block / 2)
  FIELD(const float*, sines);
  FIELD(void*, k_cache);             // (slots, kv_heads, pair_block)
  FIELD(void*, v_cache);
  FIELD(int, q_heads);
  FIELD(int, kv_heads);
  FIELD(int, pair_block);            // the width of a head, a multiple of a block's rows; n / 2 for the gated epilogue
  // The norm to start on y: deferred_norm.cuh.
  FIELD(const void*, next_norm);     // (n) its weight, or null; n is a multiple of 64, and `vectors` is true
  FIELD(void*, z);                   // (m, n) y * next_norm
  FIELD(float*, squares);            // (m, n / 16)
};

namespace {

// scales[row of x] = 1 / deviation for a deferred norm, otherwise 1.
template <typename S>
__device__ void make_scales(const DenseArgs& args, float* scales) {
  const int parts = args.k / kTileRows;
  for (int row = threadIdx.x / 32; row < args.m; row += S::kConsumers / 32) {
    // bypasses L1, which may hold outdated data
    const float* squares = args.x_squares + row * parts;
    const auto four_at = [&](int i) { return __ldcg(reinterpret_cast<const float4*>(squares + i)); };
    const float scale = args.x_squares == nullptr ? 1.f : inverse_deviation(parts, args.norm_eps, four_at);
    if (threadIdx.x % 32 == 0) scales[row] = scale;
  }
}

template <int kWidth>
__device__ void multiply(float (&sums)[kWidth], float factor) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sums[i] *= factor;
}

// Sums over the cluster, then y, for columns [0, m) and four adjacent rows of the block, or of each of its halves.
template <typename S>
__device__ void finish(const DenseArgs& args, const RingShare& share, const float* scales, const float* partial) {
  using T = typename S::Operand;
  constexpr int kPartRows = S::kRows / S::kParts;
  const bool turned = S::kParts == 2 && args.positions != nullptr;
  const int apart = args.pair_block / 2, rows = S::kParts == 1 || turned ? args.n : apart;
  for_fours<S>(args.m, kPartRows / 4, [&](int column, int row) {
    if (share.row + row >= rows) return;
    const float* first = partial + column * S::kPitch + row;
    Pairs<4> pairs = {.low = share.row + row, .high = share.row + row + apart, .column = column,
                      .vectors = args.vectors, .low_sums = {}, .high_sums = {}};
    sum_over_cluster(first, pairs.low_sums);
    multiply(pairs.low_sums, scales[column]);
    if constexpr (S::kParts == 1) {
      store_rows<T>(args, column, pairs.low, pairs.vectors, pairs.low_sums);
      if (args.next_norm != nullptr) store_deferred<T>(args, column, pairs.low, pairs.low_sums);
      return;
    }
    sum_over_cluster(first + kPartRows, pairs.high_sums);
    multiply(pairs.high_sums, scales[column]);
    if (turned) store_rotated<T>(args, pairs);
    else store_gated<T>(args, pairs);
  });
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::kMinBlocks)
    dense_gemv_kernel(const __grid_constant__ RingMaps maps, const __grid_constant__ DenseArgs args, int stages) {
#if LOWBIT_WGMMA
  LOWBIT_DYNAMIC_SHARED(uint8_t, unaligned);
  uint8_t* smem = unaligned + (1024 - smem_address(unaligned) % 1024) % 1024;
  const Ring<S> ring{smem_address(smem), stages};
  float* scales = reinterpret_cast<float*>(smem + stages * (S::kStageBytes + 16));
  const RingShare share(args.k * 2, first_row<S>(args.positions != nullptr, args.pair_block));
  stamp(Stage::kBegun);
  allow_next_kernel();
  if (threadIdx.x == S::kConsumers) ring.init();
  __syncthreads();
  if (threadIdx.x >= S::kConsumers) {
    if (threadIdx.x == S::kConsumers) produce<S>(maps, share, args.pair_block / 2, ring);
    return;
  }
  wait_for_previous_kernel();
  stamp(Stage::kWaited);
  make_scales<S>(args, scales);  // while x is in flight
  RingSums<S> sums = {};
  consume<S>(share, ring, sums);
  stamp(Stage::kComputed);
  float* partial = reinterpret_cast<float*>(smem);
  share_sums<S>(sums, partial, [&] { finish<S>(args, share, scales, partial); });
  leave_stamps(args.n, args.k);
#endif
}

template <typename S>
cudaError_t launch_shape(const DenseArgs& args, const RingLaunch& launch, cudaStream_t stream) {
  constexpr int kPartRows = S::kRows / S::kParts;
  const int stages = max(launch.stages, S::kLeastStages);
  if (args.positions != nullptr && args.pair_block % S::kRows != 0) return cudaErrorInvalidValue;
  RingMaps maps;
  cudaError_t error = make_tensor_map(maps.w, args.w, args.n, args.k * 2, args.w_pitch, kPartRows);
  if (error == cudaSuccess) error = make_tensor_map(maps.x, args.x, args.m, args.k * 2, args.x_pitch, S::kColumns);
  if (error != cudaSuccess) return error;
  const int row_blocks = (args.n / S::kParts + kPartRows - 1) / kPartRows;
  const LaunchPlan plan = ring_plan<S>(launch, row_blocks, args.m, ring_bytes<S>(stages, S::kColumns * 4), stream);
  return launch_kernel(dense_gemv_kernel<S>, plan, maps, args, stages);
}

template <typename T, int kColumns, int kParts>
cudaError_t launch_warpgroups(const DenseArgs& args, const RingLaunch& launch, cudaStream_t stream) {
  switch (launch.warpgroups) {
    case 1: return launch_shape<RingShape<T, kColumns, 1, kParts>>(args, launch, stream);
    case 2: return launch_shape<RingShape<T, kColumns, 2, kParts>>(args, launch, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <typename T, int kColumns>
cudaError_t launch_columns(const DenseArgs& args, const RingLaunch& launch, cudaStream_t stream) {
  const bool paired = args.activation == Activation::silu_mul || args.positions != nullptr;
  return paired ? launch_warpgroups<T, kColumns, 2>(args, launch, stream)
               : launch_warpgroups<T, kColumns, 1>(args, launch, stream);
}

}  // namespace

// For 1 to 64 rows of x. cudaErrorInvalidDeviceFunction if the code was not built for sm_90a.
template <typename T>
cudaError_t launch_dense_gemv(const DenseArgs& args, const RingLaunch& launch, cudaStream_t stream) {
  if (args.m <= 8) return launch_columns<T, 8>(args, launch, stream);
  if (args.m <= 16) return launch_columns<T, 16>(args, launch, stream);
  if (args.m <= 32) return launch_columns<T, 32>(args, launch, stream);
  return args.m <= 64 ? launch_columns<T, 64>(args, launch, stream) : cudaErrorInvalidValue;
}

const Kernel dense_gemv("dense_gemv", {name_of<LOWBIT_T>}, launch_dense_gemv<LOWBIT_T>);

}  // namespace lowbit
