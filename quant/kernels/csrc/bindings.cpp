// lowbit.quant._C: launchers that take raw device pointers and a stream. It does not depend on torch: addresses come as
// integers, with 0 for none, and shapes were checked by quant/kernels. A CUDA error becomes a RuntimeError.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "choose_tokens.cuh"
#include "decode_attention.cuh"
#include "dense_gemv.cuh"
#include "gptq_block.cuh"
#include "row_norm.cuh"
#include "w8a8_cutlass.cuh"
#include "w8a8_gemm.cuh"
#include "wna16_dequantize.cuh"
#include "wna16_gemm.cuh"
#include "wna16_gemv.cuh"

namespace py = pybind11;

namespace {

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

void check(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a launch error is reported once, here
  throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

// Calls `launch.template operator()<T, bits>()` for the pair in the arguments.
template <typename Launch>
cudaError_t for_type(bool bfloat16, int bits, Launch launch) {
  switch (bits * 2 + bfloat16) {
    case 8: return launch.template operator()<__half, 4>();
    case 9: return launch.template operator()<__nv_bfloat16, 4>();
    case 16: return launch.template operator()<__half, 8>();
    case 17: return launch.template operator()<__nv_bfloat16, 8>();
    default: return cudaErrorInvalidValue;
  }
}

void wna16_gemm(bool bfloat16, int bits, const lowbit::Wna16Args& args, const lowbit::Wna16GemmLaunch& launch,
                uintptr_t stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(pointer(stream));
  const auto launch_typed = [&]<typename T, int kBits>() {
    return lowbit::launch_wna16_gemm<T, kBits>(args, launch, cuda_stream);
  };
  check(for_type(bfloat16, bits, launch_typed), "wna16_gemm");
}

void wna16_gemv(bool bfloat16, int bits, const lowbit::Wna16Args& args, const lowbit::Wna16GemvLaunch& launch,
                uintptr_t stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(pointer(stream));
  const auto launch_typed = [&]<typename T, int kBits>() {
    return lowbit::launch_wna16_gemv<T, kBits>(args, launch, cuda_stream);
  };
  check(for_type(bfloat16, bits, launch_typed), "wna16_gemv");
}

void wna16_dequantize(bool bfloat16, int bits, const lowbit::Wna16DequantizeArgs& args, int device, uintptr_t stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(pointer(stream));
  const auto launch_typed = [&]<typename T, int kBits>() {
    return lowbit::launch_wna16_dequantize<T, kBits>(args, device, cuda_stream);
  };
  check(for_type(bfloat16, bits, launch_typed), "wna16_dequantize");
}

void gptq_block(const lowbit::GptqBlockArgs& args, int device, uintptr_t stream) {
  check(lowbit::launch_gptq_block(args, device, static_cast<cudaStream_t>(pointer(stream))), "gptq_block");
}

void append_heads(bool bfloat16, const lowbit::AppendHeadsArgs& args, int device, bool dependent, uintptr_t stream) {
  const auto launch = bfloat16 ? lowbit::launch_append_heads<__nv_bfloat16> : lowbit::launch_append_heads<__half>;
  check(launch(args, device, dependent, static_cast<cudaStream_t>(pointer(stream))), "append_heads");
}

void decode_attention(bool bfloat16, const lowbit::DecodeAttentionArgs& args,
                      const lowbit::DecodeAttentionLaunch& launch, uintptr_t stream) {
  const auto run = bfloat16 ? lowbit::launch_decode_attention<__nv_bfloat16> : lowbit::launch_decode_attention<__half>;
  check(run(args, launch, static_cast<cudaStream_t>(pointer(stream))), "decode_attention");
}

void choose_tokens(const lowbit::ChooseTokensArgs& args, const lowbit::ChooseTokensLaunch& launch, uintptr_t stream) {
  check(lowbit::launch_choose_tokens(args, launch, static_cast<cudaStream_t>(pointer(stream))), "choose_tokens");
}

void row_norm(bool bfloat16, const lowbit::RowNormArgs& args, int device, bool dependent, uintptr_t stream) {
  const auto launch = bfloat16 ? lowbit::launch_row_norm<__nv_bfloat16> : lowbit::launch_row_norm<__half>;
  check(launch(args, device, dependent, static_cast<cudaStream_t>(pointer(stream))), "row_norm");
}

void dense_gemv(bool bfloat16, const lowbit::DenseArgs& args, const lowbit::RingLaunch& launch, uintptr_t stream) {
  const auto run = bfloat16 ? lowbit::launch_dense_gemv<__nv_bfloat16> : lowbit::launch_dense_gemv<__half>;
  check(run(args, launch, static_cast<cudaStream_t>(pointer(stream))), "dense_gemv");
}

void w8a8_gemm(const lowbit::W8a8Args& args, const lowbit::RingLaunch& launch, int output, uintptr_t stream) {
  const auto typed = static_cast<lowbit::W8a8Output>(output);
  check(lowbit::launch_w8a8_gemm(args, launch, typed, static_cast<cudaStream_t>(pointer(stream))), "w8a8_gemm");
}

template <typename T>
cudaError_t launch_cutlass(const lowbit::W8a8Args& args, const lowbit::W8a8CutlassLaunch& launch,
                           cudaStream_t stream) {
  switch (launch.tile) {
    case 0: return lowbit::launch_w8a8_cutlass<T, 0>(args, launch, stream);
    case 1: return lowbit::launch_w8a8_cutlass<T, 1>(args, launch, stream);
    default: return cudaErrorInvalidValue;
  }
}

void w8a8_cutlass(bool bfloat16, const lowbit::W8a8Args& args, const lowbit::W8a8CutlassLaunch& launch,
                  uintptr_t stream) {
  const auto run = bfloat16 ? launch_cutlass<__nv_bfloat16> : launch_cutlass<__half>;
  check(run(args, launch, static_cast<cudaStream_t>(pointer(stream))), "w8a8_cutlass");
}

// A struct's fields become attributes settable by keyword; `field` casts an address to the field's pointer type.
template <typename Struct, typename Pointer>
void bind_pointer(py::class_<Struct>& type, const char* name, Pointer Struct::*field) {
  type.def_property(
      name, [field](const Struct& self) { return reinterpret_cast<uintptr_t>(self.*field); },
      [field](Struct& self, uintptr_t address) { self.*field = static_cast<Pointer>(pointer(address)); });
}

template <typename Struct, typename Enum>
void bind_enum(py::class_<Struct>& type, const char* name, Enum Struct::*field) {
  type.def_property(
      name, [field](const Struct& self) { return static_cast<int>(self.*field); },
      [field](Struct& self, int value) { self.*field = static_cast<Enum>(value); });
}

void bind_wna16(py::module_& module) {
  using Args = lowbit::Wna16Args;
  py::class_<Args> args(module, "Wna16Args");
  args.def(py::init([] { return Args{}; }));
  bind_pointer(args, "x", &Args::x);
  bind_pointer(args, "words", &Args::words);
  bind_pointer(args, "scales", &Args::scales);
  bind_pointer(args, "zeros", &Args::zeros);
  bind_pointer(args, "bias", &Args::bias);
  bind_pointer(args, "residual", &Args::residual);
  bind_pointer(args, "norm_weight", &Args::norm_weight);
  bind_pointer(args, "norm_bias", &Args::norm_bias);
  bind_pointer(args, "y", &Args::y);
  bind_pointer(args, "positions", &Args::positions);
  bind_pointer(args, "slots", &Args::slots);
  bind_pointer(args, "cosines", &Args::cosines);
  bind_pointer(args, "sines", &Args::sines);
  bind_pointer(args, "k_cache", &Args::k_cache);
  bind_pointer(args, "v_cache", &Args::v_cache);
  bind_pointer(args, "next_weight", &Args::next_weight);
  bind_pointer(args, "x_squares", &Args::x_squares);
  bind_pointer(args, "next_norm", &Args::next_norm);
  bind_pointer(args, "z", &Args::z);
  bind_pointer(args, "squares", &Args::squares);
  args.def_readwrite("next_bytes", &Args::next_bytes).def_readwrite("x_parts", &Args::x_parts);
  bind_enum(args, "norm", &Args::norm);
  bind_enum(args, "activation", &Args::activation);
  args.def_readwrite("m", &Args::m).def_readwrite("n", &Args::n).def_readwrite("k", &Args::k);
  args.def_readwrite("tiles", &Args::tiles).def_readwrite("chunks", &Args::chunks);
  args.def_readwrite("stage_x", &Args::stage_x);
  args.def_readwrite("pair_block", &Args::pair_block).def_readwrite("scale_rows", &Args::scale_rows);
  args.def_readwrite("scale_shift", &Args::scale_shift).def_readwrite("norm_eps", &Args::norm_eps);
  args.def_readwrite("float32_out", &Args::float32_out).def_readwrite("vectors", &Args::vectors);
  args.def_readwrite("q_heads", &Args::q_heads).def_readwrite("kv_heads", &Args::kv_heads);
  using Gemv = lowbit::Wna16GemvLaunch;
  py::class_<Gemv> gemv(module, "Wna16GemvLaunch");
  gemv.def(py::init([] { return Gemv{}; }));
  gemv.def_readwrite("device", &Gemv::device).def_readwrite("groups_per_chunk", &Gemv::groups_per_chunk);
  gemv.def_readwrite("row_tiles", &Gemv::row_tiles).def_readwrite("row_warps", &Gemv::row_warps);
  gemv.def_readwrite("k_warps", &Gemv::k_warps).def_readwrite("cluster", &Gemv::cluster);
  gemv.def_readwrite("dependent", &Gemv::dependent);
  module.def("wna16_gemv", &wna16_gemv);
  using Gemm = lowbit::Wna16GemmLaunch;
  py::class_<Gemm> gemm(module, "Wna16GemmLaunch");
  gemm.def(py::init([] { return Gemm{}; }));
  gemm.def_readwrite("device", &Gemm::device).def_readwrite("groups_per_chunk", &Gemm::groups_per_chunk);
  gemm.def_readwrite("warpgroups", &Gemm::warpgroups).def_readwrite("cluster", &Gemm::cluster);
  gemm.def_readwrite("dependent", &Gemm::dependent);
  module.def("wna16_gemm", &wna16_gemm);
}

void bind_gptq(py::module_& module) {
  using Args = lowbit::GptqBlockArgs;
  py::class_<Args> args(module, "GptqBlockArgs");
  args.def(py::init([] { return Args{}; }));
  bind_pointer(args, "w", &Args::w);
  bind_pointer(args, "factor", &Args::factor);
  bind_pointer(args, "scales", &Args::scales);
  bind_pointer(args, "zeros", &Args::zeros);
  bind_pointer(args, "codes", &Args::codes);
  bind_pointer(args, "errors", &Args::errors);
  args.def_readwrite("n", &Args::n).def_readwrite("columns", &Args::columns);
  args.def_readwrite("low", &Args::low).def_readwrite("high", &Args::high);
  args.def_readwrite("fineness", &Args::fineness).def_readwrite("least", &Args::least);
  module.def("gptq_block", &gptq_block);
}

void bind_dequantize(py::module_& module) {
  using Args = lowbit::Wna16DequantizeArgs;
  py::class_<Args> args(module, "Wna16DequantizeArgs");
  args.def(py::init([] { return Args{}; }));
  bind_pointer(args, "words", &Args::words);
  bind_pointer(args, "scales", &Args::scales);
  bind_pointer(args, "zeros", &Args::zeros);
  bind_pointer(args, "w", &Args::w);
  args.def_readwrite("n", &Args::n).def_readwrite("k", &Args::k).def_readwrite("pair_block", &Args::pair_block);
  args.def_readwrite("groups_per_chunk", &Args::groups_per_chunk).def_readwrite("scale_rows", &Args::scale_rows);
  args.def_readwrite("scale_shift", &Args::scale_shift);
  module.def("wna16_dequantize", &wna16_dequantize);
}

void bind_attention(py::module_& module) {
  using Cache = lowbit::KvCache;
  using Append = lowbit::AppendHeadsArgs;
  using Attention = lowbit::DecodeAttentionArgs;
  using Launch = lowbit::DecodeAttentionLaunch;
  py::class_<Cache> cache(module, "KvCache");
  cache.def(py::init([] { return Cache{}; }));
  bind_pointer(cache, "k", &Cache::k);
  bind_pointer(cache, "v", &Cache::v);
  bind_pointer(cache, "k_scales", &Cache::k_scales);
  bind_pointer(cache, "v_scales", &Cache::v_scales);
  cache.def_readwrite("kv_heads", &Cache::kv_heads).def_readwrite("head_dim", &Cache::head_dim);
  py::class_<Append> append(module, "AppendHeadsArgs");
  append.def(py::init([] { return Append{}; }));
  bind_pointer(append, "qkv", &Append::qkv);
  bind_pointer(append, "positions", &Append::positions);
  bind_pointer(append, "slots", &Append::slots);
  bind_pointer(append, "cosines", &Append::cosines);
  bind_pointer(append, "sines", &Append::sines);
  bind_pointer(append, "q_norm", &Append::q_norm);
  bind_pointer(append, "k_norm", &Append::k_norm);
  bind_pointer(append, "q", &Append::q);
  append.def_readwrite("cache", &Append::cache).def_readwrite("m", &Append::m).def_readwrite("heads", &Append::heads);
  append.def_readwrite("norm_eps", &Append::norm_eps);
  py::class_<Attention> attention(module, "DecodeAttentionArgs");
  attention.def(py::init([] { return Attention{}; }));
  bind_pointer(attention, "q", &Attention::q);
  bind_pointer(attention, "starts", &Attention::starts);
  bind_pointer(attention, "positions", &Attention::positions);
  bind_pointer(attention, "out", &Attention::out);
  attention.def_readwrite("cache", &Attention::cache);
  attention.def_readwrite("m", &Attention::m).def_readwrite("heads", &Attention::heads);
  attention.def_readwrite("scale", &Attention::scale).def_readwrite("softcap", &Attention::softcap);
  attention.def_readwrite("window", &Attention::window);
  py::class_<Launch> launch(module, "DecodeAttentionLaunch");
  launch.def(py::init([] { return Launch{}; }));
  launch.def_readwrite("device", &Launch::device).def_readwrite("splits", &Launch::splits);
  launch.def_readwrite("dependent", &Launch::dependent);
  module.def("append_heads", &append_heads);
  module.def("decode_attention", &decode_attention);
}

void bind_dense(py::module_& module) {
  using Launch = lowbit::RingLaunch;
  py::class_<Launch> launch(module, "RingLaunch");
  launch.def(py::init([] { return Launch{}; }));
  launch.def_readwrite("device", &Launch::device).def_readwrite("warpgroups", &Launch::warpgroups);
  launch.def_readwrite("cluster", &Launch::cluster).def_readwrite("stages", &Launch::stages);
  launch.def_readwrite("dependent", &Launch::dependent);
  using Args = lowbit::DenseArgs;
  py::class_<Args> args(module, "DenseArgs");
  args.def(py::init([] { return Args{}; }));
  bind_pointer(args, "x", &Args::x);
  bind_pointer(args, "w", &Args::w);
  bind_pointer(args, "bias", &Args::bias);
  bind_pointer(args, "residual", &Args::residual);
  bind_pointer(args, "x_squares", &Args::x_squares);
  bind_pointer(args, "y", &Args::y);
  bind_enum(args, "activation", &Args::activation);
  args.def_readwrite("m", &Args::m).def_readwrite("n", &Args::n).def_readwrite("k", &Args::k);
  args.def_readwrite("x_pitch", &Args::x_pitch).def_readwrite("w_pitch", &Args::w_pitch);
  args.def_readwrite("norm_eps", &Args::norm_eps);
  args.def_readwrite("float32_out", &Args::float32_out).def_readwrite("vectors", &Args::vectors);
  module.def("dense_gemv", &dense_gemv);
}

void bind_choose_tokens(py::module_& module) {
  using Args = lowbit::ChooseTokensArgs;
  py::class_<Args> args(module, "ChooseTokensArgs");
  args.def(py::init([] { return Args{}; }));
  bind_pointer(args, "scores", &Args::scores);
  bind_pointer(args, "temperature", &Args::temperature);
  bind_pointer(args, "seed", &Args::seed);
  bind_pointer(args, "tokens", &Args::tokens);
  bind_pointer(args, "written", &Args::written);
  bind_pointer(args, "positions", &Args::positions);
  bind_pointer(args, "slots", &Args::slots);
  args.def_readwrite("last", &Args::last).def_readwrite("m", &Args::m).def_readwrite("n", &Args::n);
  using Launch = lowbit::ChooseTokensLaunch;
  py::class_<Launch> launch(module, "ChooseTokensLaunch");
  launch.def(py::init([] { return Launch{}; }));
  launch.def_readwrite("device", &Launch::device).def_readwrite("blocks", &Launch::blocks);
  launch.def_readwrite("dependent", &Launch::dependent);
  module.def("choose_tokens", &choose_tokens);
}

void bind_w8a8(py::module_& module) {
  using Args = lowbit::W8a8Args;
  py::class_<Args> args(module, "W8a8Args");
  args.def(py::init([] { return Args{}; }));
  bind_pointer(args, "x", &Args::x);
  bind_pointer(args, "x_scales", &Args::x_scales);
  bind_pointer(args, "codes", &Args::codes);
  bind_pointer(args, "scales", &Args::scales);
  bind_pointer(args, "bias", &Args::bias);
  bind_pointer(args, "residual", &Args::residual);
  bind_pointer(args, "y", &Args::y);
  args.def_readwrite("m", &Args::m).def_readwrite("n", &Args::n).def_readwrite("k", &Args::k);
  module.def("w8a8_gemm", &w8a8_gemm);
  using Cutlass = lowbit::W8a8CutlassLaunch;
  py::class_<Cutlass> cutlass(module, "W8a8CutlassLaunch");
  cutlass.def(py::init([] { return Cutlass{}; }));
  cutlass.def_readwrite("device", &Cutlass::device).def_readwrite("processors", &Cutlass::processors);
  cutlass.def_readwrite("tile", &Cutlass::tile).def_readwrite("swizzle", &Cutlass::swizzle);
  module.def("w8a8_cutlass", &w8a8_cutlass);
}

void bind_row_norm(py::module_& module) {
  using Args = lowbit::RowNormArgs;
  py::class_<Args> args(module, "RowNormArgs");
  args.def(py::init([] { return Args{}; }));
  bind_pointer(args, "x", &Args::x);
  bind_pointer(args, "weight", &Args::weight);
  bind_pointer(args, "bias", &Args::bias);
  bind_pointer(args, "input_scale", &Args::input_scale);
  bind_pointer(args, "y", &Args::y);
  bind_pointer(args, "codes", &Args::codes);
  bind_pointer(args, "scales", &Args::scales);
  bind_enum(args, "norm", &Args::norm);
  bind_enum(args, "activation", &Args::activation);
  args.def_readwrite("m", &Args::m).def_readwrite("k", &Args::k).def_readwrite("eps", &Args::eps);
  args.def_readwrite("int8", &Args::int8);
  module.def("row_norm", &row_norm);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CUDA kernels on raw pointers; see quant/kernels/ops.py for the operators.";
  module.attr("architectures") = LOWBIT_ARCHITECTURES;
  module.attr("cuda_version") = CUDART_VERSION;
  bind_wna16(module);
  bind_dequantize(module);
  bind_gptq(module);
  bind_attention(module);
  bind_row_norm(module);
  bind_dense(module);
  bind_choose_tokens(module);
  bind_w8a8(module);
}
