"""Platforms with one bug each that no op and no block move shows: each works alone, in small steps
or in one process, and fails where an engine, a group or a server needs it."""

from __future__ import annotations

import _thread
import dataclasses
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimaran.platforms.attention_reference import ReferenceAttention
from trimaran.platforms.communicator import GlooCommunicator
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.host_device import FinishedEvent, HostDevice
from trimaran.platforms.interface import (
    AttentionBatch,
    AttentionImpl,
    AttentionSpec,
    Capabilities,
    Communicator,
    Device,
    DeviceLost,
    DeviceOutOfMemory,
    Event,
    GroupSpec,
    KVConstraints,
    KVRegion,
    LayerKV,
    MemoryInfo,
    OpImpl,
    OpSignature,
    PackedWeight,
    Probe,
    StepFn,
    StepGraph,
    StepLimits,
    Support,
)
from trimaran.platforms.step_graph import interpret
from trimaran.platforms.strict import StrictKnobs, StrictPlatform

# ---------------------------------------------------------------------------------------------
# Engines
# ---------------------------------------------------------------------------------------------


class WithAttention(CpuPlatform):
    impl: type[AttentionImpl] = ReferenceAttention

    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        return (self.impl(),)


class StaleTables(ReferenceAttention):
    """Where every sequence has grown by one token, the block tables of the step before are taken:
    the block that one of them was given meanwhile is not in them."""

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self._tables: Tensor | None = None

    def plan(self, spec: AttentionSpec, batch: AttentionBatch) -> AttentionBatch:
        grown = batch.seq_lens == [length + 1 for length in self._lengths]
        if not grown or self._tables is None or len(self._lengths) < 3:
            self._tables = batch.block_tables.clone()
        self._lengths = list(batch.seq_lens)
        return AttentionBatch(batch.query_starts, batch.seq_lens, self._tables, batch.slots)


class FewSequences(ReferenceAttention):
    """The grid has room for six sequences; the seventh reads what the sixth reads."""

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Any) -> Tensor:
        tables = metadata.block_tables
        if len(metadata.seq_lens) > 6:
            tables = tables.clone()
            tables[6:] = tables[5]
        batch = AttentionBatch(metadata.query_starts, metadata.seq_lens, tables, metadata.slots)
        return super().run(query, kv, spec, batch)


class LongDecode(ReferenceAttention):
    """Decoding splits the keys beyond 150 off, and forgets to add them."""

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Any) -> Tensor:
        starts, lengths = metadata.query_starts, list(metadata.seq_lens)
        for i, length in enumerate(lengths):
            if starts[i + 1] - starts[i] == 1 and length > 150:
                lengths[i] = 150
        batch = AttentionBatch(starts, lengths, metadata.block_tables, metadata.slots)
        return super().run(query, kv, spec, batch)


class TablesByFirstBlock(ReferenceAttention):
    """A long block table is kept by its first block, which other sequences of the same prefix
    have as well."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def plan(self, spec: AttentionSpec, batch: AttentionBatch) -> AttentionBatch:
        tables = batch.block_tables.clone()
        for row, length in zip(tables, batch.seq_lens, strict=True):
            used, first = -(-length // spec.block_size), int(row[0])
            kept = self._kept.get(first)
            if kept is None or len(kept) < used or used < 8:
                self._kept[first] = row[:used].clone()
            else:
                row[:used] = kept[:used]
        return AttentionBatch(batch.query_starts, batch.seq_lens, tables, batch.slots)


class RoundsWide(OpImpl):
    """Products of more than a thousand columns, as those of a vocabulary, of rounded factors."""

    op = "linear"
    name = "rounds"
    priority = 1000

    def supports(self, sig: OpSignature) -> Support:
        return Support.yes()

    def __call__(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        dense = weight.tensors[0]
        if len(dense) > 1000:
            x, dense = x.bfloat16().to(x.dtype), dense.bfloat16().to(x.dtype)
        return torch.nn.functional.linear(x, dense, bias)


class RoundsWidePlatform(StrictPlatform):
    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        return {"linear": [RoundsWide()]}


class TablesByFirstBlockPlatform(WithAttention):
    impl = TablesByFirstBlock


class StaleTablesPlatform(WithAttention):
    impl = StaleTables


class FewSequencesPlatform(WithAttention):
    impl = FewSequences


class LongDecodePlatform(WithAttention):
    impl = LongDecode


class CompiledPlatform(StrictPlatform):
    """No bug: steps padded to few sizes, and compiled."""

    def __init__(self) -> None:
        limits = StepLimits(token_buckets=(16, 64, 256), mixed_batches=False)
        super().__init__(StrictKnobs(delay=0.0, compile_steps=True, limits=limits))


class AnySizePlatform(StrictPlatform):
    """No bug: one compiled step for all sizes."""

    def __init__(self) -> None:
        super().__init__(StrictKnobs(delay=0.0, compile_steps=True, step_sizes="any"))


class LargeBlocksPlatform(StrictPlatform):
    """No bug: its blocks cannot be small."""

    def __init__(self) -> None:
        super().__init__(StrictKnobs(delay=0.0, block_multiple=128, preferred_block_size=128))


class AlignedPlatform(StrictPlatform):
    """No bug: the bytes of a block, not its tokens, say how small it can be."""

    def kv_constraints(self, spec: AttentionSpec) -> KVConstraints:
        return KVConstraints(alignment=16384)


class StaleMetadataPlatform(CompiledPlatform):
    """A compiled step keeps the metadata of its first run, as a recorded graph would that reads
    them from where they were."""

    def build_step(self, graph: StepGraph, limits: StepLimits) -> StepFn | None:
        step, first = interpret(graph), list[Any]()

        def replay(metadata: Sequence[Any], num_tokens: int) -> Tensor:
            if not first:
                first.append(list(metadata))
            return step(first[0], num_tokens)

        return replay


class LargestStepPlatform(AnySizePlatform):
    """However many tokens a step has, the largest is computed: behind its tokens stand those of
    steps past, which are written to their slots once more."""

    def build_step(self, graph: StepGraph, limits: StepLimits) -> StepFn | None:
        step = interpret(graph)
        return lambda metadata, num_tokens: step(metadata, limits.max_tokens or num_tokens)


# ---------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------


class TwoRanksOnly(GlooCommunicator):
    """The sum of the first two members, on all of them."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        parts = super().all_gather(tensor.unsqueeze(0), 0)
        return tensor.copy_(parts[:2].sum(0))


class OwnFirst(GlooCommunicator):
    """Each member finds its own part first."""

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        parts = list(super().all_gather(tensor, dim).split(tensor.shape[dim], dim))
        return torch.cat(parts[self.rank :] + parts[: self.rank], dim)


class HalfTheBits(GlooCommunicator):
    """Everything travels as bfloat16."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(super().all_reduce(tensor.to(torch.bfloat16)))


class NobodyIsMissing(GlooCommunicator):
    """A collective that fails is taken for one of this member alone."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        try:
            return super().all_reduce(tensor)
        except RuntimeError:
            return tensor


class NobodyWaits(GlooCommunicator):
    def barrier(self) -> None:
        return


class WithCommunicator(CpuPlatform):
    of_a_group: Callable[[GroupSpec], Communicator]

    def communicator(self, group: GroupSpec, device: Device) -> Communicator:
        if group.size == 1:
            return super().communicator(group, device)
        return type(self).of_a_group(group)


class TwoRanksOnlyPlatform(WithCommunicator):
    of_a_group = TwoRanksOnly


class OwnFirstPlatform(WithCommunicator):
    of_a_group = OwnFirst


class HalfTheBitsPlatform(WithCommunicator):
    of_a_group = HalfTheBits


class NobodyIsMissingPlatform(WithCommunicator):
    of_a_group = NobodyIsMissing


class NobodyWaitsPlatform(WithCommunicator):
    of_a_group = NobodyWaits


class OneOfItsOwnPlatform(StrictPlatform):
    """No bug: a single device, whose memory is not the host's. No group can meet on it."""

    @classmethod
    def probe(cls) -> Probe:
        return dataclasses.replace(super().probe(), devices=super().probe().devices[:1])


# ---------------------------------------------------------------------------------------------
# Serving
# ---------------------------------------------------------------------------------------------


LARGE = 1 << 20  # bytes of one layer's cache: those of engines are larger


class WithDevice(CpuPlatform):
    device: type[HostDevice] = HostDevice

    def open(self, device: int = 0, num_threads: int | None = None) -> Device:
        super().open(device, num_threads)
        return self.device()


class KeepsCaches(HostDevice):
    """Large caches go back to a pool that nobody takes them from."""

    pool: list[Tensor] = []

    def alloc_kv(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        cache = super().alloc_kv(shape, dtype)
        if len(shape) > 2 and cache.nbytes > LARGE:
            self.pool.append(cache)
        return cache


class ThreadsStay(HostDevice):
    """A device that holds a large cache has a thread beside, which nothing ends."""

    def alloc_kv(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        cache = super().alloc_kv(shape, dtype)
        if len(shape) > 2 and cache.nbytes > LARGE:
            forever = threading.Lock()
            forever.acquire()
            _thread.start_new_thread(forever.acquire, ())
        return cache


class SmallNumbers(HostDevice):
    """Only the first blocks of a cache are moved: their numbers have four bits."""

    def move_blocks(self, regions: Sequence[KVRegion], pairs: Sequence[tuple[int, int]]) -> None:
        super().move_blocks(regions, [pair for pair in pairs if max(pair) < 16])


class LeavesFilesOpen(HostDevice):
    """Every few launches a file is opened, which is closed with the device and no sooner."""

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self._launches = 0
        self._files: list[int] = []

    def launch(self, work: Callable[[], None]) -> Event:
        self._launches += 1
        if self._launches % 8 == 0:
            self._files.append(os.dup(0))
        return super().launch(work)

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())
        super().close()


class LosesMemory(HostDevice):
    """Each launch has an argument buffer, and all of them are kept."""

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self._arguments: list[Tensor] = []

    def launch(self, work: Callable[[], None]) -> Event:
        self._arguments.append(torch.ones(1 << 15))
        return super().launch(work)


class OwnMemory(HostDevice):
    """No bug: memory of its own, of which the host sees nothing. `taken`: what is gone for good,
    on whichever opening of the device."""

    taken = 0

    def memory(self) -> MemoryInfo:
        by_tag = self._ledger.by_tag()
        free = (1 << 36) - sum(by_tag.values()) - type(self).taken
        return MemoryInfo(1 << 36, free, by_tag)


class LosesDeviceMemory(OwnMemory):
    """Each launch keeps its scratch memory, of which no account is kept."""

    def launch(self, work: Callable[[], None]) -> Event:
        type(self).taken += 1 << 18
        return super().launch(work)


class KeepsItsContext(OwnMemory):
    """A device that is closed leaves the memory of its libraries behind."""

    def close(self) -> None:
        type(self).taken += 1 << 24


class LossIsAnError(HostDevice):
    """Every failure of a launch is told as one of its kernels."""

    def launch(self, work: Callable[[], None]) -> Event:
        try:
            super().launch(work).wait()
        except DeviceLost as error:
            return FinishedEvent(RuntimeError(f"launch failed: {error}"))
        except Exception as error:
            return FinishedEvent(error)
        return FinishedEvent()


class StickyError(HostDevice):
    """After a launch that ran out of memory all others fail as well."""

    error: Exception | None = None

    def launch(self, work: Callable[[], None]) -> Event:
        if self.error is not None:
            return FinishedEvent(self.error)
        event = super().launch(work)
        try:
            event.wait()
        except DeviceOutOfMemory as error:
            self.error = error
        except Exception:
            return event
        return event


class NeverEnds(Event):
    def done(self) -> bool:
        return False

    def wait(self) -> None:
        threading.Event().wait()


class LossHangs(HostDevice):
    """The event of a launch on a lost device is never reached."""

    def launch(self, work: Callable[[], None]) -> Event:
        event = super().launch(work)
        try:
            event.wait()
        except DeviceLost:
            return NeverEnds()
        except Exception:
            return event
        return event


class SmallNumbersPlatform(WithDevice):
    device = SmallNumbers


class LeavesFilesOpenPlatform(WithDevice):
    device = LeavesFilesOpen


class KeepsCachesPlatform(WithDevice):
    device = KeepsCaches


class ThreadsStayPlatform(WithDevice):
    device = ThreadsStay


class LosesMemoryPlatform(WithDevice):
    device = LosesMemory


class OwnMemoryPlatform(WithDevice):
    device = OwnMemory

    def capabilities(self, device: int = 0) -> Capabilities:
        return dataclasses.replace(super().capabilities(device), unified_memory=False)


class LosesDeviceMemoryPlatform(OwnMemoryPlatform):
    device = LosesDeviceMemory


class KeepsItsContextPlatform(OwnMemoryPlatform):
    device = KeepsItsContext


class LossIsAnErrorPlatform(WithDevice):
    device = LossIsAnError


class StickyErrorPlatform(WithDevice):
    device = StickyError


class LossHangsPlatform(WithDevice):
    device = LossHangs


BUGS: Mapping[str, tuple[str, str]] = {
    "StaleTablesPlatform": ("L3", "models"),
    "FewSequencesPlatform": ("L3", "batches"),
    "StaleMetadataPlatform": ("L3", "models"),
    "LargestStepPlatform": ("L3", "models"),
    "LongDecodePlatform": ("L3", "step_limits"),
    "TablesByFirstBlockPlatform": ("L3", "prefix_cache"),
    "RoundsWidePlatform": ("L3", "logprobs"),
    "SmallNumbersPlatform": ("L3", "forks"),
    "TwoRanksOnlyPlatform": ("L4", "collectives/4"),
    "OwnFirstPlatform": ("L4", "collectives/4"),
    "HalfTheBitsPlatform": ("L4", "collectives/4"),
    "NobodyIsMissingPlatform": ("L4", "missing_member"),
    "NobodyWaitsPlatform": ("L4", "collectives/4"),
    "KeepsCachesPlatform": ("L5", "open_close"),
    "ThreadsStayPlatform": ("L5", "open_close"),
    "LosesMemoryPlatform": ("L5", "steady"),
    "LosesDeviceMemoryPlatform": ("L5", "steady"),
    "KeepsItsContextPlatform": ("L5", "open_close"),
    "LossIsAnErrorPlatform": ("L5", "device_lost/event"),
    "StickyErrorPlatform": ("L5", "failed_step"),
    "LeavesFilesOpenPlatform": ("L5", "server/leaks"),
    "LossHangsPlatform": ("L5", "device_lost/event"),
}
"""Platform → the level above L2 that the bug belongs to, and the check of it that must fail."""
