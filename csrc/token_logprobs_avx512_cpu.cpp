#define RLHF_VECTOR_BYTES 64
#include "token_logprobs_kernels.h"
