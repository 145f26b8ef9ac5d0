"""Steps in which every row decodes, replayed from recordings.

Where a device records work (`Capabilities.graph_replay`), a step in which every row has one token
and nothing is asked but the next one is one small copy to the device and one replay: gathering the
batch, planning attention, the forward, logits, the choice of tokens and their way into the token
table are all in the recording. It reads fixed addresses only, and nothing in it was decided by
values: lengths, rows and settings come with the copy. Every other step takes the plain way.

A size runs as it is the first time, which compiles what it launches, is recorded the second time,
and replayed from then on.
"""

from __future__ import annotations

import bisect
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...platforms.interface import Device, DeviceLost, Graph
from ..config import SchedulerConfig
from ..models.step import StepBuffers, StepGroup
from ..ops import OpBinder
from ..plan import StepOutput
from .batch import StepRows, load_decoding
from .heads import TokenHead
from .rows import RowChanges, RowTable, Work, flat_places

logger = logging.getLogger("trimaran.runner")

SIZES = (1, 2, 4, *range(8, 257, 8), *range(288, 513, 32))
"""Numbers of rows that steps are recorded for: steps of more are computed, not launched, most of
their time."""
FIRST_REACH = 2048
"""Tokens a sequence may have at first, in a recording; doubled where one has more."""


class Fields(NamedTuple):
    """What is copied to the device, views of int64 `[fields, size]`: each row, and where its token
    stands; for each group entries of its block table, places and values, `[groups, 2, size]`; and
    how rows draw, as the sampler's `settings` have it."""

    rows: Any
    positions: Any
    blocks: Any
    ints: Any
    floats: Any

    @classmethod
    def of(cls, packed: Any, groups: int, float32: Any) -> Fields:
        """Of a tensor or an array; `float32`: its type of that name. Recordings of greedy rows
        have no settings."""
        size, end = packed.shape[1], 2 + 2 * groups
        floats = packed[end + 4 :].view(float32).reshape(-1, size)[:3]
        blocks = packed[2:end].reshape(groups, 2, size)
        return cls(packed[0], packed[1], blocks, packed[end : end + 4], floats)


class Scope(NamedTuple):
    """Which steps are recorded: numbers of rows, and may rows draw at random?"""

    sizes: tuple[int, ...]
    draws: bool


def recording_scope(
    binder: OpBinder, buffers: StepBuffers, scheduler: SchedulerConfig, ranks: int
) -> Scope | None:
    """What of this model's steps the device records. None: nothing; where it could, the log says
    why not."""
    if not binder.platform.capabilities(binder.device.index).graph_replay:
        return None
    reading = {binding.op for binding in binder.report() if not binding.recordable}
    if reason := _refusal(binder.device, buffers, reading - {"draw"}, ranks):
        logger.warning("steps are not recorded: %s", reason)
        return None
    if "draw" in reading:
        logger.warning("steps that draw at random are not recorded: draw reads values on the host")
    scope = Scope(_sizes(scheduler), "draw" not in reading)
    logger.info("steps of up to %d rows that decode are recorded", scope.sizes[-1])
    return scope


def _refusal(device: Device, buffers: StepBuffers, reading: set[str], ranks: int) -> str:
    if ranks > 1:
        return "a recording cannot hold a group's collectives"
    if reading:
        return f"{', '.join(sorted(reading))} reads values on the host"
    for group in buffers.groups:
        if not _plans_on_device(device, group):
            return f"the attention {group.impl.name!r} is planned on the host"
    return ""


def _plans_on_device(device: Device, group: StepGroup) -> bool:
    tables = device.to_device(torch.zeros(1, 1, dtype=torch.int32))
    seq_lens = device.to_device(torch.ones(1, dtype=torch.int32))
    found: list[Any] = []
    device.launch(
        lambda: found.append(group.impl.plan_recorded(group.spec, tables, seq_lens))
    ).wait()
    return found[0] is not None


def _sizes(scheduler: SchedulerConfig) -> tuple[int, ...]:
    """The platform's token buckets, if it has any; no more rows than a step can have."""
    most = min(scheduler.max_num_seqs, scheduler.step_tokens)
    buckets = scheduler.token_buckets
    if buckets:
        return buckets[: bisect.bisect_left(buckets, most) + 1]
    return (*(size for size in SIZES if size < most), min(most, SIZES[-1]))


class Shape(NamedTuple):
    """What is baked into a recording: rows, tokens of the longest sequence, does any row draw."""

    size: int
    reach: int
    drawing: bool

    def fields(self, groups: int) -> int:
        return 2 + 2 * groups + (6 if self.drawing else 0)  # three of fp32 take two


class Recording:
    """A step of one shape. `staged` int64 `[fields, size]` is what it reads, `found` int64 `[size]`
    what it yields: each row's token, -1 where it failed."""

    def __init__(self, device: Device, shape: Shape, groups: int) -> None:
        self.shape = shape
        self.staged = device.alloc((shape.fields(groups), shape.size), torch.int64, tag="step")
        self.found = device.alloc((shape.size,), torch.int64, tag="step")
        self._device = device
        self._has_run = False
        self._refused = False
        self._graph: Graph | None = None

    def run(self, work: Work) -> None:
        """Inside a launch, `staged` being filled: do `work`, which makes `found` of it."""
        if self._has_run and not self._refused and self._graph is None:
            self._record(work)
        if self._graph is not None:
            self._graph.replay()
        else:
            work()
            self._has_run = True

    def _record(self, work: Work) -> None:
        """Recording computes nothing. What cannot be recorded runs as it is from now on."""
        reason = "the device recorded nothing"
        try:
            self._graph = self._device.capture(work)
        except DeviceLost:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if self._graph is None:
            self._refused = True
            logger.warning("steps of %d rows are not recorded: %s", self.shape.size, reason)


class RecordedSteps:
    """The recordings of one runner, made where they are first needed."""

    def __init__(
        self,
        device: Device,
        table: RowTable,
        buffers: StepBuffers,
        head: TokenHead,
        logits: Callable[[], Tensor],
        scope: Scope,
    ) -> None:
        """`logits`: the forward of the step in the buffers, and its head."""
        self._device = device
        self._table = table
        self._buffers = buffers
        self._head = head
        self._logits = logits
        self._sizes, self._draws = scope
        self._reach = FIRST_REACH
        self._recordings: dict[Shape, Recording] = {}

    def stage(self, step: StepRows, changes: RowChanges) -> RecordedStep | None:
        """The step out of a recording, `changes` with it; None: it takes the plain way."""
        shape = self._shape_of(step, changes)
        if shape is None:
            return None
        recording = self._recordings.get(shape)
        if recording is None:
            groups = len(self._table.blocks)
            recording = self._recordings[shape] = Recording(self._device, shape, groups)
        packed = self._device.to_device(torch.from_numpy(self._pack(step, changes, shape)))
        work = functools.partial(self._compute, recording)
        return RecordedStep(self._device, recording, packed, work, len(step.rows))

    def _shape_of(self, step: StepRows, changes: RowChanges) -> Shape | None:
        """None where no recording can serve the step."""
        count, longest = len(step.rows), int(step.positions.max())
        if count > self._sizes[-1] or longest >= self._table.tokens.shape[1]:
            return None
        size = self._sizes[bisect.bisect_left(self._sizes, count)]
        if not (_fit(changes, size) and self._head.only_tokens(step)):
            return None
        drawing = self._head.sampler.draws(step.rows)
        if drawing and not self._draws:
            return None
        self._reach_to(longest)
        return Shape(size, self._reach, drawing)

    def _reach_to(self, longest: int) -> None:
        if longest > self._reach:
            self._recordings.clear()  # the block tables in them are too narrow
            while self._reach < longest:
                self._reach *= 2

    def _pack(self, step: StepRows, changes: RowChanges, shape: Shape) -> np.ndarray:
        """int64 `[fields, size]`. Padding is greedy rows of one token in the scratch block, and
        zeros written into the scratch row."""
        count, groups, scratch = len(step.rows), len(changes.blocks), self._table.scratch
        packed = np.zeros((shape.fields(groups), shape.size), dtype=np.int64)
        fields = Fields.of(packed, groups, np.float32)
        fields.rows[:] = scratch
        fields.rows[:count] = step.rows
        fields.positions[:count] = step.starts
        for part, table, change in zip(
            fields.blocks, self._table.blocks, changes.blocks, strict=True
        ):
            part[0] = scratch * table.shape[1]
            if change is not None:
                part[:, : len(change.places)] = change.places, change.values
        if shape.drawing:
            floats, ints = self._head.sampler.settings(step.rows)
            fields.ints[:, :count] = ints
            fields.floats[:, :count] = floats
        return packed

    def _compute(self, recording: Recording) -> None:
        """The whole step, as it is recorded."""
        table, shape = self._table, recording.shape
        rows, positions, blocks, ints, floats = Fields.of(
            recording.staged, len(table.blocks), torch.float32
        )
        for part, target in zip(blocks, table.blocks, strict=True):
            target.view(-1).index_copy_(0, part[0], part[1].int())
        load_decoding(table, self._buffers, rows, positions, shape.reach)
        drawn = (floats, torch.cat((ints, (positions + 1).unsqueeze(0)))) if shape.drawing else None
        token_ids, failed = self._head.sampler.choose(self._logits(), drawn)
        places = flat_places(table.tokens, rows, positions + 1)
        written = token_ids.masked_fill(rows == table.scratch, 0)  # that row stays zero
        table.tokens.view(-1).index_copy_(0, places, written.int())
        recording.found.copy_(token_ids.masked_fill_(failed, -1))


def _fit(changes: RowChanges, size: int) -> bool:
    """Are they few entries of block tables, and nothing else?"""
    few = all(change is None or len(change.places) <= size for change in changes.blocks)
    return few and changes.tokens is None


class RecordedStep:
    """One step out of a recording. `packed`: what `recording.staged` is to hold, on the device."""

    def __init__(
        self, device: Device, recording: Recording, packed: Tensor, work: Work, count: int
    ) -> None:
        self._device = device
        self._recording = recording
        self._packed = packed
        self._work = work
        self._count = count
        self._found: Tensor | None = None

    def run(self) -> None:
        """Inside the launch, after the rows' changes."""
        self._recording.staged.copy_(self._packed)
        self._recording.run(self._work)
        self._found = self._device.to_host(self._recording.found)

    def collect(self, output: StepOutput) -> None:
        """On the host, after the launch's event."""
        assert self._found is not None
        tokens = self._found.tolist()[: self._count]
        output.tokens = [[token] if token >= 0 else [] for token in tokens]
        output.failed += [index for index, token in enumerate(tokens) if token < 0]
