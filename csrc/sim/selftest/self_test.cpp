// The sim tested on itself.
//
//   self_test correct ORDER SEED RESIDENT_BLOCKS     the kernels of kernels.cuh; exit status 1 when a result is wrong
//   self_test planted NAME ORDER SEED RESIDENT_BLOCKS  one kernel of planted.cuh. Exit status: 0 right result,
//                                                    3 wrong result, 4 stopped by the sim (the message is printed);
//                                                    a sanitizer that finds the bug ends the program with its own
//   self_test speed                                  times of launches and switches, for the README
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.cuh"
#include "planted.cuh"

namespace {

using pynn::BFloat16;
using pynn::Half;

std::vector<float> random_values(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  ++failures;
  std::printf("WRONG: %s\n", what);
}

bool close(double got, double truth, double bound) { return std::abs(got - truth) <= bound; }  // false for NaN

// c (m, n) = a b in float64, where a(i, k) and b(k, j) are functions.
template <class A, class B>
double dot(const A& a, const B& b, int i, int j, int k) {
  double sum = 0;
  for (int l = 0; l < k; ++l) sum += double(a(i, l)) * double(b(l, j));
  return sum;
}

void check_pointwise() {
  const int64_t count = 4099;
  const int channels = 77;
  const auto x = random_values(count, 1), bias = random_values(channels, 2);
  std::vector<float> y(count, NAN);
  LAUNCH(selftest::pointwise, 3, 64, 0, nullptr, x.data(), bias.data(), y.data(), count, channels);
  bool right = true;
  for (int64_t i = 0; i < count; ++i) right = right && y[i] == x[i] + bias[i % channels];
  expect(right, "pointwise");
}

void check_matmul() {
  constexpr int m = 35, n = 37, k = 41, tile = 16;
  const auto a = random_values(m * k, 3), b = random_values(k * n, 4);
  std::vector<float> c(m * n, NAN), row_sums(m, 0.0f);
  LAUNCH((selftest::matmul<tile>), dim3((n + tile - 1) / tile, (m + tile - 1) / tile), dim3(tile, tile), 0, nullptr,
         a.data(), b.data(), c.data(), row_sums.data(), m, n, k);
  bool right = true;
  for (int i = 0; i < m; ++i) {
    double row_sum = 0;
    for (int j = 0; j < n; ++j) {
      const double truth =
          dot([&](int i, int l) { return a[i * k + l]; }, [&](int l, int j) { return b[l * n + j]; }, i, j, k);
      right = right && close(c[i * n + j], truth, 1e-5);
      row_sum += truth;
    }
    right = right && close(row_sums[i], row_sum, 1e-4);
  }
  expect(right, "matmul");
}

template <class T>
void check_gemm(const char* name) {
  constexpr int m = 70, n = 40, k = 104;
  const auto wide_a = random_values(m * k, 5), wide_b = random_values(n * k, 6);
  std::vector<T> a(m * k), b(n * k);
  for (int i = 0; i < m * k; ++i) a[i] = pynn::from_float<T>(wide_a[i]);
  for (int i = 0; i < n * k; ++i) b[i] = pynn::from_float<T>(wide_b[i]);
  std::vector<float> c(m * n, NAN);
  LAUNCH(selftest::gemm<T>, dim3((n + 31) / 32, (m + 63) / 64), 128, (2 * 64 * 40 + 2 * 32 * 40) * 2, nullptr, a.data(),
         b.data(), c.data(), m, n, k);
  bool right = true;
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      const double truth = dot([&](int i, int l) { return pynn::to_float(a[i * k + l]); },
                               [&](int l, int j) { return pynn::to_float(b[j * k + l]); }, i, j, k);
      right = right && close(c[i * n + j], truth, 2e-5);
    }
  expect(right, name);
}

void check_gemm_tf32() {
  constexpr int k = 40;
  const auto a = random_values(16 * k, 7), b = random_values(k * 8, 8);
  std::vector<float> c(16 * 8, NAN);
  LAUNCH(selftest::gemm_tf32, 1, 32, 0, nullptr, a.data(), b.data(), c.data(), k);
  const auto rounded = [](float v) { return pynn::bit_cast<float>(pynn::twins::to_tf32(v)); };
  bool right = true;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      const double truth = dot([&](int i, int l) { return rounded(a[i * k + l]); },
                               [&](int l, int j) { return rounded(b[l * 8 + j]); }, i, j, k);
      right = right && close(c[i * 8 + j], truth, 1e-5);
    }
  expect(right, "gemm_tf32");
}

void check_matrices() {
  std::vector<uint16_t> rows(4 * 64);
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = uint16_t(i);  // matrix m, row r, column c holds 64 m + 8 r + c
  std::vector<uint32_t> got(32 * 14);
  LAUNCH(selftest::matrices, 1, 32, 0, nullptr, rows.data(), got.data());
  bool right = true;
  for (unsigned lane = 0; lane < 32; ++lane)
    for (unsigned i = 0; i < 14; ++i) {
      const bool transposed = i >= 7;
      const unsigned slot = i % 7, m = slot < 1 ? 0 : slot < 3 ? slot - 1 : slot - 3;
      const unsigned major = lane / 4, minor = lane % 4 * 2;
      const unsigned low = 64 * m + (transposed ? 8 * minor + major : 8 * major + minor);
      right = right && got[lane * 14 + i] == (low | (low + (transposed ? 8 : 1)) << 16);
    }
  expect(right, "ldmatrix");
}

void check_collectives() {
  constexpr int threads = 96;
  std::vector<int> got(threads * 12);
  LAUNCH(selftest::collectives, 1, threads, 0, nullptr, got.data());
  bool right = true;
  for (int t = 0; t < threads; ++t) {
    const int lane = t % 32, warp = t - lane;
    int ballot = 0, sum = 0;
    for (int l = 0; l < 32; ++l) ballot |= (l % 3 == 0) << l, sum += warp + l;
    const int expected[12] = {warp + 3,
                              warp + lane / 8 * 8 + (lane + 1) % 8,
                              lane % 16 >= 2 ? t - 2 : t,
                              lane + 5 < 32 ? t + 5 : t,
                              warp + (lane ^ 9),
                              ballot,
                              (warp == 32) + 2 * (warp == 0),
                              (threads + 4) / 5,
                              1,
                              1,
                              warp + (lane < 16 ? 1 : 17),
                              sum};
    for (int i = 0; i < 12; ++i) right = right && got[t * 12 + i] == expected[i];
  }
  expect(right, "collectives");
}

void check_atomics() {
  constexpr int count = 3 * 64;
  int ints[4] = {0, 0, -1, 1};
  unsigned words[7] = {0, 0, ~0u, 0, 0, 0, 0};
  unsigned long long longs[2] = {0, 0};
  float floats[1] = {0};
  double doubles[1] = {0};
  LAUNCH(selftest::atomics, 3, 64, 0, nullptr, ints, words, longs, floats, doubles);
  const int sum = count * (count - 1) / 2;
  expect(ints[0] == sum && ints[1] == -sum && ints[2] == count - 1 && ints[3] == 1 - count, "atomics on int");
  expect(words[0] == 3 * count && words[1] == ~0u && words[2] == 0 && words[3] == count % 10 && words[4] == count &&
             words[6] == 1,
         "atomics on unsigned");
  expect(longs[0] == (1ull << 33) * count && longs[1] == static_cast<unsigned long long>(count - 1) << 32,
         "atomics on unsigned long long");
  expect(floats[0] == count / 2 && doubles[0] == count / 4, "atomics on floats");
}

void check_between_blocks() {
  constexpr int blocks = 5;
  std::vector<float> x(2 * blocks, 1.5f), partial(blocks, NAN);
  unsigned finished = 0;
  float sum = NAN;
  LAUNCH(selftest::last_block_sum, blocks, 32, 0, nullptr, x.data(), partial.data(), &finished, &sum);
  expect(sum == 3.0f * blocks, "last_block_sum");

  unsigned arrived = 0;
  std::vector<int> values(2 * blocks);
  for (int b = 0; b < blocks; ++b) values[b] = 100 * b;
  LAUNCH_COOPERATIVE(selftest::ring, blocks, 64, 0, nullptr, &arrived, values.data(), 4);
  bool right = true;
  for (int b = 0; b < blocks; ++b) right = right && values[b] == 100 * ((b + 4) % blocks) + 4;
  expect(right, "ring");

  for (const int cluster : {2, 4}) {
    constexpr int grid = 8, steps = 5;
    std::vector<int> got(grid * 68);
    LAUNCH_CLUSTERS(selftest::cluster_ring, cluster, grid, 64, 0, nullptr, got.data(), steps);
    right = true;
    for (int b = 0; b < grid; ++b)
      for (int i = 0; i < 68; ++i)
        right = right && got[b * 68 + i] == selftest::cluster_ring_result(b, i, cluster, steps);
    expect(right, "cluster_ring");
  }
}

int run_correct() {
  check_pointwise();
  check_matmul();
  check_gemm<Half>("gemm of Half");
  check_gemm<BFloat16>("gemm of BFloat16");
  check_gemm_tf32();
  check_matrices();
  check_collectives();
  check_atomics();
  check_between_blocks();
  std::printf("%s\n", failures ? "failed" : "all right");
  return failures != 0;
}

// A planted bug: launches into y (64 floats that start as NaN) with x = 64 ones, and says what y[i] should be.
struct Planted {
  std::function<void(const float* x, float* y)> launch;
  std::function<double(int)> expected = [](int) { return 1.0; };
  int count = 32;
};

#define PLANTED_Y(name)                                                           \
  {                                                                               \
    #name, {                                                                      \
      [](const float*, float* y) { LAUNCH(planted::name, 1, 32, 0, nullptr, y); } \
    }                                                                             \
  }
#define PLANTED_XY(name)                                                               \
  {                                                                                    \
    #name, {                                                                           \
      [](const float* x, float* y) { LAUNCH(planted::name, 1, 32, 0, nullptr, x, y); } \
    }                                                                                  \
  }
#define PLANTED_SHAPE(name, kernel, grid, block, shared)                              \
  {                                                                                   \
    name, {                                                                           \
      [](const float*, float* y) { LAUNCH(kernel, grid, block, shared, nullptr, y); } \
    }                                                                                 \
  }

// One cluster of two blocks.
#define PLANTED_CLUSTER(name)                                                                 \
  {                                                                                           \
    #name, {                                                                                  \
      [](const float*, float* y) { LAUNCH_CLUSTERS(planted::name, 2, 2, 32, 0, nullptr, y); } \
    }                                                                                         \
  }

const std::map<std::string, Planted>& planted_bugs() {
  static unsigned never = 0;
  static const std::map<std::string, Planted> bugs = {
      {"out_of_bounds_global",
       {[](const float* x, float* y) { LAUNCH(planted::out_of_bounds_global, 1, 96, 0, nullptr, x, y, 64); }}},
      PLANTED_Y(out_of_bounds_shared),
      PLANTED_SHAPE("out_of_bounds_dynamic", planted::out_of_bounds_dynamic, 1, 32, 31 * 4),
      PLANTED_SHAPE("no_dynamic_shared", planted::out_of_bounds_dynamic, 1, 32, 0),
      {"missing_barrier",
       {[](const float*, float* y) { LAUNCH(planted::missing_barrier, 1, 64, 0, nullptr, y); },
        [](int i) { return 63.0 - i; }, 64}},
      {"missing_second_barrier",
       {[](const float*, float* y) { LAUNCH(planted::missing_second_barrier, 1, 64, 0, nullptr, y, 3); },
        [](int) { return 3.0; }, 64}},
      {"missing_second_syncwarp",
       {[](const float*, float* y) { LAUNCH(planted::missing_second_syncwarp, 1, 32, 0, nullptr, y, 3); },
        [](int) { return 3.0; }}},
      {"barrier_between_blocks",
       {[](const float*, float* y) { LAUNCH(planted::barrier_between_blocks, 2, 32, 0, nullptr, y); },
        [](int) { return 2.0; }}},
      {"missing_syncwarp",
       {[](const float*, float* y) { LAUNCH(planted::missing_syncwarp, 1, 32, 0, nullptr, y); },
        [](int i) { return 31.0 - i; }}},
      {"unordered_add",
       {[](const float*, float* y) {
          y[0] = 0;
          LAUNCH(planted::unordered_add, 4, 32, 0, nullptr, y);
        },
        [](int) { return 4.0; }, 1}},
      {"missing_fence",
       {[](const float*, float* y) {
          unsigned finished = 0;
          LAUNCH(planted::missing_fence, 4, 32, 0, nullptr, y + 1, &finished, y);
        },
        [](int) { return 4.0; }, 1}},
      PLANTED_XY(wrong_wait),
      PLANTED_Y(uninitialised_shared),
      PLANTED_Y(shuffle_outside_mask),
      PLANTED_Y(divergent_barrier),
      PLANTED_Y(barrier_after_exit),
      PLANTED_Y(exit_before_barrier),
      PLANTED_Y(lane_not_in_mask),
      PLANTED_Y(divergent_warp),
      PLANTED_Y(lane_exited),
      PLANTED_Y(deadlock),
      {"endless_poll",
       {[](const float*, float*) { LAUNCH_COOPERATIVE(planted::endless_poll, 2, 32, 0, nullptr, &never); }}},
      PLANTED_XY(pending_copy),
      PLANTED_XY(misaligned_copy),
      PLANTED_XY(copy_to_global),
      PLANTED_Y(misaligned_ldmatrix),
      PLANTED_Y(ldmatrix_outside),
      PLANTED_SHAPE("partial_warp_mma", planted::partial_warp_mma, 1, 16, 0),
      PLANTED_XY(misaligned_vector),
      PLANTED_Y(too_much_static_shared),
      PLANTED_SHAPE("too_much_dynamic_shared", planted::nothing, 1, 32, 227 * 1024 + 1),
      PLANTED_SHAPE("block_too_large", planted::nothing, 1, 1025, 0),
      PLANTED_SHAPE("block_too_deep", planted::nothing, 1, dim3(1, 1, 65), 0),
      PLANTED_SHAPE("empty_block", planted::nothing, 1, dim3(0, 1, 1), 0),
      PLANTED_SHAPE("empty_grid", planted::nothing, dim3(0, 1, 1), 32, 0),
      PLANTED_SHAPE("grid_too_wide", planted::nothing, dim3(1u << 31, 1, 1), 32, 0),
      PLANTED_SHAPE("grid_too_high", planted::nothing, dim3(1, 65536, 1), 32, 0),
      PLANTED_SHAPE("grid_too_deep", planted::nothing, dim3(1, 1, 65536), 32, 0),
      {"too_many_resident",
       {[](const float*, float* y) { LAUNCH_COOPERATIVE(planted::nothing, 65, 1024, 0, nullptr, y); }}},
      {"too_many_resident_by_shared_memory",
       {[](const float*, float* y) { LAUNCH_COOPERATIVE(planted::nothing, 133, 32, 150 * 1024, nullptr, y); }}},
      {"missing_mbarrier_wait",
       {[](const float*, float* y) { LAUNCH_CLUSTERS(planted::missing_mbarrier_wait, 2, 2, 32, 0, nullptr, y); },
        [](int i) { return 1.0 - i / 32; }, 64}},
      {"store_before_all_have_read",
       {[](const float*, float* y) { LAUNCH_CLUSTERS(planted::store_before_all_have_read, 2, 2, 32, 0, nullptr, y); },
        [](int i) { return double(i / 32); }, 64}},
      PLANTED_CLUSTER(missing_cluster_barrier),
      PLANTED_CLUSTER(store_to_exited_block),
      PLANTED_CLUSTER(exit_before_waiting),
      PLANTED_CLUSTER(rank_out_of_range),
      PLANTED_CLUSTER(store_outside_shared),
      PLANTED_CLUSTER(misaligned_store),
      PLANTED_CLUSTER(no_mbarrier),
      PLANTED_CLUSTER(too_many_arrivals),
      PLANTED_CLUSTER(too_few_bytes),
      PLANTED_CLUSTER(arrive_twice),
      PLANTED_CLUSTER(wait_without_arrive),
      PLANTED_CLUSTER(exit_between_arrive_and_wait),
      PLANTED_CLUSTER(exit_before_cluster_barrier),
      PLANTED_CLUSTER(divergent_cluster_barrier),
      PLANTED_Y(without_cluster),
      {"cluster_too_large",
       {[](const float*, float* y) { LAUNCH_CLUSTERS(planted::nothing, 9, 9, 32, 0, nullptr, y); }}},
      {"part_of_a_cluster",
       {[](const float*, float* y) { LAUNCH_CLUSTERS(planted::nothing, 2, 3, 32, 0, nullptr, y); }}},
      {"signed_overflow",
       {[](const float*, float* y) { LAUNCH(planted::signed_overflow, 1, 32, 0, nullptr, y, 2147483640); },
        [](int i) { return double(float(2147483640.0 + i)); }}},
      PLANTED_XY(misaligned_access),
  };
  return bugs;
}

int run_planted(const std::string& name) {
  const Planted& bug = planted_bugs().at(name);
  const std::vector<float> x(64, 1.0f);
  std::vector<float> y(64, NAN);
  try {
    bug.launch(x.data(), y.data());
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 4;
  }
  for (int i = 0; i < bug.count; ++i)
    if (y[i] != bug.expected(i)) {
      std::printf("wrong result: y[%d] is %g, expected %g\n", i, y[i], bug.expected(i));
      return 3;
    }
  return 0;
}

__global__ void barriers(int count) {
  for (int i = 0; i < count; ++i) __syncthreads();
}

double microseconds(int repeats, const std::function<void()>& work) {
  work();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < repeats; ++i) work();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count() / repeats;
}

int run_speed() {
  float y = 0;
  for (const int blocks : {1, 4, 32})
    std::printf("launch of %2d blocks of 256 threads: %6.1f us\n", blocks,
                microseconds(300, [&] { LAUNCH(planted::nothing, blocks, 256, 0, nullptr, &y); }));
  const double one = microseconds(20, [&] { LAUNCH(barriers, 1, 256, 0, nullptr, 1); });
  const double many = microseconds(20, [&] { LAUNCH(barriers, 1, 256, 0, nullptr, 1001); });
  std::printf("barrier of 256 threads: %.1f us, %.1f ns per thread (two switches)\n", (many - one) / 1000,
              (many - one) / 256);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  const int schedule = mode == "planted" ? 3 : 2;  // the index of ORDER among the arguments
  if (argc > schedule + 2 &&
      pynn_sim_configure(std::atoi(argv[schedule]), std::strtoull(argv[schedule + 1], nullptr, 10),
                         std::atoi(argv[schedule + 2])) != 0) {
    std::printf("self_test: expected an order in 0 .. 2 and 1 to 64 resident blocks\n");
    return 2;
  }
  if (mode == "correct") return run_correct();
  if (mode == "planted" && argc > 2 && planted_bugs().contains(argv[2])) return run_planted(argv[2]);
  if (mode == "speed") return run_speed();
  if (mode == "list") {
    for (const auto& [name, bug] : planted_bugs()) std::printf("%s\n", name.c_str());
    return 0;
  }
  std::printf("usage: self_test correct|planted NAME|list|speed [ORDER SEED RESIDENT_BLOCKS]\n");
  return 2;
}
