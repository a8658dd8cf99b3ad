// pairwise_loss on CPU: one exponential a pair, and one logarithm, of a product, for many.
#include "aggregate.h"

namespace rlhf_fast {
namespace {

constexpr int64_t kProduct = 512;  // factors between 1 and 2: double holds 1023 of them

enum { kLoss, kRight, kGap, kChosen, kRejected, kSums };

template <class S>
struct PairSpan {
  const S *chosen, *rejected, *margin;  // margin: may be null
  S *d_chosen, *d_rejected;
  S n, center_coef;
};

template <class S>
RLHF_INLINE void pair_span(const PairSpan<S>& s, int64_t begin, int64_t end, double* sums) {
  using V = typename Lane<S>::Vector;
  constexpr int width = Lane<S>::width;
  const V zero = V{}, one = zero + 1;
  Wide<V> wide{};  // of the product of 1 + e^-|x| over kProduct pairs, what it is above 1
  Wide<V> losses{}, right{}, gaps{}, highs{}, lows{};
  double logarithms = 0;
  for (int64_t i = begin; i < end; i += width) {
    const int64_t n = end - i;
    const V high = load_some(s.chosen + i, n, 0), low = load_some(s.rejected + i, n, 0);
    const V gap = high - low, both = high + low;
    const V x = s.margin ? gap - load_some(s.margin + i, n, 0) : gap;
    // -log sigmoid(x) = max(-x, 0) + log(1 + e^-|x|)
    V e = exp(x < zero ? x : -x);
    const V wrong = select(greater(zero, x), one, e) / (one + e);
    const V centring = times(zero + s.center_coef, both);
    store_some(s.d_chosen + i, (2 * centring - wrong) / s.n, n);
    store_some(s.d_rejected + i, (2 * centring + wrong) / s.n, n);
    for (int64_t lane = n; lane < width; ++lane) e[lane] = 0;  // beyond the last pair
    const Wide<V> above = __builtin_convertvector(e, Wide<V>);
    wide += above * (1 + wide);
    if ((i - begin) / width % kProduct == kProduct - 1 || n <= width) {
      for (int lane = 0; lane < width; ++lane) logarithms += std::log1p(wide[lane]);
      wide = Wide<V>{};
    }
    add(losses, max(-x, zero) + times(centring, both));
    add(right, greater(gap, zero));
    add(gaps, gap);
    add(highs, high);
    add(lows, low);
  }
  sums[kLoss] = logarithms + sum(losses);
  sums[kRight] = sum(right);
  sums[kGap] = sum(gaps);
  sums[kChosen] = sum(highs);
  sums[kRejected] = sum(lows);
}
void run(const PairSpan<float>* s, int64_t begin, int64_t end, double* sums) {
  RLHF_ON_THIS_CPU(pair_span(*s, begin, end, sums));
}
void run(const PairSpan<double>* s, int64_t begin, int64_t end, double* sums) {
  RLHF_ON_THIS_CPU(pair_span(*s, begin, end, sums));
}

// chosen, rejected, margin [B] -> (loss 0-dim, stats [4], dloss/dchosen [B], dloss/drejected [B]).
std::tuple<Tensor, Tensor, Tensor, Tensor> pairwise_loss(
    const Tensor& chosen, const Tensor& rejected, const MaybeTensor& margin, double center_coef) {
  Tensor d_chosen = new_like(chosen), d_rejected = new_like(rejected);
  const int64_t pairs = chosen.numel();
  const double n = std::max<int64_t>(pairs, 1);
  return dispatch_accumulator(chosen, "pairwise_loss", [&](auto element) {
    using S = decltype(element);
    const PairSpan<S> span{data<S>(chosen), data<S>(rejected), data<S>(margin),
                           mutable_data<S>(d_chosen), mutable_data<S>(d_rejected), S(n),
                           S(center_coef)};
    const Units units(1, pairs);
    std::vector<std::array<double, kSums>> unit_sums(units.count());
    units.parallel([&](int64_t unit, int64_t, int64_t begin, int64_t end) {
      run(&span, begin, end, unit_sums[unit].data());
    });
    const auto sums = total(unit_sums);
    return std::tuple(scalar_of<S>(chosen, sums[kLoss] / n),
                      vector_of<S>(chosen, {sums[kRight] / n, sums[kGap] / n, sums[kChosen] / n,
                                            sums[kRejected] / n}),
                      d_chosen, d_rejected);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) {
  m.impl("pairwise_loss", TORCH_BOX(&pairwise_loss));
}

}  // namespace rlhf_fast
