// kl_penalized_rewards on CPU: -beta KL_t, and the score on the last counting token of each row.
#include "token_kl.h"

namespace rlhf_fast {
namespace {

template <class S>
struct RewardRow {
  const S *logp, *ref_logp;
  const uint8_t* mask;
  S* rewards;
  int64_t steps;
  S score, beta;
  Estimator estimator;
};

template <class S>
RLHF_INLINE void reward_row(const RewardRow<S>& r) {
  using V = typename Lane<S>::Vector;
  constexpr int width = Lane<S>::width;
  for (int64_t t = 0; t < r.steps; t += width) {
    const int64_t n = r.steps - t;
    const V d = load_some(r.logp + t, n, 0) - load_some(r.ref_logp + t, n, 0);
    const V penalty = times(V{} - r.beta, token_kl(d, r.estimator).value);
    store_some(r.rewards + t, select(load_mask<S>(r.mask + t, n), penalty, V{}), n);
  }
  int64_t last = r.steps - 1;
  while (last >= 0 && !r.mask[last]) --last;
  if (last >= 0) r.rewards[last] += r.score;
}
void run(const RewardRow<float>* r) {
  RLHF_ON_THIS_CPU(reward_row(*r));
}
void run(const RewardRow<double>* r) {
  RLHF_ON_THIS_CPU(reward_row(*r));
}

// scores [B]; logp, ref_logp [B, T]; mask [B, T] bool -> rewards [B, T].
Tensor kl_penalized_rewards(const Tensor& scores, const Tensor& logp, const Tensor& ref_logp,
                            const Tensor& mask, double beta, std::string name) {
  Tensor rewards = new_like(logp);
  const int64_t rows = logp.size(0), steps = logp.size(1);
  dispatch_accumulator(logp, "kl_penalized_rewards", [&](auto element) {
    using S = decltype(element);
    const Estimator kind = estimator(name);
    const S *score = data<S>(scores), *p = data<S>(logp), *q = data<S>(ref_logp);
    const uint8_t* m = bits(mask);
    S* out = mutable_data<S>(rewards);
    parallel_rows(rows, steps, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t o = b * steps;
        const RewardRow<S> row{p + o, q + o, m + o, out + o, steps, score[b], S(beta), kind};
        run(&row);
      }
    });
    return 0;
  });
  return rewards;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) {
  m.impl("kl_penalized_rewards", TORCH_BOX(&kl_penalized_rewards));
}

}  // namespace rlhf_fast
