"""Kernels that no card should run: one spills, one takes too much shared memory. As a program,
`planted_kernels.py ARCHITECTURE spill|shared|none` compiles one by the compile row's own
functions, prints its faults and exits as the row would."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "ci"))

import compile_kernels
import torch
import triton
import triton.language as tl

from trimaran.kernels_cuda.portable.cases import Case, rand
from trimaran.kernels_cuda.portable.tuning import Entry, Table


@triton.jit
def _many_sums(x_ptr, out_ptr, SIZE: tl.constexpr, SUMS: tl.constexpr):
    """Keeps SUMS tiles of SIZE numbers at once: with one warp, SUMS * SIZE / 32 registers."""
    at = tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), dtype=tl.float32)
    tiles = ()
    for i in tl.static_range(SUMS):
        tiles = tiles + (tl.load(x_ptr + i * SIZE + at),)
    for i in tl.static_range(SUMS):
        total += tiles[i] * tl.sum(tiles[SUMS - 1 - i])
    tl.store(out_ptr + at, total)


@triton.jit
def _wide_product(x_ptr, out_ptr, SIZE: tl.constexpr):
    """A product whose operands pass through shared memory whole, several stages of them."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for i in range(0, 8):
        tile = tl.load(x_ptr + i * SIZE * SIZE + at)
        total += tl.dot(tile, tl.trans(tile))
    tl.store(out_ptr + at, total)


def launch(kernel: Any, sizes: dict[str, int]) -> Any:
    def call(device: torch.device, table: Table) -> Any:
        dtype = torch.float16 if kernel is _wide_product else torch.float32
        x, out = rand(device, 1 << 20, dtype=dtype), rand(device, 1 << 16, dtype=torch.float32)
        return lambda: kernel[(1,)](x, out, **sizes, **table.pick("planted"))

    return call


# NVIDIA's operands pass in several stages, AMD's in one large one. AMD's have 512 registers.
PLANTED: dict[tuple[str, str], tuple[Any, dict[str, int], dict[str, int]]] = {
    ("sm_80", "spill"): (_many_sums, {"SIZE": 1024, "SUMS": 32}, {"num_warps": 1}),
    ("gfx942", "spill"): (_many_sums, {"SIZE": 1024, "SUMS": 64}, {"num_warps": 1}),
    ("sm_80", "shared"): (_wide_product, {"SIZE": 128}, {"num_warps": 8, "num_stages": 7}),
    ("gfx942", "shared"): (_wide_product, {"SIZE": 256}, {"num_warps": 16, "num_stages": 2}),
    ("sm_80", "none"): (_many_sums, {"SIZE": 256, "SUMS": 2}, {"num_warps": 4}),
    ("gfx942", "none"): (_many_sums, {"SIZE": 256, "SUMS": 2}, {"num_warps": 4}),
}


def main() -> int:
    architecture, which = sys.argv[1:]
    kernel, sizes, options = PLANTED[architecture, which]
    table = Table(architecture, (), {"planted": (Entry({}, options, "planted"),)})
    cases = [Case("planted", which, launch(kernel, sizes))]
    done = compile_kernels.compile_cases(cases, table)
    faults = compile_kernels.faults_of(done, architecture)
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
