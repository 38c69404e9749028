// Recurrent layers on the CPU: backward. How the work is cut is told in recurrent_backward.h.
#include "recurrent_backward.h"

#include "recurrent.h"

namespace pynn::cpu {
namespace {

template <class T, class Body>
auto with_pass(const RecurrentBackward<T>& call, const RecurrentShape& shape, void* scratch, const Body& body) {
  using recurrent::BackwardPass;
  if (shape.cell == Cell::lstm) return body(BackwardPass<Cell::lstm, T>(call, shape, scratch));
  if (shape.cell == Cell::gru) return body(BackwardPass<Cell::gru, T>(call, shape, scratch));
  return body(BackwardPass<Cell::rnn_tanh, T>(call, shape, scratch));
}

}  // namespace

template <class T>
int64_t Recurrent<T>::bwd_scratch(const RecurrentShape& shape) {
  return with_pass<T>({}, shape, nullptr, [](auto&& pass) { return pass.bytes(); });
}

template <class T>
void Recurrent<T>::bwd(const RecurrentBackward<T>& call, const RecurrentShape& shape, void* scratch, void*) {
  with_pass<T>(call, shape, scratch, [](auto&& pass) { pass.run(); });
}

template struct Recurrent<double>;
template struct Recurrent<float>;
template struct Recurrent<Half>;
template struct Recurrent<BFloat16>;

}  // namespace pynn::cpu
