"""The platform contract: the only door to hardware.

A vendor implements `Platform` and `Device` and offers implementations of the ops declared in
`ops.py`. Shared code asks for named capabilities, never for a vendor. Platforms return
constraints and reasons; shared code decides. Importing or probing a platform initialises nothing.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

PLATFORM_API = (0, 1)
"""(major, minor) of this contract. A change of any signature below demands a bump."""


class PlatformUnavailable(LookupError):
    """No platform can be used as asked; the message lists each one with its reason."""


# ---------------------------------------------------------------------------------------------
# What a platform says of itself
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ApiRange:
    """The contract versions a platform was written for, both ends included."""

    low: tuple[int, int]
    high: tuple[int, int]

    def __contains__(self, version: object) -> bool:
        return isinstance(version, tuple) and self.low <= version <= self.high


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device as a probe sees it, without initialising it. `memory` is in bytes (0: unknown)."""

    index: int
    name: str
    memory: int = 0
    architecture: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """Is this platform usable here? `score` 0 means no; the highest score is chosen."""

    score: int
    reason: str
    devices: tuple[DeviceInfo, ...] = ()


class Support(NamedTuple):
    """An answer with its reason; falsy when refused."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok

    @classmethod
    def yes(cls, reason: str = "") -> Support:
        return cls(True, reason)

    @classmethod
    def no(cls, reason: str) -> Support:
        return cls(False, reason)


Precision = Literal["native", "emulated"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Named facts about a device, instead of questions about its vendor.

    `run_ahead` is how many steps the engine may have in flight beyond the one whose result it
    waits for: 0 where a launch returns when its work is done.
    """

    dtypes: Mapping[str, Precision]
    kv_dtypes: tuple[str, ...] = ()
    fp8: Literal["ocp", "fnuz"] | None = None
    weight_formats: tuple[str, ...] = ("dense",)
    isa: str = ""
    graph_replay: bool = False
    peer_to_peer: bool = False
    run_ahead: int = 0
    unified_memory: bool = False
    deterministic: bool = True


@dataclass(frozen=True, slots=True)
class Finding:
    """What a platform has to say about a plan: `reject` it, `adjust` a field, or `note`."""

    kind: Literal["reject", "adjust", "note"]
    field: str
    reason: str
    value: Any = None


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Bounds on one step. `token_buckets`: sizes a step is padded to (empty: any size)."""

    max_tokens: int | None = None
    token_buckets: tuple[int, ...] = ()
    mixed_batches: bool = True


@dataclass(frozen=True, slots=True)
class KVConstraints:
    """What the block manager must respect. Blocks hold a multiple of `block_multiple` tokens."""

    block_multiple: int = 1
    alignment: int = 64
    slot_dtype: str = "int64"
    preferred_block_size: int = 32


# ---------------------------------------------------------------------------------------------
# Ops
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpSignature:
    """What is known of an op's use when the model is built: dtype and the static sizes
    (`in_features`, `out_features`, `head_dim`…), by which an implementation accepts or refuses."""

    op: str
    dtype: torch.dtype
    sizes: Mapping[str, int] = field(default_factory=dict)


class OpImpl(ABC):
    """One implementation of one op. The call has the signature of the op's reference."""

    op: str
    name: str
    priority: int = 0

    @abstractmethod
    def supports(self, sig: OpSignature) -> Support: ...

    @abstractmethod
    def __call__(self, *args: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Fusion:
    """A vendor's own fused op: `impl` equals running `composition` of standard ops in order."""

    name: str
    composition: tuple[str, ...]
    impl: OpImpl


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One layer's attention. `scale` multiplies q·k; `sliding_window` counts the keys a query
    sees, itself included (None: all); `softcap` 0 is none."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    dtype: torch.dtype
    kv_dtype: torch.dtype
    block_size: int
    causal: bool = True
    sliding_window: int | None = None
    softcap: float = 0.0


@dataclass(slots=True)
class AttentionBatch:
    """The batch of one step for one cache group, as the runner hands it to `plan`.

    Lists are on the host, tensors on the device. Sequence i has queries
    [query_starts[i], query_starts[i+1]) of the packed token axis and, this step included,
    `seq_lens[i]` tokens in the cache; its last query is at position seq_lens[i] - 1.
    `block_tables`: int32 `[seqs, max_blocks]`; entries before a sliding window may be the scratch
    block 0 and must not be read. `slots`: int64 `[tokens]`, block * block_size + offset.
    """

    query_starts: list[int]
    seq_lens: list[int]
    block_tables: Tensor
    slots: Tensor


class KVRegion(NamedTuple):
    """A block is one contiguous piece of `tensor` per region: `tensor[block]`, `stride` bytes
    from one block to the next, `bytes` long."""

    tensor: Tensor
    stride: int
    bytes: int


class LayerKV(NamedTuple):
    """The cache of one layer as an attention implementation laid it out.

    `tensors` are what the implementation reads; `regions` how blocks are moved; a block is zeroed
    by filling its regions with 0.
    """

    tensors: tuple[Tensor, ...]
    regions: tuple[KVRegion, ...]


class AttentionImpl(ABC):
    """Paged attention over mixed prefill and decode. Stateless between steps."""

    name: str
    priority: int = 0

    @abstractmethod
    def supports(self, spec: AttentionSpec) -> Support: ...

    @abstractmethod
    def alloc(self, device: Device, spec: AttentionSpec, num_blocks: int) -> LayerKV:
        """Allocate one layer's cache, zeroed, through `device.alloc_kv`."""

    @abstractmethod
    def block_bytes(self, spec: AttentionSpec) -> int:
        """Bytes one block takes in one layer."""

    @abstractmethod
    def plan(self, spec: AttentionSpec, batch: AttentionBatch) -> Any:
        """Per-step metadata, made once and used by every layer of the group."""

    @abstractmethod
    def write(self, key: Tensor, value: Tensor, kv: LayerKV, slots: Tensor) -> None:
        """Store `[tokens, kv_heads, head_dim]` keys and values at `slots` (the kv_write op)."""

    @abstractmethod
    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Any) -> Tensor:
        """Attend `[tokens, heads, head_dim]` queries to the cache (already written for this
        step); returns the same shape and dtype."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A linear layer's weight in a platform's own layout; `tensors` (or a library's own objects)
    belong to `format`'s packer. `shape` is (out_features, in_features)."""

    format: str
    shape: tuple[int, int]
    tensors: tuple[Any, ...]


class WeightPacker(ABC):
    """Turns canonical tensors (for `dense`: `weight`, `[out, in]`) into a layout that every
    `linear` of the same platform reads. `format` names the canonical form it takes."""

    format: str

    @abstractmethod
    def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight: ...


# ---------------------------------------------------------------------------------------------
# Groups of processes
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A parallel group as a member sees it; `rendezvous` is a `file://` URL every member reads. A
    collective in which a member is missing fails after `timeout` seconds."""

    rank: int = 0
    size: int = 1
    rendezvous: str = ""
    timeout: float = 300.0


class Communicator(ABC):
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


# ---------------------------------------------------------------------------------------------
# A device and its platform
# ---------------------------------------------------------------------------------------------


class Event(ABC):
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


class Device(ABC):
    """An open device. Work given to `launch` runs in order on the device's queue; between a
    launch and the wait on its event the host neither reads nor writes tensors of that launch."""

    torch_device: torch.device
    index: int

    @abstractmethod
    def alloc(self, shape: Sequence[int], dtype: torch.dtype, tag: str) -> Tensor:
        """Persistent memory, uninitialised, accounted under `tag`."""

    @abstractmethod
    def alloc_kv(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeroed memory for a KV cache, accounted under the tag `kv`."""

    @abstractmethod
    def memory(self) -> MemoryInfo: ...

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

    @abstractmethod
    def synchronize(self) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Release every thread and byte. Idempotent."""


class Platform(ABC):
    """A kind of hardware. Subclasses are checked against this contract when they are defined."""

    name: ClassVar[str]
    vendor: ClassVar[str]
    api: ClassVar[ApiRange]

    @classmethod
    @abstractmethod
    def probe(cls) -> Probe:
        """Score, reason and devices; initialises nothing and never raises."""

    @abstractmethod
    def capabilities(self, device: int = 0) -> Capabilities: ...

    @abstractmethod
    def open(self, device: int = 0, num_threads: int | None = None) -> Device:
        """Initialise a device. `num_threads` bounds the host's compute threads (None: the
        platform's choice; a platform that computes elsewhere ignores it)."""

    @abstractmethod
    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        """Implementations by op name. Ops left out fall back to the torch reference."""

    @abstractmethod
    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        """Candidates; the core asks each `supports(spec)` and takes the highest priority."""

    def weight_packers(self) -> Mapping[str, WeightPacker]:
        return {}

    def kv_constraints(self, spec: AttentionSpec) -> KVConstraints:
        return KVConstraints()

    def step_limits(self, plan: Mapping[str, Any]) -> StepLimits:
        return StepLimits()

    def review(self, plan: Mapping[str, Any]) -> Sequence[Finding]:
        """Findings on a resolved configuration (flat names → values). Changes nothing."""
        return ()

    def process_env(self, rank: int, plan: Mapping[str, Any]) -> Mapping[str, str]:
        """Environment for a worker process, applied before it is spawned. Pure."""
        return {}

    def communicator(self, group: GroupSpec, device: Device) -> Communicator:
        """Collectives for a parallel group; by default Gloo, staged through host memory."""
        from .communicator import open_communicator  # lazy: it imports this module

        return open_communicator(group)

    def fusions(self) -> Sequence[Fusion]:
        return ()

    def describe(self) -> Mapping[str, str]:
        """Facts for `trimaran doctor` and the logs."""
        return {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_contract(cls, Platform)


def check_contract(cls: type, contract: type) -> None:
    """Raise `TypeError` if `cls` overrides a member of `contract` with another signature, or
    answers unknown attributes through `__getattr__`."""
    if "__getattr__" in vars(cls):
        raise TypeError(f"{cls.__name__} defines __getattr__: the contract forbids it.")
    for name, theirs in vars(cls).items():
        ours = inspect.getattr_static(contract, name, None)
        if name.startswith("__") or ours is None or not callable(getattr(contract, name)):
            continue
        expected = list(inspect.signature(getattr(contract, name)).parameters)
        found = list(inspect.signature(getattr(cls, name)).parameters)
        if isinstance(ours, classmethod) != isinstance(theirs, classmethod) or expected != found:
            raise TypeError(
                f"{cls.__name__}.{name}{tuple(found)} does not match the platform contract's "
                f"{name}{tuple(expected)} (PLATFORM_API {PLATFORM_API})."
            )
