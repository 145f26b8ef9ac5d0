"""How quick an op is for a layer of a common size: told beside its correctness, not judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..platforms.interface import Device, OpImpl, OpSignature, PackedWeight, WeightPacker
from .base import Measurements
from .cases import Arguments, sizes

MEASURE_FOR = 0.05  # seconds
MAX_CALLS = 50
HIDDEN, QUICK_HIDDEN = 2048, 512
TOKENS = 64
EXPERTS = 8


def op_speed(
    device: Device, impl: OpImpl, packer: WeightPacker, dtype: torch.dtype, quick: bool
) -> Measurements:
    """Microseconds a call and gigabytes read and written a second, of one call a launch; nothing
    for what it refuses."""
    args = _typical(impl.op, dtype, QUICK_HIDDEN if quick else HIDDEN)
    if not impl.supports(OpSignature(impl.op, dtype, sizes(impl.op, args))):
        return {}
    given = [_place(device, packer, arg) for arg in args]
    results: list[Any] = []

    def work() -> None:
        results[:] = [impl(*given)]

    seconds = seconds_a_call(device, work)
    moved = sum(map(_bytes, [*args, *results]))
    return {"us": round(seconds * 1e6, 1), "GB/s": round(moved / seconds / 1e9, 2)}


def seconds_a_call(device: Device, work: Callable[[], None]) -> float:
    """The mean over launches, each waited for, after one that is not counted."""
    device.launch(work).wait()
    start, calls = time.perf_counter(), 0
    while calls < MAX_CALLS and time.perf_counter() - start < MEASURE_FOR:
        device.launch(work).wait()
        calls += 1
    return (time.perf_counter() - start) / calls


def _typical(op: str, dtype: torch.dtype, hidden: int) -> Arguments:
    wide = torch.ones(TOKENS, hidden, dtype=dtype)
    table: Mapping[str, Callable[[], Arguments]] = {
        "embed": lambda: (
            torch.arange(TOKENS),
            torch.ones(4 * TOKENS, hidden, dtype=dtype),
        ),
        "embed_packed": lambda: (torch.arange(TOKENS), _weight(4 * TOKENS, hidden, dtype)),
        "rms_norm": lambda: (wide, wide[0], 1e-6),
        "add_rms_norm": lambda: (wide, wide, wide[0], 1e-6),
        "linear": lambda: (wide, _weight(hidden, hidden, dtype), None),
        "moe": lambda: (
            wide,
            torch.randn(TOKENS, EXPERTS).to(dtype),
            _weight(hidden, hidden, dtype),
            _weight(EXPERTS * hidden, hidden // (2 * EXPERTS), dtype),
            2,
            True,
        ),
        "rope": lambda: (
            wide.view(TOKENS, -1, 128),
            wide[:, : hidden // 4].view(TOKENS, -1, 128),
            torch.arange(TOKENS).view(1, -1),
            torch.ones(4096, 128),
        ),
        "add": lambda: (wide, wide),
        "gather_rows": lambda: (wide, torch.arange(0, TOKENS, 2)),
        "copy": lambda: (wide, wide),
        "sample": lambda: (torch.ones(TOKENS, 32_000),),
        "draw": lambda: (
            torch.ones(TOKENS, 32_000),
            torch.tensor([[0.8], [1.0], [0.0]]).repeat(1, TOKENS),
            torch.zeros(5, TOKENS, dtype=torch.int64),
            256,
        ),
    }
    if op in table:
        return table[op]()
    return (torch.ones(TOKENS, 8 * hidden, dtype=dtype),)  # a gated activation


def _weight(rows: int, columns: int, dtype: torch.dtype) -> PackedWeight:
    return PackedWeight("dense", (rows, columns), (torch.ones(rows, columns, dtype=dtype),))


def _place(device: Device, packer: WeightPacker, arg: Any) -> Any:
    if isinstance(arg, PackedWeight):
        weight = device.to_device(arg.tensors[0])
        device.synchronize()
        return packer.pack({"weight": weight}, arg.shape)
    return device.to_device(arg) if isinstance(arg, Tensor) else arg


def _bytes(arg: Any) -> int:
    if isinstance(arg, PackedWeight):
        return _bytes(arg.tensors[0])
    if isinstance(arg, tuple | list):
        return sum(map(_bytes, arg))
    return arg.numel() * arg.element_size() if isinstance(arg, Tensor) else 0
