// One warp rounds one row: each lane keeps four of its columns in registers, and the current column is shared with all
// lanes by a shuffle. Rows are independent, so nothing is synchronised; the factor is in shared memory, read by every
// warp. Several weights of one shape, each with its own factor, are one launch.
#include "declare.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace lowbit {

struct GptqBlockArgs {
  LOWBIT_STRUCT(GptqBlockArgs);
  FIELD(const void*, w);       // (weights, n, columns) float32, as all below
  FIELD(const void*, factor);  // (weights, columns, columns), upper triangular
  FIELD(const void*, scales);  // (weights, n, columns): scales of each column's group
  FIELD(const void*, zeros);   // (weights, n, columns)
  FIELD(void*, codes);         // (weights, n, columns)
  FIELD(void*, errors);        // (weights, n, columns)
  FIELD(int, weights);
  FIELD(int, n);
  FIELD(int, columns);
  FIELD(float, low);           // limits of the codes
  FIELD(float, high);
  FIELD(float, fineness);      // step as a fraction of the power of two at or below a value; 0 for integers
  FIELD(float, least);         // smallest step
};

constexpr int kGptqColumns = 128;  // most columns of a block

namespace {

constexpr int kWarps = 8;
constexpr int kPerLane = kGptqColumns / 32;
constexpr int kSharedBytes = kGptqColumns * kGptqColumns * sizeof(float);

// Column 32 * i + lane of the row that starts at `first`; `other` beyond its end.
__device__ void load_row(const void* row_of, int64_t first, int columns, int lane, float other,
                         float (&values)[kPerLane]) {
  const float* row = static_cast<const float*>(row_of) + first;
  for (int i = 0; i < kPerLane; ++i) {
    const int column = 32 * i + lane;
    values[i] = column < columns ? row[column] : other;
  }
}

// The grid value nearest to `x`, in units of a scale: quant/numbers.py's round_to_grid.
__device__ float on_grid(float x, const GptqBlockArgs& args) {
  if (args.fineness == 0.f) return rintf(x);
  const float power = __uint_as_float(__float_as_uint(x) & 0x7f800000u);
  const float spacing = fmaxf(power * args.fineness, args.least);
  return rintf(__fdiv_rn(x, spacing)) * spacing;
}

__global__ void gptq_block_kernel(const __grid_constant__ GptqBlockArgs args) {
  LOWBIT_DYNAMIC_SHARED(float, factor);
  const int columns = args.columns, lane = threadIdx.x % 32;
  const float* factor_gmem = static_cast<const float*>(args.factor) + int64_t{blockIdx.y} * columns * columns;
  for (int i = threadIdx.x; i < columns * columns; i += blockDim.x) factor[i] = factor_gmem[i];
  __syncthreads();
  const int row_of_weight = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row_of_weight >= args.n) return;
  const int64_t row = int64_t{blockIdx.y} * args.n + row_of_weight;
  float w[kPerLane], scale[kPerLane], zero[kPerLane], code[kPerLane], error[kPerLane];
  load_row(args.w, row * columns, columns, lane, 0.f, w);
  load_row(args.scales, row * columns, columns, lane, 1.f, scale);
  load_row(args.zeros, row * columns, columns, lane, 0.f, zero);
  // unrolled, so that `turn` names registers
#pragma unroll
  for (int turn = 0; turn < kPerLane; ++turn) {
    for (int from = 0; from < 32; ++from) {
      const int j = 32 * turn + from;
      if (j >= columns) break;
      const float value = __shfl_sync(~0u, w[turn], from);
      const float step = __shfl_sync(~0u, scale[turn], from), offset = __shfl_sync(~0u, zero[turn], from);
      const float chosen = fminf(fmaxf(on_grid(__fdiv_rn(value, step), args) + offset, args.low), args.high);
      const float pushed = __fdiv_rn(__fsub_rn(value, __fmul_rn(chosen - offset, step)), factor[j * columns + j]);
      if (lane == from) code[turn] = chosen, error[turn] = pushed;
#pragma unroll
      for (int i = turn; i < kPerLane; ++i) {
        const int column = 32 * i + lane;
        if (column > j && column < columns) w[i] -= pushed * factor[j * columns + column];
      }
    }
  }
  for (int i = 0; i < kPerLane; ++i) {
    const int column = 32 * i + lane;
    if (column >= columns) continue;
    static_cast<float*>(args.codes)[row * columns + column] = code[i];
    static_cast<float*>(args.errors)[row * columns + column] = error[i];
  }
}

}  // namespace

cudaError_t launch_gptq_block(const GptqBlockArgs& args, const DeviceLaunch& launch, cudaStream_t stream) {
  const LaunchPlan plan = {
      .device = launch.device,
      .stream = stream,
      .blocks = dim3((args.n + kWarps - 1) / kWarps, args.weights),
      .threads = dim3(kWarps * 32),
      .shared_bytes = kSharedBytes,
  };
  return launch_kernel(gptq_block_kernel, plan, args);
}

const Kernel gptq_block("gptq_block", {}, launch_gptq_block);

}  // namespace lowbit
