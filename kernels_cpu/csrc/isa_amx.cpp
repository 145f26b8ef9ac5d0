// AMX tiles for what has enough rows, AVX-512 with BF16 and VNNI for the rest.
#define ISA amx
#define TRIMARAN_WIDE
#define TRIMARAN_BF16
#define TRIMARAN_VNNI
#define TRIMARAN_AMX
#include "kernels.h"
