// value_loss on CPU: loss, statistics and gradient in one pass over [B, T].
#include "aggregate.h"

namespace rlhf_fast {
namespace {

enum { kLoss, kCut, kValue, kError2, kReturn, kReturn2, kResidual, kResidual2, kSums };

template <class S>
struct ValueSpan {
  const S *values, *old_values, *returns;
  const uint8_t* mask;
  S* d_values;
  S clip;
  S return_pivot, residual_pivot;  // a counting token's return, and that minus its value
};

template <class S>
RLHF_INLINE void value_span(const ValueSpan<S>& s, int64_t begin, int64_t end, double c,
                            double* sums) {
  using V = typename Lane<S>::Vector;
  constexpr int width = Lane<S>::width;
  const V zero = V{};
  V loss = zero, cuts = zero, values = zero;
  Wide<V> errors2{};
  Moments<V> returns, residuals;
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
    store_some(s.d_values + i, select(counts, times(zero + S(c), slope), zero), n);
    loss += larger;
    values += value;
    add(errors2, squared);
    returns.add(select(counts, target, zero + s.return_pivot), s.return_pivot);
    residuals.add(select(counts, -error, zero + s.residual_pivot), s.residual_pivot);
  }
  sums[kLoss] = c == 0 ? 0 : c * sum(loss) / 2;
  sums[kCut] = sum(cuts);
  sums[kValue] = sum(values);
  sums[kError2] = sum(errors2);
  sums[kReturn] = sum(returns.sum);
  sums[kReturn2] = sum(returns.squares);
  sums[kResidual] = sum(residuals.sum);
  sums[kResidual2] = sum(residuals.squares);
}
void run(const ValueSpan<float>* s, int64_t begin, int64_t end, double c,
                     double* sums) {
  RLHF_ON_THIS_CPU(value_span(*s, begin, end, c, sums));
}
void run(const ValueSpan<double>* s, int64_t begin, int64_t end, double c,
                     double* sums) {
  RLHF_ON_THIS_CPU(value_span(*s, begin, end, c, sums));
}

// values, old_values, returns [B, T]; mask [B, T] bool; normalizer 0-dim ->
// (loss 0-dim, stats [7], dloss/dvalues [B, T]).
std::tuple<Tensor, Tensor, Tensor> value_loss(
    const Tensor& values, const MaybeTensor& old_values, const Tensor& returns, const Tensor& mask,
    const MaybeTensor& normalizer, double clip, std::string aggregation) {
  double tokens = 0;
  const std::vector<double> c = coefficients(mask, aggregation, normalizer, &tokens);
  const Units units(values.size(0), values.size(1));
  std::vector<std::array<double, kSums>> unit_sums(units.count());
  Tensor d_values = new_like(values);
  return dispatch_accumulator(values, "value_loss", [&](auto element) {
    using S = decltype(element);
    const S *value = data<S>(values), *target = data<S>(returns);
    const int64_t first = first_counting(mask);
    const S pivot = first < 0 ? S(0) : target[first];
    const ValueSpan<S> span{value, data<S>(old_values), target, bits(mask),
                            mutable_data<S>(d_values), S(clip), pivot,
                            first < 0 ? S(0) : S(pivot - value[first])};
    units.parallel([&](int64_t unit, int64_t row, int64_t begin, int64_t end) {
      run(&span, begin, end, c[row], unit_sums[unit].data());
    });
    const auto sums = total(unit_sums);
    auto mean = [&](int k) { return tokens > 0 ? sums[k] / tokens : 0; };
    const double return_mean = pivot + mean(kReturn);
    const double spread = variance(sums[kReturn], sums[kReturn2], tokens);
    const double unexplained = variance(sums[kResidual], sums[kResidual2], tokens);
    const double rounding = 4 * std::numeric_limits<S>::epsilon() * return_mean;
    const bool constant = spread <= rounding * rounding;
    return std::tuple(scalar_of<S>(values, sums[kLoss]),
                      vector_of<S>(values, {mean(kCut), mean(kValue), return_mean, spread,
                                            mean(kError2), constant ? 0 : 1 - unexplained / spread,
                                            tokens}),
                      d_values);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) { m.impl("value_loss", TORCH_BOX(&value_loss)); }

}  // namespace rlhf_fast
