// Norm and rotation of the heads of new tokens, and the append of keys and values to a cache. Few rows take a warp for
// each head. Many rows are bound by memory: a block takes a row, and a lane 16 bytes of each half of a head.
#pragma once

#include "launch.cuh"
#include "new_heads.cuh"

namespace lowbit {

struct AppendHeadsArgs {
  LOWBIT_STRUCT(AppendHeadsArgs);
  FIELD(NewHeadsArgs, made);
  FIELD(const int64_t*, slots);      // (m) not to be written by a kernel that this one may overlap
  FIELD(void*, q);                   // (m, heads, head_dim)
  FIELD(KvCache, cache);
  FIELD(int, m);
  FIELD(int, heads);
};

struct AppendHeadsLaunch {
  LOWBIT_STRUCT(AppendHeadsLaunch);
  FIELD(int, device);
  FIELD(bool, by_rows);    // a block for each row: a cache in T, heads of 64, 128, 256 or 512, all aligned to 16 bytes
  FIELD(bool, dependent);  // launched with programmatic dependent launch
};

namespace {

constexpr int kAppendThreads = 128, kRowThreads = 256;
constexpr int kEight = 8;  // halves in 16 bytes

// Constants, and inputs of the step, are read before the previous kernel has finished. Heads are at most 64 kPairs
// wide.
template <typename T, typename Codes, int kPairs>
__global__ void __launch_bounds__(kAppendThreads) append_heads_kernel(const __grid_constant__ AppendHeadsArgs args) {
  const KvCache& cache = args.cache;
  const int lane = threadIdx.x % 32, half = cache.head_dim / 2;
  const int heads = args.heads + 2 * cache.kv_heads;
  const int unit = blockIdx.x * (kAppendThreads / 32) + threadIdx.x / 32;
  const int row = unit / heads, index = unit % heads;
  allow_next_kernel();
  if (row >= args.m) return wait_for_previous_kernel();
  const bool is_q = index < args.heads, is_v = index >= args.heads + cache.kv_heads;
  const NewHeadsArgs& made = args.made;
  const void* norm = is_q ? made.q_norm : is_v ? nullptr : made.k_norm;
  const bool normed = is_v ? made.v_normed : norm != nullptr;
  Head<kPairs> head, turns, weight = Head<kPairs>::ones();
  if (!is_v) turns = read_turns<kPairs>(made, row, half, lane);
  if (norm != nullptr) weight.read(static_cast<const T*>(norm), half, lane);
  const int kv_head = is_q ? 0 : (index - args.heads) % cache.kv_heads;
  const int64_t place = is_q ? 0 : cache.index_of(args.slots[row], kv_head);
  wait_for_previous_kernel();
  head.read(static_cast<const T*>(made.qkv) + static_cast<int64_t>(unit) * cache.head_dim, half, lane);
  const float squares = normed ? lanes_sum(squares_of(head), 32) : 0.f;
  if (!is_v) finish_head<Codes>(head, normed, weight, squares, made.norm_eps, turns, half, lane);
  else if (normed) norm_head(head, weight, squares, made.norm_eps, half);
  if (is_q) {
    const Place into = {args.q, nullptr, static_cast<int64_t>(row) * args.heads + index, 0};
    return store_codes<T>(SameCache{}, head, into, half, lane);
  }
  if (is_v) store_codes<T>(Codes{}, head, {cache.v, cache.v_scales, place, kv_head}, half, lane);
  else store_codes<T>(Codes{}, head, {cache.k, cache.k_scales, place, kv_head}, half, lane);
}

// Eight adjacent inputs of a head, and the eight `half` behind them, as pairs.
template <typename T>
__device__ Head<kEight> read_eights(const T* source, int half) {
  const uint4 raw[2] = {*reinterpret_cast<const uint4*>(source), *reinterpret_cast<const uint4*>(source + half)};
  const T* values = reinterpret_cast<const T*>(raw);
  Head<kEight> head;
#pragma unroll
  for (int i = 0; i < kEight; ++i) head.low[i] = to_float(values[i]), head.high[i] = to_float(values[kEight + i]);
  return head;
}

template <typename T>
__device__ void store_eights(const Head<kEight>& head, T* target, int half) {
  uint4 raw[2];
  T* values = reinterpret_cast<T*>(raw);
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    values[i] = from_float<T>(head.low[i]);
    values[kEight + i] = from_float<T>(head.high[i]);
  }
  *reinterpret_cast<uint4*>(target) = raw[0];
  *reinterpret_cast<uint4*>(target + half) = raw[1];
}

// Eight adjacent cosines and sines of a row.
__device__ inline Head<kEight> read_eight_turns(const NewHeadsArgs& made, int64_t first) {
  Head<kEight> turns;
#pragma unroll
  for (int i = 0; i < kEight; i += 4) {
    const float4 cosine = *reinterpret_cast<const float4*>(made.cosines + first + i);
    const float4 sine = *reinterpret_cast<const float4*>(made.sines + first + i);
    turns.low[i] = cosine.x, turns.low[i + 1] = cosine.y, turns.low[i + 2] = cosine.z, turns.low[i + 3] = cosine.w;
    turns.high[i] = sine.x, turns.high[i + 1] = sine.y, turns.high[i + 2] = sine.z, turns.high[i + 3] = sine.w;
  }
  return turns;
}

// Of the heads that a block takes at once, those behind a row's last are the last again.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 4) append_rows_kernel(const __grid_constant__ AppendHeadsArgs args) {
  const KvCache& cache = args.cache;
  const NewHeadsArgs& made = args.made;
  const int half = cache.head_dim / 2, lanes = half / kEight, first = threadIdx.x % lanes * kEight;
  const int heads = args.heads + 2 * cache.kv_heads, row = blockIdx.x;
  allow_next_kernel();
  const Head<kEight> turns = read_eight_turns(made, made.positions[row] * half + first);
  const int64_t slot = args.slots[row];
  wait_for_previous_kernel();
  const T* qkv = static_cast<const T*>(made.qkv) + static_cast<int64_t>(row) * heads * cache.head_dim + first;
  T* q = static_cast<T*>(args.q) + static_cast<int64_t>(row) * args.heads * cache.head_dim + first;
  for (int begin = 0; begin < heads; begin += kRowThreads / lanes) {
    const int index = min(begin + static_cast<int>(threadIdx.x) / lanes, heads - 1), kv = index - args.heads;
    const bool is_q = kv < 0, is_v = kv >= cache.kv_heads;
    Head<kEight> head = read_eights(qkv + index * cache.head_dim, half);
    if (made.q_norm != nullptr || made.k_norm != nullptr || made.v_normed) {
      const void* norm = is_q ? made.q_norm : is_v ? nullptr : made.k_norm;
      const float squares = lanes_sum(squares_of(head), lanes);  // by whole warps
      if (norm != nullptr)
        norm_head(head, read_eights(static_cast<const T*>(norm) + first, half), squares, made.norm_eps, half);
      else if (is_v && made.v_normed)
        norm_head(head, Head<kEight>::ones(), squares, made.norm_eps, half);
    }
    if (!is_v) rotate_head(head, turns);
    const int64_t element = cache.index_of(slot, kv - (is_v ? cache.kv_heads : 0)) * cache.head_dim + first;
    store_eights(head, is_q ? q + index * cache.head_dim : static_cast<T*>(is_v ? cache.v : cache.k) + element, half);
  }
}

}  // namespace

template <typename T, typename Codes>
cudaError_t launch_append_heads(const AppendHeadsArgs& args, const AppendHeadsLaunch& launch, cudaStream_t stream) {
  const int units = args.m * (args.heads + 2 * args.cache.kv_heads), warps = kAppendThreads / 32;
  const int head_dim = args.cache.head_dim;
  if (Codes::kRotated && (head_dim < 64 || (head_dim & (head_dim - 1)) != 0)) return cudaErrorInvalidValue;
  const LaunchPlan plan = {
      .device = launch.device,
      .stream = stream,
      .blocks = dim3(launch.by_rows ? args.m : (units + warps - 1) / warps),
      .threads = dim3(launch.by_rows ? kRowThreads : kAppendThreads),
      .dependent = launch.dependent,
  };
  if (head_dim > 512) return cudaErrorInvalidValue;
  if (!launch.by_rows && head_dim <= 256) return launch_kernel(append_heads_kernel<T, Codes, 4>, plan, args);
  if (!launch.by_rows) return launch_kernel(append_heads_kernel<T, Codes, 8>, plan, args);
  const bool whole_lanes = head_dim == 64 || head_dim == 128 || head_dim == 256 || head_dim == 512;
  if constexpr (std::is_same_v<Codes, SameCache>)
    if (whole_lanes) return launch_kernel(append_rows_kernel<T>, plan, args);
  return cudaErrorInvalidConfiguration;
}

}  // namespace lowbit
