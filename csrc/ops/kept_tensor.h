// Large tensors of CPU kernels in memory that is kept when they are gone.
#pragma once
#include <mutex>
#include <utility>

#include "large_memory.h"

namespace pynn {

#if defined(PYNN_CUDA) || defined(PYNN_SIM)
// The device's allocator keeps memory itself.
inline Tensor new_kept(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return new_dense(like, shape, dtype);
}
inline Tensor new_kept(const Tensor& like, Sizes shape, Sizes strides, ScalarType dtype, int64_t) {
  return new_strided(like, shape.size(), shape.data(), strides.data(), dtype);
}
#else
// The gradients of weights, and what forward keeps for backward, are megabytes that come and go with every step of a
// training. The system's allocator tends to give them back to the system and to take them again: pages of 4 KiB, each
// cleared at its first touch, which takes longer than the products of a short sequence. Of blocks whose tensors are
// gone the process keeps the latest, kKeptBytes in all.
class __attribute__((visibility("hidden"))) KeptBlocks {
 public:
  static KeptBlocks& of_process() {
    static auto* const blocks = new KeptBlocks;  // tensors may outlive whatever is destroyed at exit
    return *blocks;
  }

  LargeMemory take(int64_t bytes) {
    // Without waiting: a child process may find the lock held by a thread that it does not have.
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock)
      for (size_t i = blocks_.size(); i-- > 0;)
        if (blocks_[i].bytes == LargeMemory::size_of(bytes)) {
          LargeMemory block = std::move(blocks_[i]);
          blocks_.erase(blocks_.begin() + std::ptrdiff_t(i));
          bytes_ -= block.bytes;
          return block;
        }
    return LargeMemory(bytes);
  }

  void give(LargeMemory block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || block.bytes > kKeptBytes) return;
    bytes_ += block.bytes;
    blocks_.push_back(std::move(block));
    size_t oldest = 0;
    while (bytes_ > kKeptBytes) bytes_ -= blocks_[oldest++].bytes;
    blocks_.erase(blocks_.begin(), blocks_.begin() + std::ptrdiff_t(oldest));
  }

 private:
  std::mutex mutex_;
  std::vector<LargeMemory> blocks_;  // the latest last
  int64_t bytes_ = 0;
};

// new_strided of a tensor without holes, in such a block from that many bytes on.
inline Tensor new_kept(const Tensor& like, Sizes shape, Sizes strides, ScalarType dtype, int64_t large) {
  int64_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  for (const int64_t size : shape) bytes *= size;
  if (bytes < large) return new_strided(like, shape.size(), shape.data(), strides.data(), dtype);
  LargeMemory block = KeptBlocks::of_process().take(bytes);
  const int64_t size = block.bytes;
  const auto give_back = [size](void* memory) {
    LargeMemory returned;
    returned.memory.reset(memory), returned.bytes = size;
    KeptBlocks::of_process().give(std::move(returned));
  };
  const Tensor tensor = torch::stable::from_blob(block.memory.get(), shape, strides, like.device(), dtype, give_back);
  block.memory.release();
  return tensor;
}
// new_dense, in such a block if the tensor is large.
inline Tensor new_kept(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  constexpr int64_t kLarge = 128 << 10;  // from where the system's allocator begins to ask the system
  int64_t strides[4], count = 1;
  PYNN_CHECK(shape.size() <= 4, "pynn: tensors of at most 4 dimensions");
  for (size_t d = shape.size(); d-- > 0; count *= shape.begin()[d]) strides[d] = count;
  return new_kept(like, Sizes(shape.begin(), shape.size()), Sizes(strides, shape.size()), dtype, kLarge);
}
#endif

}  // namespace pynn
