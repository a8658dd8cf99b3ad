// value_loss on CPU: loss, statistics and gradient in one pass over [B, T].
#include "aggregate.h"

namespace rlhf_fast {
namespace {

enum { kLoss, kCut, kValue, kReturn, kReturn2, kError, kError2, kSums };

template <class S>
struct ValueSpan {
  const S *values, *old_values, *returns;
  const bool* mask;
  S* d_values;
  S clip;
};

template <class S>
RLHF_INLINE void value_span(const ValueSpan<S>& s, int64_t begin, int64_t end, double c,
                            double* sums) {
  using V = typename Lane<S>::Vector;
  constexpr int width = Lane<S>::width;
  const V zero = V{};
  V loss = zero, cuts = zero, values = zero;
  Wide<V> returns{}, returns2{}, errors{}, errors2{};
  for (int64_t i = begin; i < end; i += width) {
    const int64_t n = end - i;
    const V counts = load_mask<S>(s.mask + i, n);
    const V value = select(counts, load_some(s.values + i, n, 0), zero);
    const V target = select(counts, load_some(s.returns + i, n, 0), zero);
    const V error = value - target, squared = error * error;
    V larger = squared, slope = error;
    if (s.old_values) {
      const V old = select(counts, load_some(s.old_values + i, n, 0), zero);
      const V clipped = clamp(value, old - s.clip, old + s.clip) - target;
      const V cut = counts * greater(clipped * clipped, squared);
      larger = select(cut, clipped * clipped, squared);
      slope = select(cut, zero, error);
      cuts += cut;
    }
    store_some(s.d_values + i, select(counts, S(c) * slope, zero), n);
    loss += larger;
    values += value;
    add(returns, target);
    add(returns2, target * target);
    add(errors, error);
    add(errors2, squared);
  }
  sums[kLoss] = c * sum(loss) / 2;
  sums[kCut] = sum(cuts);
  sums[kValue] = sum(values);
  sums[kReturn] = sum(returns);
  sums[kReturn2] = sum(returns2);
  sums[kError] = sum(errors);
  sums[kError2] = sum(errors2);
}
RLHF_CLONES void run(const ValueSpan<float>* s, int64_t begin, int64_t end, double c,
                     double* sums) {
  value_span(*s, begin, end, c, sums);
}
RLHF_CLONES void run(const ValueSpan<double>* s, int64_t begin, int64_t end, double c,
                     double* sums) {
  value_span(*s, begin, end, c, sums);
}

std::tuple<Tensor, Tensor, Tensor> value_loss(
    const Tensor& values, const MaybeTensor& old_values, const Tensor& returns, const Tensor& mask,
    const MaybeTensor& normalizer, double clip, std::string aggregation) {
  double tokens = 0;
  const std::vector<double> c = coefficients(mask, aggregation, normalizer, &tokens);
  const Units units(values.size(0), values.size(1));
  std::vector<std::array<double, kSums>> unit_sums(units.count());
  Tensor d_values = torch::stable::empty_like(values);
  return dispatch_accumulator(values, "value_loss", [&](auto element) {
    using S = decltype(element);
    const ValueSpan<S> span{data<S>(values), data<S>(old_values), data<S>(returns),
                            data<bool>(mask), mutable_data<S>(d_values), S(clip)};
    units.parallel([&](int64_t unit, int64_t row, int64_t begin, int64_t end) {
      run(&span, begin, end, c[row], unit_sums[unit].data());
    });
    const auto sums = total(unit_sums);
    auto mean = [&](int k) { return tokens > 0 ? sums[k] / tokens : 0; };
    auto variance = [&](int k, int k2) { return std::max(0.0, mean(k2) - mean(k) * mean(k)); };
    const double spread = variance(kReturn, kReturn2);
    const bool constant = spread <= 1e-12 * mean(kReturn2);
    const double explained = constant ? 0 : 1 - variance(kError, kError2) / spread;
    return std::tuple(scalar_of<S>(values, sums[kLoss]),
                      vector_of<S>(values, {mean(kCut), mean(kValue), mean(kReturn), spread,
                                            mean(kError2), explained}),
                      d_values);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) { m.impl("value_loss", TORCH_BOX(&value_loss)); }

}  // namespace rlhf_fast
