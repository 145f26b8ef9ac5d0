"""A whole step on a GPU: the step graph with neighbouring ops fused; and where every sequence has
one token, recorded once for a number of tokens and replayed.

A recording reads its inputs at fixed addresses: the step's buffers, and copies of the block tables
and lengths that are its own. A step is padded up to the next recorded size with tokens that stand
in the scratch block.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels_cuda.portable.attention import Sequences
from .gpu_attention import Metadata, TritonAttention
from .gpu_fusion import fused, owner_of
from .interface import Device, Graph, StepFn, StepGraph, StepInput, StepMetadata
from .step_graph import StepRun

logger = logging.getLogger("trimaran.gpu")

SIZES = (1, 2, 4, *range(8, 257, 8), *range(288, 513, 32))
"""Numbers of tokens that steps are recorded for: steps of more are computed, not launched, most of
their time."""
FIRST_WIDTH = 64
"""Blocks a sequence may have at first, in a recording."""


def compile_step(graph: StepGraph, device: Device) -> StepFn | None:
    """None, with the reason in the log, where the attention is another's."""
    groups = _attention_groups(graph)
    if groups is None:
        logger.info("steps run op by op: their attention is not the portable one")
        return None
    return Step(graph, groups, device)


@dataclass(frozen=True, slots=True)
class Group:
    """A cache group of the step: who computes its attention, and of what shape."""

    impl: TritonAttention
    spec: Any


def _attention_groups(graph: StepGraph) -> dict[int, Group] | None:
    groups = {}
    for node in graph.nodes:
        if node.op != "attention":
            continue
        owner, metadata = owner_of(node), node.arguments[3]
        if not isinstance(owner, TritonAttention) or not isinstance(metadata, StepMetadata):
            return None
        groups[metadata.group] = Group(owner, node.arguments[2])
    return groups


@dataclass(slots=True)
class Recording:
    """One size: `tables` int32 `[size, width]` and `lens` int32 `[size]` of each group, `out` the
    hidden states. `graph` is None until the size has run once: that compiles what it launches."""

    tables: list[Tensor]
    lens: list[Tensor]
    out: Tensor | None = None
    graph: Graph | None = None


class Step:
    """The compiled step; see `StepFn`."""

    def __init__(self, graph: StepGraph, groups: dict[int, Group], device: Device) -> None:
        self._graph = graph
        self._nodes = fused(graph)
        self._groups = [groups[index] for index in sorted(groups)]
        self._device = device
        self._inputs = _inputs(graph)
        room = min(tensor.shape[-1] for tensor in self._inputs)  # tokens of the largest step
        self._sizes = (*(size for size in SIZES if size < room), min(room, SIZES[-1]))
        self._width = FIRST_WIDTH
        self._recordings: dict[int, Recording] = {}

    def __call__(self, metadata: Sequence[Metadata], num_tokens: int) -> Tensor:
        if num_tokens > self._sizes[-1] or any(one.sequences.max_queries != 1 for one in metadata):
            return self._run(metadata, num_tokens)
        return self._replay(metadata, num_tokens)

    def _run(self, metadata: Sequence[Any], num_tokens: int) -> Tensor:
        return StepRun(self._graph, self._nodes, metadata, num_tokens).result()

    def _replay(self, metadata: Sequence[Metadata], num_tokens: int) -> Tensor:
        size = self._sizes[bisect.bisect_left(self._sizes, num_tokens)]
        recording = self._recording(size, max(m.sequences.block_tables.shape[1] for m in metadata))
        self._load(recording, metadata, num_tokens, size)
        if recording.graph is not None:
            recording.graph.replay()
        elif recording.out is None:
            recording.out = self._run(self._planned(recording), size).clone()
        else:
            self._record(recording, size)
        assert recording.out is not None
        return recording.out[:num_tokens]

    def _recording(self, size: int, width: int) -> Recording:
        """That of `size`, with room for `width` blocks a sequence."""
        if width > self._width:
            self._recordings.clear()  # their tables have fixed addresses, and are too narrow
            while self._width < width:
                self._width *= 2
        if size not in self._recordings:
            device = self._device.torch_device
            shapes = [(size, self._width), (size,)]
            tables, lens = (
                [torch.zeros(shape, dtype=torch.int32, device=device) for _ in self._groups]
                for shape in shapes
            )
            self._recordings[size] = Recording(tables, lens)
        return self._recordings[size]

    def _load(
        self, recording: Recording, metadata: Sequence[Metadata], num_tokens: int, size: int
    ) -> None:
        """What the recording reads. Padding is sequences of one token in the scratch block."""
        for tables, lens, one in zip(recording.tables, recording.lens, metadata, strict=True):
            given = one.sequences
            tables[:num_tokens, : given.block_tables.shape[1]].copy_(given.block_tables)
            lens[:num_tokens].copy_(given.seq_lens)
            if num_tokens < size:
                tables[num_tokens:, :1].zero_()
                lens[num_tokens:].fill_(1)
        if num_tokens < size:
            for tensor in self._inputs:
                tensor[..., num_tokens:size].zero_()

    def _planned(self, recording: Recording) -> list[Metadata]:
        """The plans of a recording's own sequences: no length is known to the host but the
        longest that its tables can hold."""
        found = []
        for group, tables, lens in zip(self._groups, recording.tables, recording.lens, strict=True):
            size, width = tables.shape
            starts = torch.arange(size + 1, dtype=torch.int32, device=tables.device)
            longest = width * group.spec.block_size
            sequences = Sequences(tables, starts, lens, 1, longest)
            found.append(group.impl.plan_on_device(group.spec, sequences))
        return found

    def _record(self, recording: Recording, size: int) -> None:
        out = recording.out
        assert out is not None

        def work() -> None:
            out.copy_(self._run(self._planned(recording), size))

        recording.graph = self._device.capture(work)
        if recording.graph is None:
            work()
        else:
            recording.graph.replay()  # capturing computes nothing


def _inputs(graph: StepGraph) -> list[Tensor]:
    """The step buffers that the graph reads, each once."""
    found: dict[int, Tensor] = {}
    for node in graph.nodes:
        for argument in node.arguments:
            if isinstance(argument, StepInput):
                found[argument.tensor.data_ptr()] = argument.tensor
    return list(found.values())
