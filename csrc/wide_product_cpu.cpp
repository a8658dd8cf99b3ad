// wide_product on CPU: out (+)= a b of 16-bit operands, summed and returned in float32.
//
// By the MKL that is linked into torch, whose Python has no such product on a CPU: real 16-bit
// products where the processor has them (AMX, AVX512-BF16), elsewhere float32 ones of operands that
// it widens as it packs them. Exact products of 16-bit numbers fit float32, so only sums are rounded.
#include "ops.h"

// Weak: null in a torch without MKL.
#define RLHF_MKL_PRODUCT(name)                                                                  \
  extern "C" __attribute__((weak)) void name(int layout, int trans_a, int trans_b, int m, int n, \
                                             int k, float alpha, const void* a, int lda,        \
                                             const void* b, int ldb, float beta, float* c, int ldc)
RLHF_MKL_PRODUCT(cblas_gemm_bf16bf16f32);
RLHF_MKL_PRODUCT(cblas_gemm_f16f16f32);

namespace rlhf_fast {
namespace {

constexpr int kRowMajor = 101, kAsItIs = 111, kTransposed = 112;

// A matrix [rows, columns] as BLAS takes it; by `turned` its transpose.
struct Matrix {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;

  explicit Matrix(const Tensor& t)
      : data(t.const_data_ptr()), rows(t.size(0)), columns(t.size(1)), row_stride(t.stride(0)),
        column_stride(t.stride(1)) {}
  Matrix turned() const {
    Matrix other = *this;
    std::swap(other.rows, other.columns);
    std::swap(other.row_stride, other.column_stride);
    return other;
  }
  bool by_rows() const { return (column_stride == 1 || columns <= 1) && leads(row_stride, columns); }
  bool by_columns() const { return (row_stride == 1 || rows <= 1) && leads(column_stride, rows); }
  int order() const { return by_rows() ? kAsItIs : kTransposed; }
  int leading() const { return static_cast<int>(by_rows() ? row_stride : column_stride); }

 private:
  static bool leads(int64_t stride, int64_t length) {
    return stride >= std::max<int64_t>(1, length) && stride <= std::numeric_limits<int>::max();
  }
};

void wide_product(const Tensor& a_, const Tensor& b_, Tensor out_, bool first) {
  Matrix a(a_), b(b_), out(out_);
  STD_TORCH_CHECK(a.columns == b.rows && out.rows == a.rows && out.columns == b.columns,
                  "wide_product: shapes do not fit");
  if (!out.by_rows()) {  // out^T = b^T a^T
    std::swap(a, b);
    a = a.turned();
    b = b.turned();
    out = out.turned();
  }
  for (const Matrix* x : {&a, &b, &out}) {
    STD_TORCH_CHECK(x->by_rows() || x->by_columns(), "wide_product: rows or columns with gaps");
    STD_TORCH_CHECK(std::max(x->rows, x->columns) <= std::numeric_limits<int>::max(),
                    "wide_product: a side longer than 2^31 - 1");
  }
  STD_TORCH_CHECK(out.by_rows(), "wide_product: out has gaps");
  STD_TORCH_CHECK(a_.scalar_type() == b_.scalar_type(), "wide_product: two types");
  const bool bfloat16 = a_.scalar_type() == ScalarType::BFloat16;
  if (!bfloat16) check_type<fp16>(a_);
  (bfloat16 ? cblas_gemm_bf16bf16f32 : cblas_gemm_f16f16f32)(
      kRowMajor, a.order(), b.order(), static_cast<int>(out.rows), static_cast<int>(out.columns),
      static_cast<int>(a.columns), 1.0f, a.data, a.leading(), b.data, b.leading(),
      first ? 0.0f : 1.0f, mutable_data<float>(out_), out.leading());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) {
  if (cblas_gemm_bf16bf16f32 && cblas_gemm_f16f16f32) {
    m.impl("wide_product", TORCH_BOX(&wide_product));
  }
}

}  // namespace rlhf_fast
