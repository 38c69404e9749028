// csrc/cpu/parallel.h on torch's own pool of threads.
#include "../cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace pynn::cpu {

int64_t thread_count() { return torch::stable::get_num_threads(); }

void run_pieces(int64_t count, int64_t grain, Piece piece, const void* body) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { piece(body, begin, end); });
}

}  // namespace pynn::cpu
