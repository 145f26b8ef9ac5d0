"""The ops of the cpu platform: by its own kernels, and by torch where those cannot be used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels_cpu.library import SCRATCH_BYTES, Call
from .cpu_ipex import IpexRmsNorm
from .cpu_linear import Linear
from .cpu_native import NativeOp, Operand
from .interface import OpImpl, OpSignature, Output, Support
from .torch_ops import TorchOp, common_ops

_ANY_ROW = 1 << 62  # an operand does not know how many rows it has
_MAX_VOCAB = (SCRATCH_BYTES - (64 << 10)) // 6  # tokens that `draw`'s scratch memory holds


class NativeEmbed(NativeOp):
    op, kernel = "embed", "take_rows"

    def dtype_of(self, args: Sequence[Any]) -> torch.dtype:
        dtype: torch.dtype = args[1].dtype
        return dtype

    def outputs(self, args: Sequence[Any]) -> Sequence[Output]:
        ids, table = args
        return [Output((len(ids), table.shape[1]), table.dtype)]

    def fill(self, call: Call, out: Sequence[Operand], args: Sequence[Any]) -> None:
        ids, table = args
        call.input[:2] = ids.address, table.data_ptr()
        call.output[0] = out[0].address
        entries, size = table.shape
        strides = ids.strides[0], table.stride(0), out[0].strides[0]
        call.n[:6] = size, entries, ids.dtype.itemsize, *strides


class NativeEmbedPacked(NativeOp):
    """Rows out of the panels of `NativeDensePacker`."""

    op, kernel = "embed_packed", "take_packed_rows"

    def dtype_of(self, args: Sequence[Any]) -> torch.dtype:
        dtype: torch.dtype = args[1].tensors[0].dtype
        return dtype

    def outputs(self, args: Sequence[Any]) -> Sequence[Output]:
        ids, weight = args
        return [Output((len(ids), weight.shape[1]), self.dtype_of(args))]

    def fill(self, call: Call, out: Sequence[Operand], args: Sequence[Any]) -> None:
        ids, weight = args
        call.input[:2] = ids.address, weight.tensors[0].data_ptr()
        call.output[0] = out[0].address
        entries, size = weight.shape
        call.n[:5] = size, entries, ids.dtype.itemsize, ids.strides[0], out[0].strides[0]


class NativeGatherRows(NativeOp):
    op, kernel = "gather_rows", "take_rows"
    tensors = (1, 0)

    def dtype_of(self, args: Sequence[Any]) -> torch.dtype:
        dtype: torch.dtype = args[0].dtype
        return dtype

    def outputs(self, args: Sequence[Any]) -> Sequence[Output]:
        hidden, indices = args
        return [Output((len(indices), *hidden.shape[1:]), hidden.dtype)]

    def fill(self, call: Call, out: Sequence[Operand], args: Sequence[Any]) -> None:
        hidden, indices = args
        call.input[:2] = indices.address, hidden.address
        call.output[0] = out[0].address
        strides = indices.strides[0], hidden.strides[0], out[0].strides[0]
        call.n[:6] = math.prod(hidden.shape), _ANY_ROW, indices.dtype.itemsize, *strides


class NativeAdd(NativeOp):
    op, kernel = "add", "add"
    tensors = (0, 1)

    def outputs(self, args: Sequence[Any]) -> Sequence[Output]:
        return [Output(tuple(args[0].shape), args[0].dtype)]

    def fill(self, call: Call, out: Sequence[Operand], args: Sequence[Any]) -> None:
        a, b = args
        call.input[:2] = a.address, b.address
        call.output[0] = out[0].address
        call.n[:4] = math.prod(a.shape), a.strides[0], b.strides[0], out[0].strides[0]


class NativeGated(NativeOp):
    """silu_mul and its like."""

    def __init__(self, op: str) -> None:
        self.op = self.kernel = op

    def outputs(self, args: Sequence[Any]) -> Sequence[Output]:
        rows, both = args[0].shape
        return [Output((rows, both // 2), args[0].dtype)]

    def fill(self, call: Call, out: Sequence[Operand], args: Sequence[Any]) -> None:
        (both,) = args
        call.input[0], call.output[0] = both.address, out[0].address
        call.n[:3] = both.shape[0] // 2, both.strides[0], out[0].strides[0]


class NativeRmsNorm(NativeOp):
    op = kernel = "rms_norm"

    def outputs(self, args: Sequence[Any]) -> Sequence[Output]:
        return [Output(tuple(args[0].shape), args[0].dtype)]

    def fill(self, call: Call, out: Sequence[Operand], args: Sequence[Any]) -> None:
        x, weight, eps = args
        call.input[:2] = x.address, weight.data_ptr()
        call.output[0] = out[0].address
        call.n[:4] = len(weight), math.prod(x.shape[:-1]), x.strides[0], out[0].strides[0]
        call.f[0] = eps


class NativeAddRmsNorm(NativeOp):
    op = kernel = "add_rms_norm"
    tensors = (0, 1)

    def outputs(self, args: Sequence[Any]) -> Sequence[Output]:
        return 2 * [Output(tuple(args[0].shape), args[0].dtype)]

    def fill(self, call: Call, out: Sequence[Operand], args: Sequence[Any]) -> None:
        x, residual, weight, eps = args
        call.input[:3] = x.address, residual.address, weight.data_ptr()
        call.output[:2] = out[0].address, out[1].address
        strides = (operand.strides[0] for operand in (x, residual, *out))
        call.n[:5] = len(weight), *strides
        call.f[0] = eps


class NativeRope(NativeOp):
    op = kernel = "rope"
    tensors = (0, 1, 2)

    def outputs(self, args: Sequence[Any]) -> Sequence[Output]:
        return [Output(tuple(x.shape), x.dtype) for x in args[:2]]

    def fill(self, call: Call, out: Sequence[Operand], args: Sequence[Any]) -> None:
        query, key, positions, cos_sin = args
        call.input[:4] = query.address, key.address, positions.address, cos_sin.data_ptr()
        call.output[:2] = out[0].address, out[1].address
        (heads, head_dim), kv_heads = query.shape, key.shape[0]
        call.n[:4] = heads, kv_heads, head_dim, cos_sin.shape[1]
        call.n[4:6] = query.strides[0], key.strides[0]
        call.n[6:8] = positions.strides[1], cos_sin.stride(0)
        call.n[8:10] = out[0].strides[0], out[1].strides[0]


class NativeSample(NativeOp):
    op = kernel = "sample"

    def outputs(self, args: Sequence[Any]) -> Sequence[Output]:
        return [Output((len(args[0]),), torch.int64)]

    def fill(self, call: Call, out: Sequence[Operand], args: Sequence[Any]) -> None:
        (scores,) = args
        call.input[0], call.output[0] = scores.address, out[0].address
        call.n[:2] = scores.shape[0], scores.strides[0]


class NativeDraw(NativeOp):
    op = kernel = "draw"

    def supports(self, sig: OpSignature) -> Support:
        if sig.sizes.get("vocab", 0) > _MAX_VOCAB:
            return Support.no(f"its scratch memory holds {_MAX_VOCAB:,} tokens")
        return super().supports(sig)

    def outputs(self, args: Sequence[Any]) -> Sequence[Output]:
        rows = len(args[0])
        return [Output((rows,), torch.int64), Output((rows,), torch.float32)]

    def fill(self, call: Call, out: Sequence[Operand], args: Sequence[Any]) -> None:
        logits, floats, ints, _ = args
        call.input[:3] = logits.address, floats.data_ptr(), ints.data_ptr()
        call.output[:2] = out[0].address, out[1].address
        call.n[:2] = logits.shape[0], logits.strides[0]
        call.n[2:6] = *floats.stride(), *ints.stride()


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
    """The best first; IPEX's and torch's serve where the native library cannot."""
    native: list[OpImpl] = [
        NativeEmbed(),
        NativeEmbedPacked(),
        NativeRmsNorm(),
        NativeAddRmsNorm(),
        NativeAdd(),
        NativeRope(),
        NativeGated("silu_mul"),
        NativeGated("gelu_mul"),
        NativeGated("gelu_tanh_mul"),
        NativeGatherRows(),
        NativeSample(),
        NativeDraw(),
    ]
    by_op: dict[str, list[OpImpl]] = {}
    for impl in (*native, IpexRmsNorm(), Linear(), Rope(), *common_ops("cpu")):
        by_op.setdefault(impl.op, []).append(impl)
    return by_op
