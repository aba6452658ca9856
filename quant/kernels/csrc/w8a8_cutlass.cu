// Compiled once per tile, with LOWBIT_TILE from units.py, because a CUTLASS product takes nvcc a minute. Code for
// sm_90a alone.
//
// The product is CUTLASS's own (TMA, warpgroup instructions, persistent blocks). Ours are the choice of two tiles and
// the epilogue, a visitor tree over the int32 sums: times the column's weight scale, times the row's x scale, plus
// bias, plus residual, if present. quant/kernels/w8a8_cutlass.py has the measured table that chooses the tile.
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_compute_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "declare.cuh"
#include "w8a8_args.cuh"

namespace lowbit {

struct W8a8CutlassLaunch {
  LOWBIT_STRUCT(W8a8CutlassLaunch);
  FIELD(int, device);
  FIELD(int, processors);  // multiprocessors of the device
  FIELD(int, swizzle);     // adjacent tiles of y in sequence: 1, 2, 4 or 8 rows or columns of them
};

namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

template <typename T>
struct CutlassType;
template <>
struct CutlassType<__half> {
  using Type = cutlass::half_t;
};
template <>
struct CutlassType<__nv_bfloat16> {
  using Type = cutlass::bfloat16_t;
};

// Tile of y (rows of x, rows of W) and of k; two blocks share a tile's columns of W by multicast. Cooperative: two
// warpgroups split a tile. Ping-pong: each has its own tile, and one multiplies while the other stores.
template <int kTile>
struct Tile;
template <>
struct Tile<0> {
  using Shape = Shape<_128, _128, _128>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};
template <>
struct Tile<1> {
  using Shape = Shape<_128, _256, _128>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

template <typename T_, int kTile>
struct Product {
  using T = typename CutlassType<T_>::Type;
  using TileShape = typename Tile<kTile>::Shape;
  using Cluster = Shape<_2, _1, _1>;
  template <template <class> class Function, typename Out>
  using Compute = fusion::Sm90Compute<Function, Out, float, cutlass::FloatRoundStyle::round_to_nearest>;

  using ColumnScaled =
      fusion::Sm90EVT<Compute<cutlass::multiplies, float>,
                      fusion::Sm90RowBroadcast<0, TileShape, float>, fusion::Sm90AccFetch>;
  using Biased = fusion::Sm90EVT<Compute<cutlass::homogeneous_multiply_add, float>,
                                 fusion::Sm90ColBroadcast<0, TileShape, float>, ColumnScaled,
                                 fusion::Sm90RowBroadcast<0, TileShape, T, float>>;
  using Result = fusion::Sm90EVT<Compute<cutlass::homogeneous_multiply_add, T>,
                                 fusion::Sm90ScalarBroadcast<float>, fusion::Sm90SrcFetch<T>, Biased>;

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, T, cutlass::layout::RowMajor, 8, T,
      cutlass::layout::RowMajor, 8, typename Tile<kTile>::Epilogue, Result>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, 16, int8_t,
      cutlass::layout::ColumnMajor, 16, int32_t, TileShape, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      typename Tile<kTile>::Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, CollectiveMainloop,
                                                      CollectiveEpilogue, cutlass::gemm::PersistentScheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
};

template <typename P>
typename P::Gemm::Arguments arguments_of(const W8a8Args& args, const W8a8CutlassLaunch& launch) {
  using T = typename P::T;
  using Kernel = typename P::Kernel;
  typename P::Gemm::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {args.m, args.n, args.k, 1};
  arguments.mainloop.ptr_A = static_cast<const int8_t*>(args.x);
  arguments.mainloop.ptr_B = static_cast<const int8_t*>(args.codes);
  arguments.mainloop.dA = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {args.m, args.k, 1});
  arguments.mainloop.dB = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {args.n, args.k, 1});
  const auto stride = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {args.m, args.n, 1});
  const bool adds = args.residual != nullptr;
  arguments.epilogue.ptr_C = static_cast<const T*>(adds ? args.residual : args.y);
  arguments.epilogue.ptr_D = static_cast<T*>(args.y);
  arguments.epilogue.dC = arguments.epilogue.dD = stride;
  arguments.epilogue.thread = {
      {{adds ? 1.f : 0.f}},                                                       // times the residual
      {},                                                                         // the residual itself
      {{args.x_scales}, {{args.scales}, {}, {}}, {static_cast<const T*>(args.bias)}, {}},  // scaled sums and bias
      {}};
  arguments.hw_info = {launch.device, launch.processors};
  arguments.scheduler.max_swizzle_size = launch.swizzle;
  return arguments;
}

}  // namespace

// n must be a multiple of 8; y, bias and residual must start at multiples of 16 bytes. cudaErrorInvalidValue if CUTLASS
// rejects the problem.
template <typename T, int kTile>
cudaError_t launch_w8a8_cutlass(const W8a8Args& args, const W8a8CutlassLaunch& launch, cudaStream_t stream) {
  using P = Product<T, kTile>;
  const cudaError_t error = cudaSetDevice(launch.device);
  if (error != cudaSuccess) return error;
  const auto arguments = arguments_of<P>(args, launch);
  typename P::Gemm gemm;
  if (P::Gemm::get_workspace_size(arguments) != 0) return cudaErrorInvalidValue;
  if (P::Gemm::can_implement(arguments) != cutlass::Status::kSuccess) return cudaErrorInvalidValue;
  if (gemm.initialize(arguments, nullptr, stream) != cutlass::Status::kSuccess) return cudaErrorInvalidValue;
  if (gemm.run(stream) != cutlass::Status::kSuccess) return cudaErrorLaunchFailure;
  return cudaSuccess;
}

const Kernel w8a8_cutlass("w8a8_cutlass", {name_of<LOWBIT_T>, std::to_string(LOWBIT_TILE)},
                          launch_w8a8_cutlass<LOWBIT_T, LOWBIT_TILE>);

}  // namespace lowbit
