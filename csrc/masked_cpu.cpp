// masked_mean, masked_moments and masked_normalize on CPU; sums in double.
#include "aggregate.h"

namespace rlhf_fast {
namespace {

// Sum over the counting values of (v - center)^power, power 1 or 2, and their number.
template <class S>
RLHF_INLINE void sum_span(const S* values, const bool* mask, int64_t begin, int64_t end, S center,
                          bool squared, double* sums) {
  using V = typename Lane<S>::Vector;
  constexpr int width = Lane<S>::width;
  Wide<V> sum_{};
  V count = V{};
  for (int64_t i = begin; i < end; i += width) {
    const V counts = load_mask<S>(mask + i, end - i);
    const V d = select(counts, load_some(values + i, end - i, 0) - center, V{});
    add(sum_, squared ? d * d : d);
    count += counts;
  }
  sums[0] = sum(count);
  sums[1] = sum(sum_);
}
RLHF_CLONES void run(const float* values, const bool* mask, int64_t begin, int64_t end,
                     float center, bool squared, double* sums) {
  sum_span(values, mask, begin, end, center, squared, sums);
}
RLHF_CLONES void run(const double* values, const bool* mask, int64_t begin, int64_t end,
                     double center, bool squared, double* sums) {
  sum_span(values, mask, begin, end, center, squared, sums);
}

template <class S>
std::array<double, 2> masked_sum(const Tensor& values, const Tensor& mask, S center, bool squared) {
  const Units units(1, values.numel());
  std::vector<std::array<double, 2>> unit_sums(units.count());
  const S* v = data<S>(values);
  const bool* m = data<bool>(mask);
  units.parallel([&](int64_t unit, int64_t, int64_t begin, int64_t end) {
    run(v, m, begin, end, center, squared, unit_sums[unit].data());
  });
  return total(unit_sums);
}

Tensor masked_mean(const Tensor& values, const Tensor& mask) {
  return dispatch_accumulator(values, "masked_mean", [&](auto element) {
    using S = decltype(element);
    const auto [count, sum_] = masked_sum<S>(values, mask, 0, false);
    return scalar_of<S>(values, sum_ / std::max(count, 1.0));
  });
}

Tensor masked_moments(const Tensor& values, const Tensor& mask) {
  return dispatch_accumulator(values, "masked_moments", [&](auto element) {
    using S = decltype(element);
    const auto [count, sum_] = masked_sum<S>(values, mask, 0, false);
    const S mean = static_cast<S>(sum_ / std::max(count, 1.0));
    return vector_of<S>(values, {count, mean, masked_sum<S>(values, mask, mean, true)[1]});
  });
}

template <class S>
struct NormalizeSpan {
  const S* values;
  const bool* mask;
  S* out;
  S mean, scale, shift;
};

template <class S>
RLHF_INLINE void normalize_span(const NormalizeSpan<S>& s, int64_t begin, int64_t end) {
  using V = typename Lane<S>::Vector;
  for (int64_t i = begin; i < end; i += Lane<S>::width) {
    const int64_t n = end - i;
    const V whitened = (load_some(s.values + i, n, 0) - s.mean) * s.scale + s.shift;
    store_some(s.out + i, select(load_mask<S>(s.mask + i, n), whitened, V{}), n);
  }
}
RLHF_CLONES void run(const NormalizeSpan<float>* s, int64_t begin, int64_t end) {
  normalize_span(*s, begin, end);
}
RLHF_CLONES void run(const NormalizeSpan<double>* s, int64_t begin, int64_t end) {
  normalize_span(*s, begin, end);
}

Tensor masked_normalize(const Tensor& values, const Tensor& mask, const Tensor& moments,
                        bool shift_mean) {
  Tensor out = torch::stable::empty_like(values);
  dispatch_accumulator(values, "masked_normalize", [&](auto element) {
    using S = decltype(element);
    const S *m = data<S>(moments);
    const double variance = m[2] / std::max(m[0] - 1.0, 1.0);
    const NormalizeSpan<S> span{data<S>(values), data<bool>(mask), mutable_data<S>(out), m[1],
                                S(1 / std::sqrt(variance + 1e-8)), shift_mean ? S(0) : m[1]};
    Units(1, values.numel()).parallel([&](int64_t, int64_t, int64_t begin, int64_t end) {
      run(&span, begin, end);
    });
    return 0;
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) {
  m.impl("masked_mean", TORCH_BOX(&masked_mean));
  m.impl("masked_moments", TORCH_BOX(&masked_moments));
  m.impl("masked_normalize", TORCH_BOX(&masked_normalize));
}

}  // namespace rlhf_fast
