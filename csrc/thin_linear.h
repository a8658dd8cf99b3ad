// y = x Wt + b for the few rows of x that decoding has.
#pragma once

#include "ops.h"

namespace rlhf_fast {

struct Product {
  const float *weight, *bias;  // [outputs, columns], and [outputs] or null
  int64_t outputs;
  float* out;  // [rows, outputs]
};

// Several products of the same x [rows, columns], as one piece of work for all threads.
void thin_products(const float* x, int64_t rows, int64_t columns,
                   const std::vector<Product>& products);

}  // namespace rlhf_fast
