"""The ops of the cpu platform in fewer torch calls than their references."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cpu_linear import Linear
from .interface import OpImpl
from .torch_ops import TorchOp, common_ops


class Rope(TorchOp):
    """Query and key turn together: half the calls of the reference, bit-equal to it."""

    op = "rope"

    def __init__(self) -> None:
        super().__init__("cpu")
        self._seen: tuple[Any, ...] = ()
        self._factors: tuple[Tensor, Tensor] | None = None

    def __call__(self, *args: Any) -> Any:
        query, key, positions, cos_sin = args
        heads, size = query.shape[1], cos_sin.shape[1]
        cos, sin = self._of_step(positions, cos_sin, query.dtype)
        both = torch.cat((query, key), dim=1)  # [tokens, heads + kv_heads, head_dim]
        turned = both[..., :size]
        swapped = turned.view(*both.shape[:2], 2, size // 2).flip(2).view(turned.shape)
        turned.mul_(cos).add_(swapped.mul_(sin))
        return both[:, :heads], both[:, heads:]

    def _of_step(
        self, positions: Tensor, cos_sin: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, each `[tokens, 1, rotary_dim]`: all layers of a step ask for
        the same. Both tensors are held, so that no other can come to lie at their addresses."""
        seen = (
            positions.data_ptr(),
            positions._version,
            positions.shape,
            cos_sin.data_ptr(),
            dtype,
        )
        if self._factors is None or self._seen[2:] != seen:
            row = cos_sin.index_select(0, positions[0]).to(dtype).unsqueeze(1)
            cos, sin = row.chunk(2, dim=-1)
            self._factors = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
            self._seen = (positions, cos_sin, *seen)
        return self._factors


def cpu_ops() -> dict[str, list[OpImpl]]:
    impls: list[OpImpl] = [Linear(), Rope(), *common_ops("cpu")]
    return {impl.op: [impl] for impl in impls}
