"""The step buffers: what the runner fills and the layers read.

The engine owns them for its whole life and gives them to the layers when these are built, so that
a layer's call carries no context and a captured graph sees the same addresses every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...platforms.interface import AttentionImpl, AttentionSpec, Device, Platform
from ..config import CacheConfig
from ..errors import PlatformError
from ..ops import OpBinder
from .spec import DecoderSpec, LayerGroup


class StepGroup:
    """One cache group: its layers share block tables, hence slots and attention metadata.

    Fixed: `layers`, `spec` (of this rank's heads), `impl`. Set by the runner every step, inside
    the launch: the content of `slots`, `[tokens]`, and `metadata`, what
    `impl.plan(spec, batch)` returned.
    """

    __slots__ = ("_all_slots", "impl", "layers", "metadata", "slots", "spec")

    def __init__(
        self,
        layers: Sequence[int],
        spec: AttentionSpec,
        impl: AttentionImpl,
        slot_dtype: torch.dtype = torch.int64,
    ) -> None:
        self.layers = tuple(layers)
        self.spec = spec
        self.impl = impl
        self.metadata: Any = None
        self.slots = self._all_slots = torch.empty(0, dtype=slot_dtype)

    def alloc(self, device: Device, max_tokens: int) -> None:
        """Take memory for `max_tokens` slots; slot 0 lies in the scratch block."""
        dtype = self._all_slots.dtype
        self._all_slots = device.alloc((max_tokens,), dtype, tag="step").zero_()
        self.slots = self._all_slots

    def begin(self, num_tokens: int) -> None:
        self.slots = self._all_slots[:num_tokens]
        self.metadata = None


class StepBuffers:
    """Persistent inputs of one step; every attribute below is a view of its `num_tokens`.

    `token_ids`: int64 `[tokens]`. `positions`: int64 `[axes, tokens]` (one axis for text).
    `groups[g]`: see `StepGroup`. Where launches are asynchronous, `begin` and all that follows it
    belong inside the launch: the step before may still be reading.
    """

    def __init__(
        self,
        device: Device,
        groups: Sequence[StepGroup],
        *,
        max_tokens: int,
        max_positions: int,
        position_axes: int = 1,
    ) -> None:
        """`max_positions`: every position is below it (the rope table ends there)."""
        self.groups = tuple(groups)
        self.max_tokens = max_tokens
        self.max_positions = max_positions
        self.num_tokens = max_tokens
        self._token_ids = device.alloc((max_tokens,), torch.int64, tag="step").zero_()
        self._positions = device.alloc((position_axes, max_tokens), torch.int64, tag="step").zero_()
        for group in self.groups:
            group.alloc(device, max_tokens)
        self._group_of = {layer: group for group in self.groups for layer in group.layers}
        self.begin(max_tokens)

    def begin(self, num_tokens: int) -> None:
        """Start a step of `num_tokens`; its views replace those of the step before."""
        if not 0 <= num_tokens <= self.max_tokens:
            raise ValueError(f"A step of {num_tokens} tokens; the buffers hold {self.max_tokens}.")
        self.num_tokens = num_tokens
        self.token_ids: Tensor = self._token_ids[:num_tokens]
        self.positions: Tensor = self._positions[:, :num_tokens]
        for group in self.groups:
            group.begin(num_tokens)

    def inputs(self) -> list[tuple[Tensor, Tensor]]:
        """The step's view of each tensor that the runner fills, and all of it, `[..., max_tokens]`:
        token ids, positions, each group's slots."""
        slots = [(group.slots, group._all_slots) for group in self.groups]
        return [(self.token_ids, self._token_ids), (self.positions, self._positions), *slots]

    def group_of(self, layer: int) -> StepGroup:
        return self._group_of[layer]


def make_groups(
    spec: DecoderSpec, binder: OpBinder, cache: CacheConfig, *, dtype: torch.dtype, ranks: int = 1
) -> list[StepGroup]:
    """The step groups of a resolved cache configuration, in its order."""
    groups = []
    for config in cache.groups:
        attention = spec.attention_spec(
            LayerGroup(config.name, config.layers, config.sliding_window),
            dtype=dtype,
            kv_dtype=cache.dtype,
            block_size=config.block_size,
            ranks=ranks,
        )
        slots = slot_dtype(binder.platform, attention)
        groups.append(StepGroup(config.layers, attention, binder.attention(attention), slots))
    return groups


def slot_dtype(platform: Platform, attention: AttentionSpec) -> torch.dtype:
    """The element type the platform wants slots in."""
    name = platform.kv_constraints(attention).slot_dtype
    if name not in ("int64", "int32"):
        raise PlatformError(
            f"Platform {platform.name!r} asks for slots of type {name!r}: int64 or int32."
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype
