"""A GPU's kernels in Triton's interpreter: what the GPU hulls offer, on the reference device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from helpers import interpreter
from helpers.simulated_capture import RecordingDevice, launch
from triton.runtime.interpreter import InterpretedFunction

from trimaran.platforms.cuda import CudaPlatform
from trimaran.platforms.gpu_cards import Survey
from trimaran.platforms.gpu_kernels import build_portable_step
from trimaran.platforms.interface import (
    AttentionImpl,
    AttentionSpec,
    Capabilities,
    Device,
    KVConstraints,
    OpImpl,
    StepFn,
    StepGraph,
    StepLimits,
    WeightPacker,
)
from trimaran.platforms.strict import StrictPlatform


@functools.cache
def keep_launches() -> None:
    """For this process: while a device records, it keeps launches of interpreted kernels."""
    run = InterpretedFunction.run

    def run_or_keep(self: Any, *args: Any, **options: Any) -> None:
        launch(run, self, *args, **options)

    InterpretedFunction.run = run_or_keep


interpreter.mend()
keep_launches()


class NoCard(CudaPlatform):
    """The hull on a machine without cards: its kernels take the table of any GPU."""

    @classmethod
    def survey(cls) -> Survey:
        return Survey(())


class InterpretedGpu(StrictPlatform):
    """Ops, attention, packers and steps of the hull; memory and the queue are those of `strict`, so
    that nothing may be read before it is there."""

    hull = NoCard()

    def capabilities(self, device: int = 0) -> Capabilities:
        known = super().capabilities(device)
        return dataclasses.replace(
            known, compiles_steps=True, step_sizes="any", graph_replay=True, run_ahead=1
        )

    def open(self, device: int = 0, num_threads: int | None = None) -> Device:
        return RecordingDevice(device, 0.0)

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        return self.hull.ops()

    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        return self.hull.attention(spec)

    def weight_packers(self) -> Mapping[str, WeightPacker]:
        return self.hull.weight_packers()

    def kv_constraints(self, spec: AttentionSpec) -> KVConstraints:
        return self.hull.kv_constraints(spec)

    def build_step(self, graph: StepGraph, limits: StepLimits) -> StepFn | None:
        return build_portable_step(graph)
