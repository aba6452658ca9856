// A kernel's declaration: structs whose fields, enums whose values and launchers whose names Python knows, each written
// once. bindings.cpp fills and launches whatever is declared so.
//
//   struct ToyArgs {
//     LOWBIT_STRUCT(ToyArgs);
//     FIELD(const void*, x);  // (m, k): one FIELD a line
//     FIELD(int, m);
//   };
//   template <typename T>
//   cudaError_t launch_toy(const ToyArgs& args, const PlainLaunch& launch, cudaStream_t stream);
//   const Kernel toy("toy", {name_of<LOWBIT_T>}, launch_toy<LOWBIT_T>);
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <span>
#include <string>
#include <type_traits>

namespace lowbit {

enum class Kind { kPointer, kInt, kInt64, kFloat, kBool, kEnum, kStruct };

struct Field {
  const char* name;
  size_t offset, size, alignment;
  Kind kind;
  const char* values;                    // of an enum: "none, rms, layer", 0 the first
  std::span<const Field> (*parts)();     // of a struct
};

template <int kLine>
struct Line {};

constexpr int kMostLines = 80;  // of a struct

// An enum and, for Python, its values by name.
#define LOWBIT_ENUM(NAME, ...)           \
  enum class NAME : int { __VA_ARGS__ }; \
  constexpr const char* values_of(NAME) { return #__VA_ARGS__; }

// Opens a struct whose members are FIELDs: each leaves a function that describes it, found by its line.
#define LOWBIT_STRUCT(NAME) \
  using Self = NAME;        \
  static constexpr int kFirstLine = __LINE__

#define FIELD(TYPE, NAME)                                                                      \
  TYPE NAME;                                                                                   \
  static constexpr ::lowbit::Field describe(::lowbit::Line<__LINE__ - kFirstLine>) {           \
    return ::lowbit::field_of<TYPE>(#NAME, offsetof(Self, NAME));                              \
  }                                                                                            \
  static_assert(__LINE__ - kFirstLine < ::lowbit::kMostLines)

template <typename Struct>
std::span<const Field> fields_of();

template <typename T>
constexpr Field field_of(const char* name, size_t offset) {
  Field field = {name, offset, sizeof(T), alignof(T), Kind::kStruct, nullptr, nullptr};
  if constexpr (std::is_pointer_v<T>) field.kind = Kind::kPointer;
  else if constexpr (std::is_same_v<T, int>) field.kind = Kind::kInt;
  else if constexpr (std::is_same_v<T, int64_t>) field.kind = Kind::kInt64;
  else if constexpr (std::is_same_v<T, float>) field.kind = Kind::kFloat;
  else if constexpr (std::is_same_v<T, bool>) field.kind = Kind::kBool;
  else if constexpr (std::is_enum_v<T>) field.kind = Kind::kEnum, field.values = values_of(T{});
  else field.parts = fields_of<T>;
  return field;
}

// Calls use(field) for every FIELD of Struct, in order.
template <typename Struct, int kLine = 0, typename Use>
constexpr void for_each_field(Use use) {
  if constexpr (requires { Struct::describe(Line<kLine>{}); }) use(Struct::describe(Line<kLine>{}));
  if constexpr (kLine + 1 < kMostLines) for_each_field<Struct, kLine + 1>(use);
}

constexpr size_t aligned(size_t offset, size_t alignment) { return (offset + alignment - 1) / alignment * alignment; }

// True if the FIELDs are all of Struct. Nothing would fill another member.
template <typename Struct>
constexpr bool is_whole() {
  size_t end = 0;
  bool whole = true;
  for_each_field<Struct>([&](const Field& field) {
    whole = whole && field.offset == aligned(end, field.alignment);
    end = field.offset + field.size;
  });
  return whole && aligned(end, alignof(Struct)) == sizeof(Struct);
}

template <typename Struct>
constexpr size_t count_of() {
  size_t count = 0;
  for_each_field<Struct>([&](const Field&) { ++count; });
  return count;
}

template <typename Struct>
std::span<const Field> fields_of() {
  static_assert(is_whole<Struct>(), "every member is a FIELD, one a line");
  static_assert(std::is_trivially_copyable_v<Struct>);
  static const auto fields = [] {
    std::array<Field, count_of<Struct>()> found;
    size_t place = 0;
    for_each_field<Struct>([&](const Field& field) { found[place++] = field; });
    return found;
  }();
  return fields;
}

// torch's name of a type.
template <typename T>
constexpr const char* name_of = nullptr;
template <>
constexpr const char* name_of<__half> = "float16";
template <>
constexpr const char* name_of<__nv_bfloat16> = "bfloat16";
template <>
constexpr const char* name_of<float> = "float32";
template <>
constexpr const char* name_of<int8_t> = "int8";
template <>
constexpr const char* name_of<__nv_fp8_e4m3> = "float8_e4m3fn";

constexpr size_t kMostBytes = 512;  // of a struct

// Makes a launcher known under "<name> <variant> ...", such as "wna16_gemv float16 4", while an object of it lives.
struct Kernel {
  std::span<const Field> args, launch;
  std::function<cudaError_t(const void* args, const void* launch, cudaStream_t)> run;

  template <typename Args, typename Launch>
  Kernel(std::string name, std::initializer_list<std::string> variant,
         cudaError_t (*launcher)(const Args&, const Launch&, cudaStream_t))
      : args(fields_of<Args>()), launch(fields_of<Launch>()) {
    static_assert(sizeof(Args) <= kMostBytes && sizeof(Launch) <= kMostBytes);
    run = [launcher](const void* args, const void* launch, cudaStream_t stream) {
      return launcher(*static_cast<const Args*>(args), *static_cast<const Launch*>(launch), stream);
    };
    for (const std::string& part : variant) name += " " + part;
    all().emplace(name, this);
  }

  Kernel(const Kernel&) = delete;

  static std::map<std::string, const Kernel*>& all() {
    static std::map<std::string, const Kernel*> kernels;
    return kernels;
  }
};

}  // namespace lowbit
