"""The reference platform: host memory posing as a foreign device, to find what shared code
assumes. Everything is computed by the torch references, nothing is where one would expect it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from . import host
from .attention_reference import ReferenceAttention
from .interface import (
    ApiRange,
    AttentionImpl,
    AttentionSpec,
    Capabilities,
    Device,
    DeviceInfo,
    KVConstraints,
    OpImpl,
    Platform,
    Precision,
    Probe,
    StepFn,
    StepGraph,
    StepLimits,
    StepSizes,
    WeightPacker,
)
from .ops import DensePacker, reference_ops
from .step_graph import interpret
from .strict_device import StrictDevice

_NUM_DEVICES = 3


def _all_native() -> dict[str, Precision]:
    return {"float32": "native", "bfloat16": "native", "float16": "native"}


@dataclass(frozen=True, slots=True)
class StrictKnobs:
    """What the device claims to be. `delay`: seconds each launch comes late, up to twice that."""

    delay: float = 0.0005
    run_ahead: int = 1
    block_multiple: int = 24
    preferred_block_size: int = 24
    dtypes: Mapping[str, Precision] = field(default_factory=_all_native)
    limits: StepLimits = field(default_factory=StepLimits)
    compile_steps: bool = False
    step_sizes: StepSizes = "buckets"


class StrictPlatform(Platform):
    name = "strict"
    vendor = "none"
    api = ApiRange((0, 5), (0, 5))

    def __init__(self, knobs: StrictKnobs | None = None) -> None:
        self.knobs = knobs or StrictKnobs()

    @classmethod
    def probe(cls) -> Probe:
        memory = host.total_memory()
        devices = [DeviceInfo(i, f"strict {i}", memory) for i in range(_NUM_DEVICES)]
        return Probe(1, "the reference platform: for tests, slow on purpose", tuple(devices))

    def capabilities(self, device: int = 0) -> Capabilities:
        return Capabilities(
            dtypes=self.knobs.dtypes,
            kv_dtypes=(*self.knobs.dtypes, "int8", "float8_e4m3fn", "float8_e5m2"),
            run_ahead=self.knobs.run_ahead,
            compiles_steps=self.knobs.compile_steps,
            step_sizes=self.knobs.step_sizes,
        )

    def open(self, device: int = 0, num_threads: int | None = None) -> Device:
        if device not in range(_NUM_DEVICES):
            raise ValueError(f"strict has {_NUM_DEVICES} devices; there is no device {device}.")
        return StrictDevice(device, self.knobs.delay)

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        return reference_ops()

    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        return (ReferenceAttention(),)

    def weight_packers(self) -> Mapping[str, WeightPacker]:
        packer = DensePacker()
        return {packer.format: packer}

    def kv_constraints(self, spec: AttentionSpec) -> KVConstraints:
        return KVConstraints(
            slot_dtype="int32",
            block_multiple=self.knobs.block_multiple,
            preferred_block_size=self.knobs.preferred_block_size,
        )

    def step_limits(self, plan: Mapping[str, object]) -> StepLimits:
        return self.knobs.limits

    def build_step(self, graph: StepGraph, limits: StepLimits) -> StepFn | None:
        return _overwriting(interpret(graph)) if self.knobs.compile_steps else None

    def describe(self) -> Mapping[str, str]:
        return {"devices": str(_NUM_DEVICES), "queue": "one worker thread", "ops": "references"}


def _overwriting(step: StepFn) -> StepFn:
    """`step`, whose result lasts until the next call, as the contract allows it."""
    last: list[Tensor] = []

    def run(metadata: Sequence[Any], num_tokens: int) -> Tensor:
        for result in last:
            result.fill_(math.nan)
        last[:] = [step(metadata, num_tokens)]
        return last[0]

    return run


def strict_platform(knobs: StrictKnobs) -> type[StrictPlatform]:
    """A platform class with these knobs: for those who are given a class and instantiate it."""

    class Strict(StrictPlatform):
        def __init__(self) -> None:
            super().__init__(knobs)

    return Strict
