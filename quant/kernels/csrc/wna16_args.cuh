// Arguments of all products with a packed weight: y = epilogue(prologue(x) W^T).
//
// Shapes: x (m, k), W (n, k), both half precision once dequantized; y (m, n), or (m, n / 2) for the gated epilogue.
// The packed layout is quant/kernels/packed.py's.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

namespace lowbit {

constexpr int kTileRows = 16;     // rows of W in a tile: the rows of the tensor core's A operand
constexpr int kChunkK = 128;      // inputs in a chunk: tile x chunk is contiguous in memory
constexpr int kChannelShift = 31; // the scale_shift of a weight with one scale per row

enum class Norm : int { kNone, kRms, kLayer };
enum class Activation : int { kNone, kSiluMul, kGelu, kGeluTanh, kQuickGelu };

struct Wna16Args {
  const void* x;           // (m, k), k a multiple of 128: the caller pads it with zeros
  const void* words;       // (tiles, chunks, 16 x 128 codes)
  const void* scales;      // (tiles, scale_rows, 8, groups per chunk, 2)
  const void* zeros;       // the same shape in uint8, or null: symmetric
  const void* bias;        // (n) or null
  const void* residual;    // (m, n) or null: added after the activation
  const void* norm_weight; // (k), null without a norm
  const void* norm_bias;   // (k) or null
  void* y;
  int m, n, k;
  int tiles, chunks;       // ceil(n / 16), k / 128
  bool stage_x;            // copy x to shared memory first, as a norm needs
  int pair_block;          // rows i and i + pair_block / 2 of each block of rows share a lane; 16 is the plain order
  int scale_rows;
  int scale_shift;         // chunk >> scale_shift is its row of scales
  Norm norm;
  float norm_eps;          // also for x_squares
  Activation activation;
  bool float32_out;
  bool vectors;  // n is a multiple of 8, and tensors of y's dtype start at multiples of 16 bytes
  // Rotary embedding and cache append: all null, or q goes to y, and k and v to their caches.
  const int64_t* positions;  // (m)
  const int64_t* slots;      // (m) row of the caches
  const float* cosines;      // (positions, pair_block / 2)
  const float* sines;
  void* k_cache;             // (slots, kv_heads, pair_block)
  void* v_cache;
  int q_heads, kv_heads;
  const void* next_weight;  // start of the next product's weight, to be prefetched: next_weight.cuh
  int next_bytes;           // 0 for no prefetch
  // Deferred norms (deferred_norm.cuh): the one still to finish on x, and the one to start on y.
  const float* x_squares;   // (m, x_parts), or null: no norm to finish
  int x_parts;              // k / 16 before padding, a multiple of 4
  const void* next_norm;    // (n) the weight of the norm of y, or null; n is a multiple of 64
  void* z;                  // (m, n) y * next_norm
  float* squares;           // (m, n / 16)
};

}  // namespace lowbit
