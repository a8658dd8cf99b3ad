// The KL estimators and their slopes in d = logp - ref_logp: rlhf_fast/ops/token_kl.py.
#pragma once

#include "ops.h"

namespace rlhf_fast {

enum class Estimator { k1, k2, k3, abs };

inline Estimator estimator(const std::string& name) {
  if (name == "k1") return Estimator::k1;
  if (name == "k2") return Estimator::k2;
  if (name == "k3") return Estimator::k3;
  STD_TORCH_CHECK(name == "abs", "estimator must be k1, k2, k3 or abs, got ", name);
  return Estimator::abs;
}

template <class V>
struct Kl {
  V value;
  V slope;
};

template <class V>
RLHF_INLINE Kl<V> token_kl(V d, Estimator e) {
  const V one = V{} + 1;
  switch (e) {
    case Estimator::k1:
      return {d, one};
    case Estimator::k2:
      return {d * d / 2, d};
    case Estimator::k3: {
      // beyond 20 as its tangent; at -1000 e^x - 1 is -1
      const V bounded = clamp(-d, V{} - 1000, V{} + 20);
      const V x = exponential(bounded).minus_one;
      return {(x - bounded) + times(x, -d - bounded), -x};
    }
    case Estimator::abs:
      break;
  }
  const V slope = d > V{} ? one : (d < V{} ? -one : V{});
  return {d != d ? d : d * slope, slope};
}

}  // namespace rlhf_fast
