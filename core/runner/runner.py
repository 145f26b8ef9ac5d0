"""The runner: executes step plans on one device.

Everything that touches device state happens inside one launch a step, in the plan's order: row
changes, scrubs, copies, forward, heads. What the launch needs of the plan was copied to the device
or captured before `submit` returns, so the host may plan the next step meanwhile.
"""

from __future__ import annotations

import bisect
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...platforms.interface import (
    Device,
    DeviceLost,
    DeviceOutOfMemory,
    Event,
    KVRegion,
    Platform,
    StepFn,
)
from ..config import CacheConfig, ModelSpec, SchedulerConfig
from ..errors import DeviceLostError
from ..models.decoder import Decoder
from ..models.spec import DecoderSpec
from ..models.step import StepBuffers
from ..ops import OpBinder
from ..plan import BlockCopy, BlockRef, StepOutput, StepPlan
from ..sampler.sampler import Sampler
from ..sizing import check_alignment
from .batch import StagedBatch, StepRows
from .heads import BeamHead, OutputHead, PromptLogprobsHead, StagedHead, TokenHead, Yield
from .recorded import RecordedSteps, Scope
from .rows import RowTable, Work

logger = logging.getLogger("trimaran.runner")

StepOf = Callable[[int], StepFn | None]
"""The compiled step for a number of tokens; None: it runs op by op."""


def op_by_op(num_tokens: int) -> StepFn | None:
    """No step is compiled."""
    return None


def forward(decoder: Decoder, buffers: StepBuffers, compiled: StepOf) -> Tensor:
    """The hidden states of the step in the buffers, `[tokens, hidden]`."""
    step = compiled(buffers.num_tokens)
    if step is None:
        return decoder.forward()
    return step([group.metadata for group in buffers.groups], buffers.num_tokens)


def compute_logits(decoder: Decoder, buffers: StepBuffers, compiled: StepOf) -> Tensor:
    """fp32 `[tokens, vocab]`, of every token."""
    return decoder.logits(forward(decoder, buffers, compiled))


def bind_ends(
    binder: OpBinder, spec: DecoderSpec, dtype: torch.dtype
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The ops after the decoder: picking the rows that yield a token, greedy sampling, and drawing
    at random."""
    gather = binder.bind("gather_rows", dtype, size=spec.hidden_size)
    argmax, draw = (
        binder.bind(op, torch.float32, vocab=spec.vocab_size) for op in ("sample", "draw")
    )
    return gather, argmax, draw


class Runner:
    """Owns the rows, the KV cache and the heads of one rank of one model."""

    def __init__(
        self,
        *,
        device: Device,
        decoder: Decoder,
        buffers: StepBuffers,
        binder: OpBinder,
        cache: CacheConfig,
        scheduler: SchedulerConfig,
        model: ModelSpec,
    ) -> None:
        vocab = decoder.spec.vocab_size
        num_rows = scheduler.max_num_seqs
        sizes = [group.block_size for group in cache.groups]
        self._device = device
        self._decoder = decoder
        self._buffers = buffers
        self._buckets = scheduler.token_buckets
        self.compiled: StepOf = op_by_op
        self._recorded: RecordedSteps | None = None
        self._rows = RowTable(device, num_rows, scheduler.max_model_len, sizes)
        self._regions = self._alloc_kv(cache, binder.platform)
        self._gather, argmax, draw = bind_ends(binder, decoder.spec, model.dtype)
        tokens, mode = self._rows.tokens, model.logprobs_mode
        sampler = Sampler(device, tokens, vocab, logprobs_mode=mode, argmax=argmax, draw=draw)
        self._tokens = TokenHead(device, tokens, sampler)
        self._heads: tuple[OutputHead, ...] = (
            PromptLogprobsHead(device, tokens, vocab),
            self._tokens,
            BeamHead(device, num_rows, vocab),
        )

    def _alloc_kv(self, cache: CacheConfig, platform: Platform) -> list[list[KVRegion]]:
        """Allocate the caches of this rank's layers; returns each group's regions."""
        layer_kvs = {}
        regions: list[list[KVRegion]] = []
        mine = range(*self._decoder.layer_range)
        for group, config in zip(self._buffers.groups, cache.groups, strict=True):
            layers = [layer for layer in group.layers if layer in mine]
            for layer in layers:
                kv = group.impl.alloc(self._device, group.spec, config.num_blocks)
                check_alignment(platform, group.impl.name, group.spec, kv)
                layer_kvs[layer] = kv
            regions.append([region for layer in layers for region in layer_kvs[layer].regions])
        self._decoder.bind_kv(layer_kvs)
        return regions

    def submit(self, plan: StepPlan) -> RunnerStep:
        """Put a step on the device's queue. Plans are run in the order they are submitted."""
        works, yields = self._stage(plan)
        step = RunnerStep(plan.step_id, len(plan.rows), yields)

        def work() -> None:
            try:
                for part in works:
                    part()
            except Exception as error:  # the step's requests end with it; the engine lives on
                step.fail(error)

        step.event = self._device.launch(work)
        return step

    def record(self, scope: Scope) -> None:
        """From now on steps in which all decode are replayed, see `RecordedSteps`; as they are
        compiled now. The likeliest are recorded here; where these do not even run, none is, and
        the log says why. Raises DeviceLost, DeviceOutOfMemory."""
        logits = functools.partial(compute_logits, self._decoder, self._buffers, self.compiled)
        recorded = RecordedSteps(
            self._device, self._rows, self._buffers, self._tokens, logits, scope
        )
        try:
            recorded.prepare()
        except (DeviceLost, DeviceOutOfMemory):
            raise
        except Exception as error:
            logger.warning("steps are not recorded: %s: %s", type(error).__name__, error)
            return
        self._recorded = recorded

    def run_scratch(self, num_tokens: int, work: Work) -> None:
        """Run `work` on the device with a step of `num_tokens` in the buffers, all of them
        padding, and wait for it. Raises what it raised."""
        padding = StepRows.of(StepPlan(-1)).padded(num_tokens, self._rows.scratch)
        batch = StagedBatch.stage(self._device, padding, self._rows)

        def launched() -> None:
            batch.load(self._rows, self._buffers)
            work()

        self._device.launch(launched).wait()

    def _stage(self, plan: StepPlan) -> tuple[list[Work], Sequence[Yield]]:
        """The device's work of a plan, in order, and what it yields."""
        changes = self._rows.stage(plan)
        others = self._stage_others(plan)
        if not plan.rows:
            return [*changes.stage(self._device), *others], ()
        step = StepRows.of(plan)
        if self._recorded is not None:
            recorded = self._recorded.stage(step, changes)
            if recorded is not None:
                return [*others, recorded.run], (recorded,)
        batch = self._stage_batch(step)
        staged = [head.stage(step) for head in self._heads]
        heads = [head for head in staged if head is not None]
        forward = functools.partial(self._forward, batch, heads)
        return [*changes.stage(self._device), *others, forward], heads

    def _stage_batch(self, step: StepRows) -> StagedBatch:
        """Padded to the platform's next token bucket."""
        num_tokens = int(step.counts.sum())
        if self._buckets:
            num_tokens = self._buckets[bisect.bisect_left(self._buckets, num_tokens)]
        padded = step.padded(num_tokens, self._rows.scratch)
        return StagedBatch.stage(self._device, padded, self._rows)

    def _stage_others(self, plan: StepPlan) -> list[Work]:
        """The plan's deltas but those of the row table: the host's half, and the works that are
        the device's."""
        for row in plan.removed:
            for head in self._heads:
                head.remove(row)
        works: list[Work] = []
        for new in plan.added:
            for head in self._heads:
                works += head.add(new)
        if plan.scrubs:
            works.append(self._scrub(plan.scrubs))
        if plan.copies:
            works.append(self._copy(plan.copies))
        return works

    def _scrub(self, scrubs: Sequence[BlockRef]) -> Work:
        """Zero blocks, so that whoever gets them next meets no stale NaN."""
        blocks: dict[int, list[int]] = {}
        for ref in scrubs:
            blocks.setdefault(ref.group, []).append(ref.block)
        staged = [
            (self._regions[group], self._device.to_device(torch.tensor(ids)))
            for group, ids in blocks.items()
        ]

        def work() -> None:
            for regions, ids in staged:
                for region in regions:
                    region.tensor.index_fill_(0, ids, 0)

        return work

    def _copy(self, copies: Sequence[BlockCopy]) -> Work:
        pairs: dict[int, list[tuple[int, int]]] = {}
        for copy in copies:
            pairs.setdefault(copy.group, []).append((copy.source, copy.target))

        def work() -> None:
            for group, moved in pairs.items():
                self._device.move_blocks(self._regions[group], moved)

        return work

    def _forward(self, batch: StagedBatch, heads: Sequence[StagedHead]) -> None:
        batch.load(self._rows, self._buffers)
        hidden = forward(self._decoder, self._buffers, self.compiled)

        def logits_of(indices: Tensor) -> Tensor:
            whole = len(indices) == len(hidden)  # they rise strictly: then they are all rows
            return self._decoder.logits(hidden if whole else self._gather(hidden, indices))

        for head in heads:
            head.run(logits_of)


class RunnerStep:
    """A submitted step; `result` may be read once."""

    def __init__(self, step_id: int, num_rows: int, yields: Sequence[Yield]) -> None:
        self.event: Event | None = None
        self._step_id = step_id
        self._num_rows = num_rows
        self._yields = yields
        self._error: str | None = None
        self._lost = False

    def fail(self, error: Exception) -> None:
        """Keep the message only: the traceback's frames would hold the step's tensors."""
        logger.error("step %d failed", self._step_id, exc_info=error)
        self._error = f"{type(error).__name__}: {error}"
        self._lost = self._lost or isinstance(error, DeviceLost)

    def done(self) -> bool:
        return self.event is not None and self.event.done()

    def result(self) -> StepOutput:
        """Wait for the step. An error becomes the output's `error`, never an exception; only a lost
        device is one, `DeviceLostError`, because no other step can follow."""
        assert self.event is not None
        try:
            self.event.wait()
        except Exception as error:
            self.fail(error)
        if self._lost:
            raise DeviceLostError(f"the device is lost: {self._error}")
        output = StepOutput(self._step_id, [[] for _ in range(self._num_rows)])
        if self._error is not None:
            output.error = self._error
            return output
        for one in self._yields:
            one.collect(output)
        return output
