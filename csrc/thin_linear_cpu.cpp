// thin_linear on CPU: y = x Wt + b for the few rows of x that decoding has.
//
// A BLAS packs its operands before it multiplies; with 16 rows the packing of W costs as much as
// the products (SmolLM2-135M, 16 rows, 2 cores: 48 of the 64 ms that a token takes). Here W is read
// where it lies, once, and only x is laid out anew: its rows side by side, so that a vector holds
// one column of 8 rows and is multiplied by one weight. Nothing is summed across lanes.
#include "ops.h"

namespace rlhf_fast {
namespace {

constexpr int64_t kOutputs = 6;  // rows of W at a time: 6 x 2 vectors of sums fit 16 registers
constexpr int64_t kBlock = 256;  // columns summed before they join the total: keeps sums exact
constexpr int64_t kLine = 16;    // columns in a cache line of W
constexpr int64_t kRows = 2 * kFloats;  // rows of x at a time

struct Thin {
  const float *x, *weight, *bias;  // x: [groups, columns, kRows], W: [outputs, columns]
  float* out;                      // [rows, outputs]
  int64_t rows, columns, outputs, groups;
  int64_t begin, end;  // of the outputs, in blocks of kOutputs
};

// kOutputs (fewer at the end of W, where the last row is taken again) times up to kRows rows.
template <int vectors>
RLHF_INLINE void block(const Thin& t, int64_t first, int64_t group) {
  const float* x = t.x + group * t.columns * kRows;
  const float* w[kOutputs];
  for (int64_t n = 0; n < kOutputs; ++n) {
    w[n] = t.weight + std::min(first + n, t.outputs - 1) * t.columns;
  }
  Floats total[kOutputs][vectors] = {};
  for (int64_t start = 0; start < t.columns; start += kBlock) {
    const int64_t end = std::min(t.columns, start + kBlock);
    Floats sum[kOutputs][vectors] = {};
    for (int64_t line = start; line < end; line += kLine) {
      for (int64_t n = 0; n < kOutputs && group == 0; ++n) {
        __builtin_prefetch(w[n] + kOutputs * t.columns + line);  // for the next call of this
      }
      for (int64_t k = line; k < std::min(end, line + kLine); ++k) {
        Floats column[vectors];
        for (int v = 0; v < vectors; ++v) column[v] = load(x + k * kRows + v * kFloats);
        for (int64_t n = 0; n < kOutputs; ++n) {
          for (int v = 0; v < vectors; ++v) sum[n][v] += column[v] * w[n][k];
        }
      }
    }
    for (int64_t n = 0; n < kOutputs; ++n) {
      for (int v = 0; v < vectors; ++v) total[n][v] += sum[n][v];
    }
  }
  const int64_t outputs = std::min(kOutputs, t.outputs - first);
  const int64_t rows = std::min(kRows, t.rows - group * kRows);
  for (int64_t n = 0; n < outputs; ++n) {
    float lanes[kRows];
    for (int v = 0; v < vectors; ++v) {
      store(lanes + v * kFloats, total[n][v] + (t.bias ? t.bias[first + n] : 0.0f));
    }
    for (int64_t r = 0; r < rows; ++r) {
      t.out[(group * kRows + r) * t.outputs + first + n] = lanes[r];
    }
  }
}

RLHF_CLONES void run(const Thin* t) {
  for (int64_t n = t->begin * kOutputs; n < std::min(t->end * kOutputs, t->outputs); n += kOutputs) {
    for (int64_t group = 0; group < t->groups; ++group) {
      if (t->rows - group * kRows > kFloats) {
        block<2>(*t, n, group);
      } else {
        block<1>(*t, n, group);
      }
    }
  }
}

Tensor thin_linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  const int64_t rows = x.size(0), columns = x.size(1), outputs = weight.size(0);
  Tensor out = torch::stable::new_empty(x, {rows, outputs});
  const int64_t groups = (rows + kRows - 1) / kRows;
  std::vector<float> side_by_side(groups * columns * kRows, 0.0f);
  const float* from = data<float>(x);
  for (int64_t line = 0; line < columns; line += kLine) {  // the lines written stay in L1
    for (int64_t r = 0; r < rows; ++r) {
      float* to = side_by_side.data() + r / kRows * columns * kRows + r % kRows;
      for (int64_t k = line; k < std::min(columns, line + kLine); ++k) {
        to[k * kRows] = from[r * columns + k];
      }
    }
  }
  const Thin all{side_by_side.data(), data<float>(weight), data<float>(bias),
                 mutable_data<float>(out), rows, columns, outputs, groups, 0, 0};
  const int64_t blocks = (outputs + kOutputs - 1) / kOutputs;
  parallel_rows(blocks, kOutputs * columns * groups, [&](int64_t begin, int64_t end) {
    Thin t = all;
    t.begin = begin;
    t.end = end;
    run(&t);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) { m.impl("thin_linear", TORCH_BOX(&thin_linear)); }

}  // namespace rlhf_fast
