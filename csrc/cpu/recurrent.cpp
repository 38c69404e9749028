// Recurrent layers on the CPU: forward. How the work is cut is told in recurrent_forward.h.
#include "recurrent.h"

#include "recurrent_forward.h"

namespace pynn::cpu {
namespace {

template <class T, class Body>
auto with_pass(const RecurrentForward<T>& call, const RecurrentShape& shape, void* scratch, const Body& body) {
  using recurrent::ForwardPass;
  if (shape.cell == Cell::lstm) return body(ForwardPass<Cell::lstm, T>(call, shape, scratch));
  if (shape.cell == Cell::gru) return body(ForwardPass<Cell::gru, T>(call, shape, scratch));
  return body(ForwardPass<Cell::rnn_tanh, T>(call, shape, scratch));
}

}  // namespace

template <class T>
int64_t Recurrent<T>::fwd_scratch(const RecurrentShape& shape) {
  return with_pass<T>({}, shape, nullptr, [](auto&& pass) { return pass.bytes(); });
}

template <class T>
void Recurrent<T>::fwd(const RecurrentForward<T>& call, const RecurrentShape& shape, void* scratch, void*) {
  with_pass<T>(call, shape, scratch, [](auto&& pass) { pass.run(); });
}

template struct Recurrent<double>;
template struct Recurrent<float>;
template struct Recurrent<Half>;
template struct Recurrent<BFloat16>;

}  // namespace pynn::cpu
