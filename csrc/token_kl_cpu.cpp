// token_kl on CPU: elementwise.
#include "token_kl.h"

namespace rlhf_fast {
namespace {

template <class S>
struct KlSpan {
  const S *logp, *ref_logp, *grad;
  S* out;
  int64_t begin, end;
  Estimator estimator;
};

template <class S>
RLHF_INLINE void kl_span(const KlSpan<S>& s) {
  constexpr int width = Lane<S>::width;
  for (int64_t i = s.begin; i < s.end; i += width) {
    const int64_t n = s.end - i;
    const auto kl = token_kl(
        load_some(s.logp + i, n, 0) - load_some(s.ref_logp + i, n, 0), s.estimator);
    store_some(s.out + i, s.grad ? times(load_some(s.grad + i, n, 0), kl.slope) : kl.value, n);
  }
}
void run(const KlSpan<float>* s) {
  RLHF_ON_THIS_CPU(kl_span(*s));
}
void run(const KlSpan<double>* s) {
  RLHF_ON_THIS_CPU(kl_span(*s));
}

// grad, logp, ref_logp and the result: of one shape.
Tensor elementwise(const MaybeTensor& grad, const Tensor& logp, const Tensor& ref_logp,
                   const std::string& name) {
  Tensor out = new_like(logp);
  dispatch_accumulator(logp, "token_kl", [&](auto element) {
    using S = decltype(element);
    const KlSpan<S> all{data<S>(logp), data<S>(ref_logp), data<S>(grad), mutable_data<S>(out),
                        0, 0, estimator(name)};
    Units(1, logp.numel()).parallel([&](int64_t, int64_t, int64_t begin, int64_t end) {
      KlSpan<S> span = all;
      span.begin = begin;
      span.end = end;
      run(&span);
    });
    return 0;
  });
  return out;
}

// logp, ref_logp [...] -> the estimates [...].
Tensor token_kl_forward(const Tensor& logp, const Tensor& ref_logp, std::string name) {
  return elementwise(std::nullopt, logp, ref_logp, name);
}

// grad, logp, ref_logp [...] -> dloss/dlogp [...].
Tensor token_kl_backward(const Tensor& grad, const Tensor& logp, const Tensor& ref_logp,
                         std::string name) {
  return elementwise(grad, logp, ref_logp, name);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) {
  m.impl("token_kl", TORCH_BOX(&token_kl_forward));
  m.impl("token_kl_backward", TORCH_BOX(&token_kl_backward));
}

}  // namespace rlhf_fast
