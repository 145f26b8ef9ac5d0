"""Asking an implementation of an op what it supports, and calling it between guards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..platforms.interface import (
    DENSE,
    FP8,
    INT4,
    INT8,
    W4A16,
    Device,
    OpImpl,
    OpSignature,
    PackedWeight,
    Support,
    WeightPacker,
)
from .base import Failed, expect
from .cases import Arguments
from .compare import as_tuple
from .lab import Guarded, on_device, to_host_all

CANONICAL: Mapping[str, tuple[str, ...]] = {
    DENSE: ("weight",),
    INT8: ("codes", "scales"),
    FP8: ("codes", "scales"),
    INT4: ("codes", "scales", "zeros"),
    W4A16: ("codes", "scales", "zeros"),
}
"""Format → the names of its canonical tensors, in the order in which cases hold them."""


def ask_support(impl: OpImpl, use: OpSignature) -> Support:
    try:
        answer = impl.supports(use)
    except Exception as error:  # the platform's
        said = f"{impl.op}/{impl.name}: supports() raises {type(error).__name__}: {error}"
        raise Failed(said, case=f"{use}") from error
    expect(isinstance(answer, Support), f"supports() returned {answer!r}", case=f"{use}")
    expect(answer or answer.reason, f"{impl.name} refuses without a reason", case=f"{use}")
    return answer


def place(
    device: Device, weight: PackedWeight, put: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The canonical tensors of `weight`, on the device by `put`, as a packer takes them."""
    names = CANONICAL[weight.format]
    there = {name: put(one) for name, one in zip(names, weight.tensors, strict=True)}
    device.synchronize()
    return there


def call(
    device: Device, impl: OpImpl, packer: WeightPacker, args: Arguments
) -> tuple[tuple[Tensor, ...], str]:
    """The results on the host, and what was written that may not be (empty: nothing)."""
    guards: list[tuple[int, Guarded]] = []
    given: list[Any] = []

    def guarded(tensor: Tensor) -> Tensor:
        guards.append((len(given), Guarded(device, tensor)))
        return guards[-1][1].tensor

    for arg in args:
        if isinstance(arg, PackedWeight):
            given.append(packer.pack(place(device, arg, guarded), arg.shape))
        else:
            given.append(guarded(arg) if isinstance(arg, Tensor) else arg)

    def work() -> tuple[Any, list[Tensor]]:
        results = to_host_all(device, impl(*given))
        return results, [guard.read(device) for _, guard in guards]

    results, reads = on_device(device, work)
    for (i, guard), read in zip(guards, reads, strict=True):
        if said := guard.changed(read, writable=impl.op == "copy" and i == 0):
            return as_tuple(results), f"argument {i}: {said}"
    return as_tuple(results), ""
