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

// a [m, k], b [k, n] of one 16-bit type, out [m, n] float32, each by rows or by columns; `first`
// overwrites out, whatever is in it.
void wide_product(const Tensor& a, const Tensor& b, Tensor out, bool first) {
  Matrix left(a), right(b), to(out);
  STD_TORCH_CHECK(left.columns == right.rows && to.rows == left.rows && to.columns == right.columns,
                  "wide_product: shapes do not fit");
  if (!to.by_rows()) {  // out^T = b^T a^T
    std::swap(left, right);
    left = left.turned();
    right = right.turned();
    to = to.turned();
  }
  for (const Matrix* x : {&left, &right, &to}) {
    STD_TORCH_CHECK(x->by_rows() || x->by_columns(), "wide_product: rows or columns with gaps");
    STD_TORCH_CHECK(std::max(x->rows, x->columns) <= std::numeric_limits<int>::max(),
                    "wide_product: a side longer than 2^31 - 1");
  }
  STD_TORCH_CHECK(to.by_rows(), "wide_product: out has gaps");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "wide_product: two types");
  const bool bfloat16 = a.scalar_type() == ScalarType::BFloat16;
  if (!bfloat16) check_type<fp16>(a);
  (bfloat16 ? cblas_gemm_bf16bf16f32 : cblas_gemm_f16f16f32)(
      kRowMajor, left.order(), right.order(), static_cast<int>(to.rows),
      static_cast<int>(to.columns), static_cast<int>(left.columns), 1.0f, left.data,
      left.leading(), right.data, right.leading(), first ? 0.0f : 1.0f, mutable_data<float>(out),
      to.leading());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) {
  if (cblas_gemm_bf16bf16f32 && cblas_gemm_f16f16f32) {
    m.impl("wide_product", TORCH_BOX(&wide_product));
  }
}

}  // namespace rlhf_fast
