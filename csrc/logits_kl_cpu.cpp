#define RLHF_AVX512_ELSEWHERE  // in logits_kl_avx512_cpu.cpp
#include "logits_kl_kernels.h"

namespace rlhf_fast {

namespace vectors_of_64_bytes {
decltype(vectors_of_32_bytes::logits_kl) logits_kl;
decltype(vectors_of_32_bytes::logits_kl_backward) logits_kl_backward;
}  // namespace vectors_of_64_bytes

using Forward = OfThisCpu<&vectors_of_32_bytes::logits_kl, &vectors_of_64_bytes::logits_kl>;
using Backward = OfThisCpu<&vectors_of_32_bytes::logits_kl_backward,
                           &vectors_of_64_bytes::logits_kl_backward>;

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) {
  m.impl("logits_kl", TORCH_BOX(&Forward::run));
  m.impl("logits_kl_backward", TORCH_BOX(&Backward::run));
}

}  // namespace rlhf_fast
