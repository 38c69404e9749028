// The products of whole sequences, for launchers that leave them to the library's matrix multiplication.
#pragma once
#include "recurrent_check.h"

namespace pynn {

// A matrix in device memory; strides are in elements.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, row_stride, column_stride = 1;
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  Matrix from_column(int64_t first, int64_t count) const {
    return {data + first * column_stride, rows, count, row_stride, column_stride};
  }
};

template <class T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, Half>) return ScalarType::Half;
  if constexpr (std::is_same_v<T, BFloat16>) return ScalarType::BFloat16;
  return ScalarType::Float;
}

// Multiplies in views of the memory: neither autograd nor autocast sees the operands. `like` gives the device.
template <class T>
class Products {
  using A = accumulate_t<T>;
  static constexpr bool kNarrow = sizeof(T) == 2;
#ifdef PYNN_SIM
  // On the CPU the library's order of summation depends on the number of rows and on alignment. Copies, and sums in
  // double that are rounded once, keep that out of tests that compare bits.
  static constexpr ScalarType kSum = ScalarType::Double;
#else
  static constexpr ScalarType kSum = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
#endif
#ifdef PYNN_CUDA
  static constexpr bool kDirect = true;  // the library sums 16-bit products in float32
#else
  static constexpr bool kDirect = kSum == scalar_type_of<T>();
#endif

 public:
  explicit Products(const Tensor& like) : like_(like) {}

  // out = a b, a contiguous (a.rows, b.columns).
  void multiply(const Matrix<T>& a, const Matrix<T>& b, T* out) const {
    Tensor to = view(Matrix<T>{out, a.rows, b.columns, b.columns});
    if constexpr (kDirect)
      call("aten::mm", "out", wide(a), wide(b), to);
    else
      torch::stable::copy_(to, product(a, b));
  }

  // a b summed and left in the compute type.
  Tensor product(const Matrix<T>& a, const Matrix<T>& b) const {
    Tensor out = new_dense(like_, {a.rows, b.columns}, kSum);
#ifdef PYNN_CUDA
    if constexpr (kNarrow) {
      call("aten::mm", "dtype_out", view(a), view(b), scalar_type_of<A>(), out);
      return out;
    }
#endif
    call("aten::mm", "out", wide(a), wide(b), out);
    return kSum == scalar_type_of<A>() ? out : torch::stable::to(out, scalar_type_of<A>());
  }

  // The sum of the rows, (columns), in the compute type.
  Tensor sum_rows(const Matrix<T>& a) const {
    const int64_t first[] = {0};
    return torch::stable::sum(view(a), Sizes(first, 1), false, scalar_type_of<A>());
  }

 private:
  Tensor view(const Matrix<T>& m) const {
    const int64_t sizes[] = {m.rows, m.columns}, strides[] = {m.row_stride, m.column_stride};
    return torch::stable::from_blob(const_cast<T*>(m.data), Sizes(sizes, 2), Sizes(strides, 2), like_.device(),
                                    scalar_type_of<T>());
  }
  // In the type of the sums.
  Tensor wide(const Matrix<T>& m) const {
#ifdef PYNN_SIM
    if constexpr (std::is_same_v<T, double>) return torch::stable::clone(view(m));
#endif
    return kDirect ? view(m) : torch::stable::to(view(m), kSum);
  }
  template <class... Arguments>
  static void call(const char* name, const char* overload, const Arguments&... arguments) {
    std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // owns the result's handle
  }

  const Tensor& like_;
};

// The state before each step: output moved by one step, with hx at the end a row starts from. (steps, batch, state)
inline Tensor states_before(const Tensor& output, const Tensor& hx, const OptionalTensor& lengths, bool reverse) {
  const int64_t steps = output.size(0), batch = output.size(1), state = output.size(2);
  Tensor before = torch::stable::new_empty(output, output.sizes());
  Tensor source = output, moved = torch::stable::narrow(before, 0, reverse ? 0 : 1, steps - 1);
  torch::stable::copy_(moved, torch::stable::narrow(source, 0, reverse ? 1 : 0, steps - 1));
  Tensor start = torch::stable::narrow(before, 0, reverse ? steps - 1 : 0, 1);
  const Tensor first = hx.dim() == 3 ? hx : torch::stable::unsqueeze(hx, 0);
  torch::stable::copy_(start, first);
  if (!reverse || !lengths) return before;
  // Row b starts at step lengths[b] - 1. What is written for lengths of 0 meets gradients of 0.
  const auto dispatch = [](const char* name, const char* overload, auto... arguments) {
    std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  };
  const auto number = [&](int64_t value) {
    Tensor tensor = torch::stable::new_empty(*lengths, {1});
    return torch::stable::fill_(tensor, double(value));
  };
  // lengths - 1. The stable ABI's subtract brings a floating alpha, which integers refuse.
  const Tensor last = dispatch("aten::bitwise_not", "", dispatch("aten::neg", "", *lengths));
  const Tensor step =
      dispatch("aten::clamp", "Tensor", last, OptionalTensor(number(0)), OptionalTensor(number(steps - 1)));
  const int64_t column[] = {1, batch, 1}, whole[] = {1, batch, state};
  const Tensor index =
      dispatch("aten::expand", "", torch::stable::reshape(step, Sizes(column, 3)), Sizes(whole, 3), false);
  dispatch("aten::scatter_", "src", before, int64_t(0), index, first);
  return before;
}

}  // namespace pynn
