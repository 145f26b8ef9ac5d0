// All kernels for one instruction set, and the table of them. Included by each isa_*.cpp.
#pragma once
#include "attention.h"
#include "draw.h"
#include "elementwise.h"
#include "linear.h"
#include "moe.h"
#include "rope.h"
#include "sample.h"

namespace trimaran::ISA {

extern const KernelFn TABLE[];
const KernelFn TABLE[] = {
#define TRIMARAN_KERNEL(name) name,
#include "kernels.def"
#undef TRIMARAN_KERNEL
};

}  // namespace trimaran::ISA
