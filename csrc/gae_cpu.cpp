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
  int64_t mask_stride, dones_stride;  // 0 where one constant stands for a whole tensor
  S *advantages, *returns;
  int64_t steps;
  double gamma, gamma_lambda;
  bool skip_holes;
};

constexpr bool kTrue = true, kFalse = false;

// N rows from `row` on, N known to the compiler; accumulates in double. Everything is loaded
// first and selected after, so that holes cost no mispredicted branches (they cost 10x).
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
      const bool counts = s.mask[i * s.mask_stride], done = s.dones[i * s.dones_stride];
      double reward = s.rewards[i], value = s.values[i];
      reward = counts ? reward : 0.0;
      value = counts ? value : 0.0;
      const double V = done ? 0.0 : next_value[k], A = done ? 0.0 : advantage[k];
      const double a = reward + s.gamma * V - value + s.gamma_lambda * A;
      const bool moves = counts | !s.skip_holes;
      next_value[k] = moves ? value : V;
      advantage[k] = moves ? a : A;
      s.advantages[i] = static_cast<S>(counts ? a : 0.0);
      s.returns[i] = static_cast<S>(counts ? a + value : 0.0);
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
                    mask.has_value() ? data<bool>(mask) : &kTrue,
                    dones.has_value() ? data<bool>(dones) : &kFalse,
                    mask.has_value(), dones.has_value(), mutable_data<S>(advantages),
                    mutable_data<S>(returns), steps, gamma, gamma * lambda, skip_holes};
    parallel_rows(rows, steps, [&](int64_t begin, int64_t end) { scan(s, begin, end); });
    return 0;
  });
  return {advantages, returns};
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) { m.impl("gae", TORCH_BOX(&gae)); }

}  // namespace rlhf_fast
