// The number types of a key-value cache: how a head is stored, and how its codes are widened for the tensor cores.
//
//   kName        in the kernels' names
//   kBits        of an element
//   kPairs       pairs of adjacent elements in a word
//   kTokenScales a scale in T for each token and head
//   kSignedScales such a scale may be negative
//   kHeadScales  a float32 scale for each head, of all tokens
//   kRotated     keys and queries are turned by a Hadamard matrix, which leaves their products as they are
//   kTogether    chunks that a warp takes at a time: of few bits each has few bytes and few instructions
//   kOffset      the number that codes stand above their values in products, or 0. Such codes of values come as
//                subnormal halves: element i of a word times unit_of(i)
//   kByteQueries keys are multiplied as bytes, with queries in two bytes each
//   Product<T>   the type of the products: codes are exact in float16, and queries are then converted to it
//   widen        the pairs of a word, in order
//   pair_rows    pairs of element i of one row with element i of another, for the elements of a word of each
#pragma once

#include <cuda_fp8.h>

#include "dequant.cuh"

namespace lowbit {

// Elements in T itself.
struct SameCache {
  static constexpr char kName[] = "same";
  static constexpr int kBits = 16, kPairs = 1, kTogether = 1, kOffset = 0;
  static constexpr bool kTokenScales = false, kSignedScales = false, kHeadScales = false, kRotated = false;
  static constexpr bool kByteQueries = false;
  template <typename T>
  using Product = T;

  __device__ static void widen(uint32_t word, uint32_t (&pairs)[kPairs]) { pairs[0] = word; }
  __device__ static void pair_rows(uint32_t first, uint32_t second, uint32_t (&pairs)[2 * kPairs]) {
    pairs[0] = __byte_perm(first, second, 0x5410);
    pairs[1] = __byte_perm(first, second, 0x7632);
  }
};

// The common part of caches of 8 bits: words of four bytes.
template <typename Cache>
struct ByteCache {
  static constexpr int kBits = 8, kPairs = 2, kTogether = 1, kOffset = 0;
  static constexpr bool kSignedScales = false, kRotated = false, kByteQueries = false;
  template <typename T>
  using Product = __half;

  __device__ static void pair_rows(uint32_t first, uint32_t second, uint32_t (&pairs)[2 * kPairs]) {
    uint32_t low[kPairs], high[kPairs];
    Cache::widen(__byte_perm(first, second, 0x5140), low);
    Cache::widen(__byte_perm(first, second, 0x7362), high);
    pairs[0] = low[0], pairs[1] = low[1], pairs[2] = high[0], pairs[3] = high[1];
  }
};

// int8 by a head's largest magnitude.
struct Int8Cache : ByteCache<Int8Cache> {
  static constexpr char kName[] = "int8";
  static constexpr bool kTokenScales = true, kHeadScales = false;

  // 0x6400 | u is 1024 + u, and u is the code + 128.
  __device__ static void widen(uint32_t word, uint32_t (&pairs)[kPairs]) {
    const __half2 bias = as_half2(0x64806480u);
    word ^= 0x80808080u;
    pairs[0] = bits_of(__hsub2(as_half2(__byte_perm(word, 0x64646464u, 0x4140)), bias));
    pairs[1] = bits_of(__hsub2(as_half2(__byte_perm(word, 0x64646464u, 0x4342)), bias));
  }
};

// e4m3 by calibrated scales.
struct Fp8Cache : ByteCache<Fp8Cache> {
  static constexpr char kName[] = "fp8";
  static constexpr bool kTokenScales = false, kHeadScales = true;

  __device__ static void widen(uint32_t word, uint32_t (&pairs)[kPairs]) {
    halves_of_e4m3(word, pairs);
  }
};

// int4 by a head's number of largest magnitude, which becomes -8: scales have signs. Eight elements of a word, from its
// lowest nibble: 0, 2, 4, 6, 1, 3, 5, 7. Nibbles are the code + 8. A mask makes them subnormal halves, half of them 16
// times as large as the others.
struct Int4Cache {
  static constexpr char kName[] = "int4";
  static constexpr int kBits = 4, kPairs = 4, kTogether = 2, kOffset = 8;
  static constexpr bool kTokenScales = true, kSignedScales = true, kHeadScales = false, kRotated = true;
  static constexpr bool kByteQueries = true;
  static constexpr int kHighUnit = 16;            // of a high nibble as a byte
  static constexpr float kMostQuery = 127 * 257;  // of a query in two bytes
  template <typename T>
  using Product = __half;

  __device__ static void widen(uint32_t word, uint32_t (&pairs)[kPairs]) {
    for (int i = 0; i < 2; ++i) {
      pairs[2 * i] = word >> (8 * i) & 0x000f000fu;
      pairs[2 * i + 1] = word >> (8 * i) & 0x00f000f0u;
    }
  }
  __device__ static void pair_rows(uint32_t first, uint32_t second, uint32_t (&pairs)[2 * kPairs]) {
    uint32_t even[kPairs], odd[kPairs];
    widen(__byte_perm(first, second, 0x5410), even);
    widen(__byte_perm(first, second, 0x7632), odd);
    for (int i = 0; i < kPairs; ++i) pairs[2 * i] = even[i], pairs[2 * i + 1] = odd[i];
  }
  __host__ __device__ static constexpr float unit_of(int i) { return i / 2 % 2 ? 0x1p-20f : 0x1p-24f; }
  // The nibbles of a word as bytes without a sign: the low ones, and 16 times the high ones.
  __device__ static uint32_t low_bytes(uint32_t word) { return word & 0x0f0f0f0fu; }
  __device__ static uint32_t high_bytes(uint32_t word) { return word & 0xf0f0f0f0u; }
  // The element of a word that is byte j of its low (half 0) or high nibbles.
  __host__ __device__ static constexpr int element_of_byte(int half, int j) { return j % 2 * 4 + j / 2 + 2 * half; }
  // The place of element i of a word.
  __host__ __device__ static constexpr int shift_of(int i) { return (i % 2 * 4 + i / 2) * 4; }
};

}  // namespace lowbit
