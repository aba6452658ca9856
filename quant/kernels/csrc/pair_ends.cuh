// The epilogue of wna16_gemv: one pair of rows of W per lane. Whatever results need beside their sums is loaded before
// the block's barrier, so that the loads overlap the wait. The gain is in docs/kernels/wna16_gemv.md.
#pragma once

#include "deferred_norm.cuh"
#include "epilogue.cuh"
#include "panels.cuh"

namespace lowbit {

// Two numbers of T as loaded. Converting them would wait for the loads.
template <typename T>
struct Loaded {
  T low, high;
  __device__ float2 floats() const { return make_float2(to_float(low), to_float(high)); }
};

// Operands of the epilogue for one column of y and the rows `low` and `low + pair_block / 2` of W.
template <typename T>
struct PairEnd {
  int low;
  int block, place;  // `low` is row `place` of block `block` of pair_block rows: a head, where heads turn
  Loaded<T> bias, residual, norm;
  float cosine, sine;
  int64_t slot;  // of the cache
};

// The values of rows `first` and `first + apart` of n; 0 past the end, and without a tensor.
template <typename T>
__device__ Loaded<T> pair_at(const void* values, int64_t offset, int first, int apart, int n) {
  Loaded<T> pair = {from_float<T>(0.f), from_float<T>(0.f)};
  if (values == nullptr) return pair;
  const T* numbers = static_cast<const T*>(values) + offset + first;
  if (first < n) pair.low = numbers[0];
  if (first + apart < n) pair.high = numbers[apart];
  return pair;
}

template <typename T>
__device__ PairEnd<T> pair_end(const Wna16Args& args, int tile, int row, int column) {
  const int block_tiles = args.pair_block / kTileRows, half = args.pair_block / 2;
  PairEnd<T> end;
  end.block = tile / block_tiles;
  end.place = (tile - end.block * block_tiles) * 8 + row;
  end.low = end.block * args.pair_block + end.place;
  if (args.positions != nullptr) {
    if (end.block >= args.q_heads) end.slot = args.slots[column];
    if (end.block < args.q_heads + args.kv_heads) {
      const int64_t angle = args.positions[column] * half + end.place;
      end.cosine = args.cosines[angle];
      end.sine = args.sines[angle];
    }
  }
  end.bias = pair_at<T>(args.bias, 0, end.low, half, args.n);
  end.residual = pair_at<T>(args.residual, static_cast<int64_t>(column) * args.n, end.low, half, args.n);
  end.norm = pair_at<T>(args.next_norm, 0, end.low, half, args.n);
  return end;
}

// Applies the rotary embedding to q and k, and writes q to y, k and v to the caches. Heads of W: q, then k, then v.
template <typename T>
__device__ void store_turned(const Wna16Args& args, const PairEnd<T>& end, int column, float2 sums) {
  const int kv_head = end.block - args.q_heads, half = args.pair_block / 2;
  if (kv_head < args.kv_heads)
    sums = make_float2(sums.x * end.cosine - sums.y * end.sine, sums.y * end.cosine + sums.x * end.sine);
  T* target = static_cast<T*>(args.y) + (static_cast<int64_t>(column) * args.q_heads + end.block) * args.pair_block;
  if (kv_head >= 0) {
    const bool is_key = kv_head < args.kv_heads;
    const int64_t head = end.slot * args.kv_heads + (is_key ? kv_head : kv_head - args.kv_heads);
    target = static_cast<T*>(is_key ? args.k_cache : args.v_cache) + head * args.pair_block;
  }
  target[end.place] = from_float<T>(sums.x);
  target[end.place + half] = from_float<T>(sums.y);
}

// Stores y of both rows, those below n. Returns the values before rounding.
template <typename T>
__device__ float2 store_plain(const Wna16Args& args, const PairEnd<T>& end, int column, float2 sums) {
  const int high = end.low + args.pair_block / 2;
  if (args.activation != Activation::none)
    sums = make_float2(activate(args.activation, sums.x), activate(args.activation, sums.y));
  const float2 residual = end.residual.floats();
  sums = make_float2(sums.x + residual.x, sums.y + residual.y);
  const auto store = [&](int row, float sum) {
    if (row >= args.n) return;
    const int64_t index = input_index(args.y_panel, column, args.n, row);
    if (args.float32_out) static_cast<float*>(args.y)[index] = sum;
    else static_cast<T*>(args.y)[index] = from_float<T>(sum);
  };
  store(end.low, sums.x);
  store(high, sums.y);
  return sums;
}

// Stores a pair's results. All lanes of a warp call it together; lanes without a pair are not `stored`.
template <typename T>
__device__ void store_pair(const Wna16Args& args, bool stored, const PairEnd<T>& end, int column, float2 sums) {
  const float2 bias = end.bias.floats();
  sums = make_float2(sums.x + bias.x, sums.y + bias.y);
  if (stored && args.positions != nullptr) store_turned<T>(args, end, column, sums);
  else if (stored && args.activation == Activation::silu_mul)
    static_cast<T*>(args.y)[input_index(args.y_panel, column, args.n / 2, end.low)] =
        from_float<T>(silu(sums.x) * sums.y);
  else if (stored) sums = store_plain<T>(args, end, column, sums);
  if (args.next_norm != nullptr) store_deferred<T>(args, stored, column, end.low, sums, end.norm.floats());
}

// Stores results of `group_tiles` tiles of this group, blockIdx.y, in the first `columns` columns of y: one column per
// warp, one pair of rows per lane. The block's barrier is in here, and all its threads call this function;
// sum_of(column of y, row of the group) returns a finished sum after that barrier.
template <typename T, typename SumOf>
__device__ void meet_and_store(const Wna16Args& args, int group_tiles, int columns, int warp, int warps, SumOf sum_of) {
  int first = 0, column = warp;
  bool met = false;
  do {
    const int pair = first + threadIdx.x % 32, tile = blockIdx.y * group_tiles + pair / 8;
    const bool stored = column < columns && pair < group_tiles * 8 && tile < args.tiles;
    PairEnd<T> end = {};
    if (stored) end = pair_end<T>(args, tile, pair % 8, column);
    if (!met) __syncthreads();
    met = true;
    float2 sums = {};
    const int row = pair / 8 * kTileRows + pair % 8;
    if (stored) sums = make_float2(sum_of(column, row), sum_of(column, row + 8));
    if (column < columns) store_pair<T>(args, stored, end, column, sums);
    first += 32;
    if (first >= group_tiles * 8) first = 0, column += warps;
  } while (column < columns);
}

}  // namespace lowbit
