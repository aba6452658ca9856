// Compiled once per T: LOWBIT_T comes from units.py.
//
// One block per row, or, for few long rows to be rounded, a cluster of them, with the row in registers: activation,
// norm and rounding to int8 or e4m3, each if requested. It is a kernel of its own because a fused prologue, which
// normalizes the same row in every block, costs the product more than this launch: docs/ENGINE.md has the figures.
#include "declare.cuh"
#include "epilogue.cuh"
#include "launch.cuh"
#include "messages.cuh"
#include "stamps.cuh"
#include "wna16_args.cuh"

namespace lowbit {

LOWBIT_ENUM(Rounding, none, int8, fp8)

struct RowNormArgs {
  LOWBIT_STRUCT(RowNormArgs);
  FIELD(const void*, x);             // (m, k), k a multiple of 8; (m, 2 k), gate followed by up, for silu_mul
  FIELD(const void*, weight);        // (k), null without a norm
  FIELD(const void*, bias);          // (k) or null
  FIELD(const float*, input_scale);  // one number for all tokens, or null: each token's absmax / 127, or / 448
  FIELD(void*, y);                   // (m, k), or null to get codes and scales
  FIELD(uint8_t*, codes);            // (m, k)
  FIELD(float*, scales);             // (m), or (k / 128, m)
  FIELD(int, m);
  FIELD(int, k);
  FIELD(Norm, norm);
  FIELD(float, eps);
  FIELD(Activation, activation);     // before the norm
  FIELD(Rounding, rounding);         // to multiples of the scale: -128 to 127, or e4m3
  FIELD(bool, grouped);              // 128 inputs have a scale of their own
  FIELD(bool, shuffled);             // codes of 32 inputs in the order of w4a8_gemm.cu; k is a multiple of 32
};

struct RowNormLaunch {
  LOWBIT_STRUCT(RowNormLaunch);
  FIELD(int, device);
  FIELD(int, parts);       // blocks of a cluster that share a row; 1 with a norm or an input_scale
  FIELD(bool, dependent);  // launched with programmatic dependent launch
};

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMostParts = 8;
constexpr int kVector = 8;
constexpr int kVectors = 4;  // most per thread: rows of up to 32768
constexpr int kManyRows = 256;
constexpr int kGroupLanes = 16;  // of 128 inputs

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ float operator()(float a, float b) const { return max_or_nan(a, b); }
};

// The vectors that a block has of a row, [begin, end).
struct Part {
  int64_t row;
  int rank, begin, end;
  __device__ Part(int vectors, int parts) : row(blockIdx.x), rank(0), begin(0), end(vectors) {
    if (parts == 1) return;
    row = blockIdx.x / parts, rank = blockIdx.x % parts;
    begin = vectors * rank / parts, end = vectors * (rank + 1) / parts;
  }
};

struct Shared {
  uint64_t barrier;             // of the largest numbers of the other blocks that share the row
  float largest[kMostParts];
  float scratch[kMaxThreads / 32];
};

// Of all blocks that share the row.
__device__ inline float largest_of_all(float largest, int rank, int parts, Shared& shared) {
  cluster_wait();  // all have opened their barriers
  if (threadIdx.x < parts && threadIdx.x != rank)
    send_float(&shared.largest[rank], threadIdx.x, largest, &shared.barrier);
  wait_for_messages(&shared.barrier);
  for (int i = 0; i < parts; ++i)
    if (i != rank) largest = max_or_nan(largest, shared.largest[i]);
  return largest;
}

// A reduction of the block's values, returned to all threads. `scratch` holds one number per warp. Unused values are 0.
template <typename Combine>
__device__ float reduce(float value, float* scratch, Combine combine) {
  for (int offset = 16; offset > 0; offset /= 2) value = combine(value, __shfl_xor_sync(~0u, value, offset));
  __syncthreads();  // all threads have read the scratch of the previous reduction
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float total = threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : 0.f;
  for (int offset = 16; offset > 0; offset /= 2) total = combine(total, __shfl_xor_sync(~0u, total, offset));
  return total;
}

template <typename T>
__device__ void unpack(const uint4& raw, float (&values)[kVector]) {
  const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = to_float(elements[i]);
}

// (x - mean) / deviation * weight + bias, rounded to T as by a separate norm.
template <typename T, int kCount>
__device__ void norm_row(const RowNormArgs& args, float (&x)[kCount][kVector], const uint4 (&weights)[kCount],
                         int vectors, float* scratch) {
  float mean = 0.f, sum = 0.f;
  if (args.norm == Norm::layer) {
#pragma unroll
    for (int v = 0; v < kCount; ++v)
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += x[v][i];
    mean = reduce(sum, scratch, Add{}) / args.k;
    sum = 0.f;
  }
#pragma unroll
  for (int v = 0; v < kCount; ++v)
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (threadIdx.x + v * blockDim.x < vectors) sum += (x[v][i] - mean) * (x[v][i] - mean);
  const float factor = rsqrtf(reduce(sum, scratch, Add{}) / args.k + args.eps);
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    const int index = threadIdx.x + v * blockDim.x;
    if (index >= vectors) break;
    float weight[kVector], bias[kVector] = {};
    unpack<T>(weights[v], weight);
    if (args.bias != nullptr) unpack<T>(static_cast<const uint4*>(args.bias)[index], bias);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      x[v][i] = to_float(from_float<T>((x[v][i] - mean) * factor * weight[i] + bias[i]));
  }
}

// The scale with which `largest` becomes the largest code.
__device__ inline float step_to(const RowNormArgs& args, float largest) {
  return largest == 0.f ? 1.f : largest / (args.rounding == Rounding::fp8 ? 448.f : 127.f);
}

// The largest magnitude in a vector, or NaN.
__device__ inline float largest_in(const float (&x)[kVector], float largest = 0.f) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) largest = max_or_nan(largest, fabsf(x[i]));
  return largest;
}

// The scale of this row; NaN if the row has a NaN, since codes cannot carry it.
template <int kCount>
__device__ float scale_of(const RowNormArgs& args, const float (&x)[kCount][kVector], const Part& part, int parts,
                          Shared& shared) {
  if (args.input_scale != nullptr) return *args.input_scale;
  float largest = 0.f;
#pragma unroll
  for (int v = 0; v < kCount; ++v) largest = largest_in(x[v], largest);
  largest = reduce(largest, shared.scratch, Max{});
  return step_to(args, parts > 1 ? largest_of_all(largest, part.rank, parts, shared) : largest);
}

// The scale of each of the thread's groups, which 16 adjacent lanes share.
template <int kCount>
__device__ void scales_of_groups(const RowNormArgs& args, const float (&x)[kCount][kVector], float (&scales)[kCount]) {
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    float largest = largest_in(x[v]);
    for (int offset = kGroupLanes / 2; offset > 0; offset /= 2)
      largest = max_or_nan(largest, __shfl_xor_sync(~0u, largest, offset));
    scales[v] = step_to(args, largest);
  }
}

// A scale, and the inverse of scale * lift for divisions. lift is a power of two, so that a tiny scale has an inverse
// too: no quotient depends on it, and no division stands in the code of each number.
struct Step {
  float scale, lift, inverse;
  __device__ explicit Step(float scale)
      : scale(scale), lift(scale < 1e-36f ? 0x1p96f : 1.f), inverse(1.f / (scale * lift)) {}
  // The quotient rounded as in IEEE 754, by a Newton step from the correctly rounded inverse of scale (Markstein,
  // 1990). Checked on a CPU: for every float16 x and every float16 that may be its row's largest, 504 million pairs,
  // all quotients were equal. Of 49 million in bfloat16, and of 584 million with other scales, some quotients differed
  // by a bit, but no code.
  __device__ float divide(float x) const {
    const float lifted = x * lift, guess = lifted * inverse;
    const float quotient = fmaf(fmaf(-guess, scale * lift, lifted), inverse, guess);
    return fabsf(guess) >= 512.f ? guess : quotient;  // beyond all codes, and perhaps infinite
  }
  __device__ uint8_t code_of(Rounding rounding, float x) const {
    if (rounding == Rounding::fp8) return __nv_cvt_float_to_fp8(divide(x), __NV_SATFINITE, __NV_E4M3);
    return static_cast<int8_t>(fminf(fmaxf(rintf(divide(x)), -128.f), 127.f));
  }
  __device__ float rounded(Rounding rounding, float x) const {
    const uint8_t code = code_of(rounding, x);
    if (rounding == Rounding::int8) return static_cast<int8_t>(code) * scale;
    return __half2float(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)) * scale;
  }
};

// Stores eight codes: in their order, or inputs 0, 4, 1 and 5 as word i of a half of the 32 inputs, of which they are
// the eight number i, and 2, 6, 3 and 7 as word i of the other half.
__device__ inline void store_codes(const RowNormArgs& args, int64_t index, uint2 codes) {
  if (!args.shuffled) {
    reinterpret_cast<uint2*>(args.codes)[index] = codes;
    return;
  }
  uint32_t* words = reinterpret_cast<uint32_t*>(args.codes) + index / 4 * 8 + index % 4;
  words[0] = __byte_perm(codes.x, codes.y, 0x5140);
  words[4] = __byte_perm(codes.x, codes.y, 0x7362);
}

// Stores the row as numbers of T, or as codes.
template <typename T>
__device__ void store(const RowNormArgs& args, int64_t index, const float (&x)[kVector], const Step& step) {
  if (args.codes != nullptr) {
    alignas(8) uint8_t codes[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) codes[i] = step.code_of(args.rounding, x[i]);
    return store_codes(args, index, *reinterpret_cast<const uint2*>(codes));
  }
  uint4 raw;
  T* elements = reinterpret_cast<T*>(&raw);
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    elements[i] = from_float<T>(args.rounding == Rounding::none ? x[i] : step.rounded(args.rounding, x[i]));
  static_cast<uint4*>(args.y)[index] = raw;
}

// Stores the row with a scale for each group.
template <typename T, int kCount>
__device__ void store_groups(const RowNormArgs& args, int vectors, const float (&x)[kCount][kVector]) {
  float scales[kCount];
  scales_of_groups(args, x, scales);
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    const int index = threadIdx.x + v * blockDim.x;
    if (index >= vectors) break;
    store<T>(args, static_cast<int64_t>(blockIdx.x) * vectors + index, x[v], Step(scales[v]));
    if (args.scales != nullptr && index % kGroupLanes == 0)
      args.scales[static_cast<int64_t>(index / kGroupLanes) * args.m + blockIdx.x] = scales[v];
  }
}

// The thread's numbers of a row, with the activation applied and rounded to T as by a separate product. All loads are
// issued before any value is used.
template <typename T, int kCount, bool kActive>
__device__ void load(const RowNormArgs& args, int vectors, const Part& part, float (&x)[kCount][kVector]) {
  const bool gated = kActive && args.activation == Activation::silu_mul;
  const uint4* row = static_cast<const uint4*>(args.x) + part.row * vectors * (gated ? 2 : 1);
  uint4 raw[kCount] = {}, up_raw[kCount] = {};
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    const int index = part.begin + threadIdx.x + v * blockDim.x;
    if (index < part.end) raw[v] = __ldcg(row + index);
    if (gated && index < part.end) up_raw[v] = __ldcg(row + vectors + index);
  }
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    unpack<T>(raw[v], x[v]);
    if (!kActive) continue;
    float up[kVector];
    unpack<T>(up_raw[v], up);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      x[v][i] = to_float(from_float<T>(gated ? silu(x[v][i]) * up[i] : activate(args.activation, x[v][i])));
  }
}

template <typename T, int kCount, bool kActive>
__global__ void __launch_bounds__(kMaxThreads) row_norm_kernel(const __grid_constant__ RowNormArgs args, int parts) {
  LOWBIT_SHARED(Shared, shared);
  const int vectors = args.k / kVector;
  const Part part(vectors, parts);
  stamp(Stage::kBegun);
  allow_next_kernel();
  if (parts > 1) {
    if (threadIdx.x == 0) expect_messages(&shared.barrier, (parts - 1) * sizeof(float));
    __syncthreads();
    cluster_arrive();
  }
  uint4 weights[kCount] = {};
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    const int index = threadIdx.x + v * blockDim.x;
    if (args.weight != nullptr && index < vectors) weights[v] = static_cast<const uint4*>(args.weight)[index];
  }
  wait_for_previous_kernel();
  stamp(Stage::kWaited);
  float x[kCount][kVector];
  load<T, kCount, kActive>(args, vectors, part, x);
  if (args.norm != Norm::none) norm_row<T>(args, x, weights, vectors, shared.scratch);
  if (args.grouped) {
    store_groups<T>(args, vectors, x);
    return leave_stamps(args.m, args.k);
  }
  const Step step(args.rounding == Rounding::none ? 1.f : scale_of(args, x, part, parts, shared));
  stamp(Stage::kComputed);
  if (args.scales != nullptr && threadIdx.x == 0 && part.rank == 0) args.scales[part.row] = step.scale;
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    const int index = part.begin + threadIdx.x + v * blockDim.x;
    if (index < part.end) store<T>(args, part.row * vectors + index, x[v], step);
  }
  leave_stamps(args.m, args.k);
}

template <typename T, bool kActive>
cudaError_t launch_active(const RowNormArgs& args, const RowNormLaunch& launch, cudaStream_t stream) {
  if (args.k % kVector != 0 || args.k > kVector * kMaxThreads * kVectors) return cudaErrorInvalidValue;
  const bool shared = args.norm == Norm::none && args.rounding != Rounding::none && args.input_scale == nullptr;
  const int most = shared && !args.grouped ? kMostParts : 1;
  if (launch.parts < 1 || launch.parts > most) return cudaErrorInvalidConfiguration;
  const int vectors = (args.k / kVector + launch.parts - 1) / launch.parts;  // of a block
  // Few rows need all threads; many rows need many loads in flight.
  const int least = (vectors + kMaxThreads - 1) / kMaxThreads;
  const int count = least > 2 || args.m >= kManyRows ? kVectors : least;
  const LaunchPlan plan = {
      .device = launch.device,
      .stream = stream,
      .blocks = dim3(args.m * launch.parts),
      .threads = dim3((vectors + 32 * count - 1) / (32 * count) * 32),
      .cluster = launch.parts > 1 ? launch.parts : 0,
      .dependent = launch.dependent,
  };
  if (count > 2) return launch_kernel(row_norm_kernel<T, kVectors, kActive>, plan, args, launch.parts);
  const auto kernel = count == 1 ? row_norm_kernel<T, 1, kActive> : row_norm_kernel<T, 2, kActive>;
  return launch_kernel(kernel, plan, args, launch.parts);
}

}  // namespace

// A norm alone has its own code, without that of the activations, which is there eight times for each thread.
template <typename T>
cudaError_t launch_row_norm(const RowNormArgs& args, const RowNormLaunch& launch, cudaStream_t stream) {
  return args.activation == Activation::none ? launch_active<T, false>(args, launch, stream)
                                             : launch_active<T, true>(args, launch, stream);
}

const Kernel row_norm("row_norm", {name_of<LOWBIT_T>}, launch_row_norm<LOWBIT_T>);

}  // namespace lowbit
