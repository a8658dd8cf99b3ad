// token_logprobs on CPU: one read of the logits forward; one read, one write backward.
//
// A row is taken in blocks that stay in L1: scale a block and find its maximum, then sum e^(z - m)
// and e^(z - m) (z - m) for the running maximum m. Block sums are added up in double.
#pragma once

#include "token_logprobs.h"
#include "token_logprobs_columns.h"

namespace rlhf_fast {
namespace RLHF_VECTORS {
namespace {

constexpr int64_t kBlock = 1024;

template <class S>
struct RowSums {
  S max;             // m
  double sum;        // sum of e^(z - m)
  double weighted;   // sum of e^(z - m) (z - m)
};

template <class T, class S = typename Lane<T>::Scalar>
RLHF_INLINE RowSums<S> sum_row(const T* x, int64_t vocab, Scale<S, S> scale) {
  using V = typename Lane<T>::Vector;
  constexpr int width = Lane<T>::width;
  constexpr S inf = std::numeric_limits<S>::infinity();
  V z[kBlock / width];
  RowSums<S> row{-inf, 0, 0};
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t length = std::min(kBlock, vocab - start);
    const int64_t vectors = (length + width - 1) / width;
    V block_max = V{} - inf, block_min = V{} + inf;
    for (int64_t i = 0; i < vectors; ++i) {
      z[i] = load_some(x + start + i * width, length - i * width, 0.0f);
    }
    scale.apply(z, vectors);
    for (int64_t k = length; k < vectors * width; ++k) z[vectors - 1][k % width] = -inf;
    extremes(z, vectors, block_min, block_max);
    const S top = std::max(row.max, largest(block_max));
    // Nothing but -inf (or NaN) so far: any finite reference gives e^(-inf) = 0.
    const S reference = top == -inf ? S(0) : top;
    if (top != row.max && row.sum > 0) {
      const double shift = static_cast<double>(row.max) - top;
      const double factor = std::exp(shift);
      row.weighted = factor * (row.weighted + shift * row.sum);
      row.sum *= factor;
    }
    row.max = top;
    V sum_ = V{}, weighted = V{};
    const Next next(x + start + 2 * kBlock, width);  // one block ahead would come too late
    add_exponentials(z, vectors, reference, block_min, next, sum_, weighted);
    row.sum += sum(sum_);
    row.weighted += sum(weighted);
  }
  return row;
}

template <bool kCapped, class T, class Out, class S>
RLHF_INLINE void grad_vectors(const T* x, Out* out, int64_t vocab, const Gradient<S, S>& row) {
  using V = typename Lane<T>::Vector;
  for (int64_t i = 0; i < vocab; i += Lane<T>::width) {
    __builtin_prefetch(x + i + 2 * kBlock);
    __builtin_prefetch(out + i + 2 * kBlock, 1);  // both: 1.2 times as fast (Intel Xeon, AVX-512)
    const V values = load_some(x + i, vocab - i, 0.0f);
    store_some(out + i, row.template at<kCapped>(values, V{}), vocab - i);
  }
}

// out may be x.
template <class T, class Out, class S = typename Lane<T>::Scalar>
RLHF_INLINE void grad_row(const T* x, Out* out, int64_t vocab, int64_t label, Gradient<S, S> row) {
  using V = typename Lane<T>::Vector;
  const V at_label = V{} + static_cast<S>(label == kElsewhere ? 0.0 : widen(x[label]));
  if (row.scale.softcap != 0) {
    grad_vectors<true>(x, out, vocab, row);
  } else {
    grad_vectors<false>(x, out, vocab, row);
  }
  // The label's own entry once more, so that 1 - p is not rounded to out's dtype twice.
  if (label != kElsewhere) store_some(out + label, row.at_label(at_label), 1);
}

template <class T, class S>
void sum_one(const T* x, int64_t vocab, Scale<S, S> scale, RowSums<S>* row) {
  RLHF_ON_THIS_CPU(*row = sum_row(x, vocab, scale));
}
template <class T, class Out, class S>
void grad_one(const T* x, Out* out, int64_t vocab, int64_t label, const Gradient<S, S>* row) {
  RLHF_ON_THIS_CPU(grad_row(x, out, vocab, label, *row));
}
template <class Out, class S>
void grad_label(Out* out, S x, const Gradient<S, S>* row) {
  using V = typename Lane<Out>::Vector;
  RLHF_ON_THIS_CPU(store_some(out, row->at_label(V{} + x), 1));
}
template <class T, class S>
void sum_side_by_side(const T* x, int64_t stride, int64_t begin, int64_t end, int64_t n,
                      const ColumnScale<S>* scale, ColumnSums<S>* sums) {
  RLHF_ON_THIS_CPU(sum_columns(x, stride, begin, end, n, *scale, *sums));
}
template <class T, class Out, class S>
void grad_side_by_side(const T* x, Out* out, int64_t stride, int64_t begin, int64_t end, int64_t n,
                       const ColumnGradient<S>* gradient) {
  if (gradient->scale.softcap != 0) {
    RLHF_ON_THIS_CPU(grad_columns<true>(x, out, stride, begin, end, n, *gradient));
  } else {
    RLHF_ON_THIS_CPU(grad_columns<false>(x, out, stride, begin, end, n, *gradient));
  }
}

// Rows of a [B, T, V] tensor whose last dimension is contiguous.
struct Rows {
  int64_t steps, batch_stride, step_stride;
  explicit Rows(const Tensor& t)
      : steps(t.size(1)), batch_stride(t.stride(0)), step_stride(t.stride(1)) {}
  int64_t offset(int64_t row) const {
    return row / steps * batch_stride + row % steps * step_stride;
  }
};

template <class T, class S = typename Lane<T>::Scalar>
ColumnSums<S> all_columns(const T* x, int64_t stride, int64_t vocab, int64_t n,
                          const ColumnScale<S>& scale) {
  std::vector<ColumnSums<S>> units((vocab + kVocabUnit - 1) / kVocabUnit,
                                   ColumnSums<S>(padded(n)));
  parallel_vocabulary(n, vocab, [&](int64_t unit, int64_t begin, int64_t end) {
    sum_side_by_side(x, stride, begin, end, n, &scale, &units[unit]);
  });
  for (size_t unit = 1; unit < units.size(); ++unit) {
    for (int64_t i = 0; i < n; ++i) units[0].merge(i, units[unit]);
  }
  return units[0];
}

}  // namespace

// logits [B, T, V]: V contiguous, or B = 1 and T contiguous (rows side by side); labels [B, T]
// int64; per_token [B, T] -> (logp [B, T], entropy [B, T] or, where not wanted, [0],
// norm [2, B, T]).
std::tuple<Tensor, Tensor, Tensor> token_logprobs(
    const Tensor& logits, const Tensor& labels, double temperature, const MaybeTensor& per_token,
    std::optional<double> softcap, bool want_entropy, bool /* inplace_backward */) {
  const int64_t batch = logits.size(0), steps = logits.size(1), vocab = logits.size(2);
  const int64_t n = batch * steps;
  const auto dtype = accumulator(logits);
  Tensor logp = new_tensor({batch, steps}, dtype);
  Tensor entropy = want_entropy ? new_like(logp) : new_tensor({0}, dtype);
  Tensor norm = new_tensor({2, batch, steps}, dtype);
  const int64_t* label = data<int64_t>(labels);
  for (int64_t i = 0; i < n; ++i) check_label(label[i], vocab, i);
  const Rows rows(logits);

  dispatch_floating(logits, "token_logprobs", [&](auto element) {
    using T = decltype(element);
    using S = typename Lane<T>::Scalar;
    const T* x = data<T>(logits);
    const S* divisors = data<S>(per_token);
    check_temperature(divisors, label, n);
    S *logp_ = mutable_data<S>(logp), *norm_ = mutable_data<S>(norm);
    S* entropy_ = want_entropy ? mutable_data<S>(entropy) : nullptr;
    auto write = [&](int64_t i, S at_label, S max, double sum, double weighted) {
      const double log_sum = std::log(sum);
      logp_[i] = static_cast<S>((static_cast<double>(at_label) - max) - log_sum);
      norm_[i] = max;
      norm_[n + i] = static_cast<S>(log_sum);
      if (entropy_) entropy_[i] = static_cast<S>(log_sum - weighted / sum);
    };
    auto ignore = [&](int64_t i) {
      logp_[i] = norm_[i] = norm_[n + i] = 0;
      if (entropy_) entropy_[i] = 0;
    };
    auto scale_of = [&](int64_t i) {
      const S divisor = divisors ? divisors[i] : S(temperature);
      return Scale<S, S>{divisor, S(softcap.value_or(0)), divisor != 1};
    };

    if (side_by_side(logits)) {
      const int64_t stride = logits.stride(2);
      const ColumnSums<S> sums = all_columns(
          x, stride, vocab, n, column_scale(n, temperature, divisors, softcap));
      for (int64_t i = 0; i < n; ++i) {
        if (label[i] == kIgnoreIndex) {
          ignore(i);
        } else {
          const S z = scale_of(i).apply(static_cast<S>(widen(x[label[i] * stride + i])));
          write(i, z, sums.max[i], sums.sum[i], sums.weighted[i]);
        }
      }
      return 0;
    }
    parallel_rows(n, vocab, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (label[i] == kIgnoreIndex) {
          ignore(i);
          continue;
        }
        const T* row = x + rows.offset(i);
        RowSums<S> sums;
        sum_one(row, vocab, scale_of(i), &sums);
        const S z = scale_of(i).apply(static_cast<S>(widen(row[label[i]])));
        write(i, z, sums.max, sums.sum, sums.weighted);
      }
    });
    return 0;
  });
  return {logp, entropy, norm};
}

// grad_logp, grad_entropy, entropy, per_token [B, T]; logits [B, T, V]; labels [B, T] int64;
// norm [2, B, T]. The gradient goes to out [B, T, V], which lies in memory as logits does and may
// be logits itself, or, of float32 logits, be 16 bits wide.
void token_logprobs_backward(
    const Tensor& grad_logp, const MaybeTensor& grad_entropy, const Tensor& logits,
    const Tensor& labels, const Tensor& norm, const MaybeTensor& entropy, double temperature,
    const MaybeTensor& per_token, std::optional<double> softcap, Tensor out) {
  const int64_t n = logits.size(0) * logits.size(1), vocab = logits.size(2);
  const int64_t* label = data<int64_t>(labels);
  for (int64_t i = 0; i < n; ++i) {
    if (label[i] != kElsewhere) check_label(label[i], vocab, i);
  }
  const Rows rows(logits), out_rows(out);

  dispatch_gradient(logits, out, "token_logprobs_backward", [&](auto element, auto gradient_) {
    using T = decltype(element);
    using Out = decltype(gradient_);
    using S = typename Lane<T>::Scalar;
    const T* x = data<T>(logits);
    Out* out_ = mutable_data<Out>(out);
    const S *divisors = data<S>(per_token), *norm_ = data<S>(norm);
    const S *g_logp = data<S>(grad_logp), *g_entropy = data<S>(grad_entropy);
    const S* entropy_ = g_entropy ? data<S>(entropy) : nullptr;
    auto dead = [&](int64_t i) {
      return label[i] == kIgnoreIndex || (g_logp[i] == 0 && (!g_entropy || g_entropy[i] == 0));
    };

    if (side_by_side(logits)) {
      const int64_t stride = logits.stride(2);
      STD_TORCH_CHECK(out.stride(1) == 1 && out.stride(2) == stride,
                      "out must lie in memory as logits does");
      const ColumnGradient<S> gradient{column_scale(n, temperature, divisors, softcap),
                                       per_row(n, S(0), norm_),
                                       per_row(n, S(0), norm_ + n),
                                       per_row(n, S(0), g_logp),
                                       per_row(n, S(0), g_entropy),
                                       per_row(n, S(0), entropy_)};
      std::vector<S> at_label(n);  // before in-place work overwrites it
      for (int64_t i = 0; i < n; ++i) {
        if (dead(i) || label[i] == kElsewhere) continue;
        at_label[i] = static_cast<S>(widen(x[label[i] * stride + i]));
      }
      parallel_vocabulary(n, vocab, [&](int64_t, int64_t begin, int64_t end) {
        grad_side_by_side(x, out_, stride, begin, end, n, &gradient);
        for (int64_t i = 0; i < n; ++i) {
          if (!dead(i)) continue;
          for (int64_t v = begin; v < end; ++v) out_[v * stride + i] = Out{};
        }
      });
      for (int64_t i = 0; i < n; ++i) {
        if (dead(i) || label[i] == kElsewhere) continue;
        const Gradient<S, S> row = gradient.row(i);
        grad_label(out_ + label[i] * stride + i, at_label[i], &row);
      }
      return 0;
    }
    parallel_rows(n, vocab, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Out* to = out_ + out_rows.offset(i);
        if (dead(i)) {
          std::memset(to, 0, vocab * sizeof(Out));
          continue;
        }
        const S divisor = divisors ? divisors[i] : S(temperature);
        const Gradient<S, S> row{{divisor, S(softcap.value_or(0)), divisor != 1},
                                 norm_[i],
                                 norm_[n + i],
                                 g_logp[i],
                                 g_entropy ? g_entropy[i] : S(0),
                                 g_entropy ? entropy_[i] : S(0)};
        grad_one(x + rows.offset(i), to, vocab, label[i], &row);
      }
    });
    return 0;
  });
}

}  // namespace RLHF_VECTORS
}  // namespace rlhf_fast
