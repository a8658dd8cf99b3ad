// token_logprobs where rows lie side by side: the logit of row r and token v at x[v * stride + r].
//
// The linear engine lays a chunk out like this on CPU: the BLAS makes W Xt 6 % faster than X Wt
// there, since it is the small X that is packed (three products of a chunk, 384 of 4096 rows). A
// vector holds one token of several rows, so nothing is summed across its lanes. Threads share the
// vocabulary out among them in units that do not depend on how many they are; a tile of tokens
// stays in L2 between finding its maximum and summing e^(z - m).
#pragma once

#include "token_logprobs.h"

namespace rlhf_fast {
namespace RLHF_VECTORS {

constexpr int64_t kVocabUnit = 2048;
constexpr int64_t kTile = 16;

inline int64_t padded(int64_t n) { return (n + kFloats - 1) / kFloats * kFloats; }

// [1, T, V] whose rows lie side by side.
inline bool side_by_side(const Tensor& t) {
  return t.size(0) == 1 && t.stride(1) == 1 && t.stride(2) > 1 && t.size(2) > 1;
}

inline void check_label(int64_t label, int64_t vocab, int64_t row) {
  STD_TORCH_CHECK(label == kIgnoreIndex || (label >= 0 && label < vocab), "labels: row ", row,
                  " is ", label, ", outside [0, ", vocab, ") and not -100");
}

// f(unit, begin, end) over units of the vocabulary.
template <class F>
void parallel_vocabulary(int64_t n, int64_t vocab, const F& f) {
  parallel_rows((vocab + kVocabUnit - 1) / kVocabUnit, n * kVocabUnit, [&](auto first, auto last) {
    for (int64_t unit = first; unit < last; ++unit) {
      f(unit, unit * kVocabUnit, std::min(vocab, (unit + 1) * kVocabUnit));
    }
  });
}

// n per-row arguments (all `fill` if there are none), padded to whole vectors: the last one can be
// loaded like the others.
template <class S>
std::vector<S> per_row(int64_t n, S fill, const S* from) {
  std::vector<S> values(padded(n), fill);
  if (from) std::copy(from, from + n, values.begin());
  return values;
}

// Running maximum and sums of some rows over part of the vocabulary.
template <class S>
struct ColumnSums {
  std::vector<S> max;
  std::vector<double> sum, weighted;  // of e^(z - max) and e^(z - max) (z - max)

  explicit ColumnSums(int64_t n)
      : max(n, -std::numeric_limits<S>::infinity()), sum(n, 0.0), weighted(n, 0.0) {}

  // The sums of row i as they are for a larger maximum.
  RLHF_INLINE_MEMBER void raise(int64_t i, S top) {
    if (sum[i] > 0) {
      const double shift = static_cast<double>(max[i]) - top, factor = std::exp(shift);
      weighted[i] = factor * (weighted[i] + shift * sum[i]);
      sum[i] *= factor;
    }
    max[i] = top;
  }
  // Takes in the sums of the same row over further tokens.
  void merge(int64_t i, ColumnSums& other) {
    const S top = std::max(max[i], other.max[i]);
    if (top != max[i]) raise(i, top);
    if (top != other.max[i]) other.raise(i, top);
    sum[i] += other.sum[i];
    weighted[i] += other.weighted[i];
  }
};

template <class S>
struct ColumnScale {
  std::vector<S> temperature;
  S softcap;
  bool divides;

  template <class V>
  RLHF_INLINE_MEMBER Scale<S, V> at(int64_t i) const {
    return {load(&temperature[i]), softcap, divides};
  }
};

template <class S>
ColumnScale<S> column_scale(int64_t n, double temperature, const S* divisors,
                            std::optional<double> softcap) {
  return {per_row(n, S(temperature), divisors), S(softcap.value_or(0)),
          divisors || temperature != 1};
}

template <class S>
struct ColumnGradient {
  ColumnScale<S> scale;
  std::vector<S> max, log_sum, grad_logp, grad_entropy, entropy;

  template <class V>
  RLHF_INLINE_MEMBER Gradient<S, V> at(int64_t i) const {
    return {scale.template at<V>(i), load(&max[i]),          load(&log_sum[i]),
            load(&grad_logp[i]),     load(&grad_entropy[i]), load(&entropy[i])};
  }
  Gradient<S, S> row(int64_t i) const {
    return {{scale.temperature[i], scale.softcap, scale.divides}, max[i], log_sum[i],
            grad_logp[i], grad_entropy[i], entropy[i]};
  }
};

template <class V>
RLHF_INLINE void accumulate(double* totals, V v) {
  Wide<V> wide;
  std::memcpy(&wide, totals, sizeof wide);
  add(wide, v);
  std::memcpy(totals, &wide, sizeof wide);
}

// Tokens [begin, end) of n rows.
template <class T, class S = typename Lane<T>::Scalar>
RLHF_INLINE void sum_columns(const T* x, int64_t stride, int64_t begin, int64_t end, int64_t n,
                             const ColumnScale<S>& scales, ColumnSums<S>& sums) {
  using V = typename Lane<T>::Vector;
  constexpr int width = Lane<T>::width;
  V z[kTile];
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t length = std::min(kTile, end - start);
    const T* tile = x + start * stride;
    for (int64_t c = 0; c < n; c += width) {
      const Scale<S, V> scale = scales.template at<V>(c);
      const V before = load(&sums.max[c]);
      V top = before;
      for (int64_t i = 0; i < length; ++i) {
        z[i] = load_some(tile + i * stride + c, n - c, 0.0f);
      }
      scale.apply(z, length);
      V low = z[0];
      extremes(z, length, low, top);
      if (std::memcmp(&top, &before, sizeof top) != 0) {
        for (int k = 0; k < width; ++k) {
          if (top[k] != before[k]) sums.raise(c + k, top[k]);
        }
      }
      // Nothing but -inf (or NaN) so far: any finite reference gives e^(-inf) = 0.
      const V reference = max(top, V{} + std::numeric_limits<S>::lowest());
      V sum = V{}, weighted = V{};
      const Next next(tile + kTile * stride + c, stride);
      add_exponentials(z, length, reference, low, next, sum, weighted);
      accumulate(&sums.sum[c], sum);
      accumulate(&sums.weighted[c], weighted);
    }
  }
}

// out (x itself, or a tensor that lies the same way) <- the gradient of tokens [begin, end).
template <bool kCapped, class T, class Out, class S = typename Lane<T>::Scalar>
RLHF_INLINE void grad_columns(const T* x, Out* out, int64_t stride, int64_t begin, int64_t end,
                              int64_t n, const ColumnGradient<S>& gradients) {
  using V = typename Lane<T>::Vector;
  constexpr int width = Lane<T>::width;
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t length = std::min(kTile, end - start);
    for (int64_t c = 0; c < n; c += width) {
      const Gradient<S, V> gradient = gradients.template at<V>(c);
      for (int64_t i = 0; i < length; ++i) {
        const int64_t at = (start + i) * stride + c;
        __builtin_prefetch(x + at + kTile * stride);
        const V values = load_some(x + at, n - c, 0.0f);
        store_some(out + at, gradient.template at<kCapped>(values, V{}), n - c);
      }
    }
  }
}

}  // namespace RLHF_VECTORS
}  // namespace rlhf_fast
