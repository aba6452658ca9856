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
  FIELD(const float*, factors);
};

namespace {

constexpr int kWarps = 8;

// value * scale * factor, rounded once. `values` holds eight integers in T, or a float's values.
template <typename T, typename Number>
__device__ uint4 scaled(const uint32_t (&values)[4], float scale, float factor) {
  uint4 result;
  T* out = reinterpret_cast<T*>(&result);
  const T* in = reinterpret_cast<const T*>(values);
  for (int i = 0; i < 8; ++i) {
    const float value = to_float(in[i]) * scale;
    out[i] = from_float<T>(Number::kFloat ? value * factor : value);
  }
  return result;
}

// The scale at `index`; without scales, 1. A byte has the power of two that byte_scale gives it.
template <typename T, typename Number>
__device__ float scale_at(const void* scales, int64_t index) {
  if (scales == nullptr) return 1.f;
  if (!Number::kByteScales) return to_float(static_cast<const T*>(scales)[index]);
  const uint32_t twice = byte_scale<T>(static_cast<const uint8_t*>(scales)[index], 0);
  return to_float(*reinterpret_cast<const T*>(&twice));
}

// Word `j` of a lane's chunk: words lie in fours, and of an odd number of bits the last two in a pair.
template <int kBits>
__device__ uint32_t word_of(const void* chunk, int lane, int j) {
  const uint32_t* words = static_cast<const uint32_t*>(chunk) + j / 4 * 128;
  return words[j / 4 == kBits / 2 ? lane * 2 + j % 4 : lane * 4 + j % 4];
}

// Row g (half 0) or g + 8 (half 1) of a tile, in W's own order.
__device__ inline int row_of(int tile, int lane, int half, int pair_block) {
  const int block_tiles = pair_block / 16;
  return tile / block_tiles * pair_block + tile % block_tiles * 8 + lane / 4 + half * (pair_block / 2);
}

// A lane's part of a chunk: its place, and where the results go.
template <typename T, typename Number>
struct Unit {
  const Wna16DequantizeArgs& args;
  int tile, chunk, lane;
  int64_t side;  // index of the scales of row g

  __device__ int64_t index_of(int block, int half) const {
    const int groups = args.groups_per_chunk;
    return side + (groups == 8 ? lane % 4 / 2 * 4 + block : block * groups / 4) * 2 + half;
  }

  __device__ int zero_of(int block, int half) const {
    if (args.zeros == nullptr) return 1 << (Number::kBits - 1);
    return static_cast<const uint8_t*>(args.zeros)[index_of(block, half)];
  }

  __device__ void store(int block, int half, const uint32_t (&values)[4]) const {
    const int row = row_of(tile, lane, half, args.pair_block), k = chunk * 128 + block * 32 + lane % 4 * 8;
    if (row >= args.n || k >= args.k) return;
    const float scale = scale_at<T, Number>(args.scales, index_of(block, half));
    const float factor = Number::kFloat ? args.factors[(tile * 8 + lane / 4) * 2 + half] : 1.f;
    *reinterpret_cast<uint4*>(static_cast<T*>(args.w) + static_cast<int64_t>(row) * args.k + k) =
        scaled<T, Number>(values, scale, factor);
  }
};

template <typename T, typename Number>
__global__ void wna16_dequantize_kernel(const __grid_constant__ Wna16DequantizeArgs args) {
  using D = Dequant<T, Number>;
  constexpr int kBits = Number::kBits;
  const int lane = threadIdx.x % 32;
  const int chunks = (args.k + 127) / 128;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (place >= static_cast<int64_t>((args.n + 15) / 16) * chunks) return;
  const int tile = place / chunks, chunk = place % chunks;
  const uint4* words = static_cast<const uint4*>(args.words) + place * (16 * 128 * kBits / 128);
  const int64_t row = static_cast<int64_t>(tile) * args.scale_rows + (chunk >> args.scale_shift);
  const Unit<T, Number> unit = {args, tile, chunk, lane, (row * 8 + lane / 4) * args.groups_per_chunk * 2};
  if constexpr (Number::kStream) {
    for (int first = 0; first < 4; first += 2) {
      uint32_t stream[kBits], zeros[2][2], values[2][2][4];
      for (int j = 0; j < kBits; ++j) stream[j] = word_of<kBits>(words, lane, first / 2 * kBits + j);
      for (int i = 0; i < 4; ++i) zeros[i / 2][i % 2] = unit.zero_of(first + i / 2, i % 2);
      Stream<T, kBits>::expand(stream, zeros, values);
      for (int i = 0; i < 4; ++i) unit.store(first + i / 2, i % 2, values[i / 2][i % 2]);
    }
  } else {
    constexpr int kBlocksPerLoad = 8 / kBits;
    for (int block = 0; block < 4; ++block) {
      const uint4 raw = words[block / kBlocksPerLoad * 32 + lane];
      for (int half = 0; half < 2; ++half) {
        uint32_t values[4];
        D::expand(reinterpret_cast<const uint32_t*>(&raw) + (block % kBlocksPerLoad * 2 + half) * D::kWords,
                  D::zeros_of(unit.zero_of(block, half)), values);
        unit.store(block, half, values);
      }
    }
  }
}

}  // namespace

template <typename T, typename Number>
cudaError_t launch_wna16_dequantize(const Wna16DequantizeArgs& args, const DeviceLaunch& launch, cudaStream_t stream) {
  const int64_t units = static_cast<int64_t>((args.n + 15) / 16) * ((args.k + 127) / 128);
  const LaunchPlan plan = {
      .device = launch.device,
      .stream = stream,
      .blocks = dim3((units + kWarps - 1) / kWarps),
      .threads = dim3(kWarps * 32),
  };
  return launch_kernel(wna16_dequantize_kernel<T, Number>, plan, args);
}

const Kernel wna16_dequantize("wna16_dequantize", {name_of<LOWBIT_T>, LOWBIT_NUMBER::kName},
                              launch_wna16_dequantize<LOWBIT_T, LOWBIT_NUMBER>);

}  // namespace lowbit
