"""Copies that nobody waits for: from the host to an accelerator, and between blocks of a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .interface import KVRegion


def to_accelerator(host: Tensor, device: torch.device) -> Tensor:
    """`host` on `device`, without waiting for it; `host` itself where the device is the host."""
    return host if device.type == "cpu" else upload(host, device)


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy of `host` on an accelerator, made by the current stream from pinned memory, which
    torch keeps until the copy is over: `host` may change at once."""
    return pinned_like(host).copy_(host).to(device, non_blocking=True)


def pinned_like(tensor: Tensor) -> Tensor:
    """Host memory for a copy of `tensor`, which an accelerator reads and writes by itself."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True)


def move_blocks(regions: Sequence[KVRegion], pairs: Tensor) -> None:
    """Copy blocks (source, target) of `pairs` [n, 2], which lie where the regions do; all sources
    are read before any target is written."""
    sources, targets = pairs.unbind(1)
    for region in regions:
        raw = movable(region.tensor)
        raw.index_copy_(0, targets, raw.index_select(0, sources))


def movable(tensor: Tensor) -> Tensor:
    """float8 as bytes: those torch copies by index everywhere, float8 itself not."""
    float8 = tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point
    return tensor.view(torch.uint8) if float8 else tensor
