// masked_mean, masked_moments and masked_normalize on CPU; sums in double.
#include "aggregate.h"

namespace rlhf_fast {
namespace {

// Of the counting values: their number, and the sums of v - pivot and of its square.
template <class S>
RLHF_INLINE void sum_span(const S* values, const uint8_t* mask, int64_t begin, int64_t end, S pivot,
                          double* sums) {
  using V = typename Lane<S>::Vector;
  constexpr int width = Lane<S>::width;
  Moments<V> moments;
  V count = V{};
  for (int64_t i = begin; i < end; i += width) {
    const V counts = load_mask<S>(mask + i, end - i);
    moments.add(select(counts, load_some(values + i, end - i, 0), V{} + pivot), pivot);
    count += counts;
  }
  sums[0] = sum(count);
  sums[1] = sum(moments.sum);
  sums[2] = sum(moments.squares);
}
void run(const float* values, const uint8_t* mask, int64_t begin, int64_t end,
                     float pivot, double* sums) {
  RLHF_ON_THIS_CPU(sum_span(values, mask, begin, end, pivot, sums));
}
void run(const double* values, const uint8_t* mask, int64_t begin, int64_t end,
                     double pivot, double* sums) {
  RLHF_ON_THIS_CPU(sum_span(values, mask, begin, end, pivot, sums));
}

template <class S>
std::array<double, 3> masked_sums(const Tensor& values, const Tensor& mask, S pivot) {
  const Units units(1, values.numel());
  std::vector<std::array<double, 3>> unit_sums(units.count());
  const S* v = data<S>(values);
  const uint8_t* m = bits(mask);
  units.parallel([&](int64_t unit, int64_t, int64_t begin, int64_t end) {
    run(v, m, begin, end, pivot, unit_sums[unit].data());
  });
  return total(unit_sums);
}

// values [N], mask [N] bool -> their mean, 0-dim.
Tensor masked_mean(const Tensor& values, const Tensor& mask) {
  return dispatch_accumulator(values, "masked_mean", [&](auto element) {
    using S = decltype(element);
    const auto [count, sum_, squares] = masked_sums<S>(values, mask, 0);
    return scalar_of<S>(values, sum_ / std::max(count, 1.0));
  });
}

// values [N], mask [N] bool -> [3]: count, mean, sum of squared deviations from the mean.
Tensor masked_moments(const Tensor& values, const Tensor& mask) {
  return dispatch_accumulator(values, "masked_moments", [&](auto element) {
    using S = decltype(element);
    const int64_t first = first_counting(mask);
    const S pivot = first < 0 ? S(0) : data<S>(values)[first];
    const auto [count, sum_, squares] = masked_sums<S>(values, mask, pivot);
    const double mean = first < 0 ? 0 : pivot + sum_ / count;
    return vector_of<S>(values, {count, mean, variance(sum_, squares, count) * count});
  });
}

template <class S>
struct NormalizeSpan {
  const S* values;
  const uint8_t* mask;
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
void run(const NormalizeSpan<float>* s, int64_t begin, int64_t end) {
  RLHF_ON_THIS_CPU(normalize_span(*s, begin, end));
}
void run(const NormalizeSpan<double>* s, int64_t begin, int64_t end) {
  RLHF_ON_THIS_CPU(normalize_span(*s, begin, end));
}

// values [N], mask [N] bool, moments [3] as masked_moments gives them -> [N].
Tensor masked_normalize(const Tensor& values, const Tensor& mask, const Tensor& moments,
                        bool shift_mean) {
  Tensor out = new_like(values);
  dispatch_accumulator(values, "masked_normalize", [&](auto element) {
    using S = decltype(element);
    const S *m = data<S>(moments);
    const double variance = m[2] / std::max(m[0] - 1.0, 1.0);
    const NormalizeSpan<S> span{data<S>(values), bits(mask), mutable_data<S>(out), m[1],
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
