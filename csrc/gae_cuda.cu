// rlhf_fast::gae_cuda: gae in CUDA C++, beside the Triton kernel; the scan is in gae_cuda.cuh.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "gae_cuda.cuh"

namespace rlhf_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <class T>
const T* data(const MaybeTensor& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <class S, int kWarps>
void launch(const Gae<S>& a, unsigned rows, cudaStream_t stream) {
  constexpr int kItems = 16 / sizeof(S);
  const bool vectors = a.steps % kItems == 0 && aligned(a.rewards, 16) && aligned(a.values, 16) &&
                       aligned(a.advantages, 16) && aligned(a.returns, 16) &&
                       aligned(a.mask, kItems) && aligned(a.dones, kItems);
  if (vectors) {
    gae_rows<S, kWarps, true><<<rows, kWarps * 32, 0, stream>>>(a);
  } else {
    gae_rows<S, kWarps, false><<<rows, kWarps * 32, 0, stream>>>(a);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The fewest warps whose one tile holds the row, at most 8: 1024 float32 steps at a time.
template <class S>
void run(const Gae<S>& a, int64_t rows, cudaStream_t stream) {
  STD_TORCH_CHECK(rows <= std::numeric_limits<int>::max(), "gae_cuda: too many rows, ", rows);
  const int64_t warps = (a.steps * static_cast<int64_t>(sizeof(S)) + 511) / 512;
  const auto n = static_cast<unsigned>(rows);
  if (warps <= 1) {
    launch<S, 1>(a, n, stream);
  } else if (warps <= 2) {
    launch<S, 2>(a, n, stream);
  } else if (warps <= 4) {
    launch<S, 4>(a, n, stream);
  } else {
    launch<S, 8>(a, n, stream);
  }
}

template <class S>
Gae<S> arguments(
    const Tensor& rewards, const Tensor& values, const MaybeTensor& mask, const MaybeTensor& dones,
    const MaybeTensor& bootstrap, double gamma, double lambda, bool skip_holes,
    const Tensor& advantages, const Tensor& returns) {
  return {static_cast<const S*>(rewards.const_data_ptr()),
          static_cast<const S*>(values.const_data_ptr()),
          data<S>(bootstrap),
          data<unsigned char>(mask),
          data<unsigned char>(dones),
          static_cast<S*>(advantages.mutable_data_ptr()),
          static_cast<S*>(returns.mutable_data_ptr()),
          rewards.size(1),
          static_cast<S>(gamma),
          static_cast<S>(gamma * lambda),
          skip_holes};
}

}  // namespace

// rewards, values [B, T] of one dtype, mask and dones [B, T] bool, bootstrap [B]; all contiguous,
// as rlhf_fast.gae passes them.
// Returns (advantages, returns) [B, T].
std::tuple<Tensor, Tensor> gae_cuda(
    const Tensor& rewards, const Tensor& values, const MaybeTensor& mask, const MaybeTensor& dones,
    const MaybeTensor& bootstrap, double gamma, double lambda, bool skip_holes) {
  const ScalarType dtype = rewards.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "gae_cuda: rewards must be float32 or float64");
  STD_TORCH_CHECK(rewards.dim() == 2, "gae_cuda: rewards must be [B, T]");
  const auto check = [&](const char* name, const Tensor& t, ScalarType type, int64_t dim) {
    STD_TORCH_CHECK(t.scalar_type() == type, "gae_cuda: ", name, " has the wrong dtype");
    STD_TORCH_CHECK(t.dim() == dim && t.size(0) == rewards.size(0) &&
                        (dim == 1 || t.size(1) == rewards.size(1)),
                    "gae_cuda: ", name, " has the wrong shape");
    STD_TORCH_CHECK(t.is_contiguous(), "gae_cuda: ", name, " must be contiguous");
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == rewards.get_device_index(),
                    "gae_cuda: ", name, " must be on the device of rewards");
  };
  check("rewards", rewards, dtype, 2);
  check("values", values, dtype, 2);
  if (mask.has_value()) check("mask", *mask, ScalarType::Bool, 2);
  if (dones.has_value()) check("dones", *dones, ScalarType::Bool, 2);
  if (bootstrap.has_value()) check("bootstrap", *bootstrap, dtype, 1);

  Tensor advantages = torch::stable::empty_like(rewards);
  Tensor returns = torch::stable::empty_like(rewards);
  if (rewards.numel() == 0) return {advantages, returns};
  const auto device = rewards.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == ScalarType::Float) {
    run(arguments<float>(rewards, values, mask, dones, bootstrap, gamma, lambda, skip_holes,
                         advantages, returns), rewards.size(0), on);
  } else {
    run(arguments<double>(rewards, values, mask, dones, bootstrap, gamma, lambda, skip_holes,
                          advantages, returns), rewards.size(0), on);
  }
  return {advantages, returns};
}

STABLE_TORCH_LIBRARY_FRAGMENT(rlhf_fast, m) {
  m.def(
      "gae_cuda(Tensor rewards, Tensor values, Tensor? mask, Tensor? dones, Tensor? bootstrap, "
      "float gamma, float lam, bool skip_holes) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CUDA, m) { m.impl("gae_cuda", TORCH_BOX(&gae_cuda)); }

}  // namespace rlhf_fast
