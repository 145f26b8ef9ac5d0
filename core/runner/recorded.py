"""Steps in which every row decodes, replayed from recordings.

Where a device records work (`Capabilities.graph_replay`), a step in which every row has one token
and nothing is asked but the next one is one small copy to the device and one replay: gathering the
batch, planning attention, the forward, logits, the choice of tokens and their way into the token
table are all in the recording. It reads fixed addresses only, and nothing in it was decided by
values: lengths, rows and settings come with the copy. Every other step takes the plain way.

A size runs as it is the first time, which compiles what it launches, is recorded the second time,
and replayed from then on. The likeliest ones are run and recorded at start, the largest before all
others: recordings share memory, and what it leaves free serves the smaller ones, so that all
together take little more than it alone (`planning.memory.recording_bytes`).
"""

from __future__ import annotations

import bisect
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

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
PREPARED = 8
"""Recordings made at start, at most: each costs a step, and its recording."""
FIRST_REACH = 2048
"""Tokens a sequence may have at first, in a recording; doubled where one has more."""


Array = TypeVar("Array", np.ndarray, Tensor)


@dataclass(frozen=True, slots=True)
class Fields(Generic[Array]):
    """What is copied to the device, as views of `packed`, int64 `[fields, size]`."""

    rows: Array
    """int64 `[size]`: each one's row; the scratch row where it is padding."""
    positions: Array
    """int64 `[size]`: where its token stands."""
    blocks: Array
    """int64 `[groups, 2, size]`: of each group new entries of the block table, places (it is seen
    flat) and values."""
    ints: Array
    """int64 `[4, size]`, as `Sampler.settings` has them; `[0, size]` where all are greedy."""
    floats: Array
    """fp32 `[3, size]`, as `Sampler.settings` has them; `[0, size]` where all are greedy."""

    @classmethod
    def of(cls, packed: Array, groups: int, float32: Any) -> Fields[Array]:
        """`float32`: numpy's or torch's type of that name."""
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
    sizes = recorded_sizes(scheduler.max_num_seqs, scheduler.step_tokens, scheduler.token_buckets)
    scope = Scope(sizes, "draw" not in reading)
    logger.info("steps of up to %d rows that decode are recorded", scope.sizes[-1])
    return scope


def _refusal(device: Device, buffers: StepBuffers, reading: set[str], ranks: int) -> str:
    if ranks > 1:
        return "a recording cannot hold a group's collectives"
    if reading:
        return f"{', '.join(sorted(reading))} reads values on the host"
    for group in buffers.groups:
        if reason := _planned_on_host(device, group):
            return f"the attention {group.impl.name!r} {reason}"
    return ""


def _planned_on_host(device: Device, group: StepGroup) -> str:
    """Empty: it plans on the device."""
    tables = device.to_device(torch.zeros(1, 1, dtype=torch.int32))
    seq_lens = device.to_device(torch.ones(1, dtype=torch.int32))
    found: list[Any] = []
    try:
        device.launch(
            lambda: found.append(group.impl.plan_recorded(group.spec, tables, seq_lens))
        ).wait()
    except DeviceLost:
        raise
    except Exception as error:  # an implementation's; the plain way plans otherwise
        return f"fails to plan on the device: {type(error).__name__}: {error}"
    return "is planned on the host" if found[0] is None else ""


def recorded_sizes(
    num_seqs: int, step_tokens: int, buckets: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """Numbers of rows that steps are recorded for, rising: the platform's token `buckets`, if it
    has any; no more rows than a step can have."""
    most = min(num_seqs, step_tokens)
    if buckets:
        return buckets[: bisect.bisect_left(buckets, most) + 1]
    return (*(size for size in SIZES if size < most), min(most, SIZES[-1]))


class Shape(NamedTuple):
    """What is baked into a recording: rows, tokens of the longest sequence, does any row draw."""

    size: int
    reach: int
    drawing: bool

    def __str__(self) -> str:
        return f"steps of {self.size} rows{' that draw' if self.drawing else ''}"

    def fields(self, groups: int) -> int:
        return 2 + 2 * groups + (6 if self.drawing else 0)  # three of fp32 take two


class Recording:
    """A step of one shape. `staged` int64 `[fields, size]` is what it reads, `found` int64 `[size]`
    what it yields: each row's token, -1 where it failed."""

    def __init__(self, device: Device, shape: Shape, groups: int) -> None:
        self.shape = shape
        self.staged = device.alloc((shape.fields(groups), shape.size), torch.int64, tag="graphs")
        self.found = device.alloc((shape.size,), torch.int64, tag="graphs")
        self._device = device
        self._has_run = False
        self._refused = False
        self._graph: Graph | None = None

    def prepare(self, work: Work) -> bool:
        """Inside a launch, `staged` being filled: do `work` and record it. False where that cannot
        be recorded."""
        work()
        self._has_run = True
        self._record(work)
        return not self._refused

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
            logger.warning("%s are not recorded: %s", self.shape, reason)


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
        self._ended = False
        self._recordings: dict[Shape, Recording] = {}

    def stage(self, step: StepRows, changes: RowChanges) -> RecordedStep | None:
        """The step out of a recording, `changes` with it; None: it takes the plain way."""
        shape = self._shape_of(step, changes)
        if shape is None:
            return None
        recording = self._recording(shape)
        packed = self._device.to_device(torch.from_numpy(self._pack(step, changes, shape)))
        work = functools.partial(self._compute, recording)
        return RecordedStep(self._device, recording, packed, work, len(step.rows))

    def prepare(self, smaller: bool = True) -> None:
        """Run and record the largest steps and, if `smaller`, the likeliest of the others, with
        padding alone, and wait for it; no more of them once one cannot be recorded. Raises what
        running them raised."""
        for shape in self._likely():
            if (smaller or shape.size == self._sizes[-1]) and not self._prepare(shape):
                return

    def _likely(self) -> list[Shape]:
        """PREPARED at most: the largest, then the smallest powers of two, falling."""
        kinds = (True, False) if self._draws else (False,)
        powers = [size for size in self._sizes[:-1] if size.bit_count() == 1]
        sizes = [self._sizes[-1], *reversed(powers[: max(0, PREPARED // len(kinds) - 1)])]
        return [Shape(size, self._reach, kind) for size in sizes for kind in kinds][:PREPARED]

    def _prepare(self, shape: Shape) -> bool:
        recording = self._recording(shape)
        packed = self._device.to_device(torch.from_numpy(self._padding(shape)[0]))
        recorded: list[bool] = []

        def launched() -> None:
            recording.staged.copy_(packed)
            recorded.append(recording.prepare(functools.partial(self._compute, recording)))

        self._device.launch(launched).wait()
        return recorded[0]

    def _recording(self, shape: Shape) -> Recording:
        if shape not in self._recordings:
            groups = len(self._table.blocks)
            self._recordings[shape] = Recording(self._device, shape, groups)
        return self._recordings[shape]

    def _shape_of(self, step: StepRows, changes: RowChanges) -> Shape | None:
        """None where no recording can serve the step."""
        count, longest = len(step.rows), int(step.positions.max())
        if self._ended or count > self._sizes[-1] or longest >= self._table.tokens.shape[1]:
            return None
        size = self._sizes[bisect.bisect_left(self._sizes, count)]
        if not (_fit(changes, size) and self._head.only_tokens(step)):
            return None
        drawing = self._head.sampler.draws(step.rows)
        if drawing and not self._draws:
            return None
        return Shape(size, self._reach, drawing) if self._reach_to(longest) else None

    def _reach_to(self, longest: int) -> bool:
        """False: wider steps do not run, and none is recorded from now on."""
        if longest > self._reach:
            self._recordings.clear()  # the block tables in them are too narrow
            while self._reach < longest:
                self._reach *= 2
            try:
                self.prepare(smaller=False)  # requests wait meanwhile
            except DeviceLost:
                raise
            except Exception as error:
                logger.warning("no more steps are recorded: %s: %s", type(error).__name__, error)
                self._ended = True
        return not self._ended

    def _padding(self, shape: Shape) -> tuple[np.ndarray, Fields[np.ndarray]]:
        """int64 `[fields, size]`, and its views: greedy rows of one token in the scratch block, and
        zeros written into the scratch row."""
        groups, scratch = len(self._table.blocks), self._table.scratch
        packed = np.zeros((shape.fields(groups), shape.size), dtype=np.int64)
        fields = Fields.of(packed, groups, np.float32)
        fields.rows[:] = scratch
        for part, table in zip(fields.blocks, self._table.blocks, strict=True):
            part[0] = scratch * table.shape[1]
        return packed, fields

    def _pack(self, step: StepRows, changes: RowChanges, shape: Shape) -> np.ndarray:
        """int64 `[fields, size]`, the step's rows before padding."""
        packed, fields = self._padding(shape)
        count = len(step.rows)
        fields.rows[:count] = step.rows
        fields.positions[:count] = step.starts
        for part, change in zip(fields.blocks, changes.blocks, strict=True):
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
        fields = Fields.of(recording.staged, len(table.blocks), torch.float32)
        rows, positions = fields.rows, fields.positions
        for part, target in zip(fields.blocks, table.blocks, strict=True):
            target.view(-1).index_copy_(0, part[0], part[1].int())
        load_decoding(table, self._buffers, rows, positions, shape.reach)
        drawn = None
        if shape.drawing:
            ints = torch.cat((fields.ints, (positions + 1).unsqueeze(0)))
            drawn = fields.floats, ints
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
