// Arguments of all products with a packed weight: y = epilogue(prologue(x) W^T).
//
// Shapes: x (m, k), W (n, k), both half precision once dequantized; y (m, n), or (m, n / 2) for the gated epilogue.
// The packed layout is quant/kernels/packed.py's.
#pragma once

#include "declare.cuh"

namespace lowbit {

constexpr int kTileRows = 16;     // rows of W in a tile: the rows of the tensor core's A operand
constexpr int kChunkK = 128;      // inputs in a chunk: tile x chunk is contiguous in memory
constexpr int kChannelShift = 31; // the scale_shift of a weight with one scale per row

LOWBIT_ENUM(Norm, none, rms, layer)
LOWBIT_ENUM(Activation, none, silu_mul, gelu, gelu_tanh, quick_gelu)

struct Wna16Args {
  LOWBIT_STRUCT(Wna16Args);
  FIELD(const void*, x);            // (m, k), k a multiple of 128: the caller pads it with zeros; or in panels
  FIELD(const void*, words);        // (tiles, chunks, 16 x 128 codes)
  FIELD(const void*, scales);       // (tiles, scale_rows, 8, groups per chunk, 2), T or bytes; of no rows: null
  FIELD(const void*, zeros);        // the same shape in uint8, or null: symmetric
  FIELD(const void*, bias);         // (n) or null
  FIELD(const void*, residual);     // (m, n) or null: added after the activation
  FIELD(const void*, norm_weight);  // (k), null without a norm
  FIELD(const void*, norm_bias);    // (k) or null
  FIELD(void*, y);
  FIELD(int, m);
  FIELD(int, n);
  FIELD(int, k);
  FIELD(int, tiles);                // ceil(n / 16)
  FIELD(int, chunks);               // k / 128
  // Rows of a panel (panels.cuh): 8, or 16 for more than 8 rows; 0: none. wna16_gemv alone has code for panels.
  FIELD(int, x_panel);
  FIELD(int, y_panel);
  FIELD(int, z_panel);
  FIELD(bool, stage_x);             // copy x to shared memory first, as a norm needs
  FIELD(int, pair_block);           // rows i and i + pair_block / 2 of a block share a lane; 16 is the plain order
  FIELD(int, scale_rows);
  FIELD(int, scale_shift);          // chunk >> scale_shift is its row of scales
  FIELD(Norm, norm);
  FIELD(float, norm_eps);           // also for x_squares
  FIELD(Activation, activation);
  FIELD(bool, float32_out);
  FIELD(bool, vectors);             // n is a multiple of 8, and tensors of y's dtype start at multiples of 16 bytes
  // Rotary embedding and cache append: all null, or q goes to y, and k and v to their caches.
  FIELD(const int64_t*, positions);  // (m)
  FIELD(const int64_t*, slots);      // (m) row of the caches
  FIELD(const float*, cosines);      // (positions, pair_block / 2)
  FIELD(const float*, sines);
  FIELD(void*, k_cache);             // (slots, kv_heads, pair_block)
  FIELD(void*, v_cache);
  FIELD(int, q_heads);
  FIELD(int, kv_heads);
  FIELD(const void*, next_weight);   // start of the next product's weight, to be prefetched: next_weight.cuh
  FIELD(int, next_bytes);            // 0 for no prefetch
  // Deferred norms (deferred_norm.cuh): the one still to finish on x, and the one to start on y.
  FIELD(const float*, x_squares);  // (m, x_parts), or null: no norm to finish
  FIELD(int, x_parts);             // k / 16 before padding, a multiple of 4
  FIELD(const void*, next_norm);   // (n) the weight of the norm of y, or null; n is a multiple of 64
  FIELD(void*, z);                 // (m, n) y * next_norm
  FIELD(float*, squares);          // (m, n / 16)
  FIELD(const float*, factors);    // (tiles, 8, 2) of the sums of a float's rows, null for integers
};

}  // namespace lowbit
