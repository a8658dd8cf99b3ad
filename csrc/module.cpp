// How this extension was built, for `rlhf-fast info`. Loading it registers the kernels.
#include <pybind11/pybind11.h>

namespace {

const char* simd() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "AVX-512 (x86-64-v4)";
  if (__builtin_cpu_supports("x86-64-v3")) return "AVX2 (x86-64-v3)";
  return "SSE2 (x86-64)";
#elif defined(__aarch64__)
  return "NEON (compile time)";
#else
  return "compile time";
#endif
}

const char* openmp() {
#ifdef _OPENMP
  return "yes";
#else
  return "no (threads are torch's own pool)";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of rlhf_fast, and how they were built.";
  m.def("build_info", [] {
    pybind11::dict facts;
    facts["compiler"] = RLHF_FAST_COMPILER " " __VERSION__;
    facts["C++"] = static_cast<long>(__cplusplus);
    facts["OpenMP"] = openmp();
    facts["SIMD"] = simd();
    return facts;
  });
}
