// What Python asks of the extension besides its kernels, which loading it registers.
#include <pybind11/pybind11.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#ifndef RLHF_FAST_CUDA_ARCHITECTURES
#define RLHF_FAST_CUDA_ARCHITECTURES ""
#endif

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

// Ask for 2 MiB pages for memory that has not been written yet; a hint, so errors do not matter.
void advise_huge_pages(uintptr_t address, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
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
    facts["CUDA architectures"] = RLHF_FAST_CUDA_ARCHITECTURES;
    return facts;
  });
  m.def("advise_huge_pages", &advise_huge_pages, pybind11::arg("address"), pybind11::arg("bytes"));
}
