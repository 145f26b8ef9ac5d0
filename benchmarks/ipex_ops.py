"""IPEX's ops beside the native ones and torch's: CPU time of one thread, in µs.

    OMP_NUM_THREADS=1 python benchmarks/ipex_ops.py --output benchmarks/results/ipex.json

Needs torch 2.8 with intel-extension-for-pytorch 2.8 (docs/ipex.md). The implementations take turns,
and of all rounds the best counts. Weights fit into a large cache, so that the road counts and not
the memory. Whoever is off by more than the op's tolerance is not timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import canary
import torch

from trimaran.kernels_cpu.library import about
from trimaran.platforms import cpu_ipex, cpu_ops
from trimaran.platforms.cpu_dense import NativeDensePacker, NativeLinear
from trimaran.platforms.cpu_ipex import IpexDensePacker, IpexLinear, IpexRmsNorm
from trimaran.platforms.cpu_linear import CpuDensePacker, Linear
from trimaran.platforms.cpu_weights import KERNELS
from trimaran.platforms.interface import PackedWeight
from trimaran.platforms.ops import DENSE, OPS
from trimaran.platforms.torch_ops import RmsNorm

SHAPES = ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072))  # of Qwen3-0.6B's layers
ROWS = (1, 8, 32, 128)
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 1024, 16, 8, 128

Roads = dict[str, Callable[[], Any]]


def linear_roads(x: torch.Tensor, weight: torch.Tensor) -> Roads:
    shape = (weight.shape[0], weight.shape[1])
    native, ipex, roads = (
        packer.pack({"weight": weight}, shape)
        for packer in (NativeDensePacker(), IpexDensePacker(), CpuDensePacker())
    )
    own = NativeLinear(KERNELS, (DENSE,))
    return {
        "native": lambda: own(x, native, None),
        "ipex": lambda: IpexLinear()(x, ipex, None),
        f"torch ({roads.format})": lambda: Linear()(x, roads, None),
        "reference": lambda: OPS["linear"].reference(
            x, PackedWeight(DENSE, shape, (weight,)), None
        ),
    }


def roads_of(op: str, args: tuple[Any, ...]) -> Roads:
    impls: dict[str, tuple[Callable[..., Any], ...]] = {
        "rms_norm": (cpu_ops.NativeRmsNorm(), IpexRmsNorm(), RmsNorm()),
        "rope": (cpu_ops.NativeRope(), ipex_rope, cpu_ops.Rope()),
    }
    named = zip(("native", "ipex", "torch"), impls[op], strict=True)
    return {name: partial(impl, *args) for name, impl in (*named, ("reference", OPS[op].reference))}


def ipex_rope(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Not part of the cpu platform: see docs/ipex.md. IPEX's table has the sines first."""
    row = cos_sin.index_select(0, positions[0]).to(query.dtype).float()
    table = torch.cat(row.chunk(2, dim=-1)[::-1], dim=-1)
    rows, size = torch.arange(len(query)).unsqueeze(0), cos_sin.shape[1]
    turn = torch.ops.torch_ipex.rotary_position_embedding
    return tuple(
        turn(x.unsqueeze(0), table, rows, *x.shape[1:], size // 2, size)[0].view(x.shape)
        for x in (query, key)
    )


def cases(dtype: torch.dtype) -> Iterator[tuple[str, dict[str, int], Roads]]:
    """An op, its sizes, and how it may be computed."""
    for rows in ROWS:
        for out_features, in_features in SHAPES:
            x = torch.randn(rows, in_features).to(dtype)
            weight = torch.randn(out_features, in_features).mul(0.02).to(dtype)
            sizes = {"rows": rows, "out": out_features, "in": in_features}
            yield "linear", sizes, linear_roads(x, weight)
        x, weight = torch.randn(rows, HIDDEN).to(dtype), torch.randn(HIDDEN).to(dtype)
        sizes = {"rows": rows, "size": HIDDEN}
        yield "rms_norm", sizes, roads_of("rms_norm", (x, weight, 1e-6))
        query, key = (torch.randn(rows, n, HEAD_DIM).to(dtype) for n in (HEADS, KV_HEADS))
        angles = torch.rand(4096, HEAD_DIM // 2)
        table = torch.cat((angles.cos(), angles.sin()), dim=1)
        sizes = {"rows": rows, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
        yield "rope", sizes, roads_of("rope", (query, key, torch.arange(rows)[None], table))


def race(op: str, dtype: torch.dtype, roads: Roads, seconds: float) -> dict[str, float]:
    """The best µs of each, in turn, for as many rounds as `seconds` hold, ten at least."""
    rtol, atol = OPS[op].tolerance[dtype]
    expected = roads.pop("reference")()
    for road in roads.values():
        torch.testing.assert_close(road(), expected, rtol=rtol, atol=atol)
    best, rounds, end = dict.fromkeys(roads, float("inf")), 0, time.perf_counter() + seconds
    while rounds < 10 or time.perf_counter() < end:
        rounds += 1
        for name, road in roads.items():
            start = time.thread_time_ns()
            road()
            best[name] = min(best[name], (time.thread_time_ns() - start) / 1e3)
    return {name: round(value, 1) for name, value in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0, help="For each case.")
    args = parser.parse_args()
    if reason := cpu_ipex.refusal():
        parser.error(reason)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = []
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):
            for op, sizes, roads in cases(dtype):
                found = {"op": op, "dtype": str(dtype).removeprefix("torch."), **sizes}
                found["us"] = race(op, dtype, roads, args.seconds)
                results.append(found)
                print(json.dumps(found), flush=True)
    report = {
        "command": f"benchmarks/ipex_ops.py --seconds {args.seconds}",
        "machine": canary.describe_machine(),
        "ipex": metadata.version(cpu_ipex.DISTRIBUTION),
        "native": about(),
        "unit": "µs of CPU time, best of all rounds, one thread",
        "results": results,
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
