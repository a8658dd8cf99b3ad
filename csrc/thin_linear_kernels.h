// The products of thin_linear.h, in vectors of either width.
//
// A BLAS packs its operands before it multiplies; with 16 rows the packing of W costs as much as
// the products (SmolLM2-135M, 16 rows, 2 cores: 48 of the 64 ms that a token takes). Here W is read
// where it lies, once, and only x is laid out anew: its rows side by side, so that a vector holds
// one column of 8 or 16 rows and is multiplied by one weight. Nothing is summed across lanes.
#pragma once

#include <memory>

#include "thin_linear.h"

namespace rlhf_fast {
namespace RLHF_VECTORS {
namespace {

// Rows of W at a time, and sums of each, of every kChains-th column: with two vectors of sums each
// they fit the 16 registers of AVX2, the 32 of AVX-512. (The head of SmolLM2-135M takes 16 rows in
// 5.7 to 6.7 ms on an Intel Xeon, with 12 rows of W at a time in 7.6 to 7.9, with 8 rows of x in a
// vector in 7.1 to 7.6. On a Zen 4 neither wider vectors nor more rows of W were faster.)
constexpr int64_t kOutputs = kBytes == 64 ? 4 : 6, kChains = kBytes == 64 ? 2 : 1;
constexpr int64_t kBlock = 256;  // columns summed before they join the total: keeps sums exact
constexpr int64_t kLine = 16;    // columns in a cache line of W
constexpr int64_t kRows = 2 * kFloats;  // rows of x at a time

struct Thin {
  const float* x;  // [groups, columns, kRows], but [columns, kFloats] where a group has no more rows
  int64_t rows, columns, groups;
};
RLHF_INLINE int64_t vectors_of(int64_t rows, int64_t group) {
  return rows - group * kRows > kFloats ? 2 : 1;
}

// kOutputs (fewer at the end of W, where the last row is taken again) times up to kRows rows.
template <int vectors>
RLHF_INLINE void block(const Thin& t, const Product& p, int64_t first, int64_t group) {
  const float* x = t.x + group * t.columns * kRows;
  const float* w[kOutputs];
  for (int64_t n = 0; n < kOutputs; ++n) {
    w[n] = p.weight + std::min(first + n, p.outputs - 1) * t.columns;
  }
  const float* next = w[0] + kOutputs * t.columns;  // for the next call of this
  Floats total[kOutputs][vectors] = {};
  for (int64_t start = 0; start < t.columns; start += kBlock) {
    const int64_t end = std::min(t.columns, start + kBlock);
    Floats sum[kChains][kOutputs][vectors] = {};
    const auto add = [&](int64_t k, int64_t chain) __attribute__((always_inline)) {
      Floats column[vectors];
      for (int v = 0; v < vectors; ++v) column[v] = load(x + (k * vectors + v) * kFloats);
      for (int64_t n = 0; n < kOutputs; ++n) {
        for (int v = 0; v < vectors; ++v) sum[chain][n][v] += column[v] * w[n][k];
      }
    };
    for (int64_t line = start; line < end; line += kLine) {
      for (int64_t n = 0; n < kOutputs && group == 0; ++n) {
        __builtin_prefetch(next + kOutputs * line + n * kLine, 0, 2);  // into L2: L1 is x's
      }
      const int64_t stop = std::min(end, line + kLine);
      int64_t k = line;
      for (; k + kChains <= stop; k += kChains) {
        for (int64_t chain = 0; chain < kChains; ++chain) add(k + chain, chain);
      }
      for (; k < stop; ++k) add(k, 0);
    }
    for (int64_t n = 0; n < kOutputs; ++n) {
      for (int v = 0; v < vectors; ++v) {
        for (int64_t chain = 0; chain < kChains; ++chain) total[n][v] += sum[chain][n][v];
      }
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
      if (vectors_of(t->rows, group) == 2) {
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

}  // namespace

void multiply_all(const float* x, int64_t rows, int64_t columns,
                  const std::vector<Product>& products) {
  const int64_t groups = (rows + kRows - 1) / kRows;
  std::vector<float> memory(groups * columns * kRows + kLine, 0.0f);
  void* aligned = memory.data();  // else each vector of 64 bytes lies in two lines: a third slower
  size_t room = memory.size() * sizeof(float);
  float* side_by_side = static_cast<float*>(std::align(kLine * sizeof(float), 1, aligned, room));
  for (int64_t line = 0; line < columns; line += kLine) {  // the lines written stay in L1
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t group = r / kRows, stride = vectors_of(rows, group) * kFloats;
      float* to = side_by_side + group * columns * kRows + r % kRows;
      for (int64_t k = line; k < std::min(columns, line + kLine); ++k) {
        to[k * stride] = x[r * columns + k];
      }
    }
  }
  const Thin t{side_by_side, rows, columns, groups};
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

}  // namespace RLHF_VECTORS
}  // namespace rlhf_fast
