"""What a platform says of itself and of its devices: plain data, no vendor in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple


class PlatformUnavailable(LookupError):
    """No platform can be used as asked; the message lists each one with its reason."""


class DeviceLost(RuntimeError):
    """The device is gone (fallen off the bus, reset, driver failure): nothing on it can be used
    any more. Raised by an event's `wait`, or by any method of `Device`."""


class DeviceOutOfMemory(RuntimeError):
    """`Device.alloc` or `alloc_kv` found no room; the device goes on working."""


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
Fp8Kind = Literal["ocp", "fnuz"]
StepSizes = Literal["buckets", "any"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Named facts about a device, instead of questions about its vendor.

    `dtypes`, `kv_dtypes`: torch's names (`bfloat16`; `int8` is a quantized cache). A dtype is
    `native` where the device computes with it at least as fast as in float32, by whatever
    instructions: `--dtype auto` keeps such a checkpoint; `emulated` where it is slower.
    `weight_formats`: those of `Platform.weight_packers`, and `dense`. `fp8`: which float8 encoding
    the matrix units read (OCP's e4m3fn, or the FNUZ variant), None where they read none.
    `run_ahead`: how many steps the engine may have in flight beyond the one whose result it waits
    for, 0 where a launch returns when its work is done. `unified_memory`: the device shares the
    host's memory. `compiles_steps`: `Platform.build_step` is to be asked. `step_sizes`: what one
    compiled step serves, the number of tokens of its graph alone, so that there is one for each
    token bucket, or any number of tokens, so that there is one for all. `graph_replay`:
    `Device.capture` records, and so the runner replays steps that decode; a compiled step then
    launches by shapes alone where its metadata is that of `AttentionImpl.plan_recorded`.
    """

    dtypes: Mapping[str, Precision]
    kv_dtypes: tuple[str, ...] = ()
    fp8: Fp8Kind | None = None
    weight_formats: tuple[str, ...] = ("dense",)
    isa: str = ""
    graph_replay: bool = False
    peer_to_peer: bool = False
    run_ahead: int = 0
    unified_memory: bool = False
    deterministic: bool = True
    compiles_steps: bool = False
    step_sizes: StepSizes = "buckets"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a platform has to say about a plan: `reject` it, `adjust` a field, or `note` what
    it costs, which is logged as a warning."""

    kind: Literal["reject", "adjust", "note"]
    field: str
    reason: str
    value: Any = None


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Bounds on one step. `token_buckets`: sizes a step is padded to (empty: any size), so the
    largest is a bound too; padding is sequences of one token each in the scratch block, which
    `AttentionImpl.plan` sees like any others. `mixed_batches` False: prompts and decoding take
    turns. What `Platform.build_step` is given has `max_tokens` set: no step is larger, its padding
    included."""

    max_tokens: int | None = None
    token_buckets: tuple[int, ...] = ()
    mixed_batches: bool = True


@dataclass(frozen=True, slots=True)
class KVConstraints:
    """What the KV cache must respect.

    A block holds a multiple of `block_multiple` tokens, and each of its pieces (`KVRegion.bytes`
    and `.stride`) is a multiple of `alignment`: the engine picks a block size by the bytes of a
    block in one layer and refuses a cache whose pieces do not keep it, so `block_multiple` is to
    be such that keys alone and values alone do. `slot_dtype`: `int64` or `int32`, the element type
    of the slots. `layouts`: those of `AttentionImpl.layout` that the device takes (empty: any).
    """

    block_multiple: int = 1
    alignment: int = 1
    slot_dtype: str = "int64"
    preferred_block_size: int = 32
    layouts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Roofline:
    """What bounds a device: bytes/s read from its memory, and flop/s of a dense product by dtype
    (torch's names). `source`: a measurement, or the document the figures are from."""

    bandwidth: float
    flops: Mapping[str, float]
    source: str


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A kind of device that a platform can describe without having it, for `trimaran plan`.
    `name` is what a user types (`h200`); `memory` in bytes."""

    name: str
    title: str
    architecture: str
    memory: int
    roofline: Roofline
    capabilities: Capabilities


@dataclass(frozen=True, slots=True)
class Telemetry:
    """A device's state now; None where it cannot be read. Watts, degrees Celsius, shares of 1,
    bytes, MHz; `throttled`: why the clock is held down (empty: it is not)."""

    power: float | None = None
    temperature: float | None = None
    utilization: float | None = None
    memory_used: int | None = None
    clock: float | None = None
    throttled: tuple[str, ...] = field(default=())
