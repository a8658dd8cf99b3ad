#define RLHF_VECTOR_BYTES 64
#include "thin_linear_kernels.h"
