// Selection of each row's token, likeliest or drawn, and the row's advance: one launch instead of torch's six, or about
// fifty more with noise.
//
// A score and its index are combined in one number, so that the largest does not depend on the order of comparisons.
// The blocks of a cluster share a row; each sends its best to the first one, which alone writes.
#include "candidate.cuh"
#include "declare.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace lowbit {

struct ChooseTokensArgs {
  LOWBIT_STRUCT(ChooseTokensArgs);
  FIELD(const float*, scores);       // (m, n)
  FIELD(const float*, temperature);  // (m), 0 for a row without noise; null, with seed, if no row has noise
  FIELD(const int64_t*, seed);       // (m)
  FIELD(int64_t*, tokens);           // (m): the index of each row's largest score
  FIELD(int64_t*, written);          // (m): incremented
  FIELD(int64_t*, positions);        // (m): incremented up to `last`; null, with slots, if rows do not move
  FIELD(int64_t*, slots);            // (m): moved with the position
  FIELD(int64_t, last);
  FIELD(int64_t*, sent);             // (steps, m) in memory of the host: each row's last tokens; null, with turns: none
  FIELD(int64_t*, turns);            // (m): incremented; a row's token goes to row turns % steps of `sent`
  FIELD(int, steps);
  FIELD(int, m);
  FIELD(int, n);
};

struct ChooseTokensLaunch {
  LOWBIT_STRUCT(ChooseTokensLaunch);
  FIELD(int, device);
  FIELD(int, blocks);      // that share a row: at most 8; more than 1 needs sm_90
  FIELD(bool, dependent);  // launched with programmatic dependent launch
};

namespace {

constexpr int kThreads = 1024;
constexpr int kMostBlocks = 8;  // a cluster that fits everywhere

// SplitMix64: its increment, and its finalizer, in which every bit of the result depends on every bit of the value.
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
__device__ inline uint64_t mix(uint64_t value) {
  value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9u;
  value = (value ^ value >> 27) * 0x94D049BB133111EBu;
  return value ^ value >> 31;
}

// The transformation of a row's scores before the comparison; the identity without noise.
template <bool kNoise>
struct Perturbed {
  float temperature = 0.f;
  uint64_t stream = 0;

  __device__ Perturbed(const ChooseTokensArgs& args, int row) {
    if (!kNoise) return;
    temperature = args.temperature[row];
    stream = mix(mix(args.seed[row] * kGolden + 1) + args.written[row] * kGolden);
  }
  // The scaled score plus Gumbel noise from 23 bits, whose uniform is never 0 or 1.
  __device__ float operator()(float score, uint32_t index) const {
    if (!kNoise || !(temperature > 0.f)) return score;
    const uint32_t bits = mix(stream + index * kGolden) >> 41;
    const float uniform = (static_cast<float>(bits) + 0.5f) * 0x1p-23f;
    return score / temperature - logf(-logf(uniform));
  }
};

// The thread's best of the scores [begin, end) of a row.
template <bool kNoise>
__device__ uint64_t best_of_thread(const float* row, const Perturbed<kNoise>& perturbed, int begin, int end) {
  constexpr int kLoads = kNoise ? 4 : 16;  // scores in flight
  uint64_t best = 0;
  for (int first = begin + threadIdx.x; first < end; first += kThreads * kLoads) {
    float scores[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) scores[i] = first + i * kThreads < end ? __ldcg(row + first + i * kThreads) : 0.f;
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (const int index = first + i * kThreads; index < end)
        best = max(best, candidate_of(perturbed(scores[i], index), index));
  }
  return best;
}

struct Meeting {
  uint64_t warps[kThreads / 32];
  float4 blocks[kMostBlocks];  // a candidate's halves, as bits of x and y
};

__device__ inline void move_on(const ChooseTokensArgs& args, int row, uint32_t token) {
  args.tokens[row] = token;
  args.written[row] += 1;
  if (args.sent != nullptr) {
    const int64_t turn = args.turns[row];
    args.sent[turn % args.steps * args.m + row] = token;
    args.turns[row] = turn + 1;
  }
  if (args.positions == nullptr) return;
  const int64_t position = args.positions[row], next = min(position + 1, args.last);
  args.positions[row] = next;
  args.slots[row] += next - position;
}

template <bool kNoise>
__global__ void __launch_bounds__(kThreads) choose_tokens_kernel(const __grid_constant__ ChooseTokensArgs args) {
  LOWBIT_SHARED(Meeting, meeting);
  const bool cluster = gridDim.x > 1;
  allow_next_kernel();
  if (cluster) cluster_arrive();  // other blocks may write to a block's memory once it has started
  wait_for_previous_kernel();
  const int begin = int64_t(args.n) * blockIdx.x / gridDim.x, end = int64_t(args.n) * (blockIdx.x + 1) / gridDim.x;
  const Perturbed<kNoise> perturbed(args, blockIdx.y);
  uint64_t best = best_of_warp(best_of_thread(args.scores + int64_t(blockIdx.y) * args.n, perturbed, begin, end));
  if (threadIdx.x % 32 == 0) meeting.warps[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x < 32) best = best_of_warp(meeting.warps[threadIdx.x]);
  if (cluster) {
    cluster_wait();
    const float4 halves = make_float4(__uint_as_float(best >> 32), __uint_as_float(static_cast<uint32_t>(best)), 0, 0);
    if (threadIdx.x == 0) write_cluster_floats(smem_address(&meeting.blocks[blockIdx.x]), 0, halves);
    cluster_sync();
  }
  if (threadIdx.x > 0 || blockIdx.x > 0) return;
  for (int i = 0; cluster && i < gridDim.x; ++i) {
    const float4 halves = meeting.blocks[i];
    best = max(best, uint64_t(__float_as_uint(halves.x)) << 32 | __float_as_uint(halves.y));
  }
  move_on(args, blockIdx.y, index_of(best));
}

}  // namespace

cudaError_t launch_choose_tokens(const ChooseTokensArgs& args, const ChooseTokensLaunch& launch, cudaStream_t stream) {
  if (launch.blocks < 1 || launch.blocks > kMostBlocks || args.n < 1) return cudaErrorInvalidValue;
  const LaunchPlan plan = {
      .device = launch.device,
      .stream = stream,
      .blocks = dim3(launch.blocks, args.m),
      .threads = dim3(kThreads),
      .cluster = launch.blocks > 1 ? launch.blocks : 0,
      .dependent = launch.dependent,
  };
  return launch_kernel(args.temperature ? choose_tokens_kernel<true> : choose_tokens_kernel<false>, plan, args);
}

const Kernel choose_tokens("choose_tokens", {}, launch_choose_tokens);

}  // namespace lowbit
