// support_positions and support_logits on CPU: a few tokens' logits a row, from the head's rows of
// those tokens, read where they lie.
#include "ops.h"

namespace rlhf_fast {
namespace {

// What support_positions says of a row in place of a position; ops/support.py has the words.
constexpr int64_t kLabelOutside = -1, kIdOutside = -2, kIdTwice = -3;

// Of one row: the label's position among the ids. seen [vocabulary] holds, of each token, the last
// row that had it.
int64_t position(const int64_t* ids, int64_t most, int64_t label, int64_t row, int64_t vocabulary,
                 std::vector<int64_t>& seen) {
  int64_t found = kLabelOutside, tokens = 0;
  bool outside = false, twice = false;
  for (int64_t k = 0; k < most; ++k) {
    const int64_t id = ids[k];
    if (id == -1) continue;
    ++tokens;
    if (id < 0 || id >= vocabulary) {
      outside = true;
      continue;
    }
    twice |= seen[id] == row;
    seen[id] = row;
    if (id == label) found = k;
  }
  if (outside) return kIdOutside;
  if (twice) return kIdTwice;
  return tokens == 0 ? kIgnoreIndex : found;
}

// What is wrong with a row, for a caller that cannot read values, as a compiled graph.
void check_position(int64_t at, int64_t label, int64_t vocabulary, int64_t row) {
  STD_TORCH_CHECK(at != kLabelOutside, "support: row ", row, " does not hold its label, ", label);
  STD_TORCH_CHECK(at != kIdOutside, "support: row ", row, " holds a token outside [0, ", vocabulary,
                  ") that is not -1");
  STD_TORCH_CHECK(at != kIdTwice, "support: row ", row, " holds a token twice");
}

// ids [N, K], labels [N] int64 -> [N] int64. told: the caller says what is wrong.
Tensor support_positions(const Tensor& ids, const Tensor& labels, int64_t vocabulary, bool told) {
  const int64_t rows = ids.size(0), most = ids.size(1);
  const int64_t *from = data<int64_t>(ids), *label = data<int64_t>(labels);
  Tensor out = new_tensor({rows}, ScalarType::Long);
  int64_t* to = mutable_data<int64_t>(out);
  parallel_rows(rows, most, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> seen(vocabulary, -1);
    for (int64_t row = begin; row < end; ++row) {
      to[row] = label[row] == kIgnoreIndex
                    ? kIgnoreIndex
                    : position(from + row * most, most, label[row], row, vocabulary, seen);
    }
  });
  for (int64_t row = 0; row < rows && !told; ++row) {
    check_position(to[row], label[row], vocabulary, row);
  }
  return out;
}

// Columns that are summed before they join the total: keeps long dot products exact.
constexpr int64_t kBlock = 256;

template <class T>
RLHF_INLINE typename Lane<T>::Scalar dot(const T* x, const T* w, int64_t n) {
  using V = typename Lane<T>::Vector;
  constexpr int width = Lane<T>::width;
  V total{};
  int64_t i = 0;
  while (i + width <= n) {
    V sum{};
    const int64_t end = std::min(n, i + kBlock);
    for (; i + width <= end; i += width) sum += load(x + i) * load(w + i);
    total += sum;
  }
  if (i < n) total += load_some(x + i, n - i, 0) * load_some(w + i, n - i, 0);
  typename Lane<T>::Scalar all = 0;
  for (int lane = 0; lane < width; ++lane) all += total[lane];
  return all;
}

// y += a x
template <class T>
RLHF_INLINE void add_scaled(typename Lane<T>::Scalar* y, typename Lane<T>::Scalar a, const T* x,
                            int64_t n) {
  constexpr int width = Lane<T>::width;
  int64_t i = 0;
  for (; i + width <= n; i += width) store(y + i, load(y + i) + a * load(x + i));
  for (; i < n; ++i) y[i] += a * widen(x[i]);
}

template <class T>
RLHF_INLINE void round_to(T* to, const typename Lane<T>::Scalar* from, int64_t n) {
  constexpr int width = Lane<T>::width;
  for (int64_t i = 0; i < n; i += width) store_some(to + i, load_some(from + i, n - i, 0), n - i);
}

template <class T>
struct Forward {
  const T *hidden, *weight, *bias;  // [rows, width], [vocabulary, width], [vocabulary] or null
  const int64_t* ids;               // [rows, most]
  typename Lane<T>::Scalar* out;    // [rows, most]
  int64_t width, most;
};

template <class T>
RLHF_INLINE void forward_rows(const Forward<T>& f, int64_t begin, int64_t end) {
  for (int64_t i = begin * f.most; i < end * f.most; ++i) {
    const int64_t id = f.ids[i];
    if (id < 0) {
      f.out[i] = -std::numeric_limits<typename Lane<T>::Scalar>::infinity();
      continue;
    }
    const T* x = f.hidden + i / f.most * f.width;
    f.out[i] = dot(x, f.weight + id * f.width, f.width) + (f.bias ? widen(f.bias[id]) : 0);
  }
}
template <class T>
void run(const Forward<T>* f, int64_t begin, int64_t end) {
  RLHF_ON_THIS_CPU(forward_rows(*f, begin, end));
}

template <class T>
struct Backward {
  const typename Lane<T>::Scalar* grad;  // [rows, most]
  const T *hidden, *weight;              // [rows, width], [vocabulary, width]
  const int64_t* ids;                    // [rows, most]
  T *d_hidden, *d_weight, *d_bias;       // as hidden, weight, bias; or null
  int64_t width, most, vocabulary;
  // The entries of ids that are tokens, those of one token side by side, and where each begins.
  std::vector<int64_t> entries, starts;
};

template <class T>
RLHF_INLINE void backward_rows(const Backward<T>& b, int64_t begin, int64_t end) {
  std::vector<typename Lane<T>::Scalar> sum(b.width);
  for (int64_t row = begin; row < end; ++row) {
    std::fill(sum.begin(), sum.end(), 0);
    for (int64_t i = row * b.most; i < (row + 1) * b.most; ++i) {
      if (b.ids[i] < 0 || b.grad[i] == 0) continue;
      add_scaled(sum.data(), b.grad[i], b.weight + b.ids[i] * b.width, b.width);
    }
    round_to(b.d_hidden + row * b.width, sum.data(), b.width);
  }
}
template <class T>
void run_rows(const Backward<T>* b, int64_t begin, int64_t end) {
  RLHF_ON_THIS_CPU(backward_rows(*b, begin, end));
}

// Each token of the sets with those before it that are in no set; after the last one, the rest.
template <class T>
RLHF_INLINE void backward_tokens(const Backward<T>& b, int64_t begin, int64_t end) {
  std::vector<typename Lane<T>::Scalar> sum(b.width);
  const int64_t tokens = b.starts.size() - 1;
  const auto id_of = [&](int64_t token) {
    return token < 0 ? -1 : token < tokens ? b.ids[b.entries[b.starts[token]]] : b.vocabulary;
  };
  for (int64_t token = begin; token < end; ++token) {
    const int64_t before = id_of(token - 1) + 1, id = id_of(token);
    if (b.d_weight) std::fill_n(b.d_weight + before * b.width, (id - before) * b.width, T{});
    if (b.d_bias) std::fill_n(b.d_bias + before, id - before, T{});
    if (token == tokens) break;
    const int64_t first = b.starts[token], last = b.starts[token + 1];
    std::fill(sum.begin(), sum.end(), 0);
    typename Lane<T>::Scalar of_bias = 0;
    for (int64_t e = first; e < last; ++e) {
      const int64_t i = b.entries[e];
      if (b.grad[i] == 0) continue;  // its hidden state may be anything
      of_bias += b.grad[i];
      if (b.d_weight) add_scaled(sum.data(), b.grad[i], b.hidden + i / b.most * b.width, b.width);
    }
    if (b.d_weight) round_to(b.d_weight + id * b.width, sum.data(), b.width);
    if (b.d_bias) round_to(b.d_bias + id, &of_bias, 1);
  }
}
template <class T>
void run_tokens(const Backward<T>* b, int64_t begin, int64_t end) {
  RLHF_ON_THIS_CPU(backward_tokens(*b, begin, end));
}

// hidden [N, H], weight [V, H], bias [V] or none, ids [N, K] int64 -> [N, K].
Tensor support_logits(const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias,
                      const Tensor& ids) {
  const int64_t rows = hidden.size(0), width = hidden.size(1), most = ids.size(1);
  Tensor out = new_tensor({rows, most}, accumulator(hidden));
  dispatch_floating(hidden, "support_logits", [&](auto element) {
    using T = decltype(element);
    const Forward<T> f{data<T>(hidden), data<T>(weight), data<T>(bias), data<int64_t>(ids),
                       mutable_data<typename Lane<T>::Scalar>(out), width, most};
    parallel_rows(rows, most * width, [&](int64_t begin, int64_t end) { run(&f, begin, end); });
  });
  return out;
}

// grad [N, K], hidden [N, H], weight [V, H], ids [N, K]. Written, unless it is none: d_hidden
// [N, H], d_weight [V, H], d_bias [V].
void support_logits_backward(const Tensor& grad, const Tensor& hidden, const Tensor& weight,
                             const Tensor& ids, const MaybeTensor& d_hidden,
                             const MaybeTensor& d_weight, const MaybeTensor& d_bias) {
  const int64_t rows = hidden.size(0), width = hidden.size(1), most = ids.size(1);
  const int64_t* of = data<int64_t>(ids);
  dispatch_floating(hidden, "support_logits_backward", [&](auto element) {
    using T = decltype(element);
    const auto where = [](const MaybeTensor& t) {
      return t.has_value() ? mutable_data<T>(*t) : nullptr;
    };
    Backward<T> b{data<typename Lane<T>::Scalar>(grad), data<T>(hidden), data<T>(weight), of,
                  where(d_hidden), where(d_weight), where(d_bias), width, most,
                  weight.size(0), {}, {}};
    if (b.d_hidden) {
      parallel_rows(rows, most * width,
                    [&](int64_t begin, int64_t end) { run_rows(&b, begin, end); });
    }
    if (!b.d_weight && !b.d_bias) return;
    for (int64_t i = 0; i < rows * most; ++i) {
      if (of[i] >= 0) b.entries.push_back(i);
    }
    std::stable_sort(b.entries.begin(), b.entries.end(),
                     [&](int64_t i, int64_t j) { return of[i] < of[j]; });
    const int64_t count = b.entries.size();
    for (int64_t e = 0; e < count; ++e) {
      if (e == 0 || of[b.entries[e]] != of[b.entries[e - 1]]) b.starts.push_back(e);
    }
    const int64_t tokens = b.starts.size();
    b.starts.push_back(count);
    parallel_rows(tokens + 1, width * (count / (tokens + 1) + 1),
                  [&](int64_t begin, int64_t end) { run_tokens(&b, begin, end); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) {
  m.impl("support_positions", TORCH_BOX(&support_positions));
  m.impl("support_logits", TORCH_BOX(&support_logits));
  m.impl("support_logits_backward", TORCH_BOX(&support_logits_backward));
}

}  // namespace rlhf_fast
