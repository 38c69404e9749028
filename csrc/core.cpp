// pynn._core: facts about this build and this CPU. No torch header, so it compiles per Python version in seconds.
#include <pybind11/pybind11.h>

#include <string>

namespace {

bool cpu_supports(const std::string& isa) {
  if (isa == "baseline") return true;
#ifdef __x86_64__
  __builtin_cpu_init();
  if (isa == "avx2")
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (isa == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#endif
  return false;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Build facts and CPU features of pynn.";
  m.attr("version") = PYNN_VERSION;
  m.attr("cuda_archs") = PYNN_CUDA_ARCHS;
  m.attr("cpu_isas") = PYNN_CPU_ISAS;
  m.attr("compiler") = __VERSION__;
  m.def("cpu_supports", &cpu_supports, "Whether this CPU runs the kernels built for 'baseline', 'avx2' or 'avx512'.",
        pybind11::arg("isa"));
}
