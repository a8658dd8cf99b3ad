// The coefficient c_b of each row of a loss: rlhf_fast/ops/aggregate.py has the four formulas.
#pragma once

#include "ops.h"

namespace rlhf_fast {

inline double count_row(const uint8_t* mask, int64_t width) {
  int64_t n = 0;
  for (int64_t t = 0; t < width; ++t) n += mask[t] != 0;
  return static_cast<double>(n);
}

// c_b of each row; `tokens` receives the number of counting tokens.
inline std::vector<double> coefficients(
    const Tensor& mask, const std::string& aggregation, const MaybeTensor& normalizer,
    double* tokens) {
  const int64_t rows = mask.size(0), width = mask.size(1);
  const uint8_t* m = bits(mask);
  std::vector<double> counts(rows);
  parallel_rows(rows, width, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) counts[b] = count_row(m + b * width, width);
  });
  double nonempty = 0;
  *tokens = 0;
  for (double n : counts) {
    *tokens += n;
    nonempty += n > 0;
  }
  double n = aggregation == "token-mean" ? *tokens : aggregation == "token-sum" ? 1 : nonempty;
  if (normalizer.has_value()) {
    n = normalizer->scalar_type() == ScalarType::Double ? *data<double>(*normalizer)
                                                        : *data<float>(*normalizer);
    STD_TORCH_CHECK(n >= 0 && std::isfinite(n), "normalizer must be finite and at least 0, got ",
                    n);
  }
  for (double& c : counts) {
    const double divisor = aggregation == "seq-mean-token-mean" ? n * c : n;
    c = divisor > 0 ? 1 / divisor : 0;
  }
  return counts;
}

// Index of the first counting token; -1 if none counts.
inline int64_t first_counting(const Tensor& mask) {
  const uint8_t *begin = bits(mask), *end = begin + mask.numel();
  const uint8_t* first = std::find_if(begin, end, [](uint8_t bit) { return bit != 0; });
  return first == end ? -1 : first - begin;
}

// The population variance of n numbers, of Moments' two sums.
inline double variance(double sum, double squares, double n) {
  return n > 0 ? std::max(0.0, squares / n - (sum / n) * (sum / n)) : 0;
}

// The K numbers as a [K] tensor like `like`, and the first of them as a 0-dim one.
template <class S>
Tensor vector_of(const Tensor& like, const std::vector<double>& numbers) {
  const size_t size = numbers.size();
  Tensor out = new_tensor({static_cast<int64_t>(size)}, like.scalar_type());
  for (size_t k = 0; k < size; ++k) mutable_data<S>(out)[k] = static_cast<S>(numbers[k]);
  return out;
}
template <class S>
Tensor scalar_of(const Tensor& like, double number) {
  Tensor out = new_tensor({}, like.scalar_type());
  *mutable_data<S>(out) = static_cast<S>(number);
  return out;
}

}  // namespace rlhf_fast
