#define RLHF_AVX512_ELSEWHERE  // in token_logprobs_avx512_cpu.cpp
#include "token_logprobs_kernels.h"

namespace rlhf_fast {

namespace vectors_of_64_bytes {
decltype(vectors_of_32_bytes::token_logprobs) token_logprobs;
decltype(vectors_of_32_bytes::token_logprobs_backward) token_logprobs_backward;
}  // namespace vectors_of_64_bytes

using Forward = OfThisCpu<&vectors_of_32_bytes::token_logprobs, &vectors_of_64_bytes::token_logprobs>;
using Backward = OfThisCpu<&vectors_of_32_bytes::token_logprobs_backward,
                           &vectors_of_64_bytes::token_logprobs_backward>;

STABLE_TORCH_LIBRARY_IMPL(rlhf_fast, CPU, m) {
  m.impl("token_logprobs", TORCH_BOX(&Forward::run));
  m.impl("token_logprobs_backward", TORCH_BOX(&Backward::run));
}

}  // namespace rlhf_fast
