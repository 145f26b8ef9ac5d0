"""The x86 CPU: torch, oneDNN and FBGEMM on the host's own memory and cores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..kernels_cpu.library import about, unavailable
from . import host
from .attention_reference import ReferenceAttention
from .attention_torch import TorchPagedAttention
from .cpu_attention import NativeAttention
from .cpu_communicator import how_ranks_meet, open_cpu_communicator
from .cpu_linear import linear_road
from .cpu_ops import cpu_ops
from .cpu_roofline import measured_roofline
from .cpu_step import compile_step
from .cpu_weights import linear, packers
from .host_device import HostDevice
from .interface import (
    ApiRange,
    AttentionImpl,
    AttentionSpec,
    Capabilities,
    Communicator,
    Device,
    DeviceInfo,
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

_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


class CpuPlatform(Platform):
    name = "cpu"
    vendor = "x86"
    api = ApiRange((0, 3), (0, 3))

    @classmethod
    def probe(cls) -> Probe:
        flags = host.cpu_flags()
        info = DeviceInfo(0, host.cpu_name(), host.total_memory(), host.isa(flags))
        return Probe(10, f"{info.name}, {info.architecture}", (info,))

    def capabilities(self, device: int = 0) -> Capabilities:
        flags = host.cpu_flags()
        bfloat16: Precision = "native" if flags & _BF16_FLAGS else "emulated"
        return Capabilities(
            dtypes={"float32": "native", "bfloat16": bfloat16, "float16": "emulated"},
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
        # torch's own count already minds OMP_NUM_THREADS and what an earlier engine asked for.
        torch.set_num_threads(num_threads or min(host.physical_cores(), torch.get_num_threads()))
        return HostDevice()

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        return {**cpu_ops(), "linear": [linear()]}

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
        ranks = int(plan.get("tensor_parallel_size") or 1)
        threads = int(plan.get("num_threads") or max(1, host.physical_cores() // ranks))
        return {"OMP_NUM_THREADS": str(threads)}

    def communicator(self, group: GroupSpec, device: Device) -> Communicator:
        return open_cpu_communicator(group)

    def describe(self) -> Mapping[str, str]:
        flags = host.cpu_flags()
        return {
            "processor": host.cpu_name(),
            "isa": host.isa(flags),
            "kernels": about(),
            "cores": str(host.physical_cores()),
            "bfloat16": "native" if flags & _BF16_FLAGS else "emulated",
            "linear": f"bfloat16 by {linear_road(torch.bfloat16)}",
            "ranks meet through": how_ranks_meet(),
        }
