// One warp expands one tile's chunk (16 rows x 128 inputs), with the same 16-byte reads as the product's, and 16-byte
// writes of eight consecutive inputs of a row. It is bound by the writes, so nothing is staged in shared memory.
#include "declare.cuh"
#include "dequant.cuh"
#include "launch.cuh"

namespace lowbit {

struct Wna16DequantizeArgs {
  LOWBIT_STRUCT(Wna16DequantizeArgs);
  FIELD(const void*, words);  // as in Wna16Args
  FIELD(const void*, scales);
  FIELD(const void*, zeros);
  FIELD(void*, w);            // (n, k), T
  FIELD(int, n);
  FIELD(int, k);
  FIELD(int, pair_block);
  FIELD(int, groups_per_chunk);
  FIELD(int, scale_rows);
  FIELD(int, scale_shift);
};

namespace {

constexpr int kWarps = 8;

// value * scale, rounded once. `values` holds eight integers in T.
template <typename T>
__device__ uint4 scaled(const uint32_t (&values)[4], float scale) {
  uint4 result;
  T* out = reinterpret_cast<T*>(&result);
  const T* in = reinterpret_cast<const T*>(values);
  for (int i = 0; i < 8; ++i) out[i] = from_float<T>(to_float(in[i]) * scale);
  return result;
}

// Row g (half 0) or g + 8 (half 1) of a tile, in W's own order.
__device__ inline int row_of(int tile, int lane, int half, int pair_block) {
  const int block_tiles = pair_block / 16;
  return tile / block_tiles * pair_block + tile % block_tiles * 8 + lane / 4 + half * (pair_block / 2);
}

template <typename T, int kBits>
__global__ void wna16_dequantize_kernel(const __grid_constant__ Wna16DequantizeArgs args) {
  using D = Dequant<T, kBits>;
  constexpr int kBlocksPerLoad = 8 / kBits;
  const int lane = threadIdx.x % 32;
  const int chunks = (args.k + 127) / 128;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (unit >= static_cast<int64_t>((args.n + 15) / 16) * chunks) return;
  const int tile = unit / chunks, chunk = unit % chunks;
  const uint4* words = static_cast<const uint4*>(args.words) + unit * (16 * 128 * kBits / 128);
  const int groups = args.groups_per_chunk;
  const int64_t side = ((static_cast<int64_t>(tile) * args.scale_rows + (chunk >> args.scale_shift)) * 8 + lane / 4) *
                       groups * 2;
  for (int block = 0; block < 4; ++block) {
    const uint4 raw = words[block / kBlocksPerLoad * 32 + lane];
    const int k = chunk * 128 + block * 32 + lane % 4 * 8;
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(tile, lane, half, args.pair_block);
      if (row >= args.n || k >= args.k) continue;
      const int64_t index = side + block * groups / 4 * 2 + half;
      const int zero = args.zeros == nullptr ? 1 << (kBits - 1) : static_cast<const uint8_t*>(args.zeros)[index];
      uint32_t values[4];
      D::expand(reinterpret_cast<const uint32_t*>(&raw) + (block % kBlocksPerLoad * 2 + half) * D::kWords,
                D::zeros_of(zero), values);
      const float scale = to_float(static_cast<const T*>(args.scales)[index]);
      *reinterpret_cast<uint4*>(static_cast<T*>(args.w) + static_cast<int64_t>(row) * args.k + k) =
          scaled<T>(values, scale);
    }
  }
}

}  // namespace

template <typename T, int kBits>
cudaError_t launch_wna16_dequantize(const Wna16DequantizeArgs& args, const DeviceLaunch& launch, cudaStream_t stream) {
  const int64_t units = static_cast<int64_t>((args.n + 15) / 16) * ((args.k + 127) / 128);
  const LaunchPlan plan = {
      .device = launch.device,
      .stream = stream,
      .blocks = dim3((units + kWarps - 1) / kWarps),
      .threads = dim3(kWarps * 32),
  };
  return launch_kernel(wna16_dequantize_kernel<T, kBits>, plan, args);
}

const Kernel wna16_dequantize[] = {
    {"wna16_dequantize", {name_of<__half>, "4"}, launch_wna16_dequantize<__half, 4>},
    {"wna16_dequantize", {name_of<__half>, "8"}, launch_wna16_dequantize<__half, 8>},
    {"wna16_dequantize", {name_of<__nv_bfloat16>, "4"}, launch_wna16_dequantize<__nv_bfloat16, 4>},
    {"wna16_dequantize", {name_of<__nv_bfloat16>, "8"}, launch_wna16_dequantize<__nv_bfloat16, 8>},
};

}  // namespace lowbit
