// Compiled once per T: LOWBIT_T comes from units.py.
//
// The choice of each row's experts: logits of all experts, then the best of their scores. The blocks of a cluster share
// a row's logits; in the first block each thread counts the experts that are better than its own. Every sum has an
// order of its own, so that a row's experts and weights do not depend on the other rows. The router's weights are
// constant: a warp's first ones are read before the previous kernel has ended.
#include "candidate.cuh"
#include "declare.cuh"
#include "deferred_norm.cuh"
#include "launch.cuh"
#include "messages.cuh"
#include "stamps.cuh"

namespace lowbit {

LOWBIT_ENUM(Scores, softmax, sigmoid, chosen)

struct RouteExpertsArgs {
  LOWBIT_STRUCT(RouteExpertsArgs);
  FIELD(const void*, x);            // (m, k), k a multiple of 8
  FIELD(const void*, weight);       // (experts, k)
  FIELD(const void*, bias);         // (experts) or null
  FIELD(const float*, correction);  // (experts), added to scores for the choice alone, or null
  FIELD(const float*, factors);     // (experts) of the weights, or null
  FIELD(const float*, x_squares);   // (m, x_parts): a norm to finish on x, or null
  FIELD(int, x_parts);
  FIELD(float, norm_eps);
  FIELD(int*, experts_of_rows);     // (m, top), best first
  FIELD(float*, weights_of_rows);   // (m, top)
  FIELD(int, m);
  FIELD(int, k);
  FIELD(int, experts);
  FIELD(int, top);
  FIELD(Scores, scores);
  FIELD(bool, normalized);          // weights are divided by their sum
  FIELD(float, scale);              // of weights
  FIELD(int, groups);               // of neighbouring experts, of which the best `used_groups` count
  FIELD(int, used_groups);
  FIELD(int, group_best);           // 1 or 2: as many best scores rank a group
};

struct RouteExpertsLaunch {
  LOWBIT_STRUCT(RouteExpertsLaunch);
  FIELD(int, device);
  FIELD(int, blocks);      // that share a row: at most 8; more than 1 needs sm_90
  FIELD(bool, dependent);  // launched with programmatic dependent launch
};

namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kMostExperts = 512, kMostTop = 32, kMostGroups = 32, kMostBlocks = 8;
constexpr int kPair = 2;      // experts that a warp multiplies at once
constexpr int kVectors = 8;   // of 16 bytes, of each expert, that a lane reads at once
constexpr float kLeastSum = 1e-20f;  // added to sums that divide

// The numbers of a row, in the first block's memory.
struct Row {
  uint64_t sent;  // the barrier of logits from all blocks
  float logits[kMostExperts];
  float ranks[kMostExperts];
  alignas(16) uint64_t keys[kMostExperts];
  float weights[kMostTop];  // of the chosen, before they are divided
  float factors[kMostTop];
};

__device__ inline float sum_of_warp(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

template <typename T>
__device__ float dot(const uint4& a, const uint4& b, float sum) {
  const T* left = reinterpret_cast<const T*>(&a);
  const T* right = reinterpret_cast<const T*>(&b);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += to_float(left[i]) * to_float(right[i]);
  return sum;
}

// A lane's vectors of the weights of two experts, of which the second may not exist: then the first is read twice.
template <typename T>
struct Weights {
  uint4 values[kPair][kVectors];
  float biases[kPair];

  __device__ void read(const RouteExpertsArgs& args, int first, int end, int begin) {
#pragma unroll
    for (int e = 0; e < kPair; ++e) {
      const int expert = first + e * kWarps < end ? first + e * kWarps : first;
      const T* weight = static_cast<const T*>(args.weight) + static_cast<int64_t>(expert) * args.k;
      const uint4* vectors = reinterpret_cast<const uint4*>(weight);
      biases[e] = args.bias == nullptr ? 0.f : to_float(static_cast<const T*>(args.bias)[expert]);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int at = begin + threadIdx.x % 32 + 32 * i;
        if (at < args.k / 8) values[e][i] = __ldg(vectors + at);
      }
    }
  }
};

// As many of a row's.
template <typename T>
struct Inputs {
  uint4 values[kVectors];

  __device__ void read(const RouteExpertsArgs& args, int row, int begin) {
    const uint4* x = reinterpret_cast<const uint4*>(static_cast<const T*>(args.x) + static_cast<int64_t>(row) * args.k);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = begin + threadIdx.x % 32 + 32 * i;
      if (at < args.k / 8) values[i] = __ldcg(x + at);
    }
  }
};

// The products of a row with two experts, by a warp, whose first weights and inputs have been read; in the order of
// inputs.
template <typename T>
__device__ float2 products_of(const RouteExpertsArgs& args, int row, int first, int end, Weights<T>& weights,
                              Inputs<T>& inputs) {
  float sums[kPair] = {};
  for (int begin = 0; begin < args.k / 8; begin += 32 * kVectors) {
    if (begin > 0) {
      weights.read(args, first, end, begin);
      inputs.read(args, row, begin);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (begin + threadIdx.x % 32 + 32 * i < args.k / 8)
        for (int e = 0; e < kPair; ++e) sums[e] = dot<T>(inputs.values[i], weights.values[e][i], sums[e]);
  }
  return make_float2(sum_of_warp(sums[0]), sum_of_warp(sums[1]));
}

// Gives a logit to the first block.
__device__ inline void give_logit(int expert, float logit, Row& values) {
  if (gridDim.x > 1) send_float(&values.logits[expert], 0, logit, &values.sent);
  else values.logits[expert] = logit;
}

// The largest logit and the sum of a softmax over all logits, the same in all lanes of all warps.
struct Softmax {
  float most, sum;
  __device__ Softmax(const RouteExpertsArgs& args, const float* logits) {
    most = -INFINITY, sum = 0.f;
    if (args.scores != Scores::softmax) return;
    for (int i = threadIdx.x % 32; i < args.experts; i += 32) most = max_or_nan(most, logits[i]);
    for (int offset = 16; offset > 0; offset /= 2) most = max_or_nan(most, __shfl_xor_sync(~0u, most, offset));
    for (int i = threadIdx.x % 32; i < args.experts; i += 32) sum += expf(logits[i] - most);
    sum = sum_of_warp(sum);
  }
  __device__ float operator()(float logit) const { return expf(logit - most) / sum; }
};

// The score of a logit. Of "chosen" it is the logit itself.
__device__ inline float score_of(const RouteExpertsArgs& args, const Softmax& softmax, float logit) {
  if (args.scores == Scores::softmax) return softmax(logit);
  return args.scores == Scores::sigmoid ? 1.f / (1.f + expf(-logit)) : logit;
}

// A bit for each of the best groups, from the scores in `ranks`: lane g has group g.
__device__ inline uint32_t best_groups(const RouteExpertsArgs& args, const float* ranks) {
  const int size = args.experts / args.groups, lane = threadIdx.x % 32;
  uint64_t key = 0;
  if (lane < args.groups) {
    float first = -INFINITY, second = -INFINITY;
    for (int i = 0; i < size; ++i) {
      const float rank = ranks[lane * size + i];
      second = fmaxf(second, fminf(first, rank));
      first = fmaxf(first, rank);
    }
    key = candidate_of(args.group_best == 2 ? first + second : first, lane);
  }
  uint32_t used = 0;
  for (int i = 0; i < args.used_groups; ++i) {
    const uint64_t best = best_of_warp(key);
    if (key == best) key = 0;
    used |= 1u << (index_of(best) & 31);
  }
  return used;
}

// Keys of all experts, those outside the best groups 0.
__device__ inline void make_keys(const RouteExpertsArgs& args, const Softmax& softmax, Row& row) {
  const int size = args.experts / args.groups;
  for (int i = threadIdx.x; i < args.experts; i += kThreads) {
    const float score = score_of(args, softmax, row.logits[i]);
    row.ranks[i] = args.correction == nullptr ? score : score + args.correction[i];
    if (args.groups == 1) row.keys[i] = candidate_of(row.ranks[i], i);
  }
  if (args.groups == 1) return;
  __syncthreads();
  const uint32_t used = best_groups(args, row.ranks);
  for (int i = threadIdx.x; i < args.experts; i += kThreads)
    row.keys[i] = used >> (i / size) & 1 ? candidate_of(row.ranks[i], i) : 0;
}

// The number of keys above `mine`, by two threads that share an expert. Keys are read two at a time.
__device__ inline int count_better(const Row& row, int experts, uint64_t mine) {
  int better = 0;
#pragma unroll 8
  for (int i = threadIdx.x % 2 * 2; i < experts; i += 4) {
    const ulonglong2 keys = *reinterpret_cast<const ulonglong2*>(row.keys + i);
    better += keys.x > mine;
    better += i + 1 < experts && keys.y > mine;
  }
  return better + __shfl_xor_sync(~0u, better, 1);
}

// Writes the experts and their weights, best first. By the first block.
__device__ inline void choose(const RouteExpertsArgs& args, int row, Row& values) {
  const Softmax softmax(args, values.logits);
  make_keys(args, softmax, values);
  __syncthreads();
  for (int first = 0; first < args.experts; first += kThreads / 2) {  // two threads share an expert
    const int expert = first + threadIdx.x / 2;
    const uint64_t mine = expert < args.experts ? values.keys[expert] : 0;
    const int better = count_better(values, args.experts, mine);
    if (mine == 0 || better >= args.top || threadIdx.x % 2 > 0) continue;
    args.experts_of_rows[row * args.top + better] = expert;
    // of "chosen" the logit, until the best is known
    values.weights[better] = score_of(args, softmax, values.logits[expert]);
    values.factors[better] = args.factors == nullptr ? 1.f : __ldg(args.factors + expert);
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  float weight = threadIdx.x < args.top ? values.weights[threadIdx.x] : 0.f;
  if (args.scores == Scores::chosen) weight = threadIdx.x < args.top ? expf(weight - values.weights[0]) : 0.f;
  const float total = sum_of_warp(weight);
  if (args.normalized || args.scores == Scores::chosen) weight /= total + kLeastSum;
  if (threadIdx.x >= args.top) return;
  args.weights_of_rows[row * args.top + threadIdx.x] = weight * args.scale * values.factors[threadIdx.x];
}

template <typename T>
__global__ void __launch_bounds__(kThreads) route_experts_kernel(const __grid_constant__ RouteExpertsArgs args) {
  LOWBIT_SHARED(Row, values);
  const bool cluster = gridDim.x > 1;
  const int row = blockIdx.y, warp = threadIdx.x / 32;
  const int begin = args.experts * blockIdx.x / gridDim.x, end = args.experts * (blockIdx.x + 1) / gridDim.x;
  stamp(Stage::kBegun);
  allow_next_kernel();
  if (cluster) {
    if (blockIdx.x == 0 && threadIdx.x == 0) expect_messages(&values.sent, args.experts * sizeof(float));
    cluster_arrive_relaxed();  // other blocks may write to a block's memory once it has started
  }
  Weights<T> weights;
  if (begin + warp < end) weights.read(args, begin + warp, end, 0);
  wait_for_previous_kernel();
  stamp(Stage::kWaited);
  if (cluster) cluster_wait();
  Inputs<T> inputs;
  inputs.read(args, row, 0);  // on their way beside the squares
  float inverse = 1.f;
  if (args.x_squares != nullptr) {
    const float* squares = args.x_squares + static_cast<int64_t>(row) * args.x_parts;
    const auto four_at = [&](int i) { return __ldcg(reinterpret_cast<const float4*>(squares + i)); };
    inverse = inverse_deviation(args.x_parts, args.norm_eps, four_at);
  }
  for (int first = begin + warp; first < end; first += kPair * kWarps) {
    if (first > begin + warp) {
      weights.read(args, first, end, 0);
      inputs.read(args, row, 0);
    }
    const float2 products = products_of<T>(args, row, first, end, weights, inputs);
    if (threadIdx.x % 32 > 0) continue;
    give_logit(first, products.x * inverse + weights.biases[0], values);
    if (first + kWarps < end) give_logit(first + kWarps, products.y * inverse + weights.biases[1], values);
  }
  stamp(Stage::kComputed);
  if (blockIdx.x > 0) return leave_stamps(args.experts, args.k);
  if (cluster) wait_for_messages(&values.sent);
  else __syncthreads();
  choose(args, row, values);
  leave_stamps(args.experts, args.k);
}

}  // namespace

template <typename T>
cudaError_t launch_route_experts(const RouteExpertsArgs& args, const RouteExpertsLaunch& launch, cudaStream_t stream) {
  const bool fits = args.experts >= 1 && args.experts <= kMostExperts && args.top >= 1 && args.top <= kMostTop &&
                    args.top <= args.experts && args.groups >= 1 && args.groups <= kMostGroups && args.k % 8 == 0;
  if (!fits || launch.blocks < 1 || launch.blocks > kMostBlocks) return cudaErrorInvalidValue;
  const LaunchPlan plan = {
      .device = launch.device,
      .stream = stream,
      .blocks = dim3(launch.blocks, args.m),
      .threads = dim3(kThreads),
      .cluster = launch.blocks > 1 ? launch.blocks : 0,
      .dependent = launch.dependent,
  };
  return launch_kernel(route_experts_kernel<T>, plan, args);
}

const Kernel route_experts("route_experts", {name_of<LOWBIT_T>}, launch_route_experts<LOWBIT_T>);

}  // namespace lowbit
