// AVX-512 (F, BW, VL, DQ) without the instructions for bfloat16 and bytes.
#define ISA avx512
#define TRIMARAN_WIDE
#include "kernels.h"
