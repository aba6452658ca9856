// Compiled once per (T, number type of the cache): LOWBIT_T and LOWBIT_CACHE come from units.py.
//
// Attention of few tokens over a long cache is bound by reading the cache. A warp takes 16 positions at a time on the
// tensor cores: keys are the left operand of scores = K q, values (transposed on the way, by pairing rows) that of out
// += V^T weights. Up to 8 query heads that share a key head are the 8 columns, at the cost of one. Nothing passes
// through shared memory in the loop, except queries of heads of 512: the registers hold a half of their keys or values
// at a time. Rows are read before the previous kernel has finished, except those that it may still write. At the end,
// warps and blocks of a cluster merge by the log-sum-exp rule: every warp sends each block the elements that this block
// merges, in a fixed order, so equal inputs give equal bits.
//
// A head's sums do not depend on its column, nor on the number of columns: rows of drafts and single ones have the same
// bits. So products that are added up are fmaf by name: of the same expression in two columns the compiler had rounded
// one twice.
//
// A running maximum is raised only once a score exceeds it by more than kSlack, as FlashAttention-4 does.
// FlashDecoding++'s unified maximum would never be, but overflows if a score strays from its estimate.
#include <type_traits>

#include "append_heads.cuh"
#include "cache_codes.cuh"
#include "declare.cuh"
#include "dequant.cuh"
#include "launch.cuh"
#include "messages.cuh"
#include "new_heads.cuh"
#include "panels.cuh"
#include "stamps.cuh"

namespace lowbit {

// Positions of a sequence before its last m must not be written by a kernel that this one may overlap.
struct DecodeAttentionArgs {
  LOWBIT_STRUCT(DecodeAttentionArgs);
  FIELD(const void*, q);             // (m, heads, head_dim); null: the heads of each row, whose sequence is its own,
  FIELD(NewHeadsArgs, made);         // are made here, and k and v appended to the cache
  FIELD(const int64_t*, starts);     // (m) slot of position 0
  FIELD(const int64_t*, positions);  // (m)
  FIELD(void*, out);                 // (m, heads, head_dim), or in panels
  FIELD(int, out_panel);             // rows of a panel (panels.cuh); 0: none
  FIELD(KvCache, cache);
  FIELD(int, m);
  FIELD(int, heads);
  FIELD(float, scale);
  FIELD(float, softcap);             // 0: none
  FIELD(int, window);                // 0: none
  FIELD(const void*, sinks);         // (heads) scores of one more position without a value, or null
  FIELD(int, columns);               // most query heads of a block, of all rows: up to 8
  FIELD(int, adjacent);              // adjacent rows that are consecutive positions of one sequence; 1 with a window
};

struct DecodeAttentionLaunch {
  LOWBIT_STRUCT(DecodeAttentionLaunch);
  FIELD(int, device);
  FIELD(int, splits);      // blocks of a cluster that share a sequence; more than 1 needs sm_90
  FIELD(int, warps);       // of a block: 4; or 8 or 16 for a quantized cache and heads of up to 128
  FIELD(int, least_shared);  // bytes of shared memory of a block at least, which bound the blocks of a multiprocessor
  FIELD(bool, dependent);  // launched with programmatic dependent launch
};

namespace {

constexpr int kHeads = 8;               // most query heads of a block: columns of the tensor instruction
constexpr int kRows = 16;               // positions per chunk of a warp
constexpr int kGroup = 8;               // adjacent elements of the result that are merged together
constexpr float kNothing = -1e30f;      // a maximum below any score; finite, so that differences are finite
constexpr float kLog2E = 1.44269504f;
constexpr float kSlack = 8.f;           // log2 of the largest weight
constexpr float kLeastScale = 7.8886e-31f;  // 2^-100: its inverse can still be summed

// ---- attention ----

// kFew: at most 4 columns, so that a lane has one of them.
template <typename T_, typename Codes_, int kDim_, bool kAppends_, int kWarps_ = 4, bool kFew_ = false>
struct Shape {
  using T = T_;
  using Codes = Codes_;
  using Product = typename Codes::template Product<T>;
  static constexpr int kBits = Codes::kBits;
  static constexpr int kDim = kDim_;                        // at least head_dim
  static constexpr bool kAppends = kAppends_;               // True if the kernel itself makes and appends new heads
  static constexpr int kWarps = kWarps_, kThreads = kWarps * 32;
  static constexpr bool kFew = kFew_;
  static constexpr int kColumns = kFew ? 1 : 2;             // of a lane: from kColumns * member on
  static constexpr int kParts = kDim > 256 ? kDim / 256 : 1;  // of a chunk, in registers one after another
  static constexpr int kMostSplits = 8;                     // a cluster that fits everywhere
  static constexpr int kVector = 128 / kBits;               // elements in 16 bytes
  static constexpr int kKeyVectors = kDim / kVector / 4 / kParts;  // vectors of one position's part per lane
  // Values are read in 8 bytes if they have 4 bits.
  using ValueVector = std::conditional_t<kBits == 4, uint2, uint4>;
  static constexpr int kValueVector = sizeof(ValueVector) * 8 / kBits;
  static constexpr int kValueVectors = kDim / kValueVector / 8 / kParts;
  static constexpr int kWords = kValueVectors * sizeof(ValueVector) / 4;  // of a part of a row of values per lane
  static constexpr int kPairs = 2 * Codes::kPairs;          // pairs of elements from two rows' words
  static constexpr int kBlocks = kDim / 16;                 // blocks of 16 elements of the result
  static constexpr int kPartBlocks = kBlocks / kParts;
  static_assert(kParts == 1 || !(kAppends || Codes::kByteQueries), "wide heads are appended before, and have halves");
  static constexpr bool kAhead = kDim <= 128;               // True if the next chunk is read while this one is computed
  static constexpr int kTogether = kAhead ? Codes::kTogether : 1;
  static constexpr bool kOffset = Codes::kOffset != 0;
  // Rows past the end keep an earlier row's codes: their weight is zero.
  static constexpr bool kClears = !(Codes::kTokenScales || Codes::kHeadScales);
  static constexpr int kMinBlocks = kWarps > 8 ? 1 : kWarps > 4 || !kAhead ? 2 : 3;  // 128, 168 or 255 registers
};

// The lane's place in mma fragments: rows `group` and group + 8 of the left operand, columns 2 member and 2 member + 1.
struct Lane {
  int group, member;
  __device__ Lane() : group(threadIdx.x % 32 / 4), member(threadIdx.x % 4) {}
};

// The block's columns: query heads of one key head, of all adjacent rows, in the order of rows.
struct Columns {
  int64_t first_row;
  int kv_head, group;  // query heads per key head
  int first, count;    // of the group * adjacent columns
  int most;            // columns of any block

  __device__ explicit Columns(const DecodeAttentionArgs& args) : group(args.heads / args.cache.kv_heads) {
    const int all = group * args.adjacent, chunks = (all + args.columns - 1) / args.columns;
    kv_head = blockIdx.y / chunks;
    first = blockIdx.y % chunks * args.columns;
    count = min(args.columns, all - first);
    most = min(args.columns, all);
    first_row = static_cast<int64_t>(blockIdx.z) * args.adjacent;
  }
  // A division only where there is more than one row.
  __device__ int row_of(const DecodeAttentionArgs& args, int column) const {
    return args.adjacent == 1 ? 0 : (first + column) / group;
  }
  // The index of a column's head among those of its row.
  __device__ int own_head_of(const DecodeAttentionArgs& args, int column) const {
    return kv_head * group + first + column - row_of(args, column) * group;
  }
  // Among those of all rows.
  __device__ int64_t head_of(const DecodeAttentionArgs& args, int column) const {
    return (first_row + row_of(args, column)) * args.heads + own_head_of(args, column);
  }
};

// The positions of one token's sequence that a warp processes, relative to the first visible one.
struct Span {
  const char* k;  // of position 0 of the span
  const char* v;
  const void* k_scales;
  const void* v_scales;
  unsigned pitch;        // bytes between positions; unsigned: the compiler multiplies a sign in 64 bits
  unsigned scale_pitch;  // scales between positions
  int length, settled;  // positions of the last row; positions that no running kernel writes, at least 0
  int readable;         // positions in the cache: all but the new one where this kernel appends it
  int head_dim;
  float scale;          // of all scores, for powers of two

  __device__ uint64_t bytes_to(unsigned row) const { return uint64_t{row} * pitch; }
  __device__ uint64_t scales_to(unsigned row) const { return uint64_t{row} * scale_pitch; }
};

// The addresses of the lane's part of a chunk. They move by additions, and the compiler does not know their origin: for
// want of registers it computed each anew, from constants in memory, with 12 instructions and their latencies.
template <typename S>
struct Cursor {
  const char* k;  // of row `group`, vector `member`
  const char* v;  // of row 2 member, vector `group`
  const typename S::T* scale;  // of row lane % kRows, of k for lanes 0 to 15, the others of v

  __device__ Cursor(const Span& span, Lane lane, int first)
      : k(span.k + span.bytes_to(first + lane.group) + 16 * lane.member),
        v(span.v + span.bytes_to(first + 2 * lane.member) + sizeof(typename S::ValueVector) * lane.group) {
    const int index = threadIdx.x % 32;
    scale = static_cast<const typename S::T*>(index < kRows ? span.k_scales : span.v_scales);
    if constexpr (S::Codes::kTokenScales) scale += span.scales_to(first + index % kRows);
  }
  // The same `rows` later.
  __device__ Cursor after(const Span& span, unsigned rows) const {
    Cursor later = *this;
    later.k += span.bytes_to(rows), later.v += span.bytes_to(rows);
    if constexpr (S::Codes::kTokenScales) later.scale += span.scales_to(rows);
    return later;
  }
  __device__ void hide() {
    hide_origin(k), hide_origin(v);
    if constexpr (S::Codes::kTokenScales) hide_origin(scale);
  }
};

template <typename S>
__device__ Span span_of(const DecodeAttentionArgs& args, int kv_head) {
  const KvCache& cache = args.cache;
  const int first_row = blockIdx.z * args.adjacent, position = args.positions[first_row + args.adjacent - 1];
  const int begin = args.window > 0 ? max(0, position + 1 - args.window) : 0;
  const int64_t first = cache.index_of(args.starts[first_row] + begin, kv_head);
  const int row_bytes = cache.head_dim * S::kBits / 8;
  Span span;
  span.k = static_cast<const char*>(cache.k) + first * row_bytes;
  span.v = static_cast<const char*>(cache.v) + first * row_bytes;
  span.scale = args.scale * kLog2E;
  if constexpr (S::Codes::kTokenScales) {
    span.k_scales = static_cast<const typename S::T*>(cache.k_scales) + first;
    span.v_scales = static_cast<const typename S::T*>(cache.v_scales) + first;
  }
  if constexpr (S::Codes::kHeadScales) span.scale *= __ldg(static_cast<const float*>(cache.k_scales) + kv_head);
  span.pitch = cache.slot_step * row_bytes;
  span.scale_pitch = cache.slot_step;
  span.length = position + 1 - begin;
  // a step of m rows writes at most the last m positions of a sequence
  span.settled = S::kAppends ? span.length - 1 : max(0, span.length - args.m);
  span.readable = S::kAppends ? span.length - 1 : span.length;
  span.head_dim = cache.head_dim;
  return span;
}

// log2 of a scale's magnitude, with the scale's sign as the lowest bit of the mantissa if it may have one.
template <bool kSigned>
__device__ float log_of_scale(float scale) {
  const float log = __log2f(max_or_nan(fabsf(scale), kLeastScale));
  if constexpr (!kSigned) return log;
  return __uint_as_float((__float_as_uint(log) & ~1u) | __float_as_uint(scale) >> 31);
}

// A chunk of 16 positions in registers, as each lane's share of the fragments, or one part of that. `read_` loads the
// rows in [from, to), of which neither may be negative nor `to` the smaller; `at` are the addresses of the chunk at
// `first`.
template <typename S>
struct Chunk {
  using ValueVector = typename S::ValueVector;
  uint4 k[2][S::kKeyVectors];            // rows group, group + 8; vector `member` of each four
  ValueVector v[4][S::kValueVectors];    // rows 2 member, + 1, + 8, + 9; vector `group` of each eight
  typename S::T scale;  // of tokens: of k for lanes 0 to 15, the others of v: position lane % 16

  // load(r, i) returns vector i of the lane's row r.
  template <typename Load>
  __device__ void fill_keys(const Span& span, Lane lane, int first, int from, int to, int part, Load load) {
    const int begin = part * S::kKeyVectors;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first + lane.group + 8 * r;
      if (static_cast<unsigned>(row - from) >= static_cast<unsigned>(to - from)) continue;
#pragma unroll
      for (int i = 0; i < S::kKeyVectors; ++i) {
        if ((4 * (begin + i) + lane.member) * S::kVector < span.head_dim) k[r][i] = load(r, begin + i);
      }
    }
  }

  template <typename Load>
  __device__ void fill_values(const Span& span, Lane lane, int first, int from, int to, int part, Load load) {
    const int begin = part * S::kValueVectors;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = first + 2 * lane.member + r % 2 + r / 2 * 8;
      if (static_cast<unsigned>(row - from) >= static_cast<unsigned>(to - from)) continue;
#pragma unroll
      for (int i = 0; i < S::kValueVectors; ++i) {
        if ((8 * (begin + i) + lane.group) * S::kValueVector < span.head_dim) v[r][i] = load(r, begin + i);
      }
    }
  }

  __device__ void read_keys(const Span& span, Lane lane, const Cursor<S>& at, int first, int from, int to,
                            int part = 0) {
    fill_keys(span, lane, first, from, to, part, [&](int r, int i) {
      return __ldcg(reinterpret_cast<const uint4*>(at.k + span.bytes_to(8 * r)) + 4 * i);
    });
  }

  __device__ void read_values(const Span& span, Lane lane, const Cursor<S>& at, int first, int from, int to,
                              int part = 0) {
    fill_values(span, lane, first, from, to, part, [&](int r, int i) {
      return __ldcg(reinterpret_cast<const ValueVector*>(at.v + span.bytes_to(r % 2 + r / 2 * 8)) + 8 * i);
    });
  }

  // Only asks for a scale: what would be made of it here would wait for the memory.
  __device__ void read_scales(const Cursor<S>& at, int first, int from, int to) {
    if constexpr (S::Codes::kTokenScales) {
      const int row = first + threadIdx.x % kRows;
      // Bypasses L1, which may hold an outdated line from a read of a neighbour before the wait.
      if (static_cast<unsigned>(row - from) < static_cast<unsigned>(to - from)) scale = __ldcg(at.scale);
    }
  }

  // The factor of scores for lanes 0 to 15; the others' log_of_scale.
  __device__ float side() const {
    const float value = to_float(scale), log = log_of_scale<S::Codes::kSignedScales>(value);
    return threadIdx.x % 32 < kRows ? value : log;
  }

  __device__ void clear_keys() {
    for (auto& row : k)
      for (uint4& vector : row) vector = {};
  }
  __device__ void clear_values() {
    for (auto& row : v)
      for (ValueVector& vector : row) vector = {};
  }
};

// A pair of T as a pair of Product. Numbers beyond float16 are clamped to its largest, which no real q reaches. NaN
// stays.
template <typename S>
__device__ uint32_t product_pair(uint32_t word) {
  if constexpr (std::is_same_v<typename S::T, typename S::Product>) {
    return word;
  } else {
    const __half2 most = as_half2(0x7bff7bffu), least = as_half2(0xfbfffbffu);  // 65504, -65504
    return bits_of(__hmax2_nan(__hmin2_nan(__float22half2_rn(__bfloat1622float2(as_bfloat162(word))), most), least));
  }
}

// The first of the inputs of q that the lane multiplies as its pairs 4 i to 4 i + 3: those that it has of a key.
template <typename S>
__device__ int input_of(Lane lane, int i) {
  constexpr int kQuads = S::kVector / 8;  // 16-byte vectors of q per one of k
  return (i / kQuads * 4 + lane.member) * S::kVector + i % kQuads * 8;
}

// The query heads as the right operand: head `group`, in pairs of the inputs that the lane has of a key.
template <typename S>
struct Queries {
  uint32_t pairs[S::kDim / 8];
  float scale;  // of scores

  // load(d) returns the 16 bytes from input d of the lane's head on.
  template <typename Load>
  __device__ void fill(const Span& span, const Columns& columns, Lane lane, Load load) {
    scale = span.scale;
#pragma unroll
    for (int i = 0; i < S::kDim / 32; ++i) {
      const int d = input_of<S>(lane, i);
      uint4 raw = {};
      if (lane.group < columns.count && d < span.head_dim) raw = load(d);
      const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) pairs[4 * i + w] = product_pair<S>(words[w]);
    }
  }
  __device__ static int column_of(Lane lane) { return lane.group; }
  __device__ float scale_of(int) const { return scale; }
  // Pairs 4 i to 4 i + 3.
  __device__ uint4 four(Lane, int i) const {
    return make_uint4(pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]);
  }
};

// The same heads in shared memory, from which they are read for every chunk: of wide ones a lane has no room for them.
template <typename S>
struct SharedQueries {
  const typename S::T* head;  // of the lane's column
  float scale;  // of scores

  __device__ float scale_of(int) const { return scale; }
  __device__ uint4 four(Lane lane, int i) const {
    const uint4 raw = *reinterpret_cast<const uint4*>(head + input_of<S>(lane, i));
    return make_uint4(product_pair<S>(raw.x), product_pair<S>(raw.y), product_pair<S>(raw.z), product_pair<S>(raw.w));
  }
};

// Queries for keys of 4 bits, rounded to 16 bits beside their head's largest, far finer than the keys are. Their two
// bytes are two columns of the integer tensor instruction, or, with more than 4 columns, of two instructions; a word's
// nibbles are its left operand as they are. All sums are exact.
template <typename S>
struct ByteQueries {
  static constexpr int kParts = S::kFew ? 1 : 2;
  // Of the head column_of(lane), for each word of the lane's keys: bytes for its low nibbles and for its high ones.
  // With one part upper bytes are in even columns, lower ones in odd columns.
  uint32_t bytes[kParts][S::kDim / 16];
  int offsets[kParts][2];  // initial sums of columns 2 member and 2 member + 1
  float scales[S::kColumns];  // of the lane's scores

  __device__ static int column_of(Lane lane) { return S::kFew ? lane.group / 2 : lane.group; }
  __device__ float scale_of(int h) const { return scales[h]; }

  template <typename Load>
  __device__ void fill(const Span& span, const Columns& columns, Lane lane, Load load) {
    using T = typename S::T;
    float q[S::kDim / 32][8], largest = 0.f;
#pragma unroll
    for (int i = 0; i < S::kDim / 32; ++i) {
      const int d = (i / 4 * 4 + lane.member) * S::kVector + i % 4 * 8;
      uint4 raw = {};
      if (column_of(lane) < columns.count && d < span.head_dim) raw = load(d);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        q[i][j] = to_float(reinterpret_cast<const T*>(&raw)[j]);
        largest = max_or_nan(largest, fabsf(q[i][j]));
      }
    }
    for (int offset = 1; offset < 4; offset *= 2) largest = max_or_nan(largest, __shfl_xor_sync(~0u, largest, offset));
    const float inverse = largest > 0.f ? S::Codes::kMostQuery / largest : 0.f;
    int sums[kParts] = {};
#pragma unroll
    for (int i = 0; i < S::kDim / 32; ++i) {
      int codes[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) codes[j] = static_cast<int>(rintf(q[i][j] * inverse));
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const bool upper = S::kFew ? lane.group % 2 == 0 : part == 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) bytes[part][2 * i + half] = bytes_of(codes, upper, half, sums[part]);
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      for (int offset = 1; offset < 4; offset *= 2) sums[part] += __shfl_xor_sync(~0u, sums[part], offset);
#pragma unroll
      for (int h = 0; h < 2; ++h)
        offsets[part][h] = -S::Codes::kOffset * __shfl_sync(~0u, sums[part], (2 * lane.member + h) * 4);
    }
#pragma unroll
    for (int h = 0; h < S::kColumns; ++h)
      scales[h] = span.scale * __shfl_sync(~0u, largest, (2 * lane.member + h) * 4) /
                  (S::Codes::kMostQuery * S::Codes::kHighUnit);
  }

  // The bytes of four of eight codes, those for low or high nibbles, and their sum added to `sum`.
  __device__ static uint32_t bytes_of(const int (&codes)[8], bool upper, int half, int& sum) {
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int code = codes[S::Codes::element_of_byte(half, j)];
      const int byte = upper ? (code + 128) >> 8 : static_cast<int8_t>(code);
      sum += byte;
      word |= static_cast<uint32_t>(byte & 0xff) << (8 * j);
    }
    return word;
  }
};

template <typename S>
using HalfQueries = std::conditional_t<(S::kParts > 1), SharedQueries<S>, Queries<S>>;

template <typename S>
using QueriesOf = std::conditional_t<S::Codes::kByteQueries, ByteQueries<S>, HalfQueries<S>>;

// Reads the head of the lane's column.
template <typename S>
__device__ void read_queries(QueriesOf<S>& q, const DecodeAttentionArgs& args, const Span& span, const Columns& columns,
                             Lane lane) {
  using T = typename S::T;
  const T* head = static_cast<const T*>(args.q) + columns.head_of(args, q.column_of(lane)) * span.head_dim;
  q.fill(span, columns, lane, [&](int d) { return __ldcg(reinterpret_cast<const uint4*>(head + d)); });
}

// The lane's scores of each chunk: those of row `group` for its columns, then those of row group + 8.
template <typename S>
using Scores = float[S::kTogether][2 * S::kColumns];

// The scores of one chunk, before their scale.
template <typename S>
__device__ void multiply_keys(const Chunk<S>& chunk, const ByteQueries<S>& q, Lane, int,
                              float (&scores)[2 * S::kColumns]) {
  using Codes = typename S::Codes;
  constexpr int kParts = ByteQueries<S>::kParts;
  int sums[kParts][4];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    int low[4], high[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) low[i] = q.offsets[part][i % 2];
#pragma unroll
    for (int i = 0; i < S::kKeyVectors; ++i) {
      const uint32_t* first = reinterpret_cast<const uint32_t*>(&chunk.k[0][i]);
      const uint32_t* second = reinterpret_cast<const uint32_t*>(&chunk.k[1][i]);
#pragma unroll
      for (int w = 0; w < 4; w += 2) {
        const uint32_t* bytes = q.bytes[part] + 2 * (4 * i + w);
        mma_bytes_16x8x32(low, {Codes::low_bytes(first[w]), Codes::low_bytes(second[w]), Codes::low_bytes(first[w + 1]),
                                Codes::low_bytes(second[w + 1])}, bytes[0], bytes[2]);
        mma_bytes_16x8x32(high, {Codes::high_bytes(first[w]), Codes::high_bytes(second[w]),
                                 Codes::high_bytes(first[w + 1]), Codes::high_bytes(second[w + 1])},
                          bytes[1], bytes[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[part][i] = low[i] * Codes::kHighUnit + high[i];
  }
#pragma unroll
  for (int i = 0; i < 2 * S::kColumns; ++i)
    scores[i] = static_cast<float>(S::kFew ? sums[0][2 * i] * 256 + sums[0][2 * i + 1]
                                           : sums[0][i] * 256 + sums[kParts - 1][i]);
}

// The scores of one chunk, or of one part of it, which the next one's are added to.
template <typename S>
__device__ void multiply_keys(const Chunk<S>& chunk, const HalfQueries<S>& q, Lane lane, int part, float (&scores)[4]) {
  float odd[4] = {};  // two chains: the latency of a tensor instruction is several issue slots
#pragma unroll
  for (float& score : scores) score = part == 0 ? 0.f : score;
#pragma unroll
  for (int i = 0; i < S::kKeyVectors; ++i) {
    const uint32_t* low = reinterpret_cast<const uint32_t*>(&chunk.k[0][i]);
    const uint32_t* high = reinterpret_cast<const uint32_t*>(&chunk.k[1][i]);
    constexpr int kWord = S::Codes::kPairs, kSteps = 2 * kWord;
    uint32_t a[4][kWord], b[4][kWord];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      S::Codes::widen(low[w], a[w]);
      S::Codes::widen(high[w], b[w]);
    }
#pragma unroll
    for (int p = 0; p < kSteps; ++p) {
      const int first = 2 * p, second = 2 * p + 1;
      const uint4 pairs = q.four(lane, kSteps / 2 * (part * S::kKeyVectors + i) + p / 2);
      mma_16x8x16<typename S::Product>(p % 2 ? odd : scores,
                                       {a[first / kWord][first % kWord], b[first / kWord][first % kWord],
                                        a[second / kWord][second % kWord], b[second / kWord][second % kWord]},
                                       p % 2 ? pairs.z : pairs.x, p % 2 ? pairs.w : pairs.y);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) scores[i] += odd[i];
}

// A warp's sums for the lane's columns. Weights are relative to 2^maximum. `sum` is per lane.
template <typename S>
struct Running {
  float maximum[S::kColumns], sum[S::kColumns] = {};
  // Elements i (0, 1) and i + kPartBlocks (2, 3) of the lane's 2 kPartBlocks of a part, for two columns of the tensor
  // instruction, of which every other is 0 if there are few; with offsets the sums of weights.
  float out[S::kBlocks + S::kOffset][4] = {};

  __device__ Running() {
    for (float& each : maximum) each = kNothing;
  }
};

// Raises maxima that scores exceed by more than kSlack, and shrinks the sums. Each depends on its own scores alone.
template <typename S>
__device__ void raise(float (&most)[S::kColumns], Running<S>& running) {
  float shrink[S::kColumns];
#pragma unroll
  for (int h = 0; h < S::kColumns; ++h) {
    for (int offset = 4; offset < 32; offset *= 2) most[h] = fmaxf(most[h], __shfl_xor_sync(~0u, most[h], offset));
    const float maximum = most[h] > running.maximum[h] + kSlack ? most[h] : running.maximum[h];
    shrink[h] = exp2_fast(running.maximum[h] - maximum);
    running.maximum[h] = maximum;
    running.sum[h] *= shrink[h];
  }
#pragma unroll
  for (int i = 0; i < 4 * (S::kBlocks + S::kOffset); ++i)
    if (i % 2 < S::kColumns) running.out[i / 4][i % 4] *= shrink[i % S::kColumns];
}

// The largest score of each of the lane's columns.
template <typename S>
__device__ void find_most(const Scores<S>& scores, float (&most)[S::kColumns]) {
#pragma unroll
  for (int h = 0; h < S::kColumns; ++h) {
    most[h] = fmaxf(scores[0][h], scores[0][S::kColumns + h]);
#pragma unroll
    for (int c = 1; c < S::kTogether; ++c)
      most[h] = fmaxf(most[h], fmaxf(scores[c][h], scores[c][S::kColumns + h]));
  }
}

// Converts scores to weights of the values, and adds these to the sums: exp2 of score (with a scale for each token, of
// score + log2 of v's scale) minus the maximum, so that float16 can hold them for any scale.
template <typename S>
__device__ void weigh(const DecodeAttentionArgs& args, const Span& span, const Columns& columns,
                      const QueriesOf<S>& q, const Chunk<S> (&chunks)[S::kTogether], Lane lane, int first, int step,
                      Scores<S>& scores, Running<S>& running) {
  constexpr int kCount = 2 * S::kColumns;  // of a chunk
  float factors[S::kTogether][kCount], sides[S::kTogether][2] = {};  // log2 of v's scale
#pragma unroll
  for (int c = 0; c < S::kTogether; ++c) {
    const float side = S::Codes::kTokenScales ? chunks[c].side() : 0.f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float k_scale = S::Codes::kTokenScales ? __shfl_sync(~0u, side, lane.group + 8 * r) : 1.f;
      if constexpr (S::Codes::kTokenScales) sides[c][r] = __shfl_sync(~0u, side, lane.group + 8 * r + kRows);
#pragma unroll
      for (int h = 0; h < S::kColumns; ++h) factors[c][S::kColumns * r + h] = q.scale_of(h) * k_scale;
    }
  }
  const auto for_scores = [&](auto change) {
#pragma unroll
    for (int i = 0; i < kCount * S::kTogether; ++i) change(scores[i / kCount][i % kCount], i / kCount, i % kCount);
  };
  if (args.softcap > 0.f) {
    const float cap = args.softcap * kLog2E;
    for_scores([&](float& score, int c, int i) {
      score = fmaf(cap, tanhf(score * factors[c][i] / cap), sides[c][i / S::kColumns]);
    });
  } else {
    for_scores([&](float& score, int c, int i) { score = fmaf(score, factors[c][i], sides[c][i / S::kColumns]); });
  }
  if (first + (S::kTogether - 1) * step + kRows > span.length - args.adjacent + 1) {
    int lengths[S::kColumns];  // positions that the lane's columns see
#pragma unroll
    for (int h = 0; h < S::kColumns; ++h)
      lengths[h] = span.length - (args.adjacent - 1 - columns.row_of(args, S::kColumns * lane.member + h));
    for_scores([&](float& score, int c, int i) {
      if (first + c * step + lane.group + i / S::kColumns * 8 >= lengths[i % S::kColumns]) score = -INFINITY;
    });
  }
  float most[S::kColumns];
  find_most<S>(scores, most);
  bool above = false;
#pragma unroll
  for (int h = 0; h < S::kColumns; ++h) above = above || most[h] > running.maximum[h] + kSlack;
  if (__any_sync(~0u, above)) raise<S>(most, running);
  for_scores([&](float& score, int c, int i) {
    const float side = sides[c][i / S::kColumns];
    score = exp2_fast(score - running.maximum[i % S::kColumns]);
    float& sum = running.sum[i % S::kColumns];
    sum = fmaf(score, S::Codes::kTokenScales ? exp2_fast(-side) : 1.f, sum);
    if constexpr (S::Codes::kSignedScales)
      score = __uint_as_float(__float_as_uint(score) ^ __float_as_uint(side) << 31);
  });
}

// out += V^T weights, of a part.
template <typename S>
__device__ void multiply_values(const Chunk<S>& chunk, int part, const float (&weights)[2 * S::kColumns],
                                Running<S>& running) {
  using P = typename S::Product;
  constexpr int kLast = S::kColumns - 1;
  const uint32_t low = transpose_matrix(pair_of<P>(weights[0], kLast ? weights[kLast] : 0.f));
  const uint32_t high = transpose_matrix(pair_of<P>(weights[S::kColumns], kLast ? weights[S::kColumns + kLast] : 0.f));
  constexpr int kHalf = S::kWords / 2;
  const uint32_t* rows[4];
  for (int r = 0; r < 4; ++r) rows[r] = reinterpret_cast<const uint32_t*>(chunk.v[r]);
#pragma unroll
  for (int w = 0; w < kHalf; ++w) {
    uint32_t pairs[4][S::kPairs];  // in the order of the left operand's registers
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int word = i % 2 * kHalf + w;
      S::Codes::pair_rows(rows[i / 2 * 2][word], rows[i / 2 * 2 + 1][word], pairs[i]);
    }
#pragma unroll
    for (int p = 0; p < S::kPairs; ++p)
      mma_16x8x16<P>(running.out[part * S::kPartBlocks + w * S::kPairs + p],
                     {pairs[0][p], pairs[1][p], pairs[2][p], pairs[3][p]}, low, high);
  }
  if constexpr (S::kOffset) {
    constexpr uint32_t kOnes = 0x3c003c00u;
    mma_16x8x16<P>(running.out[S::kBlocks], {kOnes, kOnes, kOnes, kOnes}, low, high);
  }
}

// Shared memory for merging a cluster's warps, as much as the heads of a block need. Block r merges groups r,
// r + blocks, ... of kGroup elements, of every head.
template <typename S>
struct Meeting {
  static constexpr int kGroups = S::kDim / kGroup;
  static constexpr int kBarrier = 4;  // floats
  uint64_t* sent;  // the barrier of what the cluster's blocks send
  float* out;      // (warp of the cluster, group, head, element)
  float* maximum;
  float* sum;
  float of_block, of_head;  // 1 / blocks, 1 / heads: a division costs 20 instructions

  __device__ Meeting(float* memory, int most, int heads) {
    const int slots = gridDim.x * S::kWarps;
    sent = reinterpret_cast<uint64_t*>(memory);
    out = memory + kBarrier;
    maximum = out + slots * groups_of_block(gridDim.x) * most * kGroup;
    sum = maximum + slots * most;
    of_block = divide_fast(1.f, gridDim.x), of_head = divide_fast(1.f, heads);
  }
  __host__ __device__ static int groups_of_block(int blocks) { return (kGroups + blocks - 1) / blocks; }
  static size_t bytes(int blocks, int heads) {
    return kBarrier * sizeof(float) +
           size_t(blocks) * S::kWarps * heads * (groups_of_block(blocks) * kGroup + 2) * sizeof(float);
  }

  // By one thread, before the cluster's blocks meet.
  __device__ void expect(int heads) const {
    const int groups = over(kGroups - 1 - static_cast<int>(blockIdx.x), of_block) + 1;
    expect_messages(sent, gridDim.x * S::kWarps * heads * (groups * kGroup + 2) * sizeof(float));
  }
  // a / b of numbers below 1000, given 1 / b.
  __device__ static int over(int a, float inverse) { return static_cast<int>((a + 0.5f) * inverse); }
};

// Gives four floats, or one, to a block: this one where there is no cluster.
template <typename S>
__device__ void give(const Meeting<S>& meeting, float* target, int rank, float4 value) {
  if (gridDim.x > 1) send_floats(target, rank, value, meeting.sent);
  else *reinterpret_cast<float4*>(target) = value;
}

template <typename S>
__device__ void give(const Meeting<S>& meeting, float* target, int rank, float value) {
  if (gridDim.x > 1) send_float(target, rank, value, meeting.sent);
  else *target = value;
}

// Gives eight of the lane's 2 kBlocks elements of the heads below `heads` to the block that merges them.
template <typename S>
__device__ void give_eight(const Meeting<S>& meeting, const Running<S>& running, Lane lane, int heads, int eight) {
  const int blocks = gridDim.x, slot = blockIdx.x * S::kWarps + threadIdx.x / 32;
  const int vector = eight * kGroup / S::kValueVector * 8 + lane.group;
  const int group = (vector * S::kValueVector + eight * kGroup % S::kValueVector) / kGroup;
  const int turn = Meeting<S>::over(group, meeting.of_block), rank = group - turn * blocks;
#pragma unroll
  for (int h = 0; h < S::kColumns; ++h) {
    const int column = S::kColumns * lane.member + h;
    if (column >= heads) continue;
    const int place = (slot * Meeting<S>::groups_of_block(blocks) + turn) * heads + column;
    float values[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int element = eight * kGroup + i, own = element % (2 * S::kPartBlocks);
      const int block = element / (2 * S::kPartBlocks) * S::kPartBlocks + own % S::kPartBlocks;
      values[i] = running.out[block][own / S::kPartBlocks * 2 + h];
      if constexpr (S::kOffset)
        values[i] = values[i] / S::Codes::unit_of(element % S::kPairs) - S::Codes::kOffset * running.out[S::kBlocks][h];
    }
    float* target = &meeting.out[place * kGroup];
    give(meeting, target, rank, make_float4(values[0], values[1], values[2], values[3]));
    give(meeting, target + 4, rank, make_float4(values[4], values[5], values[6], values[7]));
  }
}

template <typename S>
__device__ void give_all(const Meeting<S>& meeting, Running<S>& running, Lane lane, int heads) {
  const int slot = blockIdx.x * S::kWarps + threadIdx.x / 32;
#pragma unroll
  for (int h = 0; h < S::kColumns; ++h) {
    for (int offset = 4; offset < 32; offset *= 2) running.sum[h] += __shfl_xor_sync(~0u, running.sum[h], offset);
    const int column = S::kColumns * lane.member + h;
    if (column >= heads || lane.group >= gridDim.x) continue;
    const int place = slot * heads + column;
    give(meeting, &meeting.maximum[place], lane.group, running.maximum[h]);
    give(meeting, &meeting.sum[place], lane.group, running.sum[h]);
  }
#pragma unroll
  for (int i = 0; i < 2 * S::kBlocks / kGroup; ++i) give_eight<S>(meeting, running, lane, heads, i);
}

// The weight of a row's head's sink, relative to 2^maximum.
template <typename T>
__device__ float sink_weight(const DecodeAttentionArgs& args, int head, float maximum) {
  const float sink = to_float(static_cast<const T*>(args.sinks)[head]);
  return exp2_fast(sink * kLog2E - maximum);
}

// Merges the block's elements of the result from all warps' contributions. A thread has four elements: the weights of
// warps are the same for all of a head.
template <typename S>
__device__ void merge(const DecodeAttentionArgs& args, const Meeting<S>& meeting, const Columns& columns) {
  using T = typename S::T;
  constexpr int kFours = kGroup / 4;
  const int heads = columns.count;
  const int blocks = gridDim.x, slots = blocks * S::kWarps, groups = Meeting<S>::groups_of_block(blocks);
  float v_scale = 1.f;
  if constexpr (S::Codes::kHeadScales)
    v_scale = __ldg(static_cast<const float*>(args.cache.v_scales) + columns.kv_head);
  for (int i = threadIdx.x; i < groups * heads * kFours; i += S::kThreads) {
    const int turn = Meeting<S>::over(i / kFours, meeting.of_head), head = i / kFours - turn * heads;
    const int d = (turn * blocks + blockIdx.x) * kGroup + i % kFours * 4;
    if (d >= args.cache.head_dim) continue;
    float maximum = kNothing, sum = 0.f, out[4] = {};
#pragma unroll 8
    for (int slot = 0; slot < slots; ++slot) maximum = fmaxf(maximum, meeting.maximum[slot * heads + head]);
#pragma unroll 4
    for (int slot = 0; slot < slots; ++slot) {
      const float weight = exp2_fast(meeting.maximum[slot * heads + head] - maximum);
      const float4 part = reinterpret_cast<const float4*>(meeting.out)[slot * groups * heads * kFours + i];
      sum = fmaf(weight, meeting.sum[slot * heads + head], sum);
      out[0] = fmaf(weight, part.x, out[0]), out[1] = fmaf(weight, part.y, out[1]);
      out[2] = fmaf(weight, part.z, out[2]), out[3] = fmaf(weight, part.w, out[3]);
    }
    const int own_head = columns.own_head_of(args, head);
    if (args.sinks != nullptr) sum += sink_weight<T>(args, own_head, maximum);
    const int row = static_cast<int>(columns.first_row) + columns.row_of(args, head);
    const int place = own_head * args.cache.head_dim + d;
    const int64_t index = input_index(args.out_panel, row, args.heads * args.cache.head_dim, place);
    const float factor = v_scale / sum;
    alignas(8) T rounded[4];
    for (int e = 0; e < 4; ++e) rounded[e] = from_float<T>(out[e] * factor);
    *reinterpret_cast<uint2*>(static_cast<T*>(args.out) + index) = *reinterpret_cast<const uint2*>(rounded);
  }
}

// The heads of a row that are new, where the kernel appends them: each block makes the q of its columns, and k and v of
// the new position if one of its warps multiplies them; the block of a key head's first columns also stores those.
template <typename S>
struct NewHeads {
  using T = typename S::T;
  using Codes = typename S::Codes;
  static constexpr int kRowBytes = S::kDim * S::kBits / 8, kPairs = (S::kDim + 63) / 64;
  static constexpr int kPitch = S::kDim + 32;  // of q: 64 bytes more than a multiple of 128, as wna16_gemv's x
  static constexpr int kRounds = (kHeads + 2 + S::kWarps - 1) / S::kWarps;  // heads that a warp makes

  // In shared memory.
  struct Memory {
    alignas(16) T q[kHeads][kPitch];
    alignas(16) char k[kRowBytes], v[kRowBytes];
    T scales[2];  // of k and v
  };
  static constexpr size_t kBytes = sizeof(Memory);

  Memory& memory;
  const DecodeAttentionArgs& args;
  const Span& span;
  const Columns& columns;
  bool owns;  // the block multiplies the new position
  Head<kPairs> turns, q_norm, k_norm;

  // Reads constants and inputs of the step, which no running kernel writes.
  __device__ NewHeads(float* memory, const DecodeAttentionArgs& args, const Span& span, const Columns& columns)
      : memory(*reinterpret_cast<Memory*>(memory)), args(args), span(span), columns(columns) {
    const int half = span.head_dim / 2, lane = threadIdx.x % 32;
    owns = span.settled / kRows % (gridDim.x * S::kWarps) / S::kWarps == blockIdx.x;
    turns = read_turns<kPairs>(args.made, static_cast<int>(columns.first_row), half, lane);
    if (args.made.q_norm != nullptr) q_norm.read(static_cast<const T*>(args.made.q_norm), half, lane);
    if (args.made.k_norm != nullptr) k_norm.read(static_cast<const T*>(args.made.k_norm), half, lane);
  }

  // The head `index` of the block: a column, or behind them k and v.
  __device__ int64_t source_of(int index) const {
    const int kv_heads = args.cache.kv_heads;
    const int64_t first = columns.first_row * (args.heads + 2 * kv_heads);
    if (index < columns.count) return first + columns.kv_head * columns.group + columns.first + index;
    return first + args.heads + (index - columns.count) * kv_heads + columns.kv_head;
  }

  // Fills the block's memory, which holds once its threads have met. A warp's sums over its lanes, of all its heads,
  // go on side by side.
  __device__ void make() {
    const int half = span.head_dim / 2, lane = threadIdx.x % 32, count = columns.count + (owns ? 2 : 0);
    Head<kPairs> heads[kRounds];
    float squares[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int index = min(static_cast<int>(threadIdx.x) / 32 + i * S::kWarps, count - 1);
      heads[i].read(static_cast<const T*>(args.made.qkv) + source_of(index) * span.head_dim, half, lane);
    }
#pragma unroll
    for (int i = 0; i < kRounds; ++i) squares[i] = squares_of(heads[i]);
    if (args.made.q_norm != nullptr || args.made.k_norm != nullptr || args.made.v_normed) sum_over_lanes(squares);
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int index = threadIdx.x / 32 + i * S::kWarps;
      if (index < count) finish(heads[i], index, squares[i], half, lane);
    }
  }

  __device__ static void sum_over_lanes(float (&values)[kRounds]) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      for (float& value : values) value += __shfl_xor_sync(~0u, value, offset);
  }

  __device__ void finish(Head<kPairs>& head, int index, float squares, int half, int lane) {
    const NewHeadsArgs& made = args.made;
    if (index < columns.count) {
      finish_head<Codes>(head, made.q_norm != nullptr, q_norm, squares, made.norm_eps, turns, half, lane);
      return store_codes<T>(SameCache{}, head, {memory.q[index], nullptr, 0, 0}, half, lane);
    }
    const bool is_k = index == columns.count;
    if (is_k) finish_head<Codes>(head, made.k_norm != nullptr, k_norm, squares, made.norm_eps, turns, half, lane);
    else if (made.v_normed) norm_head(head, Head<kPairs>::ones(), squares, made.norm_eps, half);
    void* scales = &memory.scales[is_k ? 0 : 1];
    if constexpr (Codes::kHeadScales) scales = is_k ? args.cache.k_scales : args.cache.v_scales;
    store_codes<T>(Codes{}, head, {is_k ? memory.k : memory.v, scales, 0, columns.kv_head}, half, lane);
  }

  // Stores the new position, once the block's threads have met.
  __device__ void append() const {
    if (!owns || columns.first > 0) return;
    const int vectors = span.head_dim * S::kBits / 128, row = span.settled;
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * vectors; i += S::kThreads) {
      const bool is_k = i < vectors;
      const int vector = is_k ? i : i - vectors;
      const char* target = (is_k ? span.k : span.v) + span.bytes_to(row);
      reinterpret_cast<uint4*>(const_cast<char*>(target))[vector] =
          reinterpret_cast<const uint4*>(is_k ? memory.k : memory.v)[vector];
    }
    if constexpr (Codes::kTokenScales) {
      const void* scales = threadIdx.x == 0 ? span.k_scales : span.v_scales;
      if (threadIdx.x < 2)
        const_cast<T*>(static_cast<const T*>(scales))[span.scales_to(row)] = memory.scales[threadIdx.x];
    }
  }

  __device__ void read(QueriesOf<S>& q, Lane lane) const {
    const T* head = memory.q[q.column_of(lane)];
    q.fill(span, columns, lane, [&](int d) { return *reinterpret_cast<const uint4*>(head + d); });
  }

  // True if the chunk at `first` has the new position.
  __device__ bool in(int first) const { return span.settled >= first && span.settled < first + kRows; }

  __device__ void take_key(Chunk<S>& chunk, Lane lane, int first) const {
    if (!in(first)) return;
    chunk.fill_keys(span, lane, first, span.settled, span.length, 0,
                    [&](int, int i) { return reinterpret_cast<const uint4*>(memory.k)[4 * i + lane.member]; });
    if constexpr (Codes::kTokenScales) {
      const int place = threadIdx.x % 32;
      if (first + place % kRows != span.settled) return;
      chunk.scale = memory.scales[place / kRows];
    }
  }
  __device__ void take_value(Chunk<S>& chunk, Lane lane, int first) const {
    using Vector = typename S::ValueVector;
    if (!in(first)) return;
    chunk.fill_values(span, lane, first, span.settled, span.length, 0,
                      [&](int, int i) { return reinterpret_cast<const Vector*>(memory.v)[8 * i + lane.group]; });
  }
};

// Heads that are in the cache already.
template <typename S>
struct OldHeads {
  static constexpr size_t kBytes = 0;
  const DecodeAttentionArgs& args;
  const Span& span;
  const Columns& columns;

  __device__ OldHeads(float*, const DecodeAttentionArgs& args, const Span& span, const Columns& columns)
      : args(args), span(span), columns(columns) {}
  __device__ void make() {}
  __device__ void append() const {}
  __device__ void read(QueriesOf<S>& q, Lane lane) const { read_queries<S>(q, args, span, columns, lane); }
  __device__ void take_key(Chunk<S>&, Lane, int) const {}
  __device__ void take_value(Chunk<S>&, Lane, int) const {}
};

// Wide heads that are in the cache already: the block copies its queries to shared memory.
template <typename S>
struct WideHeads {
  using T = typename S::T;
  static constexpr int kPitch = S::kDim + 32;  // 64 bytes more than a multiple of 128
  struct Memory {
    alignas(16) T q[kHeads][kPitch];
  };
  static constexpr size_t kBytes = sizeof(Memory);

  Memory& memory;
  const DecodeAttentionArgs& args;
  const Span& span;
  const Columns& columns;

  __device__ WideHeads(float* memory, const DecodeAttentionArgs& args, const Span& span, const Columns& columns)
      : memory(*reinterpret_cast<Memory*>(memory)), args(args), span(span), columns(columns) {}
  // Fills the block's memory, which holds once its threads have met.
  __device__ void make() {
    constexpr int kVectors = S::kDim / 8;
    for (int i = threadIdx.x; i < columns.count * kVectors; i += S::kThreads) {
      const int column = i / kVectors, d = i % kVectors * 8;
      const T* head = static_cast<const T*>(args.q) + columns.head_of(args, column) * S::kDim;
      *reinterpret_cast<uint4*>(&memory.q[column][d]) = __ldcg(reinterpret_cast<const uint4*>(head + d));
    }
  }
  __device__ void append() const {}
  // Columns without a head take the last one's: nobody reads their sums.
  __device__ void read(SharedQueries<S>& q, Lane lane) const {
    q.head = memory.q[min(lane.group, columns.count - 1)];
    q.scale = span.scale;
  }
  __device__ void take_key(Chunk<S>&, Lane, int) const {}
  __device__ void take_value(Chunk<S>&, Lane, int) const {}
};

template <typename S>
using ReadHeads = std::conditional_t<(S::kParts > 1), WideHeads<S>, OldHeads<S>>;

template <typename S>
using Heads = std::conditional_t<S::kAppends, NewHeads<S>, ReadHeads<S>>;

// Rows [from, to) of a chunk, except values that are read behind the products with its keys.
template <typename S>
__device__ void read_ahead(const Span& span, Lane lane, const Cursor<S>& at, int first, int from, int to,
                           Chunk<S>& chunk) {
  chunk.read_keys(span, lane, at, first, from, to);
  if (S::kAhead) chunk.read_values(span, lane, at, first, from, to);
  chunk.read_scales(at, first, from, to);
}

// Adds the chunks at `first` and every `step` rows on, and reads those after them into their registers. `at` moves from
// `first` to the next.
template <typename S>
__device__ void attend_chunks(const DecodeAttentionArgs& args, const Span& span, Lane lane, const Columns& columns,
                              const Heads<S>& heads, const QueriesOf<S>& q, int first, int step, Cursor<S>& at,
                              Chunk<S> (&chunks)[S::kTogether], Running<S>& running) {
  Scores<S> scores;
  const int next = first + S::kTogether * step;
  const Cursor<S> here = at;
  at = at.after(span, S::kTogether * step);
  at.hide();
#pragma unroll
  for (int c = 0; c < S::kTogether; ++c) {
    heads.take_key(chunks[c], lane, first + c * step);
    multiply_keys<S>(chunks[c], q, lane, 0, scores[c]);
#pragma unroll
    for (int part = 1; part < S::kParts; ++part) {
      chunks[c].read_keys(span, lane, here, first, 0, span.readable, part);
      multiply_keys<S>(chunks[c], q, lane, part, scores[c]);
    }
    if (S::kAhead) chunks[c].read_keys(span, lane, at.after(span, c * step), next + c * step, 0, span.readable);
    if (!S::kAhead && S::kClears) chunks[c].clear_values();
    if (!S::kAhead) chunks[c].read_values(span, lane, here, first, 0, span.readable);
  }
  weigh<S>(args, span, columns, q, chunks, lane, first, step, scores, running);
#pragma unroll
  for (int c = 0; c < S::kTogether; ++c) {
    const Cursor<S> later = at.after(span, c * step);
    chunks[c].read_scales(later, next + c * step, 0, span.readable);
    heads.take_value(chunks[c], lane, first + c * step);
    multiply_values<S>(chunks[c], 0, scores[c], running);
#pragma unroll
    for (int part = 1; part < S::kParts; ++part) {
      if (S::kClears) chunks[c].clear_values();
      chunks[c].read_values(span, lane, here, first, 0, span.readable, part);
      multiply_values<S>(chunks[c], part, scores[c], running);
    }
    if (S::kAhead) {
      if (S::kClears) chunks[c].clear_values();
      chunks[c].read_values(span, lane, later, next + c * step, 0, span.readable);
    } else {
      chunks[c].clear_keys();  // else their registers are taken throughout: rows past the end keep an earlier row's
      chunks[c].read_keys(span, lane, later, next, 0, span.readable);
    }
  }
}

// The loop over the warp's chunks: every `step` rows from `first` on.
template <typename S>
__device__ void attend_span(const DecodeAttentionArgs& args, const Span& span, Lane lane, const Columns& columns,
                            Heads<S>& heads, Running<S>& running) {
  const int step = gridDim.x * S::kWarps * kRows;
  int first = (blockIdx.x * S::kWarps + threadIdx.x / 32) * kRows;
  Chunk<S> chunks[S::kTogether];
  Cursor<S> at(span, lane, first);
#pragma unroll
  for (int c = 0; c < S::kTogether; ++c) {
    chunks[c].clear_keys(), chunks[c].clear_values();
    chunks[c].scale = from_float<typename S::T>(0.f);
    read_ahead<S>(span, lane, at.after(span, c * step), first + c * step, 0, span.settled, chunks[c]);
  }
  wait_for_previous_kernel();
  stamp(Stage::kWaited);
#pragma unroll
  for (int c = 0; !S::kAppends && c < S::kTogether; ++c)
    read_ahead<S>(span, lane, at.after(span, c * step), first + c * step, span.settled, span.length, chunks[c]);
  heads.make();
  if (Heads<S>::kBytes > 0) __syncthreads();
  QueriesOf<S> q;
  heads.read(q, lane);
  for (; first < span.length; first += S::kTogether * step)
    attend_chunks<S>(args, span, lane, columns, heads, q, first, step, at, chunks, running);
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::kMinBlocks)
    decode_attention_kernel(const __grid_constant__ DecodeAttentionArgs args) {
  LOWBIT_DYNAMIC_SHARED(float, memory);
  const Columns columns(args);
  const Meeting<S> meeting(memory + Heads<S>::kBytes / sizeof(float), columns.most, columns.count);
  const Lane lane;
  stamp(Stage::kBegun);
  allow_next_kernel();
  const bool cluster = gridDim.x > 1;
  if (cluster) {
    if (threadIdx.x == 0) meeting.expect(columns.count);
    cluster_arrive_relaxed();  // other blocks may write to a block's memory once it has started
  }

  // positions and starts are inputs of the step, not of the previous kernel: they are read before it has finished
  const Span span = span_of<S>(args, columns.kv_head);
  Heads<S> heads(memory, args, span, columns);
  Running<S> running;
  attend_span<S>(args, span, lane, columns, heads, running);

  stamp(Stage::kComputed);
  if (cluster) cluster_wait();
  give_all<S>(meeting, running, lane, columns.count);
  heads.append();  // while these are on their way
  if (cluster) wait_for_messages(meeting.sent);
  else __syncthreads();
  merge<S>(args, meeting, columns);
  leave_stamps(args.heads, args.cache.head_dim);
}

// ---- launches ----

template <typename S>
cudaError_t launch_shape(const DecodeAttentionArgs& args, const DecodeAttentionLaunch& launch, cudaStream_t stream) {
  if (launch.splits < 1 || launch.splits > S::kMostSplits) return cudaErrorInvalidConfiguration;
  if (args.columns < 1 || args.columns > kHeads) return cudaErrorInvalidValue;
  if (args.adjacent < 1 || args.m % args.adjacent != 0 || (args.adjacent > 1 && (args.window > 0 || S::kAppends)))
    return cudaErrorInvalidValue;
  const int columns = args.heads / args.cache.kv_heads * args.adjacent;
  const unsigned chunks = (columns + args.columns - 1) / args.columns;
  const size_t bytes = Heads<S>::kBytes + Meeting<S>::bytes(launch.splits, std::min(args.columns, columns));
  const LaunchPlan plan = {
      .device = launch.device,
      .stream = stream,
      .blocks = dim3(launch.splits, args.cache.kv_heads * chunks, args.m / args.adjacent),
      .threads = dim3(S::kThreads),
      .shared_bytes = std::max<size_t>(bytes, launch.least_shared),
      .cluster = launch.splits > 1 ? launch.splits : 0,
      .dependent = launch.dependent,
  };
  return launch_kernel(decode_attention_kernel<S>, plan, args);
}

// A block of many warps, with code of its own for few columns where there is one.
template <typename T, typename Codes, bool kAppends, int kWarps>
cudaError_t launch_warps(const DecodeAttentionArgs& args, const DecodeAttentionLaunch& launch, cudaStream_t stream) {
  if constexpr (Codes::kByteQueries) {
    if (args.heads / args.cache.kv_heads * args.adjacent <= kHeads / 2)
      return launch_shape<Shape<T, Codes, 128, kAppends, kWarps, true>>(args, launch, stream);
  }
  return launch_shape<Shape<T, Codes, 128, kAppends, kWarps>>(args, launch, stream);
}

}  // namespace

template <typename T, typename Codes, bool kAppends>
cudaError_t launch_heads(const DecodeAttentionArgs& args, const DecodeAttentionLaunch& launch, cudaStream_t stream) {
  constexpr bool kIsSame = std::is_same_v<Codes, SameCache>;
  const int head_dim = args.cache.head_dim;
  if constexpr (!kAppends && !Codes::kByteQueries)
    if (head_dim == 512 && launch.warps == 4) return launch_shape<Shape<T, Codes, 512, false>>(args, launch, stream);
  if (head_dim % (128 / Codes::kBits) != 0 || head_dim > 256) return cudaErrorInvalidValue;
  if constexpr (kIsSame) {
    if (head_dim <= 64 && launch.warps == 4) return launch_shape<Shape<T, Codes, 64, kAppends>>(args, launch, stream);
  } else {
    if (head_dim <= 128 && launch.warps == 8) return launch_warps<T, Codes, kAppends, 8>(args, launch, stream);
    if (head_dim <= 128 && launch.warps == 16) return launch_warps<T, Codes, kAppends, 16>(args, launch, stream);
  }
  if (launch.warps != 4) return cudaErrorInvalidConfiguration;
  if (head_dim <= 128) return launch_shape<Shape<T, Codes, 128, kAppends>>(args, launch, stream);
  return launch_shape<Shape<T, Codes, 256, kAppends>>(args, launch, stream);
}

template <typename T, typename Codes>
cudaError_t launch_decode_attention(const DecodeAttentionArgs& args, const DecodeAttentionLaunch& launch,
                                    cudaStream_t stream) {
  if (args.q != nullptr) return launch_heads<T, Codes, false>(args, launch, stream);
  const int head_dim = args.cache.head_dim;
  if (Codes::kRotated && (head_dim < 64 || (head_dim & (head_dim - 1)) != 0)) return cudaErrorInvalidValue;
  return launch_heads<T, Codes, true>(args, launch, stream);
}

const Kernel append_heads("append_heads", {name_of<LOWBIT_T>, LOWBIT_CACHE::kName},
                          launch_append_heads<LOWBIT_T, LOWBIT_CACHE>);
const Kernel decode_attention("decode_attention", {name_of<LOWBIT_T>, LOWBIT_CACHE::kName},
                              launch_decode_attention<LOWBIT_T, LOWBIT_CACHE>);

}  // namespace lowbit
