"""What the two vendors' hulls share: everything but whom they ask and which tables they read."""

from __future__ import annotations

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..kernels_cuda.portable.tuning import Table
from . import gpu_cards, host
from .accelerator_communicator import missing_nccl, open_accelerator_communicator
from .attention_reference import ReferenceAttention
from .attention_torch import TorchPagedAttention
from .gpu_cards import Card, Survey, Vendor
from .gpu_kernels import (
    GENERIC,
    build_portable_step,
    describe_kernels,
    portable_attention,
    portable_packers,
    triton_missing,
)
from .gpu_library_attention import LibraryAttention
from .gpu_ops import gpu_ops
from .gpu_tables import Architecture, CardModel, capabilities_of, model_of
from .gpu_user_table import TableInUse, table_in_use
from .gpu_wheels import Wheel, installed_wheel
from .interface import (
    DENSE,
    AttentionImpl,
    AttentionSpec,
    Capabilities,
    Communicator,
    Device,
    DeviceSpec,
    Finding,
    GroupSpec,
    KVConstraints,
    OpImpl,
    Platform,
    PlatformUnavailable,
    Probe,
    Roofline,
    StepFn,
    StepGraph,
    StepLimits,
    Telemetry,
    WeightPacker,
)
from .torch_accelerator import TorchAccelerator
from .torch_errors import translated

_HOST_THREADS = 8
"""Most host threads of a rank: it stages small tensors and waits for its device."""


class GpuPlatform(Platform):
    """A vendor's GPUs through its build of torch, which answers to `torch.cuda` for both."""

    vendor_facts: ClassVar[Vendor]
    architectures: ClassVar[Mapping[str, Architecture]]
    models: ClassVar[tuple[CardModel, ...]]
    libraries: ClassVar[tuple[type[LibraryAttention], ...]] = ()

    @classmethod
    @abstractmethod
    def survey(cls) -> Survey:
        """The cards this process may use; initialises nothing."""

    @classmethod
    @abstractmethod
    def built_for(cls, wheel: Wheel) -> str:
        """The version of this vendor's software that `wheel` was built for; empty: none."""

    @classmethod
    @abstractmethod
    def read_telemetry(cls, card: Card) -> Telemetry: ...

    @classmethod
    def probe(cls) -> Probe:
        wheel = installed_wheel()
        return gpu_cards.probe_of(cls.survey(), wheel, cls.built_for(wheel), cls.vendor_facts)

    @classmethod
    def known_devices(cls) -> Sequence[DeviceSpec]:
        return tuple(model.spec for model in cls.models)

    @functools.cached_property
    def _cards(self) -> tuple[Card, ...]:
        return self.survey().cards

    def card(self, device: int = 0) -> Card:
        """ValueError where there is no such device."""
        if device not in range(len(self._cards)):
            found = len(self._cards)
            raise ValueError(f"{self.name} has {found} devices; there is no device {device}.")
        return self._cards[device]

    def capabilities(self, device: int = 0) -> Capabilities:
        architecture = self.card(device).architecture
        # Of one that no table knows only what every GPU that torch serves can do is promised.
        known = self.architectures.get(architecture, Architecture("unknown", "emulated"))
        found = capabilities_of(architecture, known)
        if triton_missing():
            return dataclasses.replace(found, weight_formats=(DENSE,), compiles_steps=False)
        return found

    def roofline(self, device: int = 0) -> Roofline | None:
        model = model_of(self.card(device).name, self.models)
        return None if model is None else model.roofline

    def open(self, device: int = 0, num_threads: int | None = None) -> Device:
        card = self.card(device)
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        try:
            ordinal = find_ordinal(torch.cuda, self._cards, device, self.vendor_facts.order)
            telemetry = functools.partial(self.read_telemetry, card)
            opened = TorchAccelerator(torch.cuda, device, ordinal, telemetry)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it has the vendor
            reason = translated(error)
            raise PlatformUnavailable(f"{card.name} cannot be opened: {reason}") from error
        return opened

    @functools.cached_property
    def kernel_table(self) -> TableInUse:
        """What the portable kernels are launched with: of cards of different architectures, what
        any of them can run."""
        names = self._architectures
        return table_in_use(next(iter(names)) if len(names) == 1 else GENERIC)

    @functools.cached_property
    def _architectures(self) -> frozenset[str]:
        return frozenset(card.architecture for card in self._cards)

    @functools.cached_property
    def _table(self) -> Table:
        """The table in use, with the 8-bit floats that all the cards convert: a relative's table,
        and the one of any GPU, may name types which these lack."""
        table = self.kernel_table.table
        kept = [self.capabilities(device).kv_dtypes for device in range(len(self._cards))]
        fp8 = tuple(kind for kind in table.fp8 if all(kind in kinds for kinds in kept))
        return dataclasses.replace(table, fp8=fp8)

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        return gpu_ops(self._table, self._architectures)

    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        own = () if triton_missing() else (portable_attention(self._table),)
        kinds = (kind for kind in self.libraries if kind.library.installed())
        found = [kind(self._architectures) for kind in kinds]
        return (*own, *found, TorchPagedAttention(), ReferenceAttention())

    def weight_packers(self) -> Mapping[str, WeightPacker]:
        packers = () if triton_missing() else portable_packers(self._table)
        return {packer.format: packer for packer in packers}

    def kv_constraints(self, spec: AttentionSpec) -> KVConstraints:
        """Blocks of whole tiles of the matrix units (16 rows), so that every block starts at an
        address that the widest loads of a thread (16 bytes) can take."""
        return KVConstraints(block_multiple=16, alignment=16, preferred_block_size=32)

    def review(self, plan: Mapping[str, Any]) -> Sequence[Finding]:
        known = self.capabilities(int(plan.get("device") or 0))
        findings = []
        if plan.get("dtype") == "bfloat16" and known.dtypes["bfloat16"] == "emulated":
            reason = f"{known.isa} has no bfloat16 units; float16 takes as much memory"
            findings.append(Finding("adjust", "dtype", reason, "float16"))
        ranks = int(plan.get("tensor_parallel_size") or 1)
        if known.unified_memory and ranks > len(self._cards):
            reason = f"each of {ranks} ranks needs a device of its own; {len(self._cards)} here"
            findings.append(Finding("reject", "tensor_parallel_size", reason))
        if ranks > 1:
            findings += _parallel_findings(known)
        return findings

    def process_env(self, rank: int, plan: Mapping[str, Any]) -> Mapping[str, str]:
        """Ranks share the host's cores. No variable that hides or renumbers devices is set."""
        ranks = int(plan.get("tensor_parallel_size") or 1)
        share = min(_HOST_THREADS, max(1, host.physical_cores() // ranks))
        return {"OMP_NUM_THREADS": str(int(plan.get("num_threads") or share))}

    def communicator(self, group: GroupSpec, device: Device) -> Communicator:
        several = group.size > 1 and not missing_nccl()
        peers = several and self.capabilities(device.index).peer_to_peer
        return open_accelerator_communicator(group, device, peers)

    def build_step(self, graph: StepGraph, limits: StepLimits) -> StepFn | None:
        return build_portable_step(graph)

    def describe(self) -> Mapping[str, str]:
        """Also how the cards are now: a hot or capped one explains a slow start."""
        wheel, survey = installed_wheel(), self.survey()
        probe = gpu_cards.probe_of(survey, wheel, self.built_for(wheel), self.vendor_facts)
        states = [gpu_cards.state(self.read_telemetry(card)) for card in survey.cards]
        return {
            "devices": gpu_cards.summary(probe.devices) or "none",
            "now": "; ".join(states) if any(states) else "not known",
            "torch": f"{wheel.version}, {self.vendor_facts.software} {self.built_for(wheel)}",
            "kernels": describe_kernels(self.kernel_table.origin),
            "collectives": missing_nccl() or "NCCL",
        }


def _parallel_findings(known: Capabilities) -> list[Finding]:
    findings = []
    if missing_nccl():
        reason = f"collectives go through host memory: {missing_nccl()}"
        findings.append(Finding("note", "tensor_parallel_size", reason))
    elif not known.peer_to_peer:
        reason = f"{known.isa} cards have no link of their own: collectives cross the PCI bus"
        findings.append(Finding("note", "tensor_parallel_size", reason))
    return findings


def find_ordinal(accelerator: Any, cards: Sequence[Card], position: int, order: str = "") -> int:
    """torch's number of the card at `position` in `cards`, which follow the bus: CUDA sorts
    different cards by speed, so a UUID decides where there is one and torch tells it.

    Initialises the runtime. Raises RuntimeError where torch sees other cards; `order`: the setting
    without which it may, for runtimes with an order of their own."""
    card, count = cards[position], accelerator.device_count()
    wanted = _plain(card.uuid)
    if [_plain(other.uuid) for other in cards].count(wanted) > 1:
        wanted = ""  # of another card too
    told = [_uuids(accelerator.get_device_properties(ordinal)) for ordinal in range(count)]
    found = [ordinal for ordinal in range(count) if wanted and wanted in told[ordinal]]
    if len(found) == 1:
        return found[0]
    whole = bool(wanted) and not card.uuid.lower().startswith("mig-")
    if order and whole and told and all(told) and not found:
        raise RuntimeError(f"torch sees other cards in its place: set {order}")
    if position < count:
        return position
    raise RuntimeError(f"torch sees {count} devices, and {card.name} is none of them")


def _uuids(properties: Any) -> tuple[str, ...]:
    """A device's UUID in its spellings; none where torch does not tell it."""
    uuid = getattr(properties, "uuid", None)
    return () if uuid is None else _spellings(str(uuid))


def _spellings(uuid: str) -> tuple[str, ...]:
    """A UUID as it is, and as HIP fills it: 16 characters of a 64-bit number's hexadecimal text."""
    plain = _plain(uuid)
    try:
        return plain, bytes.fromhex(plain).decode("ascii").lower()
    except ValueError:
        return (plain,)


def _plain(uuid: str) -> str:
    return uuid.lower().removeprefix("gpu-").removeprefix("mig-").replace("-", "")
