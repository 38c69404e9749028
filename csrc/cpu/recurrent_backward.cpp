// Recurrent layers on the CPU: backward. How the work is cut is told in recurrent_backward.h.
#include "recurrent_backward.h"

#include "recurrent.h"

namespace pynn::cpu {

template <class T>
int64_t Recurrent<T>::bwd_scratch(const RecurrentShape& shape) {
  return recurrent::with_pass<recurrent::BackwardPass, T>(RecurrentBackward<T>{}, shape, nullptr,
                                                          [](auto&& pass) { return pass.bytes(); });
}

template <class T>
void Recurrent<T>::bwd(const RecurrentBackward<T>& call, const RecurrentShape& shape, void* scratch, void*) {
  recurrent::with_pass<recurrent::BackwardPass, T>(call, shape, scratch, [](auto&& pass) { pass.run(); });
}

template struct Recurrent<double>;
template struct Recurrent<float>;
template struct Recurrent<Half>;
template struct Recurrent<BFloat16>;

}  // namespace pynn::cpu
