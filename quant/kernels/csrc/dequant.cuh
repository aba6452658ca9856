// Exact conversion of codes to half precision: the result is code - zero, an integer that the type represents without
// rounding, or a float's value times a power of two. So the only rounding of a product is the tensor core's float32
// accumulation.
//
// A code's bits are placed under a constant exponent: 0x6400 | q is the float16 number 1024 + q, 0x4300 | q the
// bfloat16 number 128 + q. Subtracting (1024 + zero) is then exact. The trick is from Kim et al., "Who says elephants
// can't run" (2022); the order of nibbles in a word is ours, and lets one shift serve eight codes.
#pragma once

#include <type_traits>

#include "ptx.cuh"

namespace lowbit {

// The number types of codes. kName is the variant's in a kernel's name. A float has no zero points, and its weights
// have a float32 factor per row, which takes back the powers of two of expansion. kByteScales: its scales are bytes, of
// groups of 16 or 32, and are multiplied with the values exactly. kStream: integers of a width that does not divide a
// word evenly, in the order of Stream.
template <int kBits_, bool kFloat_ = false, bool kByteScales_ = false>
struct Number {
  static constexpr int kBits = kBits_;
  static constexpr bool kFloat = kFloat_, kByteScales = kByteScales_;
  static constexpr bool kStream = kBits != 4 && kBits != 8;
  static constexpr char kName[] = {kFloat ? 'f' : char('0' + kBits), kFloat ? 'p' : '\0', char('0' + kBits), '\0'};
};
using Int2 = Number<2>;
using Int3 = Number<3>;
using Int4 = Number<4>;
using Int5 = Number<5>;
using Int6 = Number<6>;
using Int7 = Number<7>;
using Int8 = Number<8>;
using Fp4 = Number<4, true, true>;  // e2m1
using Fp8 = Number<8, true>;        // e4m3

// Converts eight consecutive codes of a row to four registers of two values each, first code in the low half. kWords:
// number of 32-bit words with the eight codes. Zeros: the row's zero point in the form that `expand` needs.
template <typename T, typename Number>
struct Dequant;

__device__ inline uint32_t bits_of(__half2 value) { return *reinterpret_cast<uint32_t*>(&value); }
__device__ inline uint32_t bits_of(__nv_bfloat162 value) { return *reinterpret_cast<uint32_t*>(&value); }
__device__ inline __half2 as_half2(uint32_t bits) { return *reinterpret_cast<__half2*>(&bits); }
__device__ inline __nv_bfloat162 as_bfloat162(uint32_t bits) { return *reinterpret_cast<__nv_bfloat162*>(&bits); }

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

// Nibble order in a word, lowest first: codes 0, 2, 4, 6, 1, 3, 5, 7.
template <>
struct Dequant<__half, Int4> {
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
struct Dequant<__nv_bfloat16, Int4> {
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
struct Dequant<__half, Int8> {
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
struct Dequant<__nv_bfloat16, Int8> {
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

// Integers of 2, 3, 5, 6 or 7 bits: kBits words hold the codes of two blocks of 32 inputs of both rows of a lane, that
// is 16 pairs of adjacent inputs: of block, row, then input. Each half of a word has 16 / kBits codes, lowest first,
// one of each pair. The bits that are left over hold one bit of the last pairs each: word j has bit j.
//
// A pair's place in the mantissa, under a constant exponent, adds a power of two to its codes: with as many bits as
// there are above its lowest. kNear: at most 2^7, so that sums of products stay exact enough for the powers to be taken
// from them instead, in places that are those of the same pair of the other block.
template <typename T, int kBits, bool kNear = false>
struct Stream {
  static constexpr bool kIsHalf = std::is_same_v<T, __half>;
  static constexpr int kMantissa = kIsHalf ? 10 : 7, kBias = kIsHalf ? 15 : 127;
  static constexpr int kFields = 16 / kBits;                   // of a half of a word
  static constexpr int kSpare = 16 - kFields * kBits;          // pairs in the bits that are left over
  static constexpr int kInPlace = (kNear ? 7 : kMantissa) / kBits;  // codes of a half that one shift places
  static constexpr int kHighest = kMantissa - kInPlace * kBits;     // the lowest place may be there, or at a field
  static constexpr int kLowest = !kNear ? 0 : kHighest - kHighest % kBits < kMantissa - 7 ? kHighest
                                                                                        : kHighest - kHighest % kBits;
  static constexpr int kUpper = kIsHalf ? 0xd6 : 0x4a;  // near, of 3 bits: pairs in the upper place, for two shifts
  static constexpr uint32_t kTwice = 0x10001;

  __device__ static constexpr int place_of(int pair) {
    if (kNear && kBits == 3) return kLowest + (kUpper >> pair % 8 & 1) * kBits;
    const int field = kNear ? pair % 8 + kInPlace - kLowest / kBits % kInPlace : pair % kFields;
    return kLowest + field % kInPlace * kBits;
  }
  __device__ static constexpr uint32_t power_at(int place) { return (kBias + kMantissa - place) << kMantissa; }
  __device__ static uint32_t shifted(uint32_t word, int right) { return right < 0 ? word << -right : word >> right; }

  // Codes of a pair, plus the power of two that their place adds.
  __device__ static uint32_t raised(const uint32_t (&words)[kBits], int pair) {
    const int place = place_of(pair), spare = pair - kBits * kFields;
    uint32_t bits = power_at(place) * kTwice;
    if (spare < 0) {
      const uint32_t word = shifted(words[pair / kFields], pair % kFields * kBits - place);
      return and_or(word, (((1 << kBits) - 1) << place) * kTwice, bits);
    }
#pragma unroll
    for (int j = 0; j < kBits; ++j)
      bits = and_or(shifted(words[j], kFields * kBits + spare - j - place), kTwice << (place + j), bits);
    return bits;
  }

  // Minus that power and a zero point, exactly.
  __device__ static uint32_t away(int pair, uint32_t zero) {
    const int place = place_of(pair);
    return (0x8000 | power_at(place) | zero << place) * kTwice;
  }

  __device__ static uint32_t centered(const uint32_t (&words)[kBits], int pair, uint32_t zero) {
    const uint32_t code = raised(words, pair), offset = away(pair, zero);
    if constexpr (kIsHalf) return bits_of(__hadd2(as_half2(code), as_half2(offset)));
    else return bits_of(__hadd2(as_bfloat162(code), as_bfloat162(offset)));
  }

  // zeros: of both blocks' rows. values: of block, row and pair.
  __device__ static void expand(const uint32_t (&words)[kBits], const uint32_t (&zeros)[2][2],
                                uint32_t (&values)[2][2][4]) {
#pragma unroll
    for (int pair = 0; pair < 16; ++pair)
      values[pair / 8][pair / 4 % 2][pair % 4] = centered(words, pair, zeros[pair / 8][pair / 4 % 2]);
  }
};

// A stream's zero point is an integer; it has no expansion of eight codes alone.
template <typename T, typename Number>
struct Dequant {
  static constexpr int kWords = 0;
  __device__ static uint32_t zeros_of(uint32_t zero) { return zero; }
  template <typename Zeros>
  __device__ static void expand(const uint32_t*, const Zeros&, uint32_t (&)[4]) {}
};

struct NoZeros {};

// e4m3. Sign, exponent and mantissa are moved under a half's exponent as they are, which divides the value by a power
// of two (subnormals included): 2^8 for float16. Byte order in a word: codes 2, 0, 3, 1, so that the upper bytes of
// both halves are a pair in place.
template <>
struct Dequant<__half, Fp8> {
  static constexpr int kWords = 2;
  using Zeros = NoZeros;
  __device__ static Zeros zeros_of(uint32_t) { return {}; }
  __device__ static uint32_t upper_bytes(uint32_t word) {
    return and_or(word, 0x80008000u, word >> 1 & 0x3f803f80u);
  }
  __device__ static void expand(const uint32_t* words, const Zeros&, uint32_t (&values)[4]) {
    for (int i = 0; i < 2; ++i) {
      values[2 * i] = upper_bytes(words[i]);
      values[2 * i + 1] = upper_bytes(words[i] << 8);
    }
  }
};

// 2^120 for bfloat16, of which a product takes 2^112 back: sums would be subnormal.
template <>
struct Dequant<__nv_bfloat16, Fp8> {
  static constexpr int kWords = 2;
  using Zeros = NoZeros;
  __device__ static Zeros zeros_of(uint32_t) { return {}; }
  __device__ static uint32_t upper_bytes(uint32_t word) {
    return multiply_halves<__nv_bfloat16>(and_or(word, 0x80008000u, word >> 4 & 0x07f007f0u), 0x77807780u);
  }
  __device__ static void expand(const uint32_t* words, const Zeros&, uint32_t (&values)[4]) {
    for (int i = 0; i < 2; ++i) {
      values[2 * i] = upper_bytes(words[i]);
      values[2 * i + 1] = upper_bytes(words[i] << 8);
    }
  }
};

// e2m1, in the same way: divided by 2^14 for float16, 2^126 for bfloat16. Each half of a word has the magnitudes of its
// four codes in bits 9 to 11, 6 to 8, 3 to 5 and 0 to 2, and their signs in bits 15, 12, 14 and 13: for float16 the
// first is in place, and one shift serves both parts of the second. Codes 0, 2, 4, 6 are in the low half.
template <>
struct Dequant<__half, Fp4> {
  static constexpr int kWords = 1;
  using Zeros = NoZeros;
  __device__ static Zeros zeros_of(uint32_t) { return {}; }
  __device__ static void expand(const uint32_t* words, const Zeros&, uint32_t (&values)[4]) {
    const uint32_t word = words[0];
    values[0] = word & 0x8e008e00u;
    values[1] = word << 3 & 0x8e008e00u;
    values[2] = and_or(word << 1, 0x80008000u, word << 6 & 0x0e000e00u);
    values[3] = and_or(word << 2, 0x80008000u, word << 9 & 0x0e000e00u);
  }
};

template <>
struct Dequant<__nv_bfloat16, Fp4> {
  static constexpr int kWords = 1;
  using Zeros = NoZeros;
  __device__ static Zeros zeros_of(uint32_t) { return {}; }
  __device__ static void expand(const uint32_t* words, const Zeros&, uint32_t (&values)[4]) {
    const uint32_t word = words[0], up = word << 3;
    values[0] = and_or(word, 0x80008000u, word >> 3 & 0x01c001c0u);
    values[1] = and_or(up, 0x80008000u, word & 0x01c001c0u);
    values[2] = and_or(word << 1, 0x80008000u, up & 0x01c001c0u);
    values[3] = and_or(word << 2, 0x80008000u, word << 6 & 0x01c001c0u);
  }
};

// Byte `place` of the scales of an Fp4 weight, twice: an unsigned float with 5 bits of exponent and 3 of mantissa, the
// upper bits of a float16. For bfloat16 it is multiplied by 2^112, which leaves 2^-14 of the value's 2^-126, as for
// float16. The product with a value has 6 significant bits at most, and is exact for scales from 2^-6 on, and for
// powers of two from 2^-9 on: row_scaled.py makes no others.
template <typename T>
__device__ inline uint32_t byte_scale(uint32_t bytes, int place);
template <>
__device__ inline uint32_t byte_scale<__half>(uint32_t bytes, int place) {
  return __byte_perm(bytes, 0, 0x4040 + 0x0101 * place) << 7;
}
template <>
__device__ inline uint32_t byte_scale<__nv_bfloat16>(uint32_t bytes, int place) {
  return (__byte_perm(bytes, 0, 0x4040 + 0x0101 * place) << 4) + 0x70007000u;
}

// Bytes `place` and `place` + 1 as floats, of float16's scales: the factors of sums instead.
__device__ inline float2 byte_scales_of_sums(uint32_t bytes, int place) {
  return __half22float2(as_half2(__byte_perm(bytes, 0, 0x4140 + 0x0101 * place) << 7));
}

// Values of a row times such a scale.
template <typename T>
__device__ inline void scale_by_byte(uint32_t bytes, int place, uint32_t (&values)[4]) {
  const uint32_t scale = byte_scale<T>(bytes, place);
  for (int i = 0; i < 4; ++i) values[i] = multiply_halves<T>(values[i], scale);
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
