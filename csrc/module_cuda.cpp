// How the CUDA kernels were built, for `rlhf-fast info`. Loading it registers them.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of rlhf_fast, and how they were built.";
  m.def("build_info", [] {
    pybind11::dict facts;
    facts["architectures"] = RLHF_FAST_CUDA_ARCHITECTURES;
    return facts;
  });
}
