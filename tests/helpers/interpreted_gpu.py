"""A GPU's kernels in Triton's interpreter: what the GPU hulls offer, on the reference device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from helpers import interpreter

from trimaran.platforms.cuda import CudaPlatform
from trimaran.platforms.gpu_cards import Survey
from trimaran.platforms.gpu_kernels import build_portable_step
from trimaran.platforms.interface import (
    AttentionImpl,
    AttentionSpec,
    Capabilities,
    Device,
    Graph,
    KVConstraints,
    OpImpl,
    StepFn,
    StepGraph,
    StepLimits,
    WeightPacker,
)
from trimaran.platforms.strict import StrictPlatform
from trimaran.platforms.strict_device import StrictDevice

interpreter.mend()

REPLAYS: list[int] = []
"""An entry for each replay of a recording."""


class NoCard(CudaPlatform):
    """The hull on a machine without cards: its kernels take the table of any GPU."""

    @classmethod
    def survey(cls) -> Survey:
        return Survey(())


class Again(Graph):
    """A recording that runs the work again: it reads and writes what that reads and writes."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def replay(self) -> None:
        REPLAYS.append(1)
        self._work()


class RecordingDevice(StrictDevice):
    def capture(self, work: Callable[[], None]) -> Graph | None:
        return Again(work)


class InterpretedGpu(StrictPlatform):
    """Ops, attention, packers and steps of the hull; memory and the queue are those of `strict`, so
    that nothing may be read before it is there."""

    hull = NoCard()

    def __init__(self) -> None:
        super().__init__()
        self._opened: dict[object, Device] = {}

    def capabilities(self, device: int = 0) -> Capabilities:
        known = super().capabilities(device)
        return dataclasses.replace(
            known, compiles_steps=True, step_sizes="any", graph_replay=True, run_ahead=1
        )

    def open(self, device: int = 0, num_threads: int | None = None) -> Device:
        opened = RecordingDevice(device, 0.0)
        self._opened[opened.torch_device] = opened
        return opened

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        return self.hull.ops()

    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        return self.hull.attention(spec)

    def weight_packers(self) -> Mapping[str, WeightPacker]:
        return self.hull.weight_packers()

    def kv_constraints(self, spec: AttentionSpec) -> KVConstraints:
        return self.hull.kv_constraints(spec)

    def build_step(self, graph: StepGraph, limits: StepLimits) -> StepFn | None:
        return build_portable_step(graph, self._opened)
