"""The platform contract: the only door to hardware.

A vendor implements `Platform` and `Device` and offers implementations of the ops declared in
`ops.py`. Shared code asks for named capabilities, never for a vendor. Platforms return
constraints and reasons; shared code decides. Importing or probing a platform initialises nothing.

This module is all a platform imports: plain data comes from `facts`, ops and attention from
`compute`, versions from `api`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .api import (
    PLATFORM_API,
    ApiRange,
    Contract,
)
from .compute import (
    DENSE,
    FP8,
    INT4,
    INT4_GROUPS,
    INT8,
    W4A16,
    AttentionBatch,
    AttentionImpl,
    AttentionSpec,
    Fusion,
    KVRegion,
    LayerKV,
    OpImpl,
    OpSignature,
    Output,
    PackedWeight,
    StepFn,
    StepGraph,
    StepInput,
    StepMetadata,
    StepNode,
    Value,
    View,
    WeightPacker,
)
from .facts import (
    Capabilities,
    DeviceInfo,
    DeviceLost,
    DeviceOutOfMemory,
    DeviceSpec,
    Finding,
    Fp8Kind,
    KVConstraints,
    PlatformUnavailable,
    Precision,
    Probe,
    Roofline,
    StepLimits,
    StepSizes,
    Support,
    Telemetry,
)

__all__ = [
    "DENSE",
    "INT4",
    "INT4_GROUPS",
    "FP8",
    "INT8",
    "PLATFORM_API",
    "ApiRange",
    "AttentionBatch",
    "AttentionImpl",
    "AttentionSpec",
    "Capabilities",
    "Communicator",
    "Contract",
    "Device",
    "DeviceInfo",
    "DeviceLost",
    "DeviceOutOfMemory",
    "DeviceSpec",
    "Event",
    "Finding",
    "Fp8Kind",
    "Fusion",
    "Graph",
    "GroupSpec",
    "KVConstraints",
    "KVRegion",
    "LayerKV",
    "MemoryInfo",
    "OpImpl",
    "OpSignature",
    "Output",
    "PackedWeight",
    "Platform",
    "PlatformUnavailable",
    "Precision",
    "Probe",
    "Roofline",
    "StepFn",
    "StepGraph",
    "StepInput",
    "StepLimits",
    "StepMetadata",
    "StepNode",
    "StepSizes",
    "Support",
    "Telemetry",
    "Value",
    "View",
    "W4A16",
    "WeightPacker",
]

# ---------------------------------------------------------------------------------------------
# Groups of processes
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A parallel group as a member sees it; `rendezvous` is a `file://` URL every member reads. A
    collective in which a member is missing fails after `timeout` seconds; where `low_latency` is
    asked for it may also wait on the device without an end, if that makes it faster."""

    rank: int = 0
    size: int = 1
    rendezvous: str = ""
    timeout: float = 300.0
    low_latency: bool = False


class Communicator(Contract):
    """Collectives over one group. In place where the tensor is given, in order of the ranks."""

    rank: int
    size: int

    @abstractmethod
    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the group; the result may share memory with `tensor`."""

    @abstractmethod
    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Concatenate the members' tensors along `dim`."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, source: int) -> Tensor: ...

    @abstractmethod
    def barrier(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    def abort(self) -> None:
        """The group cannot go on, and its other members were ended: end what waits for them on
        the host and on the device's queue, so that a wait for an event returns; what the queue
        computes after that is nobody's. Called from another thread than the one that may be in a
        collective; later collectives raise RuntimeError, and `close` may still follow."""
        self.close()


# ---------------------------------------------------------------------------------------------
# A device and its platform
# ---------------------------------------------------------------------------------------------


class Event(Contract):
    """A point on the device's queue."""

    @abstractmethod
    def done(self) -> bool: ...

    @abstractmethod
    def wait(self) -> None:
        """Block the host until the point is reached; re-raises what the launched work raised."""


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Bytes: what the device has, what is free now, and what this process allocated, by tag."""

    total: int
    free: int
    by_tag: Mapping[str, int]


class Graph(Contract):
    """Device work recorded once."""

    @abstractmethod
    def replay(self) -> None:
        """Run it again on the same addresses. Inside a launch."""


class Device(Contract):
    """An open device. Work given to `launch` runs in order on the device's queue; between a
    launch and the wait on its event the host neither reads nor writes tensors of that launch.

    Raises `DeviceOutOfMemory` where memory is asked for and none is left, and `DeviceLost` (also
    from an event's `wait`) once it cannot be used any more.
    """

    torch_device: torch.device
    index: int

    @abstractmethod
    def alloc(self, shape: Sequence[int], dtype: torch.dtype, tag: str) -> Tensor:
        """Persistent memory, uninitialised, accounted under `tag` as the bytes that were asked
        for, until the tensor ends."""

    @abstractmethod
    def alloc_kv(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeroed memory for a KV cache, accounted under the tag `kv`."""

    @abstractmethod
    def account(self, owner: object, size: int, tag: str) -> None:
        """Enter `size` bytes that a library holds for `owner` under `tag`, until `owner` ends."""

    @abstractmethod
    def memory(self) -> MemoryInfo:
        """As it is now. After `close` it may raise RuntimeError."""

    @abstractmethod
    def launch(self, work: Callable[[], None]) -> Event:
        """Put `work` on the queue. Where launches are synchronous it has run on return."""

    @abstractmethod
    def to_device(self, host: Tensor) -> Tensor:
        """A device copy of a host tensor, ordered with the launches that follow. The host may
        change `host` as soon as this returns."""

    @abstractmethod
    def to_host(self, tensor: Tensor) -> Tensor:
        """A host copy. Call it inside the launch that computes `tensor`, read it after the event;
        or outside any launch once every event has been waited for."""

    @abstractmethod
    def move_blocks(self, regions: Sequence[KVRegion], pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, target) inside each region; runs inside a launch."""

    def capture(self, work: Callable[[], None]) -> Graph | None:
        """Record `work`, which has run before on the same tensors, for replay; inside a launch.
        None where `Capabilities.graph_replay` is False."""
        return None

    def telemetry(self) -> Telemetry:
        """The device's state now; what cannot be read is None."""
        return Telemetry()

    @abstractmethod
    def synchronize(self) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Release every thread and byte. Idempotent."""


class Platform(Contract):
    """A kind of hardware. Subclasses are checked against this contract when they are defined."""

    name: ClassVar[str]
    vendor: ClassVar[str]
    api: ClassVar[ApiRange]

    @classmethod
    @abstractmethod
    def probe(cls) -> Probe:
        """Score, reason and devices; initialises nothing and never raises."""

    @classmethod
    def known_devices(cls) -> Sequence[DeviceSpec]:
        """Devices that can be planned for without being here (`trimaran plan --device`)."""
        return ()

    @abstractmethod
    def capabilities(self, device: int = 0) -> Capabilities: ...

    def roofline(self, device: int = 0) -> Roofline | None:
        """What bounds a present device, from a table or by measuring it (under a second); None
        where it is not known."""
        return None

    @abstractmethod
    def open(self, device: int = 0, num_threads: int | None = None) -> Device:
        """Initialise a device; it may be opened more than once. `num_threads` bounds the host's
        compute threads (None: the platform's choice; a platform that computes elsewhere ignores
        it). Raises ValueError for a device that the probe does not name."""

    @abstractmethod
    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        """Implementations by op name. Ops left out fall back to the torch reference."""

    @abstractmethod
    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        """Candidates; the core asks each `supports(spec)` and takes the highest priority."""

    def weight_packers(self) -> Mapping[str, WeightPacker]:
        """By the format they take. Weights of a format that is not here, or that no `linear`
        supports, are turned back into dense ones: right, and no smaller."""
        return {}

    def kv_constraints(self, spec: AttentionSpec) -> KVConstraints:
        return KVConstraints()

    def step_limits(self, plan: Mapping[str, Any]) -> StepLimits:
        """`plan`: the engine's arguments by name, as they were asked for (None, "auto": not
        decided yet)."""
        return StepLimits()

    def review(self, plan: Mapping[str, Any]) -> Sequence[Finding]:
        """Findings on a plan: the engine's arguments by name, lengths, dtypes and limits resolved.
        Changes nothing; the plan that its adjustments lead to is not asked about again."""
        return ()

    def process_env(self, rank: int, plan: Mapping[str, Any]) -> Mapping[str, str]:
        """Environment for a worker process, applied before it is spawned. Pure. `plan` holds
        `tensor_parallel_size` and `num_threads` (None: the platform's choice)."""
        return {}

    def communicator(self, group: GroupSpec, device: Device) -> Communicator:
        """Collectives for a parallel group; by default Gloo, staged through host memory."""
        from .communicator import open_communicator  # lazy: it imports this module

        return open_communicator(group)

    def fusions(self) -> Sequence[Fusion]:
        """This platform's own fused ops; they win over their parts where they support a use."""
        return ()

    def build_step(self, graph: StepGraph, limits: StepLimits) -> StepFn | None:
        """Compile a step, where `Capabilities.compiles_steps`: by `Capabilities.step_sizes` asked
        for each of the token buckets, or once, with a graph for any size. Outside any launch,
        after the model is loaded and its cache allocated. `limits`: those that steps really keep.
        None: run it op by op."""
        return None

    def describe(self) -> Mapping[str, str]:
        """Facts for `trimaran doctor` and the logs."""
        return {}
