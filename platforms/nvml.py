"""NVIDIA's cards through NVML (the module `pynvml` of the package nvidia-ml-py): a survey that
starts no CUDA context, and telemetry."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from .gpu_cards import Card, Survey, load_library
from .interface import Telemetry
from .visible import Visibility, visible

_LIBRARY, _PACKAGE = "pynvml", "nvidia-ml-py"

# Bits of nvmlDeviceGetCurrentClocksThrottleReasons that hold the clock down (NVML API reference,
# "NvmlClocksEventReasons"); idleness and chosen clocks are none.
_THROTTLING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}

_OWN_ORDER = (
    "the numbers in CUDA_VISIBLE_DEVICES may mean other cards to CUDA, which puts the fastest "
    "first: set CUDA_DEVICE_ORDER=PCI_BUS_ID"
)


def survey(visibility: Visibility) -> Survey:
    """The cards that CUDA would show this process, in NVML's order (that of the PCI bus)."""
    try:
        with _session() as nvml:
            if isinstance(nvml, str):
                return Survey(problem=nvml)
            return _survey(nvml, visibility)
    except Exception as error:  # whatever the library raises is a reason
        return Survey(problem=f"NVML: {error}")


def telemetry(card: Card) -> Telemetry:
    """The state of a card now."""
    with _session() as nvml:
        if isinstance(nvml, str):
            return Telemetry()
        ask = _asker(nvml)
        handle = ask("nvmlDeviceGetHandleByUUID", card.key or card.uuid)
        if handle is None:
            return Telemetry()
        power = ask("nvmlDeviceGetPowerUsage", handle)
        rates = ask("nvmlDeviceGetUtilizationRates", handle)
        memory = ask("nvmlDeviceGetMemoryInfo", handle)
        reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle) or 0
        temperature = ask("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU)
        clock = ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM)
        return Telemetry(
            power=None if power is None else power / 1000,  # milliwatts
            temperature=None if temperature is None else float(temperature),
            utilization=None if rates is None else rates.gpu / 100,
            memory_used=None if memory is None else int(memory.used),
            clock=None if clock is None else float(clock),
            throttled=tuple(name for bit, name in _THROTTLING.items() if reasons & bit),
        )


@contextlib.contextmanager
def _session() -> Iterator[ModuleType | str]:
    """The library between its start and its end, or why it does not start."""
    nvml = load_library(_LIBRARY, _PACKAGE)
    if isinstance(nvml, str):
        yield nvml
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        yield f"no NVIDIA driver that answers (NVML: {error})"
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _survey(nvml: Any, visibility: Visibility) -> Survey:
    cards: list[Card] = []
    instances: list[list[Card]] = []
    notes: list[str] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            card, parts = _card(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
        except nvml.NVMLError as error:
            notes.append(f"card {index} does not answer ({error})")
            continue
        if parts is not None and not parts:
            notes.append(f"card {index} is in MIG mode and has no instance")
        cards.append(card)
        instances.append([card] if parts is None else parts)
    version = _asker(nvml)("nvmlSystemGetCudaDriverVersion_v2")
    driver = None if version is None else (version // 1000, version % 1000 // 10)
    if visibility.may_mean_others and len({card.name for card in cards}) > 1:
        notes.append(_OWN_ORDER)
    found = Survey(tuple(cards), driver=driver, notes=tuple(notes))
    return _shown(found, instances, visibility)


def _card(nvml: Any, handle: Any) -> tuple[Card, list[Card] | None]:
    """A card and, where it is in MIG mode, its instances."""
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    architecture = f"sm_{major}{minor}"
    name = _text(nvml.nvmlDeviceGetName(handle))

    def described(part: Any, title: str) -> Card:
        uuid = _text(nvml.nvmlDeviceGetUUID(part))
        memory = _asker(nvml)("nvmlDeviceGetMemoryInfo", part)
        return Card(uuid, title, 0 if memory is None else int(memory.total), architecture, uuid)

    card = described(handle, name)
    mode = _asker(nvml)("nvmlDeviceGetMigMode", handle)
    if mode is None or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        return card, None
    ask = _asker(nvml)
    parts = [
        ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, i)
        for i in range(ask("nvmlDeviceGetMaxMigDeviceCount", handle) or 0)
    ]
    return card, [described(part, f"{name} MIG") for part in parts if part is not None]


def _shown(found: Survey, instances: list[list[Card]], visibility: Visibility) -> Survey:
    """CUDA shows whole cards, or the first MIG instance alone if there is any (NVIDIA Multi-
    Instance GPU User Guide, "CUDA Device Enumeration")."""
    ((variable, value),) = visibility.for_nvidia.items()
    setting = f"{variable}={value!r}"
    if value is not None and value.strip().lower().startswith("mig-"):
        parts = [part for cards in instances for part in cards]
        chosen = visible(value, [part.uuid for part in parts])[:1]
        return Survey(tuple(parts), driver=found.driver, notes=found.notes).restricted(
            chosen, setting
        )
    chosen = visible(value, [card.uuid for card in found.cards])
    shown = found.restricted(chosen, setting)
    partitioned = [part for i in chosen for part in instances[i] if part is not found.cards[i]]
    whole = tuple(found.cards[i] for i in chosen if found.cards[i] in instances[i])
    if not partitioned:
        return Survey(whole, "", shown.hidden, shown.hidden_by, found.driver, found.notes)
    note = "CUDA shows one MIG instance and no card beside it; name another by its UUID"
    return Survey(
        (partitioned[0],), "", shown.hidden, shown.hidden_by, found.driver, (*found.notes, note)
    )


def _asker(nvml: Any) -> Callable[..., Any]:
    """Calls by name that answer None where the card or this release of the library cannot."""

    def ask(name: str, *args: Any) -> Any:
        call = getattr(nvml, name, None)
        if call is None:
            return None
        try:
            return call(*args)
        except nvml.NVMLError:
            return None

    return ask


def _text(value: str | bytes) -> str:
    """Older releases answer bytes."""
    return value.decode() if isinstance(value, bytes) else value
