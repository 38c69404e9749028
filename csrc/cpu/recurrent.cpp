// Recurrent layers on the CPU: forward. How the work is cut is told in recurrent_forward.h.
#include "recurrent.h"

#include "recurrent_forward.h"

namespace pynn::cpu {

template <class T>
int64_t Recurrent<T>::fwd_scratch(const RecurrentShape& shape) {
  return recurrent::with_pass<recurrent::ForwardPass, T>(RecurrentForward<T>{}, shape, nullptr,
                                                         [](auto&& pass) { return pass.bytes(); });
}

template <class T>
void Recurrent<T>::fwd(const RecurrentForward<T>& call, const RecurrentShape& shape, void* scratch, void*) {
  recurrent::with_pass<recurrent::ForwardPass, T>(call, shape, scratch, [](auto&& pass) { pass.run(); });
}

template struct Recurrent<double>;
template struct Recurrent<float>;
template struct Recurrent<Half>;
template struct Recurrent<BFloat16>;

}  // namespace pynn::cpu
