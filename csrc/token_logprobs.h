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

  // Of a block in place: tanh, a call, would push all else out of the registers of a larger loop.
  template <class V>
  RLHF_INLINE_MEMBER void apply(V* block, int64_t n) const {
    if (softcap != 0) {
      for (int64_t i = 0; i < n; ++i) block[i] = softcap * tanh(block[i] / softcap);
    }
    if (divides) {
      for (int64_t i = 0; i < n; ++i) block[i] = block[i] / temperature;
    }
  }
  template <class V>
  RLHF_INLINE_MEMBER V apply(V x) const {
    apply(&x, 1);
    return x;
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

// The least and the largest of each lane of a block of n vectors, `low` and `top` among them: in
// four chains, since a comparison waits for the one before.
template <class V>
RLHF_INLINE void extremes(const V* block, int64_t n, V& low, V& top) {
  constexpr int64_t chains = 4;
  V lows[chains], tops[chains];
  for (int64_t k = 0; k < chains; ++k) lows[k] = low, tops[k] = top;
  for (int64_t i = 0; i < n - n % chains; i += chains) {
    for (int64_t k = 0; k < chains; ++k) {
      lows[k] = min(block[i + k], lows[k]);
      tops[k] = max(block[i + k], tops[k]);
    }
  }
  for (int64_t i = n - n % chains; i < n; ++i) {
    lows[0] = min(block[i], lows[0]);
    tops[0] = max(block[i], tops[0]);
  }
  low = min(min(lows[0], lows[1]), min(lows[2], lows[3]));
  top = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
}

// The vectors that are read after a block: their bytes, and the distance of two. What a CPU fetches
// ahead by itself ends at a page's end, and while a block is worked on nothing else is read: with
// these, one thread sums rows that come from memory 1.5 times as fast (Intel Xeon, AVX-512). Past
// the end of a tensor it does nothing.
struct Next {
  const char* at;
  int64_t distance;

  template <class T>
  Next(const T* x, int64_t distance_)
      : at(reinterpret_cast<const char*>(x)), distance(distance_ * sizeof(T)) {}
  RLHF_INLINE_MEMBER void fetch(int64_t i) const { __builtin_prefetch(at + i * distance); }
};

// sum += e^(z - m) and weighted += e^(z - m) (z - m) over a block of n vectors; low: the least of
// each lane. Nearly always all are far above where e^x becomes 0, and nothing need be held there:
// 14 % faster (AMD EPYC, AVX2).
template <bool kNormal, class V, class M>
RLHF_INLINE void add_exponentials(const V* block, int64_t n, M m, Next next, V& sum, V& weighted) {
  for (int64_t i = 0; i < n; ++i) {
    next.fetch(i);
    const V d = block[i] - m;
    const V e = kNormal ? exp_of_normal(d) : exp(d);
    sum += e;
    if constexpr (kNormal) {
      weighted += e * d;
    } else {
      weighted += e * (d < kLeastExponent ? V{} : d);  // 0 * -inf is 0 here; NaN stays NaN
    }
  }
}
template <class V, class M>
RLHF_INLINE void add_exponentials(const V* block, int64_t n, M m, V low, Next next, V& sum,
                                  V& weighted) {
  if (smallest(low - m) >= kLeastExponent) {
    add_exponentials<true>(block, n, m, next, sum, weighted);
  } else {
    add_exponentials<false>(block, n, m, next, sum, weighted);
  }
}

// z and dz/dx of one vector.
template <class V>
struct Scaled {
  V z, slope;

  template <bool kCapped, class S, class D>
  static RLHF_INLINE_MEMBER Scaled of(V x, const Scale<S, D>& scale) {
    Scaled s{x, V{} + 1};
    if constexpr (kCapped) {
      const V t = tanh(x / scale.softcap);
      s = {scale.softcap * t, 1 - t * t};
    }
    return scale.divides ? Scaled{s.z / scale.temperature, s.slope / scale.temperature} : s;
  }
};

// dloss/dx = dz/dx (g_logp (1[v = label] - p) - g_entropy p (log p + entropy)).
template <class S, class D>
struct Gradient {
  Scale<S, D> scale;
  D max, log_sum, grad_logp, grad_entropy, entropy;

  // hit: 1 where the token is the row's label, else 0.
  template <bool kCapped, class V>
  RLHF_INLINE_MEMBER V at(V x, V hit) const {
    const auto [z, slope] = Scaled<V>::template of<kCapped>(x, scale);
    const V log_p = (z - max) - log_sum;
    const V p = exp(log_p);
    const V tilt = log_p < kLeastExponent ? V{} : log_p + entropy;  // 0 * -inf is 0 here
    return slope * (grad_logp * (hit - p) - grad_entropy * p * tilt);
  }
  template <class V>
  RLHF_INLINE_MEMBER V at_label(V x) const {
    const V one = V{} + 1;
    return scale.softcap != 0 ? at<true>(x, one) : at<false>(x, one);
  }
};

}  // namespace RLHF_VECTORS
}  // namespace rlhf_fast
