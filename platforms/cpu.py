"""The x86 CPU: torch, oneDNN and FBGEMM on the host's own memory and cores."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..kernels_cpu.library import about, asked_cap, unavailable, wrong_cap
from . import host
from .attention_reference import ReferenceAttention
from .attention_torch import TorchPagedAttention
from .cpu_attention import GRAIN, NativeAttention
from .cpu_communicator import how_ranks_meet, open_cpu_communicator
from .cpu_device import CpuDevice
from .cpu_ipex import about as about_ipex
from .cpu_moe import NativeMoe
from .cpu_ops import cpu_ops
from .cpu_roofline import measured_roofline
from .cpu_step import compile_step
from .cpu_threads import Binding, available_threads, binding, default_threads
from .cpu_weights import linears, packers, road
from .interface import (
    ApiRange,
    AttentionImpl,
    AttentionSpec,
    Capabilities,
    Communicator,
    Device,
    DeviceInfo,
    Finding,
    GroupSpec,
    KVConstraints,
    OpImpl,
    Platform,
    Precision,
    Probe,
    Roofline,
    StepFn,
    StepGraph,
    StepLimits,
    WeightPacker,
)

logger = logging.getLogger("trimaran.cpu")

_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


class CpuPlatform(Platform):
    name = "cpu"
    vendor = "x86"
    api = ApiRange((0, 5), (0, 5))

    _binding: Binding | None = None  # of the engine that it serves

    @classmethod
    def probe(cls) -> Probe:
        flags = host.cpu_flags()
        info = DeviceInfo(0, host.cpu_name(), host.total_memory(), host.isa(flags))
        return Probe(10, f"{info.name}, {info.architecture}", (info,))

    def capabilities(self, device: int = 0) -> Capabilities:
        flags = host.cpu_flags()
        return Capabilities(
            dtypes={"float32": "native", **_halves()},
            kv_dtypes=("float32", "bfloat16", "float16", *(() if unavailable() else ("int8",))),
            weight_formats=tuple(packer.format for packer in packers()),
            isa=host.isa(flags),
            unified_memory=True,
            compiles_steps=not unavailable(),
            step_sizes="any",
        )

    def roofline(self, device: int = 0) -> Roofline:
        """Measured, once a process, in less than half a second."""
        return measured_roofline(min(host.physical_cores(), torch.get_num_threads()))

    def open(self, device: int = 0, num_threads: int | None = None) -> Device:
        if device != 0:
            raise ValueError(f"The cpu platform has one device, 0; there is no device {device}.")
        torch.set_num_threads(num_threads or default_threads())
        return CpuDevice()

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        return {**cpu_ops(), "linear": linears(), "moe": (NativeMoe(),)}

    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        return (NativeAttention(), TorchPagedAttention(), ReferenceAttention())

    def weight_packers(self) -> Mapping[str, WeightPacker]:
        return {packer.format: packer for packer in packers()}

    def build_step(self, graph: StepGraph, limits: StepLimits) -> StepFn | None:
        return compile_step(graph, limits)

    def kv_constraints(self, spec: AttentionSpec) -> KVConstraints:
        # Blocks that the native kernel does not take go by torch's attention.
        return KVConstraints(block_multiple=1, preferred_block_size=32)

    def process_env(self, rank: int, plan: Mapping[str, Any]) -> Mapping[str, str]:
        """Ranks on one host share its cores: a pool larger than its share only spins."""
        threads, _ = _threads_and_ranks(plan)
        return {"OMP_NUM_THREADS": str(threads)}

    def review(self, plan: Mapping[str, Any]) -> Sequence[Finding]:
        return tuple(_findings(plan))

    def communicator(self, group: GroupSpec, device: Device) -> Communicator:
        """Here a device learns which rank of an engine it serves, and so which CPUs are its own."""
        if isinstance(device, CpuDevice):
            self._binding = binding(torch.get_num_threads(), group.rank, group.size)
            device.bind(self._binding)
            logger.info("compute threads: %s", self._binding.about)
        return open_cpu_communicator(group)

    def describe(self) -> Mapping[str, str]:
        flags = host.cpu_flags()
        return {
            "processor": host.cpu_name(),
            "isa": host.isa(flags),
            "kernels": about(),
            "ipex": about_ipex(),
            "cores": str(host.physical_cores()),
            "threads": self._about_threads(),
            "bfloat16": _halves()["bfloat16"],
            "linear": f"bfloat16 by {road(torch.bfloat16)}",
            "ranks meet through": how_ranks_meet(),
        }

    def _about_threads(self) -> str:
        """Of an engine's platform, what holds for its rank; or else what would, without options."""
        if self._binding is not None:
            return self._binding.about
        try:
            return binding(default_threads()).about
        except ValueError as error:
            return str(error)


def _halves() -> dict[str, Precision]:
    """16-bit weights are half the bytes to read, and the own kernels compute in fp32 where there is
    nothing better; torch is quick only where the processor multiplies bfloat16."""
    if not unavailable():
        return {"bfloat16": "native", "float16": "native"}
    bfloat16: Precision = "native" if host.cpu_flags() & _BF16_FLAGS else "emulated"
    return {"bfloat16": bfloat16, "float16": "emulated"}


def _findings(plan: Mapping[str, Any]) -> Iterator[Finding]:
    if wrong := wrong_cap(asked_cap()):
        yield Finding("reject", "platform", wrong)
    elif reason := unavailable():
        slower = "torch's kernels serve instead, several times slower"
        yield Finding("note", "platform", f"{reason}; {slower}")
    elif (size := plan.get("block_size") or GRAIN) % GRAIN:
        slower = "other sizes go by torch's, op by op and slower"
        reason = f"{size}: the native attention takes multiples of {GRAIN}; {slower}"
        yield Finding("note", "block_size", reason)
    threads, ranks = _threads_and_ranks(plan)
    try:
        binding(threads, 0, ranks)
    except ValueError as error:
        yield Finding("reject", "num_threads", str(error))
        return
    if threads * ranks > (most := available_threads()):
        reason = f"{threads} threads of each of {ranks} ranks take turns where {most} fit"
        yield Finding("note", "num_threads", reason)


def _threads_and_ranks(plan: Mapping[str, Any]) -> tuple[int, int]:
    """The threads of each rank, and how many ranks there are."""
    ranks = int(plan.get("tensor_parallel_size") or 1)
    return int(plan.get("num_threads") or max(1, available_threads() // ranks)), ranks
