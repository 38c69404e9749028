// Recurrent layers on the CPU: forward. How the work is cut is told in recurrent_forward.h.
#include "recurrent.h"

#include "recurrent_forward.h"

namespace pynn::cpu {
namespace {
template <Cell kCell, class T>
using InFloats = recurrent::ForwardPass<kCell, T, MultiplyAdd>;
template <Cell kCell, class T>
using InPairs = recurrent::ForwardPass<kCell, T, MultiplyAddPairs>;

// body(pass). Which products it takes depends on the sizes alone: all parts of a sequence have the same bits.
template <class T, class Body>
auto with_forward(const RecurrentForward<T>& call, const RecurrentShape& shape, void* scratch, const Body& body) {
  if constexpr (std::is_same_v<T, BFloat16> && !std::is_same_v<MultiplyAdd, MultiplyAddPairs>)
    if (has_pair_products() && shape.input % 2 == 0 && shape.state % 2 == 0)
      return recurrent::with_pass<InPairs, T>(call, shape, scratch, body);
  return recurrent::with_pass<InFloats, T>(call, shape, scratch, body);
}
}  // namespace

template <class T>
int64_t Recurrent<T>::fwd_scratch(const RecurrentShape& shape) {
  return with_forward<T>(RecurrentForward<T>{}, shape, nullptr, [](auto&& pass) { return pass.bytes(); });
}

template <class T>
void Recurrent<T>::fwd(const RecurrentForward<T>& call, const RecurrentShape& shape, void* scratch, void*) {
  with_forward<T>(call, shape, scratch, [](auto&& pass) { pass.run(); });
}

template struct Recurrent<double>;
template struct Recurrent<float>;
template struct Recurrent<Half>;
template struct Recurrent<BFloat16>;

}  // namespace pynn::cpu
