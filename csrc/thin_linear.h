// y = x Wt + b for the few rows of x that decoding has.
//
// A BLAS packs its operands before it multiplies; with 16 rows the packing of W costs as much as
// the products (SmolLM2-135M, 16 rows, 2 cores: 48 of the 64 ms that a token takes). Here W is read
// where it lies, once, and only x is laid out anew: its rows side by side, so that a vector holds
// one column of 8 rows and is multiplied by one weight. Nothing is summed across lanes.
// (16 rows, W from memory, one core of a Zen 4: 90 to 100 GFLOP/s. Vectors of 64 bytes, or 12 and
// 24 rows of W at a time, are no faster.)
#pragma once

#include "ops.h"

namespace rlhf_fast {
namespace {

constexpr int64_t kOutputs = 6;  // rows of W at a time: 6 x 2 vectors of sums fit 16 registers
constexpr int64_t kBlock = 256;  // columns summed before they join the total: keeps sums exact
constexpr int64_t kLine = 16;    // columns in a cache line of W
constexpr int64_t kRows = 2 * kFloats;  // rows of x at a time

struct Product {
  const float *weight, *bias;  // [outputs, columns], and [outputs] or null
  int64_t outputs;
  float* out;  // [rows, outputs]
};

struct Thin {
  const float* x;  // [groups, columns, kRows]
  int64_t rows, columns, groups;
};

// kOutputs (fewer at the end of W, where the last row is taken again) times up to kRows rows.
template <int vectors>
RLHF_INLINE void block(const Thin& t, const Product& p, int64_t first, int64_t group) {
  const float* x = t.x + group * t.columns * kRows;
  const float* w[kOutputs];
  for (int64_t n = 0; n < kOutputs; ++n) {
    w[n] = p.weight + std::min(first + n, p.outputs - 1) * t.columns;
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
  const int64_t outputs = std::min(kOutputs, p.outputs - first);
  const int64_t rows = std::min(kRows, t.rows - group * kRows);
  float lanes[kOutputs][kRows];
  for (int64_t n = 0; n < outputs; ++n) {
    for (int v = 0; v < vectors; ++v) {
      store(lanes[n] + v * kFloats, total[n][v] + (p.bias ? p.bias[first + n] : 0.0f));
    }
  }
  for (int64_t r = 0; r < rows; ++r) {  // row after row: column after column costs a sixth more
    float* out = p.out + (group * kRows + r) * p.outputs + first;
    for (int64_t n = 0; n < outputs; ++n) out[n] = lanes[n][r];
  }
}

// Outputs begin * kOutputs to end * kOutputs of one product.
RLHF_INLINE void multiply(const Thin* t, const Product* p, int64_t begin, int64_t end) {
  for (int64_t n = begin * kOutputs; n < std::min(end * kOutputs, p->outputs); n += kOutputs) {
    for (int64_t group = 0; group < t->groups; ++group) {
      if (t->rows - group * kRows > kFloats) {
        block<2>(*t, *p, n, group);
      } else {
        block<1>(*t, *p, n, group);
      }
    }
  }
}
void run(const Thin* t, const Product* p, int64_t begin, int64_t end) {
  RLHF_ON_THIS_CPU(multiply(t, p, begin, end));
}

// Several products of the same x [rows, columns], as one piece of work for all threads.
void thin_products(const float* x, int64_t rows, int64_t columns,
                   const std::vector<Product>& products) {
  const int64_t groups = (rows + kRows - 1) / kRows;
  std::vector<float> side_by_side(groups * columns * kRows, 0.0f);
  for (int64_t line = 0; line < columns; line += kLine) {  // the lines written stay in L1
    for (int64_t r = 0; r < rows; ++r) {
      float* to = side_by_side.data() + r / kRows * columns * kRows + r % kRows;
      for (int64_t k = line; k < std::min(columns, line + kLine); ++k) {
        to[k * kRows] = x[r * columns + k];
      }
    }
  }
  const Thin t{side_by_side.data(), rows, columns, groups};
  const auto blocks = [](const Product& p) { return (p.outputs + kOutputs - 1) / kOutputs; };
  int64_t count = 0;
  for (const Product& p : products) count += blocks(p);
  parallel_rows(count, kOutputs * columns * groups, [&](int64_t begin, int64_t end) {
    for (const Product& p : products) {  // begin and end count on from product to product
      const int64_t own = blocks(p);
      run(&t, &p, std::clamp<int64_t>(begin, 0, own), std::clamp<int64_t>(end, 0, own));
      begin -= own;
      end -= own;
    }
  });
}

}  // namespace
}  // namespace rlhf_fast
