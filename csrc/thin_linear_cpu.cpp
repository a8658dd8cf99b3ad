// thin_linear on CPU: one product of thin_linear.h.
#include "thin_linear.h"

namespace rlhf_fast {
namespace {

// x [M, K], weight [N, K], bias [N] or none, float32 -> [M, N].
Tensor thin_linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  const int64_t rows = x.size(0), columns = x.size(1), outputs = weight.size(0);
  Tensor out = torch::stable::new_empty(x, {rows, outputs});
  thin_products(data<float>(x), rows, columns,
                {{data<float>(weight), data<float>(bias), outputs, mutable_data<float>(out)}});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) { m.impl("thin_linear", TORCH_BOX(&thin_linear)); }

}  // namespace rlhf_fast
