#define RLHF_VECTOR_BYTES 64
#include "logits_kl_kernels.h"
