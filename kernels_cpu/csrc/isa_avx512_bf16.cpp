// AVX-512 with BF16 and VNNI: products of bfloat16 pairs and of bytes.
#define ISA avx512_bf16
#define TRIMARAN_WIDE
#define TRIMARAN_BF16
#define TRIMARAN_VNNI
#include "kernels.h"
