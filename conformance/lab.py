"""Work on the device under examination: only by the contract, so that it is right on a device that
queues, and on one whose memory is not the host's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..platforms.interface import Device, Platform
from .base import Subject

T = TypeVar("T")

PAD = 128
"""Elements of canary before and behind a guarded tensor: enough to keep the alignment of what lies
between them."""


@contextlib.contextmanager
def opened(subject: Subject, platform: Platform | None = None) -> Iterator[Device]:
    """The subject's device, closed at the end."""
    device = (platform or subject.platform()).open(subject.device, 1)
    try:
        yield device
    finally:
        device.close()


def on_device(device: Device, work: Callable[[], T]) -> T:
    """What `work` returns, run in a launch of its own that is waited for."""
    results: list[T] = []
    device.launch(lambda: results.append(work())).wait()
    return results[0]


def fetch(device: Device, *tensors: Tensor) -> list[Tensor]:
    """Host copies of device tensors."""
    return on_device(device, lambda: [device.to_host(tensor) for tensor in tensors])


def equal(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool(torch.equal(found, expected))


def adding_one(tensor: Tensor) -> Callable[[], None]:
    def work() -> None:
        tensor.add_(1)

    return work


def to_host_all(device: Device, value: Any) -> Any:
    """Inside a launch: `value` with its tensors (in tuples and lists, too) copied to the host."""
    if isinstance(value, Tensor):
        return device.to_host(value)
    if isinstance(value, tuple | list):
        return tuple(to_host_all(device, one) for one in value)
    return value


def canary(dtype: torch.dtype) -> Any:
    """What stands where nobody may read or write: NaN, or for integers a number that is no index
    of anything."""
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).min // 2 + 45


class Guarded:
    """A host tensor's copy on the device, laid out with the same strides inside a larger buffer of
    canaries: they fill its two ends, and the gaps of a view that is not contiguous."""

    def __init__(self, device: Device, host: Tensor) -> None:
        span = 1 + sum((n - 1) * step for n, step in zip(host.shape, host.stride(), strict=True))
        span = span if host.numel() else 0
        self._expected = torch.full((PAD + span + PAD,), canary(host.dtype), dtype=host.dtype)
        self._shape, self._stride = host.shape, host.stride()
        self._view(self._expected).copy_(host)
        self._buffer = device.to_device(self._expected)
        self.tensor = self._view(self._buffer)

    def _view(self, buffer: Tensor) -> Tensor:
        return buffer.as_strided(self._shape, self._stride, PAD)

    def read(self, device: Device) -> Tensor:
        """Inside a launch: the whole buffer, to be given to `changed` after it."""
        return device.to_host(self._buffer)

    def value(self, read: Tensor) -> Tensor:
        return self._view(read)

    def changed(self, read: Tensor, writable: bool = False) -> str:
        """What was written that may not be; empty if nothing. `writable`: the tensor itself may."""
        expected = self._expected.clone()
        if writable:
            self._view(expected).copy_(self._view(read))
        different = (as_bits(read) != as_bits(expected)).nonzero().flatten()
        if not len(different):
            return ""
        at, end = int(different[0]) - PAD, len(expected) - 2 * PAD
        if at < 0:
            return "memory before it was written"
        if at >= end:
            return f"memory {at - end} elements behind its end was written"
        return f"its memory was changed, at element {at}"


def as_bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, by which a NaN equals itself."""
    if tensor.dtype == torch.bool or not tensor.dtype.is_floating_point:
        return tensor
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])
