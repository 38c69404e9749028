// Threads: torch's own pool. A kernel's result must not depend on how the range is cut.
#pragma once
#include <torch/csrc/stable/ops.h>

namespace pynn::cpu {

// Calls body(begin, end) on pieces of [0, count). The body must not throw.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (count <= grain) return body(int64_t(0), count);
  torch::stable::parallel_for(0, count, grain, body);
}

}  // namespace pynn::cpu
