"""`strict` on a device that records (`simulated_capture`): torch's ops, and what reads values on
the host as kernels of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from helpers.simulated_capture import RecordingDevice, launch
from torch import Tensor

from trimaran.platforms.attention_reference import ReferenceAttention
from trimaran.platforms.interface import (
    AttentionBatch,
    AttentionImpl,
    AttentionSpec,
    Capabilities,
    Device,
    LayerKV,
    OpImpl,
    OpSignature,
    StepFn,
    StepGraph,
    StepLimits,
    Support,
)
from trimaran.platforms.ops import OPS, reference_ops
from trimaran.platforms.step_graph import interpret
from trimaran.platforms.strict import StrictKnobs, StrictPlatform


class OnDevice(NamedTuple):
    """Sequences of one query each: `tables` int32 `[seqs, width]`, `lens` int32 `[seqs]`."""

    tables: Tensor
    lens: Tensor


class LaunchedAttention(ReferenceAttention):
    """The reference as one kernel."""

    name = "launched"

    def plan_recorded(self, spec: AttentionSpec, block_tables: Tensor, seq_lens: Tensor) -> Any:
        return OnDevice(block_tables, seq_lens)

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Any) -> Tensor:
        if not isinstance(metadata, OnDevice):
            return super().run(query, kv, spec, metadata)
        out = torch.empty_like(query)
        launch(self._attend, out, query, kv, spec, metadata)
        return out

    def _attend(
        self, out: Tensor, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: OnDevice
    ) -> None:
        seqs, width = metadata.tables.shape
        lens = metadata.lens.tolist()
        assert all(0 < length <= width * spec.block_size for length in lens)
        batch = AttentionBatch(list(range(seqs + 1)), lens, metadata.tables, metadata.lens)
        assert all(b - a == 1 for a, b in pairwise(batch.query_starts))
        out.copy_(super().run(query, kv, spec, batch))


class LaunchedDraw(OpImpl):
    op = "draw"
    name = "launched"

    def supports(self, sig: OpSignature) -> Support:
        return Support.yes()

    def __call__(self, *args: Any) -> Any:
        logits, floats = args[:2]
        token_ids = torch.empty(len(logits), dtype=torch.int64)
        floor = torch.empty_like(floats[0])
        launch(self._draw, token_ids, floor, *args)
        return token_ids, floor

    def _draw(self, token_ids: Tensor, floor: Tensor, *args: Any) -> None:
        for target, value in zip((token_ids, floor), OPS["draw"].reference(*args), strict=True):
            target.copy_(value)


class RecordingPlatform(StrictPlatform):
    def __init__(self, knobs: StrictKnobs | None = None) -> None:
        super().__init__(knobs or StrictKnobs(delay=0.0))

    def capabilities(self, device: int = 0) -> Capabilities:
        return dataclasses.replace(super().capabilities(device), graph_replay=True)

    def open(self, device: int = 0, num_threads: int | None = None) -> Device:
        return RecordingDevice(device, self.knobs.delay)

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        return {**reference_ops(), "draw": [LaunchedDraw()]}

    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        return (LaunchedAttention(),)

    def build_step(self, graph: StepGraph, limits: StepLimits) -> StepFn | None:
        return interpret(graph) if self.knobs.compile_steps else None


class RecordingCompiled(RecordingPlatform):
    """Whose steps are compiled, too."""

    def __init__(self) -> None:
        super().__init__(StrictKnobs(delay=0.0, compile_steps=True, step_sizes="any"))


class RecordingAtOnce(RecordingPlatform):
    """No step is queued behind another."""

    def __init__(self) -> None:
        super().__init__(StrictKnobs(delay=0.0, run_ahead=0))
