// dequant.cuh's values of one pair of eight codes, where a lane knows which: value `i` of the four that Dequant::expand
// makes of the same words, in as many instructions for each.
#pragma once

#include "dequant.cuh"

namespace lowbit {

template <typename T, typename Number>
using ZerosOf = decltype(Dequant<T, Number>::zeros_of(0));

template <typename T, typename Number>
struct PairAt;

template <>
struct PairAt<__half, Int4> {
  __device__ static uint32_t of(const uint32_t* words, int i, const ZerosOf<__half, Int4>& zeros) {
    return bits_of(__hsub2(as_half2(and_or(words[0] >> (4 * i), 0x000f000fu, 0x64006400u)), zeros.low));
  }
};

template <>
struct PairAt<__nv_bfloat16, Int4> {
  __device__ static uint32_t of(const uint32_t* words, int i, const ZerosOf<__nv_bfloat16, Int4>& zeros) {
    return bits_of(__hadd2(as_bfloat162(and_or(words[0] >> (4 * i), 0x000f000fu, 0x43004300u)), zeros.zero));
  }
};

template <>
struct PairAt<__half, Int8> {
  __device__ static uint32_t of(const uint32_t* words, int i, const ZerosOf<__half, Int8>& zeros) {
    const uint32_t pair = __byte_perm(i / 2 ? words[1] : words[0], 0x64646464u, i % 2 ? 0x4342 : 0x4140);
    return bits_of(__hsub2(as_half2(pair), zeros.zero));
  }
};

template <>
struct PairAt<__nv_bfloat16, Int8> {
  __device__ static uint32_t of(const uint32_t* words, int i, const ZerosOf<__nv_bfloat16, Int8>& zeros) {
    const uint32_t word = i / 2 ? words[1] : words[0];
    const uint32_t first = __byte_perm(word, 0x4b000000u, i % 2 ? 0x7442 : 0x7440);
    const uint32_t second = __byte_perm(word, 0x4b000000u, i % 2 ? 0x7443 : 0x7441);
    return __byte_perm(__float_as_uint(__uint_as_float(first) - zeros.zero),
                       __float_as_uint(__uint_as_float(second) - zeros.zero), 0x7632);
  }
};

template <typename T>
struct PairAt<T, Fp8> {
  __device__ static uint32_t of(const uint32_t* words, int i, NoZeros) {
    return Dequant<T, Fp8>::upper_bytes((i / 2 ? words[1] : words[0]) << i % 2 * 8);
  }
};

template <typename T>
struct PairAt<T, Fp4> {
  static constexpr int kSigns = 0x2130;  // from the lowest digit: by how much the signs of each pair are shifted
  __device__ static uint32_t of(const uint32_t* words, int i, NoZeros) {
    const uint32_t up = words[0] << (3 * i);
    const uint32_t bits = std::is_same_v<T, __half> ? up & 0x0e000e00u : up >> 3 & 0x01c001c0u;
    return and_or(words[0] << (kSigns >> (4 * i) & 3), 0x80008000u, bits);
  }
};

}  // namespace lowbit
