// Planted bugs as torch ops, to see how they reach Python.
#include "library.h"
#include "planted.cuh"

namespace {

using torch::stable::Tensor;

Tensor divergent_barrier(Tensor y) {
  LAUNCH(planted::divergent_barrier, dim3(2, 3), dim3(32, 2), 0, nullptr, static_cast<float*>(y.mutable_data_ptr()));
  return y;
}

Tensor too_much_shared(Tensor y) {
  LAUNCH(planted::nothing, 1, 32, 300 * 1024, nullptr, static_cast<float*>(y.mutable_data_ptr()));
  return y;
}

Tensor nothing(Tensor y) {
  LAUNCH(planted::nothing, 1, 32, 0, nullptr, static_cast<float*>(y.mutable_data_ptr()));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY(pynn_planted, m) {
  m.def("divergent_barrier(Tensor(a!) y) -> Tensor(a!)");
  m.def("too_much_shared(Tensor(a!) y) -> Tensor(a!)");
  m.def("nothing(Tensor(a!) y) -> Tensor(a!)");
}

STABLE_TORCH_LIBRARY_IMPL(pynn_planted, CPU, m) {
  m.impl("divergent_barrier", TORCH_BOX(&divergent_barrier));
  m.impl("too_much_shared", TORCH_BOX(&too_much_shared));
  m.impl("nothing", TORCH_BOX(&nothing));
}
