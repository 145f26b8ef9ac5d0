"""Hidden states layer by layer, compared.

One prefill goes through each decoder: once as it runs, where errors pile up, and once with every
layer given the reference's own input, so that the first layer at fault is named even if all
behind it are off as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...platforms.interface import AttentionBatch, Device
from ..models.decoder import Decoder

LAYER_ERRORS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""By element type: the error of one layer that rounding explains, as a share of what it adds."""

PROBE_TOKENS = 64
"""Of one prompt, that the layers are compared on."""


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """A prefill, layer by layer, on the host: `inputs[i]` and `outputs[i]` are a layer's
    `(hidden, residual)`, `[tokens, hidden]` each (no residual goes into the first). `own[i]`: its
    output for another trace's input. `final`: the normed states; `logits`: of the last token."""

    embedding: Tensor
    inputs: list[tuple[Tensor | None, ...]]
    outputs: list[tuple[Tensor | None, ...]]
    own: list[tuple[Tensor | None, ...]]
    final: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True)
class LayerError:
    """Of one layer: the stream's largest error and its root mean square relative to the stream;
    `own`: the same of what the layer itself adds, given the reference's input."""

    layer: int
    max_abs: float
    relative: float
    own: float


def trace_layers(
    decoder: Decoder, device: Device, token_ids: Sequence[int], given: LayerTrace | None = None
) -> LayerTrace:
    """Run one prompt through a decoder whose cache holds nothing of worth. With `given` each
    layer also runs on that trace's input."""
    assert decoder.embed is not None and decoder.norm is not None, "a whole decoder"
    embed, norm, buffers = decoder.embed, decoder.norm, decoder.buffers
    dtype, count = decoder.dtype, len(token_ids)
    ids, positions = torch.tensor(list(token_ids)), torch.arange(count)
    staged_ids, staged_positions = device.to_device(ids), device.to_device(positions)
    tables = [_first_blocks(device, group.spec.block_size, count) for group in buffers.groups]
    fed: list[Any] = [
        [_fed(device, one, dtype) for one in pair] for pair in (given.inputs if given else ())
    ]
    kept: dict[str, Any] = {"inputs": [], "outputs": [], "own": []}

    def work() -> None:
        buffers.begin(count)
        buffers.token_ids.copy_(staged_ids)
        buffers.positions.copy_(staged_positions.expand_as(buffers.positions))
        for group, (table, slots) in zip(buffers.groups, tables, strict=True):
            group.slots.copy_(slots)
            batch = AttentionBatch([0, count], [count], table, group.slots)
            group.metadata = group.impl.plan(group.spec, batch)
        hidden: Tensor = embed(buffers.token_ids)
        residual: Tensor | None = None
        kept["embedding"] = device.to_host(hidden)
        for index, layer in enumerate(decoder.layers):
            kept["inputs"].append(_to_host(device, hidden, residual))
            hidden, residual = layer(hidden, residual)
            kept["outputs"].append(_to_host(device, hidden, residual))
            if fed:
                kept["own"].append(_to_host(device, *layer(*fed[index])))
        final = norm.add(hidden, residual)[0]
        kept["final"] = device.to_host(final)
        kept["logits"] = device.to_host(decoder.logits(final[-1:]))

    device.launch(work).wait()
    return LayerTrace(**kept)


def _first_blocks(device: Device, block_size: int, count: int) -> tuple[Tensor, Tensor]:
    """Block table int32 `[1, blocks]` and slots int64 `[count]` behind the scratch block."""
    table = torch.arange(1, 1 + -(-count // block_size), dtype=torch.int32).unsqueeze(0)
    slots = block_size + torch.arange(count)
    return device.to_device(table), device.to_device(slots)


def _fed(device: Device, tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else device.to_device(tensor.to(dtype))


def _to_host(device: Device, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if one is None else device.to_host(one) for one in tensors)


def compare_layers(reference: LayerTrace, other: LayerTrace) -> list[LayerError]:
    """`other` was traced with `reference` given."""
    errors = []
    pairs = zip(reference.inputs, reference.outputs, other.outputs, other.own, strict=True)
    for index, (entered, left, right, own) in enumerate(pairs):
        expected, found = _stream(left), _stream(right)
        added = expected - _stream(entered)
        errors.append(
            LayerError(
                layer=index,
                max_abs=float((found - expected).abs().max()),
                relative=_share(found - expected, expected),
                own=_share(_stream(own) - expected, added),
            )
        )
    return errors


def end_errors(reference: LayerTrace, other: LayerTrace) -> dict[str, float]:
    """Of what is not a layer: root mean square errors relative to the reference's values."""
    return {
        name: _share(getattr(other, name).float() - expected.float(), expected.float())
        for name in ("embedding", "final", "logits")
        for expected in (getattr(reference, name),)
    }


def first_at_fault(errors: Sequence[LayerError], limit: float) -> int | None:
    """The first layer that is off by itself, by more than `limit` of what it adds (or NaN)."""
    return next((one.layer for one in errors if not one.own <= limit), None)


def _stream(pair: tuple[Tensor | None, ...]) -> Tensor:
    """hidden + residual, the sum that the next norm reads, in fp32."""
    hidden, residual = pair
    assert hidden is not None
    return hidden.float() if residual is None else hidden.float() + residual.float()


def _share(error: Tensor, whole: Tensor) -> float:
    """The root mean square of `error` over that of `whole`."""
    size = float(whole.pow(2).mean().sqrt())
    return float(error.pow(2).mean().sqrt()) / size if size else float(error.abs().max())
