// lowbit.quant._C: launches the kernels that were declared as declare.cuh says, on raw device pointers and a stream.
// Knows nothing of torch: a tensor is what has data_ptr(), and shapes have been checked by quant/kernels. A CUDA error
// becomes a RuntimeError.
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "declare.cuh"

namespace py = pybind11;

namespace {

using lowbit::Field;
using lowbit::Kernel;
using lowbit::Kind;

std::string names_of(std::span<const Field> fields) {
  std::string names;
  for (const Field& field : fields) names += (names.empty() ? "" : ", ") + std::string(field.name);
  return names;
}

uintptr_t address_of(py::handle value) {
  if (value.is_none()) return 0;
  return py::cast<uintptr_t>(value.attr("data_ptr")());
}

// The place of `name` in "none, rms, layer".
int place_of(const std::string& name, const std::string& values) {
  int place = 0;
  for (size_t begin = 0; begin <= values.size(); ++place) {
    const size_t end = std::min(values.find(", ", begin), values.size());
    if (values.compare(begin, end - begin, name) == 0) return place;
    begin = end + 2;
  }
  throw py::value_error("'" + name + "' is none of " + values);
}

template <typename T>
void store(uint8_t* target, T value) {
  std::memcpy(target, &value, sizeof(T));
}

void fill(uint8_t* target, std::span<const Field> fields, const py::dict& values);

void fill_one(uint8_t* target, const Field& field, py::handle value) {
  switch (field.kind) {
    case Kind::kPointer: return store(target, address_of(value));
    case Kind::kInt: return store(target, py::cast<int>(value));
    case Kind::kInt64: return store(target, py::cast<int64_t>(value));
    case Kind::kFloat: return store(target, py::cast<float>(value));
    case Kind::kBool: return store(target, py::cast<bool>(value));
    case Kind::kEnum: return store(target, place_of(py::cast<std::string>(value), field.values));
    case Kind::kStruct: return fill(target, field.parts(), py::cast<py::dict>(value));
  }
}

// Every field by its name: ValueError where one has no value, or a value no field.
void fill(uint8_t* target, std::span<const Field> fields, const py::dict& values) {
  for (const Field& field : fields) {
    if (!values.contains(field.name)) throw py::value_error("no value for " + std::string(field.name));
    fill_one(target + field.offset, field, values[field.name]);
  }
  if (values.size() != fields.size())
    throw py::value_error(std::to_string(values.size()) + " values for the fields " + names_of(fields));
}

void launch(const std::string& name, const py::dict& args, const py::dict& cut, uintptr_t stream) {
  const auto found = Kernel::all().find(name);
  if (found == Kernel::all().end()) throw std::runtime_error(name + ": lowbit.quant._C was built without it");
  const Kernel& kernel = *found->second;
  alignas(16) uint8_t args_bytes[lowbit::kMostBytes] = {}, cut_bytes[lowbit::kMostBytes] = {};
  fill(args_bytes, kernel.args, args);
  fill(cut_bytes, kernel.launch, cut);
  const cudaError_t error = kernel.run(args_bytes, cut_bytes, reinterpret_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a launch error is reported once, here
  throw std::runtime_error(name + ": " + cudaGetErrorString(error));
}

py::dict described(std::span<const Field> fields) {
  py::dict found;
  for (const Field& field : fields) found[field.name] = field.values ? py::cast(field.values) : py::none();
  return found;
}

// The fields of a kernel's arguments and of its launch by name; of an enum, its values.
py::tuple fields(const std::string& name) {
  const Kernel& kernel = *Kernel::all().at(name);
  return py::make_tuple(described(kernel.args), described(kernel.launch));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CUDA kernels on raw pointers; see quant/kernels/ops.py for the operators.";
  module.attr("architectures") = LOWBIT_ARCHITECTURES;
  module.attr("cuda_version") = CUDART_VERSION;
  py::list names;
  for (const auto& [name, kernel] : Kernel::all()) names.append(name);
  module.attr("kernels") = py::tuple(names);
  module.def("launch", &launch, py::arg("kernel"), py::arg("args"), py::arg("cut"), py::arg("stream"));
  module.def("fields", &fields);
}
