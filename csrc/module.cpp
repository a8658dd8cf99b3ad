// How this extension was built, for `rlhf-fast info`. Loading it registers the kernels.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu.h"

namespace {

rlhf_fast::Cpu best() {
#if RLHF_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return rlhf_fast::kAvx512;
  if (__builtin_cpu_supports("x86-64-v3")) return rlhf_fast::kAvx2;
#endif
  return rlhf_fast::kPlain;
}

constexpr const char* kNames[] = {"default", "avx2", "avx512"};

// "" for done, or what the CPU (or the compiler) has.
std::string use_cpu(const std::string& name) {
  for (int level = rlhf_fast::kPlain; level <= best(); ++level) {
    if (name == kNames[level]) {
      rlhf_fast::cpu = static_cast<rlhf_fast::Cpu>(level);
      return "";
    }
  }
  return kNames[best()];
}

std::string simd() {
#if RLHF_X86_LEVELS
  constexpr const char* kLong[] = {"SSE2 (x86-64)", "AVX2 (x86-64-v3)", "AVX-512 (x86-64-v4)"};
  std::string text = kLong[rlhf_fast::cpu];
  if (rlhf_fast::cpu != best()) text += std::string(", where the CPU has ") + kLong[best()];
  return text;
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

rlhf_fast::Cpu rlhf_fast::cpu = best();

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
  m.def("use_cpu", &use_cpu);
}
