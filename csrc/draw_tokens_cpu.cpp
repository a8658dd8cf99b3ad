// draw_tokens on CPU: two passes over a row's logits and no copy of them.
#include "ops.h"

namespace rlhf_fast {
namespace {

constexpr int64_t kPart = 512;  // logits whose probabilities are summed by themselves

constexpr float kNone = -std::numeric_limits<float>::infinity();

RLHF_INLINE Floats weights(const float* row, int64_t at, int64_t end, float most) {
  return exp(load_some(row + at, end - at, kNone) - most);
}

// First the largest logit, then the sum of every part; only the part in which the cumulated sum
// passes the draw is gone through token by token. logits [rows, size]; draws, tokens, logp [rows].
RLHF_INLINE void draw_rows(const float* logits, const double* draws, int64_t begin, int64_t end,
                           int64_t size, int64_t* tokens, float* logp) {
  std::vector<double> sums((size + kPart - 1) / kPart);
  for (int64_t r = begin; r < end; ++r) {
    const float* row = logits + r * size;
    Floats largest_of_lanes = Floats{} + kNone;
    for (int64_t i = 0; i < size; i += kFloats) {
      largest_of_lanes = max(load_some(row + i, size - i, kNone), largest_of_lanes);
    }
    const float most = largest(largest_of_lanes);
    double total = 0;
    for (size_t part = 0; part < sums.size(); ++part) {
      const int64_t stop = std::min<int64_t>(size, (part + 1) * kPart);
      WideDoubles lanes = {};
      for (int64_t i = part * kPart; i < stop; i += kFloats) {
        add(lanes, weights(row, i, stop, most));
      }
      total += sums[part] = sum(lanes);
    }
    const double target = draws[r] * total;
    size_t part = 0;
    double cumulated = 0, reached = 0;  // before this part, and after it
    // The last part that has any probability takes what rounding leaves of the target.
    for (size_t next = 0; next < sums.size() && !(reached > target); ++next) {
      if (sums[next] == 0) continue;
      part = next;
      cumulated = reached;
      reached += sums[next];
    }
    int64_t token = size - 1;
    const int64_t stop = std::min<int64_t>(size, (part + 1) * kPart);
    for (int64_t i = part * kPart; i < stop && !(cumulated > target); i += kFloats) {
      const Floats w = weights(row, i, stop, most);
      for (int lane = 0; lane < kFloats && !(cumulated > target); ++lane) {
        cumulated += w[lane];
        if (w[lane] > 0) token = i + lane;  // never one of probability 0
      }
    }
    tokens[r] = token;
    logp[r] = row[token] - most - std::log(total);
  }
}
void draw(const float* logits, const double* draws, int64_t begin, int64_t end, int64_t size,
          int64_t* tokens, float* logp) {
  RLHF_ON_THIS_CPU(draw_rows(logits, draws, begin, end, size, tokens, logp));
}

// logits [B, V] float32, draws [B] float64 in [0, 1) -> (tokens [B] int64, their log-probs [B]).
std::tuple<Tensor, Tensor> draw_tokens(const Tensor& logits, const Tensor& draws) {
  const int64_t rows = logits.size(0), size = logits.size(1);
  Tensor tokens = new_tensor({rows}, ScalarType::Long);
  Tensor logp = new_tensor({rows}, logits.scalar_type());
  const float* from = data<float>(logits);
  const double* drawn = data<double>(draws);
  int64_t* to = mutable_data<int64_t>(tokens);
  float* probable = mutable_data<float>(logp);
  parallel_rows(rows, size, [&](int64_t begin, int64_t end) {
    draw(from, drawn, begin, end, size, to, probable);
  });
  return {tokens, logp};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) { m.impl("draw_tokens", TORCH_BOX(&draw_tokens)); }

}  // namespace rlhf_fast
