// Every wrapper of csrc/cuda/primitives.cuh run on the GPU and compared with its twin on the host: what the sim
// believes about the hardware. Prints a table; exit status 0 all agree, 1 something differs, 77 no GPU (nothing was
// checked).
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../twins.h"
#include "kernels.cuh"

namespace {

using pynn::BFloat16;
using pynn::bit_cast;
using pynn::Half;
using namespace pynn::cuda;
namespace twins = pynn::twins;

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("primitives_check: %s failed: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// A vector with a copy on the device.
template <class T>
class Array {
 public:
  explicit Array(std::vector<T> values) : host(std::move(values)) {
    check_cuda(cudaMalloc(&device_, bytes()), "cudaMalloc");
    check_cuda(cudaMemcpy(device_, host.data(), bytes(), cudaMemcpyHostToDevice), "cudaMemcpy to the device");
  }
  explicit Array(size_t count) : Array(std::vector<T>(count)) {}
  ~Array() { cudaFree(device_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T* device() { return device_; }
  const std::vector<T>& fetch() {
    check_cuda(cudaDeviceSynchronize(), "a kernel");
    check_cuda(cudaMemcpy(host.data(), device_, bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy to the host");
    return host;
  }
  std::vector<T> host;

 private:
  size_t bytes() const { return host.size() * sizeof(T); }
  T* device_ = nullptr;
};

int failed_rows = 0;

void report(const char* name, size_t cases, size_t wrong, const std::string& detail = "") {
  failed_rows += wrong != 0;
  std::printf("%-28s %8zu cases %6zu differ  %-6s %s\n", name, cases, wrong, wrong ? "FAILED" : "ok", detail.c_str());
}

std::mt19937 generator(1);
uint32_t random_bits() { return generator(); }
float random_normal() { return std::normal_distribution<float>()(generator); }

// ---- cp.async ----

template <int size>
__global__ void copy_kernel(const unsigned char* from, unsigned char* to) {
  SHARED_ARRAY(uint4, tile, (size + 1) * size / 16 + 1);
  auto* bytes = reinterpret_cast<unsigned char*>(tile);
  const int valid = int(threadIdx.x);  // thread v copies v bytes and fills the rest of its size bytes with zeros
  for (int i = 0; i < size; ++i) bytes[valid * size + i] = 0xee;
  cp_async<size>(bytes + valid * size, from + valid * size, valid);
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < size; ++i) to[valid * size + i] = bytes[valid * size + i];
}

template <int size>
void check_copy() {
  constexpr int count = (size + 1) * size;
  std::vector<unsigned char> values(count);
  for (auto& value : values) value = static_cast<unsigned char>(random_bits() | 1);
  Array<unsigned char> from(values), to(count);
  LAUNCH(copy_kernel<size>, 1, size + 1, 0, nullptr, from.device(), to.device());
  const auto& got = to.fetch();
  size_t wrong = 0;
  for (int valid = 0; valid <= size; ++valid)
    for (int i = 0; i < size; ++i) {
      const int at = valid * size + i;
      wrong += got[at] != (i < valid ? values[at] : 0);
    }
  report(("cp_async<" + std::to_string(size) + ">, all lengths").c_str(), size + 1, wrong);
}

// Two groups under way; waiting for the older one must be enough to read it.
__global__ void copy_groups_kernel(const uint4* from, uint4* to) {
  SHARED_ARRAY(uint4, tile, 2 * 128);
  const int i = int(threadIdx.x);
  for (int group = 0; group < 2; ++group) {
    cp_async<16>(tile + 128 * group + i, from + 128 * group + i);
    cp_async_commit();
  }
  cp_async_wait<1>();
  to[i] = tile[i];
  cp_async_wait<0>();
  to[128 + i] = tile[128 + i];
}

void check_copy_groups() {
  std::vector<uint4> values(256);
  for (auto& v : values) v = make_uint4(random_bits(), random_bits(), random_bits(), random_bits());
  Array<uint4> from(values), to(256);
  LAUNCH(copy_groups_kernel, 1, 128, 0, nullptr, from.device(), to.device());
  const auto& got = to.fetch();
  size_t wrong = 0;
  for (int i = 0; i < 256; ++i)
    wrong += got[i].x != values[i].x || got[i].y != values[i].y || got[i].z != values[i].z || got[i].w != values[i].w;
  report("cp_async_wait<1>, <0>", 256, wrong);
}

// ---- ldmatrix ----

void check_ldmatrix() {
  std::vector<uint16_t> values(4 * 64);
  for (auto& value : values) value = uint16_t(random_bits());
  Array<uint16_t> rows(values);
  Array<uint32_t> registers(32 * 14);
  LAUNCH(selftest::matrices, 1, 32, 0, nullptr, rows.device(), registers.device());
  const auto& got = registers.fetch();
  const char* names[6] = {"ldmatrix x1",       "ldmatrix x2",       "ldmatrix x4",
                          "ldmatrix_trans x1", "ldmatrix_trans x2", "ldmatrix_trans x4"};
  const int first[7] = {0, 1, 3, 7, 8, 10, 14};  // registers of selftest::matrices
  for (int variant = 0; variant < 6; ++variant) {
    size_t wrong = 0;
    for (int lane = 0; lane < 32; ++lane)
      for (int i = first[variant]; i < first[variant + 1]; ++i) {
        uint32_t expected = 0;
        for (int high = 0; high < 2; ++high) {
          const auto element = twins::ldmatrix_element(lane, high, variant >= 3);
          const int matrix = i - first[variant];
          expected |= uint32_t(values[64 * matrix + 8 * element.row + element.column]) << (16 * high);
        }
        wrong += got[lane * 14 + i] != expected;
      }
    report(names[variant], size_t(32) * (first[variant + 1] - first[variant]), wrong);
  }
}

// ---- mma ----

struct Tf32 {};

// One warp per case; operands are registers, lane by lane.
template <class T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  const int at = int(blockIdx.x) * 32 + int(threadIdx.x);
  uint32_t fragment_a[4], fragment_b[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) fragment_a[i] = a[at * 4 + i], sums[i] = c[at * 4 + i];
  for (int i = 0; i < 2; ++i) fragment_b[i] = b[at * 2 + i];
  if constexpr (std::is_same_v<T, Tf32>)
    mma_m16n8k8_tf32(sums, fragment_a, fragment_b);
  else
    mma_m16n8k16<T>(sums, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[at * 4 + i] = sums[i];
}

// A register of random operands made by `value`, and its absolute value.
template <class T, class Value>
uint32_t pack(const Value& value) {
  if constexpr (std::is_same_v<T, Tf32>) {
    return bit_cast<uint32_t>(value());
  } else {
    const uint32_t low = pynn::from_float<T>(value()).bits;
    return low | uint32_t(pynn::from_float<T>(value()).bits) << 16;
  }
}
template <class T>
uint32_t magnitude(uint32_t bits) {
  return bits & (std::is_same_v<T, Tf32> ? 0x7fffffffu : 0x7fff7fffu);
}
template <class T>
void twin(const uint32_t (*a)[4], const uint32_t (*b)[2], const float (*c)[4], float (*d)[4]) {
  if constexpr (std::is_same_v<T, Tf32>)
    twins::mma_m16n8k8_tf32(a, b, c, d);
  else
    twins::mma_m16n8k16<T>(a, b, c, d);
}

// exact: equal bits, or both NaN. Otherwise within the error of adding the terms one by one in fp32, each rounded
// toward zero: terms * 2^-23 * sum of magnitudes.
template <class T, class Value>
void check_mma(const std::string& name, bool exact, const Value& value) {
  constexpr int cases = 500, terms = std::is_same_v<T, Tf32> ? 9 : 17;
  std::vector<uint32_t> a(cases * 128), b(cases * 64);
  std::vector<float> c(cases * 128);
  for (auto& bits : a) bits = pack<T>(value);
  for (auto& bits : b) bits = pack<T>(value);
  for (auto& v : c) v = value();
  Array<uint32_t> device_a(a), device_b(b);
  Array<float> device_c(c), device_d(c.size());
  LAUNCH(mma_kernel<T>, cases, 32, 0, nullptr, device_a.device(), device_b.device(), device_c.device(),
         device_d.device());
  const auto& got = device_d.fetch();
  size_t wrong = 0;
  double worst = 0;
  for (int k = 0; k < cases; ++k) {
    uint32_t ak[32][4], bk[32][2], abs_a[32][4], abs_b[32][2];
    float ck[32][4], abs_c[32][4], expected[32][4], scale[32][4];
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int at = (k * 32 + lane) * 4 + i;
        ak[lane][i] = a[at], ck[lane][i] = c[at];
        abs_a[lane][i] = magnitude<T>(a[at]), abs_c[lane][i] = std::fabs(c[at]);
      }
      for (int i = 0; i < 2; ++i) {
        bk[lane][i] = b[(k * 32 + lane) * 2 + i];
        abs_b[lane][i] = magnitude<T>(bk[lane][i]);
      }
    }
    twin<T>(ak, bk, ck, expected);
    twin<T>(abs_a, abs_b, abs_c, scale);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const float hardware = got[(k * 32 + lane) * 4 + i], wanted = expected[lane][i];
        if (hardware == wanted || (std::isnan(hardware) && std::isnan(wanted))) continue;
        const double error = std::fabs(double(hardware) - double(wanted)) / (terms * 0x1p-23 * scale[lane][i]);
        wrong += exact || !(error <= 1);
        if (error > worst) worst = error;
      }
  }
  char detail[64] = "";
  if (!exact) std::snprintf(detail, sizeof detail, "largest error %.2f of the bound", worst);
  report(name.c_str(), size_t(cases) * 128, wrong, detail);
}

template <class T>
void check_mma_all(const std::string& name) {
  const auto integer = [] { return float(int(random_bits() % 17) - 8); };
  check_mma<T>(name + ", integers", true, integer);
  check_mma<T>(name + ", normals", false, random_normal);
  // Wide range: magnitudes from 2^-20 to 2^12, so that subnormals of fp16 and cancellation occur.
  check_mma<T>(name + ", wide range", false, [] { return std::ldexp(random_normal(), int(random_bits() % 33) - 20); });
  check_mma<T>(name + ", infinities and NaN", true, [&] {
    const uint32_t which = random_bits() % 64;
    return which == 0 ? INFINITY : which == 1 ? -INFINITY : which == 2 ? NAN : integer();
  });
  if constexpr (std::is_same_v<T, Tf32>)  // integers with noise in the 13 bits that are ignored; c has none
    check_mma<T>(name + ", low bits ignored", false, [&] {
      const float v = integer();
      return bit_cast<float>(bit_cast<uint32_t>(v) | (random_bits() & 0x1fffu));
    });
}

// ---- one value in, one value out ----

__global__ void to_tf32_kernel(const float* x, uint32_t* y, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) y[i] = to_tf32(x[i]);
}
template <class T>
__global__ void round_pair_kernel(const float* x, uint32_t* y, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) y[i] = round_pair<T>(x[i], x[(i + 1) % count]);
}
__global__ void ex2_kernel(const float* x, float* y, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) y[i] = ex2_approx(x[i]);
}

std::vector<float> scalars(int count, float (*random)()) {
  std::vector<float> x = {0.0f, -0.0f, 1.0f, -1.0f, INFINITY, -INFINITY, NAN, FLT_MAX, -FLT_MAX, FLT_MIN, 1e-45f};
  while (int(x.size()) < count) x.push_back(random());
  return x;
}

void check_to_tf32() {
  constexpr int count = 100'000;
  Array<float> x(scalars(count, [] { return bit_cast<float>(random_bits()); }));
  // Ties, of both signs.
  for (int i = 100; i < 1000; ++i) x.host[i] = bit_cast<float>((random_bits() & 0xffffe000u) | 0x1000u);
  Array<float> operands(x.host);
  Array<uint32_t> y(count);
  LAUNCH(to_tf32_kernel, (count + 255) / 256, 256, 0, nullptr, operands.device(), y.device(), count);
  const auto& got = y.fetch();
  size_t wrong = 0;
  for (int i = 0; i < count; ++i) {
    const bool both_nan = std::isnan(x.host[i]) && std::isnan(bit_cast<float>(got[i]));
    // Only the bits that a tensor core reads count.
    wrong += !both_nan && (got[i] & 0xffffe000u) != twins::to_tf32(x.host[i]);
  }
  report("to_tf32", count, wrong);
}

template <class T>
void check_round_pair(const std::string& name) {
  constexpr int count = 100'000;
  Array<float> x(scalars(count, [] { return bit_cast<float>(random_bits()); }));
  for (int i = 100; i < 50'000; ++i) x.host[i] = std::ldexp(random_normal(), int(random_bits() % 48) - 30);
  for (int i = 100; i < 1000; ++i)  // ties, of both signs
    x.host[i] = bit_cast<float>((bit_cast<uint32_t>(x.host[i]) & 0xffff0000u) | 0x8000u);
  for (int i = 1000; i < 2000; ++i)
    x.host[i] = bit_cast<float>((bit_cast<uint32_t>(x.host[i]) & 0xffffe000u) | 0x1000u);
  Array<float> operands(x.host);
  Array<uint32_t> y(count);
  LAUNCH(round_pair_kernel<T>, (count + 255) / 256, 256, 0, nullptr, operands.device(), y.device(), count);
  const auto& got = y.fetch();
  const auto is_nan = [](uint16_t bits) { return std::isnan(to_float(T{bits})); };
  size_t wrong = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t expected = twins::round_pair<T>(x.host[i], x.host[(i + 1) % count]);
    for (int shift = 0; shift < 32; shift += 16) {
      const uint16_t a = uint16_t(got[i] >> shift), b = uint16_t(expected >> shift);
      wrong += a != b && !(is_nan(a) && is_nan(b));
    }
  }
  report(name.c_str(), count, wrong);
}

void check_ex2() {
  constexpr int count = 100'000;
  Array<float> x(scalars(count, [] { return std::uniform_real_distribution<float>(-130, 130)(generator); }));
  Array<float> y(count);
  LAUNCH(ex2_kernel, (count + 255) / 256, 256, 0, nullptr, x.device(), y.device(), count);
  const auto& got = y.fetch();
  size_t wrong = 0;
  double worst = 0;
  for (int i = 0; i < count; ++i) {
    const float expected = twins::ex2_approx(x.host[i]);
    if (got[i] == expected || (std::isnan(got[i]) && std::isnan(expected))) continue;
    const bool at_the_edge =
        std::fmax(got[i], expected) < 1.001f * FLT_MIN || !(std::fmin(got[i], expected) <= FLT_MAX);
    const double error = std::fabs(double(got[i]) / expected - 1) / (0x1p-22 + 0x1p-24);
    if (at_the_edge) continue;
    wrong += !(error <= 1);
    if (error > worst) worst = error;
  }
  char detail[64];
  std::snprintf(detail, sizeof detail, "largest error %.2f of the bound", worst);
  report("ex2_approx", count, wrong, detail);
}

// ---- memory ----

__global__ void add_one_kernel(uint4* x, int count) {  // in place
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  uint4 v = load_streaming(x + i);
  ++v.x, ++v.y, ++v.z, ++v.w;
  store_streaming(x + i, v);
}

void check_streaming() {
  constexpr int count = 10'000;
  std::vector<uint4> values(count);
  for (auto& v : values) v = make_uint4(random_bits(), random_bits(), random_bits(), random_bits());
  Array<uint4> x(values);
  for (int repeat = 0; repeat < 3; ++repeat)
    LAUNCH(add_one_kernel, (count + 255) / 256, 256, 0, nullptr, x.device(), count);
  const auto& got = x.fetch();
  size_t wrong = 0;
  for (int i = 0; i < count; ++i)
    wrong += got[i].x != values[i].x + 3 || got[i].y != values[i].y + 3 || got[i].z != values[i].z + 3 ||
             got[i].w != values[i].w + 3;
  report("load_, store_streaming", count, wrong, "three times in place");
}

void check_between_blocks() {
  constexpr int blocks = 64, steps = 200;
  std::vector<int> start(2 * blocks);
  for (int b = 0; b < blocks; ++b) start[b] = 1000 * b;
  Array<int> values(start);
  Array<unsigned> arrived(1);
  LAUNCH_COOPERATIVE(selftest::ring, blocks, 64, 0, nullptr, arrived.device(), values.device(), steps);
  const auto& got = values.fetch();
  size_t wrong = 0;
  for (int b = 0; b < blocks; ++b) wrong += got[b] != 1000 * ((b + steps) % blocks) + steps;
  report("load_acquire, red_release_add", blocks, wrong, "200 grid barriers");
}

// One block writes, then raises a flag; the other waits for it, then reads.
__global__ void message_kernel(int* message, unsigned* flag, int* received, int rounds) {
  for (int round = 1; round <= rounds; ++round) {
    if (threadIdx.x != 0) continue;
    if (blockIdx.x == 0) {
      *message = round * 7;
      store_release(flag, unsigned(round));
      while (load_acquire(flag + 1) != unsigned(round)) continue;
    } else {
      while (load_acquire(flag) != unsigned(round)) continue;
      received[round - 1] = *message;
      store_release(flag + 1, unsigned(round));
    }
  }
}

void check_message() {
  constexpr int rounds = 1000;
  Array<int> message(1), received(rounds);
  Array<unsigned> flags(2);
  LAUNCH_COOPERATIVE(message_kernel, 2, 32, 0, nullptr, message.device(), flags.device(), received.device(), rounds);
  const auto& got = received.fetch();
  size_t wrong = 0;
  for (int i = 0; i < rounds; ++i) wrong += got[i] != (i + 1) * 7;
  report("store_release, load_acquire", rounds, wrong);
}

// Words and packs through the shared memory of clusters, many times over the two phases of two barriers.
void check_clusters(int cluster) {
  constexpr int grid = 64, steps = 501;
  Array<int> out(grid * 68);
  LAUNCH_CLUSTERS(selftest::cluster_ring, cluster, grid, 64, 0, nullptr, out.device(), steps);
  const auto& got = out.fetch();
  size_t wrong = 0;
  for (int b = 0; b < grid; ++b)
    for (int i = 0; i < 68; ++i) wrong += got[b * 68 + i] != selftest::cluster_ring_result(b, i, cluster, steps);
  report("store_async, mbarrier", got.size(), wrong, "clusters of " + std::to_string(cluster));
}

// ---- the launch macros ----

__global__ void dynamic_shared_kernel(int* out, int count) {
  DYNAMIC_SHARED(int, values);
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) values[i] = i;
  __syncthreads();
  if (threadIdx.x != 0) return;
  int sum = 0;
  for (int i = 0; i < count; ++i) sum += values[i] == i;
  *out = sum;
}

void check_dynamic_shared(int bytes) {
  Array<int> out(1);
  const int count = bytes / int(sizeof(int));
  LAUNCH(dynamic_shared_kernel, 1, 256, size_t(bytes), nullptr, out.device(), count);
  report("LAUNCH with dynamic shared", 1, out.fetch()[0] != count, std::to_string(bytes) + " bytes");
}

template <class T>
void check_gemm(const char* name) {
  constexpr int m = 70, n = 40, k = 104;
  std::vector<T> a(m * k), b(n * k);
  for (auto& v : a) v = pynn::from_float<T>(float(int(random_bits() % 9) - 4));
  for (auto& v : b) v = pynn::from_float<T>(float(int(random_bits() % 9) - 4));
  Array<T> device_a(a), device_b(b);
  Array<float> c(m * n);
  LAUNCH(selftest::gemm<T>, dim3((n + 31) / 32, (m + 63) / 64), 128, (2 * 64 * 40 + 2 * 32 * 40) * 2, nullptr,
         device_a.device(), device_b.device(), c.device(), m, n, k);
  const auto& got = c.fetch();
  size_t wrong = 0;
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int l = 0; l < k; ++l) sum += double(pynn::to_float(a[i * k + l])) * double(pynn::to_float(b[j * k + l]));
      wrong += got[i * n + j] != float(sum);
    }
  report(name, m * n, wrong, "cp_async, ldmatrix and mma together, integers");
}

}  // namespace

int main() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    std::printf("primitives_check: no GPU (%s): nothing was checked\n", cudaGetErrorString(error));
    return 77;
  }
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  std::printf("primitives against their twins on %s (sm_%d%d)\n", properties.name, properties.major, properties.minor);

  check_copy<4>();
  check_copy<8>();
  check_copy<16>();
  check_copy_groups();
  check_ldmatrix();
  check_mma_all<Half>("mma_m16n8k16 fp16");
  check_mma_all<BFloat16>("mma_m16n8k16 bf16");
  check_mma_all<Tf32>("mma_m16n8k8_tf32");
  check_to_tf32();
  check_round_pair<Half>("round_pair fp16");
  check_round_pair<BFloat16>("round_pair bf16");
  check_ex2();
  check_streaming();
  check_between_blocks();
  check_message();
  if (resident_clusters(selftest::cluster_ring, 8, 64, 0) > 0)
    for (const int cluster : {2, 4, 8}) check_clusters(cluster);
  else
    std::printf("clusters of blocks: not on this device, or not compiled for it\n");
  check_dynamic_shared(16 * 1024);
  check_dynamic_shared(int(properties.sharedMemPerBlockOptin));
  check_gemm<Half>("gemm of fp16");
  check_gemm<BFloat16>("gemm of bf16");
  std::printf("%s\n", failed_rows ? "FAILED" : "all agree");
  return failed_rows != 0;
}
