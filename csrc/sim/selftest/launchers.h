// The frame in which every launcher of every op is run without torch, for the sanitizers and for coverage. An op adds
// one file, launchers_<op>.cpp, which defines `const launchers::Op op{"name", &launch}`.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "dtype.h"

namespace launchers {

// One pass over all cases of an op: the same inputs each time, outputs that start as `fill` bytes. Each operand is an
// allocation of exactly its size, so that ASan knows its end.
class Run {
 public:
  // once: for race detection and coverage.
  Run(int fill, bool once) : fill_(fill), once_(once) {}

  bool once() const { return once_; }

  // count values made by value(i).
  template <class T, class Value>
  const T* input(size_t count, const Value& value) {
    T* memory = allocate<T>(count);
    for (size_t i = 0; i < count; ++i) memory[i] = value(i);
    return memory;
  }
  // count random normals of a floating type.
  template <class T>
  const T* normals(size_t count) {
    return input<T>(count, [this](size_t) { return pynn::from_float<T>(pynn::accumulate_t<T>(normal_(generator_))); });
  }
  // Compared between schedules once the pass is over: every element must have been written.
  template <class T>
  T* output(size_t count) {
    T* memory = scratch<T>(count);
    outputs_.push_back({reinterpret_cast<const char*>(memory), count * sizeof(T)});
    return memory;
  }
  // Memory for a launcher's own use.
  template <class T>
  T* scratch(size_t count) {
    T* memory = allocate<T>(count);
    memset(static_cast<void*>(memory), fill_, count * sizeof(T));
    return memory;
  }

  std::vector<char> results() const {
    std::vector<char> all;
    for (const Output& output : outputs_) all.insert(all.end(), output.bytes, output.bytes + output.count);
    return all;
  }

 private:
  struct Output {
    const char* bytes;
    size_t count;
  };
  template <class T>
  T* allocate(size_t count) {
    std::shared_ptr<T[]> memory(new T[count]);
    kept_.push_back(memory);
    return memory.get();
  }

  int fill_;
  bool once_;
  std::mt19937 generator_{1};
  std::normal_distribution<double> normal_;
  std::vector<std::shared_ptr<void>> kept_;
  std::vector<Output> outputs_;
};

struct Op {
  Op(const char* name, void (*launch)(Run&));
  const char* name;
  void (*launch)(Run&);
};

// Calls body with a value of each floating storage type. Half differs from BFloat16 by an instruction and a rounding:
// its kernels have the same lines and the same races.
template <class Body>
void for_each_type(const Run& run, const Body& body) {
  body(double{});
  body(float{});
  if (!run.once()) body(pynn::Half{});
  body(pynn::BFloat16{});
}

}  // namespace launchers
