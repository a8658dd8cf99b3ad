// logits_kl on CPU: one read of both logits forward; one read of both and one write backward.
//
// Made for chunks whose rows lie side by side (token_logprobs_columns.h). Rows that lie otherwise
// are taken one at a time, one lane of each vector at work: right, not fast, and the engine never
// asks for it.
#pragma once

#include "token_logprobs_columns.h"

namespace rlhf_fast {
namespace RLHF_VECTORS {
namespace {

// Running maxima and sums of some rows of two distributions, a and b. A maximum is the lowest
// number until something larger than -inf comes.
template <class S>
struct PairSums {
  std::vector<S> max_a, max_b;
  std::vector<double> sum_a, sum_b;  // of e^(z - max)
  std::vector<double> gap;           // of e^(a - max_a) ((a - max_a) - (b - max_b))

  explicit PairSums(int64_t n)
      : max_a(n, std::numeric_limits<S>::lowest()), max_b(max_a), sum_a(n), sum_b(n), gap(n) {}

  // The sums of row i as they are for larger maxima.
  RLHF_INLINE_MEMBER void raise(int64_t i, S top_a, S top_b) {
    const double down_a = static_cast<double>(max_a[i]) - top_a;
    const double down_b = static_cast<double>(max_b[i]) - top_b;
    if (sum_a[i] > 0) {
      const double factor = down_a < -87.3 ? 0 : std::exp(down_a);  // as exp() in sum_pairs has it
      // what was infinite with p > 0 is nothing once p has become 0
      gap[i] = factor > 0 ? factor * (gap[i] + (down_a - down_b) * sum_a[i]) : 0;
      sum_a[i] *= factor;
    }
    sum_b[i] *= std::exp(down_b);
    max_a[i] = top_a;
    max_b[i] = top_b;
  }
  // Takes in the sums of the same row over further tokens.
  void merge(int64_t i, PairSums& other) {
    const S top_a = std::max(max_a[i], other.max_a[i]), top_b = std::max(max_b[i], other.max_b[i]);
    raise(i, top_a, top_b);
    other.raise(i, top_a, top_b);
    sum_a[i] += other.sum_a[i];
    sum_b[i] += other.sum_b[i];
    gap[i] += other.gap[i];
  }
};

// dloss/dx = dz/dx (g_logp (1[v = label] - p) + g_kl dkl/dz), p the policy, q the reference:
// dkl/dz = p ((log p - log q) - kl) for KL(p || q), and p - q for KL(q || p).
template <class S, class D>
struct KlGradient {
  Scale<S, D> scale;
  D max, log_sum, ref_max, ref_log_sum, grad_logp, grad_kl;
  D kl;  // 0 where g_kl is 0, so that an infinite one is not multiplied by it

  template <bool kReverse, bool kCapped, class V>
  RLHF_INLINE_MEMBER V at(V x, V y, V hit) const {
    const auto [z, slope] = Scaled<V>::template of<kCapped>(x, scale);
    const V log_p = (z - max) - log_sum, p = exp(log_p);
    const V ref_z = Scaled<V>::template of<kCapped>(y, scale).z;
    const V log_q = (ref_z - ref_max) - ref_log_sum;
    V d_kl;
    if constexpr (kReverse) {
      // bounded, since 0 * inf is 0 here; a p of 0 bounds all
      const V bound = V{} + std::numeric_limits<S>::lowest();
      d_kl = p * ((rlhf_fast::max(log_p, bound) - rlhf_fast::max(log_q, bound)) - kl);
    } else {
      d_kl = p - exp(log_q);
    }
    return slope * (grad_logp * (hit - p) + grad_kl * d_kl);
  }
};

template <class S>
struct ColumnKlGradient {
  ColumnScale<S> scale;
  std::vector<S> max, log_sum, ref_max, ref_log_sum, grad_logp, grad_kl, kl;

  template <class V>
  RLHF_INLINE_MEMBER KlGradient<S, V> at(int64_t i) const {
    return {scale.template at<V>(i), load(&max[i]),         load(&log_sum[i]),
            load(&ref_max[i]),       load(&ref_log_sum[i]), load(&grad_logp[i]),
            load(&grad_kl[i]),       load(&kl[i])};
  }
  KlGradient<S, S> row(int64_t i) const {
    return {{scale.temperature[i], scale.softcap, scale.divides}, max[i], log_sum[i], ref_max[i],
            ref_log_sum[i], grad_logp[i], grad_kl[i], kl[i]};
  }
};

// n rows of logits, side by side: row r and token v at x[v * stride + r].
template <class T>
struct Columns {
  T* x;
  int64_t stride;
};

// Tokens [begin, end) of n rows of a and b.
template <class T, class S = typename Lane<T>::Scalar>
RLHF_INLINE void sum_pairs(Columns<const T> a, Columns<const T> b, int64_t begin, int64_t end,
                           int64_t n, const ColumnScale<S>& scales, PairSums<S>& sums) {
  using V = typename Lane<T>::Vector;
  constexpr int width = Lane<T>::width;
  V za[kTile], zb[kTile];
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t length = std::min(kTile, end - start);
    for (int64_t c = 0; c < n; c += width) {
      const Scale<S, V> scale = scales.template at<V>(c);
      const V before_a = load(&sums.max_a[c]), before_b = load(&sums.max_b[c]);
      V top_a = before_a, top_b = before_b;
      for (int64_t i = 0; i < length; ++i) {
        const T *at_a = a.x + (start + i) * a.stride + c, *at_b = b.x + (start + i) * b.stride + c;
        za[i] = load_some(at_a, n - c, 0.0f);
        zb[i] = load_some(at_b, n - c, 0.0f);
      }
      scale.apply(za, length);
      scale.apply(zb, length);
      for (int64_t i = 0; i < length; ++i) {
        top_a = max(za[i], top_a);
        top_b = max(zb[i], top_b);
      }
      if (std::memcmp(&top_a, &before_a, sizeof top_a) != 0 ||
          std::memcmp(&top_b, &before_b, sizeof top_b) != 0) {
        for (int k = 0; k < width; ++k) {
          if (top_a[k] != before_a[k] || top_b[k] != before_b[k]) {
            sums.raise(c + k, top_a[k], top_b[k]);
          }
        }
      }
      V sum_a = V{}, sum_b = V{}, gap = V{};
      const Next next_a(a.x + (start + kTile) * a.stride + c, a.stride);
      const Next next_b(b.x + (start + kTile) * b.stride + c, b.stride);
      for (int64_t i = 0; i < length; ++i) {
        next_a.fetch(i);
        next_b.fetch(i);
        const V da = za[i] - top_a, db = zb[i] - top_b;
        const V e = exp(da);
        sum_a += e;
        sum_b += exp(db);
        gap += e * (da < kLeastExponent ? V{} : da - db);  // where p is 0, q does not matter
      }
      accumulate(&sums.sum_a[c], sum_a);
      accumulate(&sums.sum_b[c], sum_b);
      accumulate(&sums.gap[c], gap);
    }
  }
}

// out (the policy's logits themselves, or a tensor that lies the same way) <- their gradient.
template <bool kReverse, bool kCapped, class T, class Out, class S = typename Lane<T>::Scalar>
RLHF_INLINE void grad_pairs(Columns<const T> x, Columns<const T> ref, Out* out, int64_t begin,
                            int64_t end, int64_t n, const ColumnKlGradient<S>& gradients) {
  using V = typename Lane<T>::Vector;
  constexpr int width = Lane<T>::width;
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t length = std::min(kTile, end - start);
    for (int64_t c = 0; c < n; c += width) {
      const KlGradient<S, V> gradient = gradients.template at<V>(c);
      for (int64_t i = 0; i < length; ++i) {
        const int64_t at = (start + i) * x.stride + c;
        const T* at_ref = ref.x + (start + i) * ref.stride + c;
        __builtin_prefetch(x.x + at + kTile * x.stride);
        __builtin_prefetch(at_ref + kTile * ref.stride);
        const V z = load_some(x.x + at, n - c, 0.0f), y = load_some(at_ref, n - c, 0.0f);
        store_some(out + at, gradient.template at<kReverse, kCapped>(z, y, V{}), n - c);
      }
    }
  }
}

template <class T, class S>
void sum_two(Columns<const T> a, Columns<const T> b, int64_t begin, int64_t end, int64_t n,
             const ColumnScale<S>* scale, PairSums<S>* sums) {
  RLHF_ON_THIS_CPU(sum_pairs(a, b, begin, end, n, *scale, *sums));
}
template <bool kReverse, class T, class Out, class S>
void grad_two(Columns<const T> x, Columns<const T> ref, Out* out, int64_t begin, int64_t end,
              int64_t n, const ColumnKlGradient<S>* gradient) {
  if (gradient->scale.softcap != 0) {
    RLHF_ON_THIS_CPU(grad_pairs<kReverse, true>(x, ref, out, begin, end, n, *gradient));
  } else {
    RLHF_ON_THIS_CPU(grad_pairs<kReverse, false>(x, ref, out, begin, end, n, *gradient));
  }
}
template <bool kReverse, class Out, class S>
RLHF_INLINE void grad_one(Out* out, S x, S y, const KlGradient<S, S>& row) {
  using V = typename Lane<Out>::Vector;
  const V z = V{} + x, r = V{} + y, hit = V{} + 1;
  const V gradient = row.scale.softcap != 0 ? row.template at<kReverse, true>(z, r, hit)
                                            : row.template at<kReverse, false>(z, r, hit);
  store_some(out, gradient, 1);
}
template <class Out, class S>
void grad_label(Out* out, S x, S y, bool reverse, const KlGradient<S, S>* row) {
  if (reverse) {
    RLHF_ON_THIS_CPU(grad_one<true>(out, x, y, *row));
  } else {
    RLHF_ON_THIS_CPU(grad_one<false>(out, x, y, *row));
  }
}

// f(first, n) over runs of rows that lie side by side in both tensors: all rows, or one at a time.
template <class F>
void runs(const Tensor& logits, const Tensor& ref_logits, const F& f) {
  STD_TORCH_CHECK(logits.size(0) == 1 && ref_logits.size(0) == 1, "logits must be [1, n, V]");
  const int64_t n = logits.size(1);
  if (logits.stride(1) == 1 && ref_logits.stride(1) == 1) return f(0, n);
  for (int64_t i = 0; i < n; ++i) f(i, 1);
}

// The tokens of rows `first` and on.
template <class T>
Columns<const T> columns(const Tensor& t, int64_t first) {
  return {data<T>(t) + first * t.stride(1), t.stride(2)};
}

template <class T>
double at(Columns<const T> columns, int64_t token, int64_t row) {
  return widen(columns.x[token * columns.stride + row]);
}

}  // namespace

// logits, ref_logits [1, n, V]; labels [1, n] int64; per_token [1, n] ->
// (logp, ref_logp, kl [1, n], norm, ref_norm [2, 1, n]).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> logits_kl(
    const Tensor& logits, const Tensor& ref_logits, const Tensor& labels, double temperature,
    const MaybeTensor& per_token, std::optional<double> softcap, bool reverse) {
  const int64_t rows = logits.size(1), vocab = logits.size(2);
  auto zeros = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_zeros(logits, {shape.begin(), shape.size()}, accumulator(logits));
  };
  Tensor logp = zeros({1, rows}), ref_logp = zeros({1, rows}), kl = zeros({1, rows});
  Tensor norm = zeros({2, 1, rows}), ref_norm = zeros({2, 1, rows});
  const int64_t* label = data<int64_t>(labels);
  for (int64_t i = 0; i < rows; ++i) check_label(label[i], vocab, i);
  // KL(q || p) is the same sum with the two in each other's place
  const Tensor &a = reverse ? logits : ref_logits, &b = reverse ? ref_logits : logits;
  const Tensor &a_logp = reverse ? logp : ref_logp, &b_logp = reverse ? ref_logp : logp;
  const Tensor &a_norm = reverse ? norm : ref_norm, &b_norm = reverse ? ref_norm : norm;

  dispatch_floating(logits, "logits_kl", [&](auto element) {
    using T = decltype(element);
    using S = typename Lane<T>::Scalar;
    check_temperature(data<S>(per_token), label, rows);
    S *kl_ = mutable_data<S>(kl);
    S *logp_a = mutable_data<S>(a_logp), *logp_b = mutable_data<S>(b_logp);
    S *norm_a = mutable_data<S>(a_norm), *norm_b = mutable_data<S>(b_norm);
    runs(logits, ref_logits, [&](int64_t first, int64_t n) {
      const Columns<const T> at_a = columns<T>(a, first), at_b = columns<T>(b, first);
      const S* divisors = per_token ? data<S>(per_token) + first : nullptr;
      const ColumnScale<S> scale = column_scale(n, temperature, divisors, softcap);
      std::vector<PairSums<S>> units((vocab + kVocabUnit - 1) / kVocabUnit, PairSums<S>(padded(n)));
      parallel_vocabulary(n, vocab, [&](int64_t unit, int64_t begin, int64_t end) {
        sum_two(at_a, at_b, begin, end, n, &scale, &units[unit]);
      });
      for (int64_t k = 0; k < n; ++k) {
        const int64_t i = first + k;
        if (label[i] == kIgnoreIndex) continue;
        PairSums<S>& sums = units[0];
        for (size_t unit = 1; unit < units.size(); ++unit) sums.merge(k, units[unit]);
        const Scale<S, S> own{scale.temperature[k], scale.softcap, scale.divides};
        const double log_sum_a = std::log(sums.sum_a[k]), log_sum_b = std::log(sums.sum_b[k]);
        const S z_a = own.apply(static_cast<S>(at(at_a, label[i], k)));
        const S z_b = own.apply(static_cast<S>(at(at_b, label[i], k)));
        logp_a[i] = static_cast<S>((static_cast<double>(z_a) - sums.max_a[k]) - log_sum_a);
        logp_b[i] = static_cast<S>((static_cast<double>(z_b) - sums.max_b[k]) - log_sum_b);
        norm_a[i] = sums.max_a[k];
        norm_b[i] = sums.max_b[k];
        norm_a[rows + i] = static_cast<S>(log_sum_a);
        norm_b[rows + i] = static_cast<S>(log_sum_b);
        kl_[i] = static_cast<S>(sums.gap[k] / sums.sum_a[k] - (log_sum_a - log_sum_b));
      }
    });
    return 0;
  });
  return {logp, ref_logp, kl, norm, ref_norm};
}

// grad_logp, grad_kl, kl, per_token [1, n]; logits, ref_logits [1, n, V]; labels [1, n] int64;
// norm, ref_norm [2, 1, n]. The gradient goes to out [1, n, V], which lies in memory as logits does
// and may be logits itself, or, of float32 logits, be 16 bits wide.
void logits_kl_backward(const Tensor& grad_logp, const Tensor& grad_kl, const Tensor& logits,
                        const Tensor& ref_logits, const Tensor& labels, const Tensor& norm,
                        const Tensor& ref_norm, const Tensor& kl, double temperature,
                        const MaybeTensor& per_token, std::optional<double> softcap, bool reverse,
                        Tensor out) {
  const int64_t rows = logits.size(1), vocab = logits.size(2);
  const int64_t* label = data<int64_t>(labels);
  for (int64_t i = 0; i < rows; ++i) {
    if (label[i] != kElsewhere) check_label(label[i], vocab, i);
  }
  STD_TORCH_CHECK(out.stride(1) == logits.stride(1) && out.stride(2) == logits.stride(2),
                  "out must lie in memory as logits does");

  dispatch_gradient(logits, out, "logits_kl_backward", [&](auto element, auto gradient_) {
    using T = decltype(element);
    using Out = decltype(gradient_);
    using S = typename Lane<T>::Scalar;
    const S *g_logp = data<S>(grad_logp), *g_kl = data<S>(grad_kl), *kl_ = data<S>(kl);
    const S *norm_ = data<S>(norm), *ref_norm_ = data<S>(ref_norm);
    runs(logits, ref_logits, [&](int64_t first, int64_t n) {
      const Columns<const T> x = columns<T>(logits, first), ref = columns<T>(ref_logits, first);
      Out* to = mutable_data<Out>(out) + first * out.stride(1);
      const S* divisors = per_token ? data<S>(per_token) + first : nullptr;
      auto some = [&](const S* from) { return per_row(n, S(0), from + first); };
      ColumnKlGradient<S> gradient{column_scale(n, temperature, divisors, softcap),
                                   some(norm_),
                                   some(norm_ + rows),
                                   some(ref_norm_),
                                   some(ref_norm_ + rows),
                                   some(g_logp),
                                   some(g_kl),
                                   some(kl_)};
      std::vector<bool> dead(n);
      std::vector<S> at_label(n), ref_at_label(n);  // before in-place work overwrites them
      for (int64_t k = 0; k < n; ++k) {
        const int64_t i = first + k;
        dead[k] = label[i] == kIgnoreIndex || (g_logp[i] == 0 && g_kl[i] == 0);
        if (g_kl[i] == 0) gradient.kl[k] = 0;
        if (dead[k] || label[i] == kElsewhere) continue;
        at_label[k] = static_cast<S>(at(x, label[i], k));
        ref_at_label[k] = static_cast<S>(at(ref, label[i], k));
      }
      parallel_vocabulary(n, vocab, [&](int64_t, int64_t begin, int64_t end) {
        if (reverse) {
          grad_two<true>(x, ref, to, begin, end, n, &gradient);
        } else {
          grad_two<false>(x, ref, to, begin, end, n, &gradient);
        }
        for (int64_t k = 0; k < n; ++k) {
          if (!dead[k]) continue;
          for (int64_t v = begin; v < end; ++v) to[v * x.stride + k] = Out{};
        }
      });
      for (int64_t k = 0; k < n; ++k) {
        if (dead[k] || label[first + k] == kElsewhere) continue;
        const KlGradient<S, S> row = gradient.row(k);
        grad_label(to + label[first + k] * x.stride + k, at_label[k], ref_at_label[k], reverse,
                   &row);
      }
    });
    return 0;
  });
}

}  // namespace RLHF_VECTORS
}  // namespace rlhf_fast
