// Exact conversion of codes to half precision: the result is code - zero, an integer that the type represents without
// rounding. So the only rounding of a product is the tensor core's float32 accumulation.
//
// A code's bits are placed under a constant exponent: 0x6400 | q is the float16 number 1024 + q, 0x4300 | q the
// bfloat16 number 128 + q. Subtracting (1024 + zero) is then exact. The trick is from Kim et al., "Who says elephants
// can't run" (2022); the order of nibbles in a word is ours, and lets one shift serve eight codes.
#pragma once

#include "ptx.cuh"

namespace lowbit {

// Converts eight consecutive codes of a row to four registers of two values each, first code in the low half. kWords:
// number of 32-bit words with the eight codes. Zeros: the row's zero point in the form that `expand` needs.
template <typename T, int kBits>
struct Dequant;

__device__ inline uint32_t bits_of(__half2 value) { return *reinterpret_cast<uint32_t*>(&value); }
__device__ inline uint32_t bits_of(__nv_bfloat162 value) { return *reinterpret_cast<uint32_t*>(&value); }
__device__ inline __half2 as_half2(uint32_t bits) { return *reinterpret_cast<__half2*>(&bits); }
__device__ inline __nv_bfloat162 as_bfloat162(uint32_t bits) { return *reinterpret_cast<__nv_bfloat162*>(&bits); }

// Nibble order in a word, lowest first: codes 0, 2, 4, 6, 1, 3, 5, 7.
template <>
struct Dequant<__half, 4> {
  static constexpr int kWords = 1;
  struct Zeros {
    __half2 low, high;  // 1024 + zero; -(64 + zero)
  };
  __device__ static Zeros zeros_of(uint32_t zero) {
    return {as_half2(0x64006400u | zero * 0x10001u), as_half2(0xd400d400u | zero * 0x100010u)};
  }
  __device__ static void expand(const uint32_t* words, const Zeros& zeros, uint32_t (&values)[4]) {
    const __half2 sixteenth = __float2half2_rn(0.0625f);
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = words[0] >> (8 * i);
      const __half2 low = as_half2(and_or(word, 0x000f000fu, 0x64006400u));
      const __half2 high = as_half2(and_or(word, 0x00f000f0u, 0x64006400u));
      values[2 * i] = bits_of(__hsub2(low, zeros.low));
      values[2 * i + 1] = bits_of(__hfma2(high, sixteenth, zeros.high));
    }
  }
};

// bfloat16 has only 7 bits of mantissa: the high nibbles must be shifted down first.
template <>
struct Dequant<__nv_bfloat16, 4> {
  static constexpr int kWords = 1;
  struct Zeros {
    __nv_bfloat162 zero;  // -(128 + zero)
  };
  __device__ static Zeros zeros_of(uint32_t zero) { return {as_bfloat162(0xc300c300u | zero * 0x10001u)}; }
  __device__ static void expand(const uint32_t* words, const Zeros& zeros, uint32_t (&values)[4]) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = and_or(words[0] >> (4 * i), 0x000f000fu, 0x43004300u);
      values[i] = bits_of(__hadd2(as_bfloat162(low), zeros.zero));
    }
  }
};

// Byte order in the two words: codes 0, 1, ..., 7.
template <>
struct Dequant<__half, 8> {
  static constexpr int kWords = 2;
  struct Zeros {
    __half2 zero;  // 1024 + zero
  };
  __device__ static Zeros zeros_of(uint32_t zero) { return {as_half2(0x64006400u | zero * 0x10001u)}; }
  __device__ static void expand(const uint32_t* words, const Zeros& zeros, uint32_t (&values)[4]) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = __byte_perm(words[i / 2], 0x64646464u, i % 2 ? 0x4342 : 0x4140);
      values[i] = bits_of(__hsub2(as_half2(pair), zeros.zero));
    }
  }
};

// An 8-bit code does not fit into a bfloat16 mantissa, but code - zero (at most 8 significant bits) is a bfloat16
// number. So it goes through float32 (2^23 + q, minus 2^23 + zero), and the upper halves are kept without loss.
template <>
struct Dequant<__nv_bfloat16, 8> {
  static constexpr int kWords = 2;
  struct Zeros {
    float zero;  // 2^23 + zero
  };
  __device__ static Zeros zeros_of(uint32_t zero) { return {__uint_as_float(0x4b000000u | zero)}; }
  __device__ static void expand(const uint32_t* words, const Zeros& zeros, uint32_t (&values)[4]) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = words[i / 2];
      const uint32_t first = __byte_perm(word, 0x4b000000u, i % 2 ? 0x7442 : 0x7440);
      const uint32_t second = __byte_perm(word, 0x4b000000u, i % 2 ? 0x7443 : 0x7441);
      values[i] = __byte_perm(__float_as_uint(__uint_as_float(first) - zeros.zero),
                              __float_as_uint(__uint_as_float(second) - zeros.zero), 0x7632);
    }
  }
};

// The products of two pairs of halves.
template <typename T>
__device__ inline uint32_t multiply_halves(uint32_t a, uint32_t b);
template <>
__device__ inline uint32_t multiply_halves<__half>(uint32_t a, uint32_t b) {
  return bits_of(__hmul2(as_half2(a), as_half2(b)));
}
template <>
__device__ inline uint32_t multiply_halves<__nv_bfloat16>(uint32_t a, uint32_t b) {
  return bits_of(__hmul2(as_bfloat162(a), as_bfloat162(b)));
}

__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ inline T from_float(float value);
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Two floats as a pair, the first in the low half.
template <typename T>
__device__ inline uint32_t pair_of(float low, float high);
template <>
__device__ inline uint32_t pair_of<__half>(float low, float high) {
  return bits_of(__floats2half2_rn(low, high));
}
template <>
__device__ inline uint32_t pair_of<__nv_bfloat16>(float low, float high) {
  return bits_of(__floats2bfloat162_rn(low, high));
}

}  // namespace lowbit
