// gae on CPU. The scan is a serial chain along a row, so eight rows run side by side to keep the
// processor busy while each waits for its own last step.
#include "ops.h"

namespace rlhf_fast {
namespace {

constexpr int64_t kSideBySide = 8;

template <class S>
struct Scan {
  const S *rewards, *values, *bootstrap;
  const bool *mask, *dones;
  S *advantages, *returns;
  int64_t steps;
  double gamma, gamma_lambda;
  bool skip_holes;
};

// N rows from `row` on, N known to the compiler; accumulates in double.
template <int64_t N, class S>
RLHF_INLINE void scan_rows(const Scan<S>& s, int64_t row) {
  double next_value[N], advantage[N];
  for (int64_t k = 0; k < N; ++k) {
    next_value[k] = s.bootstrap ? s.bootstrap[row + k] : S(0);
    advantage[k] = 0;
  }
  for (int64_t t = s.steps - 1; t >= 0; --t) {
    for (int64_t k = 0; k < N; ++k) {
      const int64_t i = (row + k) * s.steps + t;
      const bool counts = !s.mask || s.mask[i];
      const double alive = s.dones && s.dones[i] ? 0.0 : 1.0;
      const double reward = counts ? s.rewards[i] : S(0);
      const double value = counts ? s.values[i] : S(0);
      next_value[k] *= alive;
      advantage[k] *= alive;
      const double a =
          reward + s.gamma * next_value[k] - value + s.gamma_lambda * advantage[k];
      const bool moves = counts || !s.skip_holes;
      next_value[k] = moves ? value : next_value[k];
      advantage[k] = moves ? a : advantage[k];
      s.advantages[i] = counts ? static_cast<S>(a) : S(0);
      s.returns[i] = counts ? static_cast<S>(a + value) : S(0);
    }
  }
}

template <class S>
void scan(const Scan<S>& s, int64_t begin, int64_t end) {
  int64_t row = begin;
  for (; row + kSideBySide <= end; row += kSideBySide) scan_rows<kSideBySide>(s, row);
  for (; row < end; ++row) scan_rows<1>(s, row);
}

}  // namespace

std::tuple<Tensor, Tensor> gae(
    const Tensor& rewards, const Tensor& values, const MaybeTensor& mask, const MaybeTensor& dones,
    const MaybeTensor& bootstrap, double gamma, double lambda, bool skip_holes) {
  Tensor advantages = torch::stable::empty_like(rewards);
  Tensor returns = torch::stable::empty_like(rewards);
  const int64_t rows = rewards.size(0), steps = rewards.size(1);
  dispatch_accumulator(rewards, "gae", [&](auto element) {
    using S = decltype(element);
    const Scan<S> s{data<S>(rewards), data<S>(values), data<S>(bootstrap),
                    data<bool>(mask), data<bool>(dones), mutable_data<S>(advantages),
                    mutable_data<S>(returns), steps, gamma, gamma * lambda, skip_holes};
    parallel_rows(rows, steps, [&](int64_t begin, int64_t end) { scan(s, begin, end); });
    return 0;
  });
  return {advantages, returns};
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) { m.impl("gae", TORCH_BOX(&gae)); }

}  // namespace rlhf_fast
