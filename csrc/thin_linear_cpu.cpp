// thin_linear on CPU: one product of thin_linear.h.
#define RLHF_AVX512_ELSEWHERE  // in thin_linear_avx512_cpu.cpp
#include "thin_linear_kernels.h"

namespace rlhf_fast {

namespace vectors_of_64_bytes {
decltype(vectors_of_32_bytes::multiply_all) multiply_all;
}

void thin_products(const float* x, int64_t rows, int64_t columns,
                   const std::vector<Product>& products) {
  OfThisCpu<&vectors_of_32_bytes::multiply_all, &vectors_of_64_bytes::multiply_all>::run(
      x, rows, columns, products);
}

namespace {

// x [M, K], weight [N, K], bias [N] or none, float32 -> [M, N].
Tensor thin_linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  const int64_t rows = x.size(0), columns = x.size(1), outputs = weight.size(0);
  Tensor out = new_tensor({rows, outputs}, x.scalar_type());
  thin_products(data<float>(x), rows, columns,
                {{data<float>(weight), data<float>(bias), outputs, mutable_data<float>(out)}});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) { m.impl("thin_linear", TORCH_BOX(&thin_linear)); }

}  // namespace rlhf_fast
