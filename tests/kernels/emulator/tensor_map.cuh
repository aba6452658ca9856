// csrc/tensor_map.cuh's functions on the CPU: a map holds the numbers that it is made of.
#pragma once

#include <cuda.h>

#include "ptx.cuh"

namespace lowbit {

constexpr int kBoxBytes = 128;

struct Matrix {
  const uint8_t* data;
  int64_t pitch;
  int rows, row_bytes, box_rows, box_bytes, element_bytes;
  bool swizzled;
};

inline cudaError_t make_tensor_map(CUtensorMap& map, const void* data, int rows, int row_bytes, int64_t pitch,
                                   int box_rows) {
  if (reinterpret_cast<uintptr_t>(data) % 16 || pitch % 16 || box_rows > 256) return cudaErrorInvalidValue;
  const Matrix matrix = {static_cast<const uint8_t*>(data), pitch, rows, row_bytes, box_rows, kBoxBytes, 1, true};
  memcpy(&map, &matrix, sizeof(matrix));
  return cudaSuccess;
}

inline cudaError_t make_word_map(CUtensorMap& map, const void* data, int rows, int row_words, int box_words,
                                 int box_rows) {
  if (reinterpret_cast<uintptr_t>(data) % 16 || row_words % 4 || box_words % 4 || box_words > 256 || box_rows > 256)
    return cudaErrorInvalidValue;
  const uint8_t* bytes = static_cast<const uint8_t*>(data);
  const Matrix matrix = {bytes, row_words * 4, rows, row_words * 4, box_rows, box_words * 4, 4, false};
  memcpy(&map, &matrix, sizeof(matrix));
  return cudaSuccess;
}

inline void prefetch_map(const CUtensorMap&) {}

enum class Reuse { kNone, kSome };

inline emulator::Copy copy_of(uint32_t smem, const CUtensorMap& map, int place, int row, uint32_t barrier) {
  Matrix matrix;
  memcpy(&matrix, &map, sizeof(matrix));
  const int rows = std::clamp(matrix.rows - row, 0, matrix.box_rows), byte = place * matrix.element_bytes;
  const int row_bytes = std::clamp(matrix.row_bytes - byte, 0, matrix.box_bytes);
  const uint8_t* source = matrix.data + int64_t(row) * matrix.pitch + byte;
  return {smem, uint32_t(matrix.box_rows * matrix.box_bytes), barrier, source, rows, int(matrix.pitch), row_bytes,
          matrix.box_bytes, matrix.swizzled};
}

template <Reuse>
void copy_box(uint32_t smem, const CUtensorMap& map, int place, int row, uint32_t barrier) {
  emulator::copy(copy_of(smem, map, place, row, barrier));
}

}  // namespace lowbit
