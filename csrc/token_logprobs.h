// What a logit becomes, whichever way the logits lie.
#pragma once

#include "ops.h"

namespace rlhf_fast {
namespace RLHF_VECTORS {

// z = softcap tanh(x / softcap) / temperature, and dz/dx; softcap 0 means none. D is S for the
// temperature of one row, or a vector where each lane is a row of its own.
template <class S, class D>
struct Scale {
  D temperature;
  S softcap;
  bool divides;  // false: every temperature is 1

  template <class V>
  RLHF_INLINE_MEMBER V apply(V x) const {
    if (softcap != 0) x = softcap * tanh(x / softcap);
    return divides ? x / temperature : x;
  }
  template <class V>
  RLHF_INLINE_MEMBER V slope(V x) const {
    V s = V{} + 1;
    if (softcap != 0) {
      const V t = tanh(x / softcap);
      s = s - t * t;
    }
    return divides ? s / temperature : s;
  }
};

// Of the rows that count; a compiled graph has no other look at the values.
template <class S>
void check_temperature(const S* divisors, const int64_t* label, int64_t rows) {
  for (int64_t i = 0; divisors && i < rows; ++i) {
    STD_TORCH_CHECK(label[i] == kIgnoreIndex || (divisors[i] > 0 && std::isfinite(divisors[i])),
                    "temperature: row ", i, " is ", divisors[i], ", not finite and above 0");
  }
}

// dloss/dx = dz/dx (g_logp (1[v = label] - p) - g_entropy p (log p + entropy)).
template <class S, class D>
struct Gradient {
  Scale<S, D> scale;
  D max, log_sum, grad_logp, grad_entropy, entropy;

  // hit: 1 where the token is the row's label, else 0.
  template <class V>
  RLHF_INLINE_MEMBER V at(V x, V hit) const {
    const V log_p = (scale.apply(x) - max) - log_sum;
    const V p = exp(log_p);
    const V tilt = log_p < S(-87.3) ? V{} : log_p + entropy;  // 0 * -inf is 0 here
    return scale.slope(x) * (grad_logp * (hit - p) - grad_entropy * p * tilt);
  }
};

}  // namespace RLHF_VECTORS
}  // namespace rlhf_fast
