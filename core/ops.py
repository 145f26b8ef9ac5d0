"""The binding of ops to implementations: chosen once, when a model is built, and recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..platforms.interface import AttentionImpl, AttentionSpec, Device, PackedWeight, Platform


class OpBinder:
    def __init__(self, platform: Platform, device: Device | None = None) -> None: ...

    def bind(self, op: str, dtype: torch.dtype, **sizes: int) -> Callable[..., Any]:
        raise NotImplementedError

    def attention(self, spec: AttentionSpec) -> AttentionImpl:
        raise NotImplementedError

    def pack(self, weight: Tensor) -> PackedWeight:
        raise NotImplementedError
