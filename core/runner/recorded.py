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
from .rows import RowTable, Work, flat_places

logger = logging.getLogger("trimaran.runner")

SIZES = (1, 2, 4, *range(8, 257, 8), *range(288, 513, 32))
"""Numbers of rows that steps are recorded for: steps of more are computed, not launched, most of
their time."""
FIRST_REACH = 2048
"""Tokens a sequence may have at first, in a recording; doubled where one has more."""

GREEDY_FIELDS = 2
DRAWING_FIELDS = 8
"""int64 a row that are copied to the device: row and position; for rows that draw also top_k, the
seed's halves and the child index, and in the last two temperature, top_p and min_p in fp32."""


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

    @property
    def fields(self) -> int:
        return DRAWING_FIELDS if self.drawing else GREEDY_FIELDS


class Recording:
    """A step of one shape. `staged` int64 `[fields, size]` is what it reads, `found` int64 `[size]`
    what it yields: each row's token, -1 where it failed."""

    def __init__(self, device: Device, shape: Shape) -> None:
        self.shape = shape
        self.staged = device.alloc((shape.fields, shape.size), torch.int64, tag="step")
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

    def stage(self, step: StepRows) -> RecordedStep | None:
        """The step out of a recording; None: it takes the plain way."""
        count = len(step.rows)
        if count > self._sizes[-1] or not self._head.only_tokens(step):
            return None
        longest = int(step.positions.max())
        drawing = self._head.sampler.draws(step.rows)
        if longest >= self._table.tokens.shape[1] or (drawing and not self._draws):
            return None
        self._reach_to(longest)
        size = self._sizes[bisect.bisect_left(self._sizes, count)]
        shape = Shape(size, self._reach, drawing)
        recording = self._recordings.get(shape)
        if recording is None:
            recording = self._recordings[shape] = Recording(self._device, shape)
        packed = self._device.to_device(torch.from_numpy(self._pack(step, shape)))
        work = functools.partial(self._compute, recording)
        return RecordedStep(self._device, recording, packed, work, count)

    def _reach_to(self, longest: int) -> None:
        if longest > self._reach:
            self._recordings.clear()  # the block tables in them are too narrow
            while self._reach < longest:
                self._reach *= 2

    def _pack(self, step: StepRows, shape: Shape) -> np.ndarray:
        """int64 `[fields, size]`; padding is greedy rows of one token in the scratch block."""
        count = len(step.rows)
        packed = np.zeros((shape.fields, shape.size), dtype=np.int64)
        packed[0] = self._table.scratch
        packed[0, :count] = step.rows
        packed[1, :count] = step.starts
        if shape.drawing:
            floats, ints = self._head.sampler.settings(step.rows)
            packed[2:6, :count] = ints
            packed[6:].view(np.float32).reshape(4, -1)[:3, :count] = floats
        return packed

    def _compute(self, recording: Recording) -> None:
        """The whole step, as it is recorded."""
        shape, staged = recording.shape, recording.staged
        rows, positions = staged[0], staged[1]
        load_decoding(self._table, self._buffers, rows, positions, shape.reach)
        drawn = None
        if shape.drawing:
            floats = staged[6:].view(torch.float32).view(4, -1)[:3]
            drawn = floats, torch.cat((staged[2:6], (positions + 1).unsqueeze(0)))
        token_ids, failed = self._head.sampler.choose(self._logits(), drawn)
        places = flat_places(self._table.tokens, rows, positions + 1)
        written = token_ids.masked_fill(rows == self._table.scratch, 0)  # that row stays zero
        self._table.tokens.view(-1).index_copy_(0, places, written.int())
        recording.found.copy_(token_ids.masked_fill_(failed, -1))


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
