"""How fast each road multiplies a 16-bit weight on this processor, by the number of rows.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/linear_roads.py

The weight fits into a large cache, so that the road counts and not the memory; best of 30 calls.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import canary
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from trimaran.platforms import cpu_linear
from trimaran.platforms.interface import PackedWeight
from trimaran.platforms.ops import DENSE


def roads(weight: torch.Tensor) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The packed road that the cpu platform takes here, and torch's own without packing."""
    out_features, in_features = weight.shape
    packed = cpu_linear.CpuDensePacker().pack({"weight": weight}, (out_features, in_features))
    plain = PackedWeight(DENSE, packed.shape, (weight,))
    linear = cpu_linear.Linear()
    wide = weight.float()
    return {
        f"{packed.format}, packed once": lambda x: linear(x, packed, None),
        f"F.linear in {weight.dtype}": lambda x: linear(x, plain, None),
        "F.linear in fp32, widened before": lambda x: F.linear(x.float(), wide),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(6144, 1024), metavar=("OUT", "IN"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 32, 128])
    args = parser.parse_args()
    weight = torch.randn(*args.shape).mul(0.02).to(getattr(torch, args.dtype))
    table = Table("rows", "road", "µs", "GFLOP/s", title=f"{args.shape}, {args.dtype}")
    with torch.inference_mode():
        found = roads(weight)
        for rows in args.rows:
            x = torch.randn(rows, args.shape[1]).to(weight.dtype)
            for name, road in found.items():
                seconds = min(canary.seconds(partial(road, x)) for _ in range(30))
                rate = 2 * rows * weight.numel() / seconds / 1e9
                table.add_row(str(rows), name, f"{seconds * 1e6:,.0f}", f"{rate:.1f}")
            table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
