// The tensor instructions' arithmetic: operands laid out over lanes as the PTX ISA has them, sums in float32 or int32.
// Sums of e4m3 are rounded less than a GPU's.

#include "emulator.h"
#include "products.h"

namespace emulator {
namespace {

float half_at(const uint8_t* bytes, bool bfloat16) {
  return bfloat16 ? __bfloat162float(load<__nv_bfloat16>(bytes)) : __half2float(load<__half>(bytes));
}

// A lane's row g or g + 8 of a 16 x 16 left operand: its input k, of the fragments that lanes 4 g to 4 g + 3 hold.
float left_at(const uint8_t* fragments, size_t pitch, int high, int k, bool bfloat16) {
  return half_at(fragments + k % 8 / 2 * pitch + (k / 8 * 2 + high) * 4 + k % 2 * 2, bfloat16);
}

struct Operands {
  float c[4];
  uint32_t a[4], b[2];
};

template <bool kBfloat16>
void multiply_warp(const Slots& in, Slots& out) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int column = lane % 4 * 2 + i % 2;
      float sum = load<float>(in[lane] + 4 * i);
      for (int k = 0; k < 16; ++k) {
        const uint8_t* right = in[column * 4 + k % 8 / 2] + offsetof(Operands, b) + k / 8 * 4 + k % 2 * 2;
        const float a = left_at(in[lane / 4 * 4] + offsetof(Operands, a), kSlot, i / 2, k, kBfloat16);
        sum += a * half_at(right, kBfloat16);
      }
      memcpy(out[lane] + 4 * i, &sum, 4);
    }
  }
}

// Rows of bytes without a sign, columns of bytes with one.
void multiply_warp_of_bytes(const Slots& in, Slots& out) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int column = lane % 4 * 2 + i % 2;
      int sum = load<int>(in[lane] + 4 * i);
      for (int k = 0; k < 32; ++k) {
        const int member = k % 16 / 4, half = k / 16, byte = k % 4;
        const uint8_t* left = in[lane / 4 * 4 + member] + offsetof(Operands, a) + (half * 2 + i / 2) * 4 + byte;
        const uint8_t* right = in[column * 4 + member] + offsetof(Operands, b) + half * 4 + byte;
        sum += *left * static_cast<int8_t>(*right);
      }
      memcpy(out[lane] + 4 * i, &sum, 4);
    }
  }
}

// The four lanes' fragments of a, one lane's after another, that hold the calling lane's rows.
struct Rows {
  uint8_t bytes[4][16];
};

Rows gather_rows(const uint32_t (&a)[4]) {
  Rows rows;
  together("wgmma", a, sizeof(a), &rows, sizeof(rows), [](const Slots& in, Slots& out) {
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < 4; ++i) memcpy(out[lane] + 16 * i, in[lane / 4 * 4 + i], 16);
  });
  return rows;
}

// Column of c's element i, and whether it is the lane's higher row.
int column_of(int i, int thread) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }
int high_of(int i) { return i % 4 / 2; }

}  // namespace

void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bfloat16) {
  Operands operands = {{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  together("mma", &operands, sizeof(operands), c, sizeof(c), bfloat16 ? multiply_warp<true> : multiply_warp<false>);
}

void multiply_bytes(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Operands operands = {{}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  memcpy(operands.c, c, sizeof(c));
  together("mma", &operands, sizeof(operands), c, sizeof(c), multiply_warp_of_bytes);
}

void multiply_later(float* c, int columns, const uint32_t (&a)[4], uint64_t b, bool add, bool bfloat16) {
  const int along_inputs = b >> 32 & 0xffff, along_columns = b >> 48;
  later([=, thread = threadIdx.x, rows = gather_rows(a)] {
    for (int i = 0; i < columns / 2; ++i) {
      const int column = column_of(i, thread);
      const uint32_t block = uint32_t(b) + column / 8 * along_columns + column % 8 * 16;
      float sum = add ? c[i] : 0.f;
      for (int k = 0; k < 16; ++k)
        sum += left_at(rows.bytes[0], sizeof(rows.bytes[0]), high_of(i), k, bfloat16) *
               half_at(shared_at(block + k / 8 * along_inputs + k % 8 * 2, 2), bfloat16);
      c[i] = sum;
    }
  });
}

void multiply_halves_later(float* c, int columns, const uint32_t (&a)[4], uint32_t b, bool add, bool bfloat16) {
  later([=, thread = threadIdx.x, rows = gather_rows(a)] {
    for (int i = 0; i < columns / 2; ++i) {
      const uint32_t right = b + column_of(i, thread) * 128;
      float sum = add ? c[i] : 0.f;
      for (int k = 0; k < 16; ++k)
        sum += left_at(rows.bytes[0], sizeof(rows.bytes[0]), high_of(i), k, bfloat16) *
               half_at(shared_at(swizzled(right + k * 2), 2), bfloat16);
      c[i] = sum;
    }
  });
}

void multiply_bytes_later(int* c, int columns, const uint32_t (&a)[4], uint32_t b, bool add) {
  later([=, thread = threadIdx.x, rows = gather_rows(a)] {
    for (int i = 0; i < columns / 2; ++i) {
      int sum = add ? c[i] : 0;
      for (int k = 0; k < 32; ++k) {
        const uint8_t left = rows.bytes[k % 16 / 4][(k / 16 * 2 + high_of(i)) * 4 + k % 4];
        const uint32_t right = b + column_of(i, thread) * 128 + k;
        sum += static_cast<int8_t>(left) * load<int8_t>(shared_at(swizzled(right), 1));
      }
      c[i] = sum;
    }
  });
}

template <typename Operand, typename Sum>
void multiply_shared_later(Sum* c, int columns, uint32_t a, uint32_t b) {
  __syncwarp();  // all lanes come to a warpgroup's product
  const auto at = [](uint32_t address) {
    const uint8_t* bytes = shared_at(swizzled(address), sizeof(Operand));
    if constexpr (std::is_same_v<Operand, int8_t>) return int(load<int8_t>(bytes));
    else if constexpr (std::is_same_v<Operand, __nv_fp8_e4m3>) return float(load<__nv_fp8_e4m3>(bytes));
    else return half_at(bytes, std::is_same_v<Operand, __nv_bfloat16>);
  };
  later([=, thread = threadIdx.x] {
    const int row = thread / 32 % 4 * 16 + thread % 32 / 4;
    for (int i = 0; i < columns / 2; ++i) {
      const uint32_t left = a + (row + high_of(i) * 8) * 128, right = b + column_of(i, thread) * 128;
      for (int byte = 0; byte < 32; byte += sizeof(Operand)) c[i] += at(left + byte) * at(right + byte);
    }
  });
}
template void multiply_shared_later<int8_t>(int*, int, uint32_t, uint32_t);
template void multiply_shared_later<__nv_fp8_e4m3>(float*, int, uint32_t, uint32_t);
template void multiply_shared_later<__half>(float*, int, uint32_t, uint32_t);
template void multiply_shared_later<__nv_bfloat16>(float*, int, uint32_t, uint32_t);

}  // namespace emulator
