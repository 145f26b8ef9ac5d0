"""Ops. VENDOR: call your kernels; `trimaran.platforms.ops` defines what each op must yield."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimaran.platforms import interface as tri

WIDTH = 16  # elements that the vector unit takes at once


class AcmeOp(tri.OpImpl):
    """A kernel as an implementation of an op."""

    name = "acme"

    def __init__(self, op: str, kernel: Callable[..., Any]) -> None:
        self.op, self._kernel = op, kernel

    def supports(self, sig: tri.OpSignature) -> tri.Support:
        # Asked when the model is built. A refusal is no error: torch takes over, and the reason is
        # what `trimaran platforms` shows. Never say yes to what you cannot do.
        if sig.dtype not in (torch.float32, torch.bfloat16):
            return tri.Support.no(f"Acme One does not read {sig.dtype}")
        if sig.sizes.get("size", 0) % WIDTH:
            return tri.Support.no(f"rows that are no multiple of {WIDTH} elements")
        return tri.Support.yes("Acme One")

    def __call__(self, *args: Any) -> Any:
        return self._kernel(*args)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scale = (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return (wide / scale).to(x.dtype) * weight


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    return (wide / (1 + torch.exp(-wide))).to(gate.dtype) * up


def linear(x: Tensor, weight: tri.PackedWeight, bias: Tensor | None) -> Tensor:
    packed: Tensor = weight.tensors[0]  # as AcmePacker laid it out
    product = x.float() @ packed.float()
    return (product if bias is None else product + bias).to(x.dtype)


def linear_silu_mul(x: Tensor, weight: tri.PackedWeight, bias: Tensor | None) -> Tensor:
    """A fusion equals its parts, run one after the other. VENDOR: one kernel."""
    return silu_mul(linear(x, weight, bias))


class AcmePacker(tri.WeightPacker):
    """Weights lie `[in, out]`. VENDOR: in the tiles that your matrix unit reads."""

    format = tri.DENSE  # what it takes

    def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tri.PackedWeight:
        packed = tensors["weight"].t().contiguous()
        return tri.PackedWeight("acme", shape, (packed,), extra_bytes=packed.nbytes)

    def packed_bytes(self, dtype: torch.dtype, shape: tuple[int, int]) -> int:
        return shape[0] * shape[1] * dtype.itemsize
