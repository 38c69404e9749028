// Threads. A kernel's result must not depend on how the range is cut.
#pragma once
#include <cstdint>

namespace pynn::cpu {

using Piece = void (*)(const void* body, int64_t begin, int64_t end);

// In csrc/ops/parallel.cpp, because the kernels are compiled without torch: how many threads torch may use, and
// piece(body, begin, end) called from them.
int64_t thread_count();
void run_pieces(int64_t count, int64_t grain, Piece piece, const void* body);

// Calls body(begin, end) on pieces of [0, count). The body must not throw.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (count <= grain) return body(int64_t(0), count);
  const auto piece = [](const void* of, int64_t begin, int64_t end) { (*static_cast<const Body*>(of))(begin, end); };
  run_pieces(count, grain, piece, &body);
}

}  // namespace pynn::cpu
