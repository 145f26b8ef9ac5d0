// AVX2 and FMA: every kernel with 256-bit vectors.
#define ISA avx2
#include "kernels.h"
