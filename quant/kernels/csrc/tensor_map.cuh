// Tensor maps of the copy engine for a matrix (sm_90): of bytes with boxes of 128 bytes per row, swizzled for wgmma, or
// of words of 32 bits with boxes in their plain order.
#pragma once

#include <cstdint>
#include <cuda.h>
#include <cuda_runtime.h>

#include "ptx.cuh"

namespace lowbit {

constexpr int kBoxBytes = 128;  // of a row

// The type and number of a box's elements along a row, and their order in shared memory.
struct BoxRow {
  CUtensorMapDataType type;
  int element_bytes, elements;
  CUtensorMapSwizzle swizzle;
};

// The driver's function is looked up at run time, so nothing links against libcuda.
inline cudaError_t encode_map(CUtensorMap& map, const void* data, int rows, int row_bytes, int64_t pitch, int box_rows,
                              const BoxRow& box_row) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static Encode encode = nullptr;
  if (encode == nullptr) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess) return error;
    if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    encode = reinterpret_cast<Encode>(function);
  }
  const cuuint64_t sizes[] = {cuuint64_t(row_bytes / box_row.element_bytes), cuuint64_t(rows)};
  const cuuint64_t strides[] = {cuuint64_t(pitch)};
  const cuuint32_t box[] = {cuuint32_t(box_row.elements), cuuint32_t(box_rows)}, steps[] = {1, 1};
  const CUresult result = encode(&map, box_row.type, 2, const_cast<void*>(data), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, box_row.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Rows of `row_bytes`, `pitch` bytes apart, both multiples of 16, from an aligned address; boxes of `box_rows`, at most
// 256. Memory beyond the matrix reads as zero.
inline cudaError_t make_tensor_map(CUtensorMap& map, const void* data, int rows, int row_bytes, int64_t pitch,
                                   int box_rows) {
  const BoxRow bytes = {CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, kBoxBytes, CU_TENSOR_MAP_SWIZZLE_128B};
  return encode_map(map, data, rows, row_bytes, pitch, box_rows, bytes);
}

// The same for adjacent rows of words in boxes of `box_words`, at most 256, whose rows are adjacent in shared memory.
inline cudaError_t make_word_map(CUtensorMap& map, const void* data, int rows, int row_words, int box_words,
                                 int box_rows) {
  const BoxRow words = {CU_TENSOR_MAP_DATA_TYPE_INT32, 4, box_words, CU_TENSOR_MAP_SWIZZLE_NONE};
  return encode_map(map, data, rows, row_words * 4, int64_t(row_words) * 4, box_rows, words);
}

// Prefetches the map itself, so that its first box does not wait for it.
__device__ inline void prefetch_map(const CUtensorMap& map) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

enum class Reuse { kNone, kSome };  // kSome: other blocks read the same bytes soon

// Starts the copy of the box at (byte or word `place` of the rows, `row`) to `smem`; its end counts at `barrier`.
template <Reuse kReuse>
__device__ inline void copy_box(uint32_t smem, const CUtensorMap& map, int place, int row, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  if constexpr (kReuse == Reuse::kNone) {
    asm volatile(
        "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
        "[%1, {%2, %3}], [%4], policy;\n}" ::"r"(smem),
        "l"(&map), "r"(place), "r"(row), "r"(barrier)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            smem),
        "l"(&map), "r"(place), "r"(row), "r"(barrier)
        : "memory");
  }
#endif
}

}  // namespace lowbit
