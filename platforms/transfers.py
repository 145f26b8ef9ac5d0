"""Copies from the host to an accelerator that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


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
