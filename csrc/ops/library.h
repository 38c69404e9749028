// What every csrc/ops/<op>.cpp shares. Each of those files is compiled once into every kernel library (CPU instruction
// sets, CUDA, sim); this header is the one place that knows which library is being built.
//
// PYNN_LIBRARY(m) registers the kernels. PYNN_CHECKS(m) registers the validation of an op alone, as `<op>_check`, for
// implementations that are not in C++ (Triton): it lives in the CPU library and serves tensors of every device.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "dtype.h"

#if defined(PYNN_CUDA)
#include <dlfcn.h>
#define PYNN_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(pynn, CUDA, m)
#elif defined(PYNN_SIM)
#define PYNN_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(pynn_sim, CPU, m)
#else
#define PYNN_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(pynn, CPU, m)
#define PYNN_CHECKS(m) STABLE_TORCH_LIBRARY_IMPL(pynn, CompositeExplicitAutograd, m)
#endif

namespace pynn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Bad input ends here: the message names the op, the argument, what came and what was expected.
#define PYNN_CHECK(condition, ...) \
  do {                             \
    if (!(condition)) [[unlikely]] \
      ::pynn::fail(__VA_ARGS__);   \
  } while (false)

inline std::string to_string(Sizes sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t d = 0; d < sizes.size(); ++d) out << (d ? ", " : "") << sizes[d];
  out << ']';
  return out.str();
}
inline std::string shape_of(const Tensor& tensor) { return to_string(tensor.sizes()); }

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "an unsupported dtype";
  }
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

inline void check_floating(const char* op, const char* argument, const Tensor& tensor) {
  PYNN_CHECK(is_floating(tensor.scalar_type()), op, ": expected ", argument,
             " to be float64, float32, float16 or bfloat16, got ", name_of(tensor.scalar_type()));
}
inline void check_same_dtype(const char* op, const char* argument, const Tensor& tensor, const char* other_argument,
                             const Tensor& other) {
  PYNN_CHECK(tensor.scalar_type() == other.scalar_type(), op, ": expected ", argument, " and ", other_argument,
             " to have the same dtype, got ", name_of(tensor.scalar_type()), " and ", name_of(other.scalar_type()));
}
inline void check_same_device(const char* op, const char* argument, const Tensor& tensor, const char* other_argument,
                              const Tensor& other) {
  PYNN_CHECK(tensor.device() == other.device(), op, ": expected ", argument, " and ", other_argument,
             " to be on the same device");
}
inline void check_rank(const char* op, const char* argument, const Tensor& tensor, int64_t rank) {
  PYNN_CHECK(tensor.dim() == rank, op, ": expected ", argument, " to have ", rank, " dimensions, got ", tensor.dim(),
             " (shape ", shape_of(tensor), ")");
}
inline void check_shape(const char* op, const char* argument, const Tensor& tensor,
                        std::initializer_list<int64_t> shape) {
  const Sizes expected(shape.begin(), shape.size());
  bool same = size_t(tensor.dim()) == shape.size();
  for (size_t d = 0; same && d < shape.size(); ++d) same = tensor.size(int64_t(d)) == expected[d];
  PYNN_CHECK(same, op, ": expected ", argument, " of shape ", to_string(expected), ", got ", shape_of(tensor));
}
inline void check_same_shape(const char* op, const char* argument, const Tensor& tensor, const char* other_argument,
                             const Tensor& other) {
  bool same = tensor.dim() == other.dim();
  for (int64_t d = 0; same && d < tensor.dim(); ++d) same = tensor.size(d) == other.size(d);
  PYNN_CHECK(same, op, ": expected ", argument, " to have the shape of ", other_argument, " ", shape_of(other),
             ", got ", shape_of(tensor));
}

// a * b, or an error when the product does not fit 63 bits.
inline int64_t checked_multiply(const char* op, int64_t a, int64_t b) {
  int64_t product;
  PYNN_CHECK(!__builtin_mul_overflow(a, b, &product), op, ": tensor size overflows 64 bits (", a, " x ", b, ")");
  return product;
}

template <class T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* mutable_pointer(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// An uninitialised tensor on the device of `like`. Several times cheaper than torch::stable::empty and new_empty, which
// look the op up by name; sizes and strides are the caller's to check.
inline Tensor new_strided(const Tensor& like, size_t rank, const int64_t* shape, const int64_t* strides,
                          ScalarType dtype) {
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(rank), shape, strides, type, device_type, device_index, &handle));
  return Tensor(handle);
}

// The same, contiguous.
inline Tensor new_dense(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  constexpr size_t kMost = 8;
  PYNN_CHECK(shape.size() <= kMost, "pynn: tensors of at most ", kMost, " dimensions");
  int64_t strides[kMost], stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape.begin()[d], 1)) strides[d] = stride;
  return new_strided(like, shape.size(), shape.begin(), strides, dtype);
}

// Device memory for a launcher, freed in stream order when this goes out of scope.
class __attribute__((visibility("hidden"))) Scratch {
 public:
  Scratch(const Tensor& like, int64_t bytes) {
    if (bytes > 0) memory_ = new_dense(like, {bytes}, ScalarType::Byte);
  }
  void* get() { return memory_ ? memory_->mutable_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> memory_;
};

// Calls body with a value-less tag of the storage type: dispatch(dtype, [&](auto tag) { using T = typename
// decltype(tag)::type; ... })
template <class T>
struct Tag {
  using type = T;
};
template <class Body>
auto dispatch_floating(const char* op, ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(Tag<double>{});
    case ScalarType::Float:
      return body(Tag<float>{});
    case ScalarType::Half:
      return body(Tag<Half>{});
    case ScalarType::BFloat16:
      return body(Tag<BFloat16>{});
    default:
      fail(op, ": expected a floating dtype, got ", name_of(dtype));
  }
}

#ifdef PYNN_CUDA
// Makes the tensor's device current for as long as it lives, and converts to the stream torch launches on there.
class Stream {
 public:
  explicit Stream(const Tensor& tensor) : guard_(tensor.get_device_index()), stream_(get(tensor.get_device_index())) {}
  operator void*() const { return stream_; }

 private:
  static void* get(int32_t device);
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

// Looked up at run time, so that libpynn_cuda.so also loads beside a CPU-only torch.
inline void* Stream::get(int32_t device) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  PYNN_CHECK(get_stream, "pynn: a CUDA tensor needs a CUDA build of torch");
  void* stream = nullptr;
  PYNN_CHECK(get_stream(device, &stream) == 0, "pynn: torch gave no current CUDA stream");
  return stream;
}
// A temporary in a launcher's argument list lives until the launch is done.
inline Stream current_stream(const Tensor& tensor) { return Stream(tensor); }
#else
inline void* current_stream(const Tensor&) { return nullptr; }
#endif

}  // namespace pynn
