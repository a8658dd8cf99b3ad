// What every C++ op shares: torch's stable ABI, argument access, dtype dispatch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "simd.h"

namespace rlhf_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kIgnoreIndex = -100;
constexpr int64_t kElsewhere = -(int64_t{1} << 62);  // check.py's ELSEWHERE; in a backward only

// Least number of elements that is worth a thread of its own.
constexpr int64_t kGrain = 8192;

template <class T>
constexpr ScalarType kTypeOf = ScalarType::Undefined;
template <>
inline constexpr ScalarType kTypeOf<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kTypeOf<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kTypeOf<bf16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType kTypeOf<fp16> = ScalarType::Half;
template <>
inline constexpr ScalarType kTypeOf<int64_t> = ScalarType::Long;
template <>
inline constexpr ScalarType kTypeOf<bool> = ScalarType::Bool;

// The Python side brings all tensors of a call to their types; a mistake there must not be read
// as other numbers.
template <class T>
void check_type(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == kTypeOf<T>, "expected a tensor of type ",
                  torch::headeronly::toString(kTypeOf<T>), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

template <class T>
const T* data(const Tensor& t) {
  check_type<T>(t);
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* data(const MaybeTensor& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}
// The bytes of a bool tensor: 0 is False, and anything else True, as torch reads them. A mask that
// was received or mapped as bytes may hold any, which a C++ bool must not.
inline const uint8_t* bits(const Tensor& t) {
  check_type<bool>(t);
  return static_cast<const uint8_t*>(t.const_data_ptr());
}
inline const uint8_t* bits(const MaybeTensor& t) { return t.has_value() ? bits(*t) : nullptr; }
template <class T>
T* mutable_data(const Tensor& t) {
  check_type<T>(t);
  return static_cast<T*>(t.mutable_data_ptr());
}

// f(T{}) with T = float or double, for tensors that the Python side brought to one of them.
template <class F>
auto dispatch_accumulator(const Tensor& t, const char* op, F f) {
  if (t.scalar_type() == ScalarType::Double) return f(double{});
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, op, ": expected float32 or float64");
  return f(float{});
}

// f(T{}) with T = float, double, bf16 or fp16.
template <class F>
auto dispatch_floating(const Tensor& t, const char* op, F f) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(bf16{});
    case ScalarType::Half:
      return f(fp16{});
    default:
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, op,
                      ": expected float32, bfloat16, float16 or float64");
      return f(float{});
  }
}

// f(T{}, Out{}) for logits of type T and their gradient in the same type, or, of float32, in 16 bits.
template <class F>
auto dispatch_gradient(const Tensor& logits, const Tensor& out, const char* op, F f) {
  if (out.scalar_type() == logits.scalar_type()) {
    return dispatch_floating(logits, op, [&](auto element) { return f(element, element); });
  }
  check_type<float>(logits);
  if (out.scalar_type() == ScalarType::BFloat16) return f(float{}, bf16{});
  check_type<fp16>(out);
  return f(float{}, fp16{});
}

// A new contiguous tensor on the CPU, of int64 or a type that kernels compute in.
// torch::stable::empty_like looks its operator up by name: gae of 8 steps, with two new tensors,
// takes 9 us with it and 5 without (AMD EPYC, AVX2).
inline Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  std::array<int64_t, 64> strides;  // torch has no tensor of more dimensions
  int64_t numbers = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = numbers;
    numbers *= std::max<int64_t>(1, sizes[d]);
  }
  const int32_t code = type == ScalarType::Long     ? aoti_torch_dtype_int64()
                       : type == ScalarType::Double ? aoti_torch_dtype_float64()
                                                    : aoti_torch_dtype_float32();
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                                                         code, aoti_torch_device_type_cpu(), 0,
                                                         &made));
  return Tensor(made);
}
inline Tensor new_like(const Tensor& t) { return new_tensor(t.sizes(), t.scalar_type()); }

inline ScalarType accumulator(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// body(begin, end) over rows of `width` elements, on as many threads as the work is worth.
template <class F>
void parallel_rows(int64_t rows, int64_t width, const F& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width));
  if (rows > 0) torch::stable::parallel_for(0, rows, grain, body);
}

// body(unit, row, begin, end) over units of at most kUnit elements of one row of [rows, width].
// The units do not depend on the number of threads, so sums that are kept by unit and added up in
// order are the same bits whatever runs them.
constexpr int64_t kUnit = 4096;

struct Units {
  int64_t rows, width, per_row;
  Units(int64_t rows, int64_t width)
      : rows(rows), width(width), per_row((width + kUnit - 1) / kUnit) {}
  int64_t count() const { return rows * per_row; }

  template <class F>
  void parallel(const F& body) const {
    if (count() == 0) return;
    parallel_rows(count(), std::min(width, kUnit), [&](int64_t first, int64_t last) {
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t row = unit / per_row, begin = unit % per_row * kUnit;
        body(unit, row, row * width + begin, row * width + std::min(width, begin + kUnit));
      }
    });
  }
};

// Adds up the K sums of every unit, in order.
template <size_t K>
std::array<double, K> total(const std::vector<std::array<double, K>>& units) {
  std::array<double, K> sums{};
  for (const auto& unit : units) {
    for (size_t k = 0; k < K; ++k) sums[k] += unit[k];
  }
  return sums;
}

}  // namespace rlhf_fast
