// token_logprobs on CPU: one read of the logits forward; one read, one write backward.
//
// A row is taken in blocks that stay in L1: scale a block and find its maximum, then sum e^(z - m)
// and e^(z - m) (z - m) for the running maximum m. Block sums are added up in double.
#define RLHF_VECTOR_BYTES 64
#include "ops.h"

namespace rlhf_fast {
namespace {

constexpr int64_t kBlock = 1024;

// z = softcap tanh(x / softcap) / temperature, and dz/dx; softcap 0 means none.
template <class S>
struct Scale {
  S temperature;
  S softcap;

  template <class V>
  RLHF_INLINE_MEMBER V apply(V x) const {
    if (softcap != 0) x = softcap * tanh(x / softcap);
    return temperature == 1 ? x : x / temperature;
  }
  template <class V>
  RLHF_INLINE_MEMBER V slope(V x) const {
    V s = V{} + 1;
    if (softcap != 0) {
      const V t = tanh(x / softcap);
      s = s - t * t;
    }
    return s / temperature;
  }
};

template <class S>
struct RowSums {
  S max;             // m
  double sum;        // sum of e^(z - m)
  double weighted;   // sum of e^(z - m) (z - m)
};

template <class T, class S = typename Lane<T>::Scalar>
RLHF_INLINE RowSums<S> sum_row(const T* x, int64_t vocab, Scale<S> scale) {
  using V = typename Lane<T>::Vector;
  constexpr int width = Lane<T>::width;
  constexpr S inf = std::numeric_limits<S>::infinity();
  V z[kBlock / width];
  RowSums<S> row{-inf, 0, 0};
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t length = std::min(kBlock, vocab - start);
    const int64_t vectors = (length + width - 1) / width;
    V block_max = V{} - inf;
    for (int64_t i = 0; i < vectors; ++i) {
      const int64_t left = length - i * width;
      z[i] = scale.apply(load_some(x + start + i * width, left, 0.0f));
      for (int64_t k = std::max<int64_t>(left, 0); k < width; ++k) z[i][k] = -inf;
      block_max = max(z[i], block_max);
    }
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
    for (int64_t i = 0; i < vectors; ++i) {
      const V d = z[i] - reference;
      const V e = exp(d);
      sum_ += e;
      weighted += e * (d < S(-87.3) ? V{} : d);  // 0 * -inf is 0 here; NaN stays NaN
    }
    row.sum += sum(sum_);
    row.weighted += sum(weighted);
  }
  return row;
}

template <class T, class S = typename Lane<T>::Scalar>
struct BackwardRow {
  Scale<S> scale;
  S max, log_sum, grad_logp, grad_entropy, entropy;
  int64_t label;
};

// out = dz/dx (g_logp (1[v = label] - p) - g_entropy p (log p + entropy)); out may be x.
template <class T, class S = typename Lane<T>::Scalar>
RLHF_INLINE void grad_row(const T* x, T* out, int64_t vocab, BackwardRow<T, S> r) {
  using V = typename Lane<T>::Vector;
  constexpr int width = Lane<T>::width;
  V at_label = V{} + static_cast<S>(widen(x[r.label]));
  auto tilted = [&](V values, V hit) __attribute__((always_inline)) {
    const V log_p = (r.scale.apply(values) - r.max) - r.log_sum;
    const V p = exp(log_p);
    const V tilt = log_p < S(-87.3) ? V{} : log_p + r.entropy;
    return r.scale.slope(values) * (r.grad_logp * (hit - p) - r.grad_entropy * p * tilt);
  };
  for (int64_t i = 0; i < vocab; i += width) {
    const V values = load_some(x + i, vocab - i, 0.0f);
    store_some(out + i, tilted(values, V{}), vocab - i);
  }
  // The label's own entry once more, so that 1 - p is not rounded to out's dtype twice.
  store_some(out + r.label, tilted(at_label, V{} + 1), 1);
}

// Clones need plain functions, one for each element type.
#define ROW_FUNCTIONS(T, S)                                                                 \
  RLHF_CLONES void sum_one(const T* x, int64_t vocab, Scale<S> scale, RowSums<S>* row) {    \
    *row = sum_row(x, vocab, scale);                                                        \
  }                                                                                         \
  RLHF_CLONES void grad_one(const T* x, T* out, int64_t vocab, const BackwardRow<T>* row) { \
    grad_row(x, out, vocab, *row);                                                          \
  }
ROW_FUNCTIONS(float, float)
ROW_FUNCTIONS(bf16, float)
ROW_FUNCTIONS(fp16, float)
ROW_FUNCTIONS(double, double)
#undef ROW_FUNCTIONS

// Rows of a [B, T, V] tensor whose last dimension is contiguous.
struct Rows {
  int64_t steps, batch_stride, step_stride;
  explicit Rows(const Tensor& t) : steps(t.size(1)), batch_stride(t.stride(0)), step_stride(t.stride(1)) {}
  int64_t offset(int64_t row) const {
    return row / steps * batch_stride + row % steps * step_stride;
  }
};

void check_label(int64_t label, int64_t vocab, int64_t row) {
  STD_TORCH_CHECK(label == kIgnoreIndex || (label >= 0 && label < vocab), "labels: row ", row,
                  " is ", label, ", outside [0, ", vocab, ") and not -100");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> token_logprobs(
    const Tensor& logits, const Tensor& labels, double temperature, const MaybeTensor& per_token,
    std::optional<double> softcap, bool want_entropy, bool /* inplace_backward */) {
  const int64_t batch = logits.size(0), steps = logits.size(1), vocab = logits.size(2);
  const int64_t n = batch * steps;
  const auto dtype = accumulator(logits);
  auto empty = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(logits, {shape.begin(), shape.size()}, dtype);
  };
  Tensor logp = empty({batch, steps});
  Tensor entropy = want_entropy ? empty({batch, steps}) : empty({0});
  Tensor norm = empty({2, batch, steps});
  const int64_t* label = data<int64_t>(labels);
  for (int64_t i = 0; i < n; ++i) check_label(label[i], vocab, i);
  const Rows rows(logits);

  dispatch_floating(logits, "token_logprobs", [&](auto element) {
    using T = decltype(element);
    using S = typename Lane<T>::Scalar;
    const T* x = data<T>(logits);
    const S* divisors = data<S>(per_token);
    S *logp_ = mutable_data<S>(logp), *norm_ = mutable_data<S>(norm);
    S* entropy_ = want_entropy ? mutable_data<S>(entropy) : nullptr;
    parallel_rows(n, vocab, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (label[i] == kIgnoreIndex) {
          logp_[i] = norm_[i] = norm_[n + i] = 0;
          if (entropy_) entropy_[i] = 0;
          continue;
        }
        const Scale<S> scale{divisors ? divisors[i] : S(temperature), S(softcap.value_or(0))};
        RowSums<S> row;
        sum_one(x + rows.offset(i), vocab, scale, &row);
        const double log_sum = std::log(row.sum);
        const S z = scale.apply(static_cast<S>(widen(x[rows.offset(i) + label[i]])));
        logp_[i] = static_cast<S>((static_cast<double>(z) - row.max) - log_sum);
        norm_[i] = row.max;
        norm_[n + i] = static_cast<S>(log_sum);
        if (entropy_) entropy_[i] = static_cast<S>(log_sum - row.weighted / row.sum);
      }
    });
    return 0;
  });
  return {logp, entropy, norm};
}

void token_logprobs_backward(
    const Tensor& grad_logp, const MaybeTensor& grad_entropy, const Tensor& logits,
    const Tensor& labels, const Tensor& norm, const MaybeTensor& entropy, double temperature,
    const MaybeTensor& per_token, std::optional<double> softcap, Tensor out) {
  const int64_t n = logits.size(0) * logits.size(1), vocab = logits.size(2);
  const int64_t* label = data<int64_t>(labels);
  const Rows rows(logits), out_rows(out);

  dispatch_floating(logits, "token_logprobs_backward", [&](auto element) {
    using T = decltype(element);
    using S = typename Lane<T>::Scalar;
    const T* x = data<T>(logits);
    T* out_ = mutable_data<T>(out);
    const S *divisors = data<S>(per_token), *norm_ = data<S>(norm);
    const S *g_logp = data<S>(grad_logp), *g_entropy = data<S>(grad_entropy);
    const S* entropy_ = data<S>(entropy);
    parallel_rows(n, vocab, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        BackwardRow<T> row;
        row.grad_logp = g_logp[i];
        row.grad_entropy = g_entropy ? g_entropy[i] : S(0);
        row.entropy = g_entropy ? entropy_[i] : S(0);
        row.label = label[i];
        T* to = out_ + out_rows.offset(i);
        if (label[i] == kIgnoreIndex || (row.grad_logp == 0 && row.grad_entropy == 0)) {
          std::memset(to, 0, vocab * sizeof(T));
          continue;
        }
        row.scale = {divisors ? divisors[i] : S(temperature), S(softcap.value_or(0))};
        row.max = norm_[i];
        row.log_sum = norm_[n + i];
        grad_one(x + rows.offset(i), to, vocab, &row);
      }
    });
    return 0;
  });
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) {
  m.impl("token_logprobs", TORCH_BOX(&token_logprobs));
  m.impl("token_logprobs_backward", TORCH_BOX(&token_logprobs_backward));
}

}  // namespace rlhf_fast
