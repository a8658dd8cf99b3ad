// pairwise_loss on CPU. A batch of pairs is small: plain scalar code, in double, with one exponential
// a pair and one logarithm, of a product, for many.
#include "aggregate.h"

namespace rlhf_fast {
namespace {

constexpr int64_t kProduct = 512;  // factors between 1 and 2: double holds 1023 of them

// chosen, rejected, margin [B] -> (loss 0-dim, stats [4], dloss/dchosen [B], dloss/drejected [B]).
std::tuple<Tensor, Tensor, Tensor, Tensor> pairwise_loss(
    const Tensor& chosen, const Tensor& rejected, const MaybeTensor& margin, double center_coef) {
  Tensor d_chosen = torch::stable::empty_like(chosen);
  Tensor d_rejected = torch::stable::empty_like(rejected);
  const int64_t pairs = chosen.numel();
  const double n = std::max<int64_t>(pairs, 1);
  return dispatch_accumulator(chosen, "pairwise_loss", [&](auto element) {
    using S = decltype(element);
    const S *w = data<S>(chosen), *l = data<S>(rejected), *m = data<S>(margin);
    S *dw = mutable_data<S>(d_chosen), *dl = mutable_data<S>(d_rejected);
    const Units units(1, pairs);
    std::vector<std::array<double, 5>> unit_sums(units.count());
    units.parallel([&](int64_t unit, int64_t, int64_t begin, int64_t end) {
      std::array<double, 5> sums{};
      double wide = 0;  // of the product of (1 + e^-|x|) over kProduct pairs, what it is above 1
      for (int64_t i = begin; i < end; ++i) {
        const double high = w[i], low = l[i], gap = high - low, both = high + low;
        const double x = gap - (m ? m[i] : S(0));
        // -log sigmoid(x) = max(-x, 0) + log(1 + e^-|x|)
        const double e = std::exp(-std::abs(x));
        wide += e * (1 + wide);
        if ((i - begin) % kProduct == kProduct - 1 || i == end - 1) {
          sums[0] += std::log1p(wide);
          wide = 0;
        }
        const double wrong = (x < 0 ? 1 : e) / (1 + e);
        const double centring = center_coef == 0 ? 0 : center_coef * both;  // 0 * inf is 0 here
        dw[i] = static_cast<S>((2 * centring - wrong) / n);
        dl[i] = static_cast<S>((2 * centring + wrong) / n);
        const double loss = std::max(-x, 0.0) + (centring == 0 ? 0 : centring * both);
        const double terms[] = {loss, gap > 0 ? 1.0 : 0.0, gap, high, low};
        for (int k = 0; k < 5; ++k) sums[k] += terms[k];
      }
      unit_sums[unit] = sums;
    });
    const auto sums = total(unit_sums);
    return std::tuple(
        scalar_of<S>(chosen, sums[0] / n),
        vector_of<S>(chosen, {sums[1] / n, sums[2] / n, sums[3] / n, sums[4] / n}), d_chosen,
        d_rejected);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) {
  m.impl("pairwise_loss", TORCH_BOX(&pairwise_loss));
}

}  // namespace rlhf_fast
