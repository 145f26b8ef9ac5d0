"""AMD's cards through the module `amdsmi`: a survey that starts no HIP runtime, and telemetry.

Its answers differ between releases: a figure may be missing, or the text "N/A", and a name may be
empty or a hexadecimal number. What is not a number is not known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

from .gpu_cards import Card, Survey, load_library
from .interface import Telemetry
from .visible import Visibility, visible

_LIBRARY = _PACKAGE = "amdsmi"

# Device ids (the PCI ID repository, vendor 1002), for releases that know no architecture or name.
_BY_DEVICE_ID = {
    0x740F: ("AMD Instinct MI210", "gfx90a"),
    0x74A1: ("AMD Instinct MI300X", "gfx942"),
    0x74A5: ("AMD Instinct MI325X", "gfx942"),
    0x75A3: ("AMD Instinct MI355X", "gfx950"),
    0x744C: ("AMD Radeon RX 7900 XT/XTX", "gfx1100"),
}
# Fields of amdsmi_get_violation_status, which cards since MI300 answer.
_THROTTLING = {
    "active_ppt_pwr": "power cap",
    "active_socket_thrm": "thermal (socket)",
    "active_vr_thrm": "thermal (voltage regulator)",
    "active_hbm_thrm": "thermal (memory)",
    "active_prochot_thrm": "thermal (processor hot)",
}


def survey(visibility: Visibility) -> Survey:
    """The cards that HIP would show this process, in HIP's order."""
    try:
        with _session() as smi:
            if isinstance(smi, str):
                return Survey(problem=smi)
            found = _survey(smi)
    except Exception as error:  # whatever the library raises is a reason
        return Survey(problem=f"amdsmi: {_one_line(error)}")
    found = _overridden(found, visibility.overridden)
    for variable, value in visibility.for_amd.items():
        chosen = visible(value, [card.uuid for card in found.cards])
        found = found.restricted(chosen, f"{variable}={value!r}")
    return found


def _overridden(found: Survey, architecture: str) -> Survey:
    """The cards as ROCm's runtime takes them where HSA_OVERRIDE_GFX_VERSION is set."""
    if not architecture or not found.cards:
        return found
    cards = tuple(replace(card, code=architecture) for card in found.cards)
    note = f"HSA_OVERRIDE_GFX_VERSION has every card run code for {architecture}"
    return replace(found, cards=cards, notes=(*found.notes, note))


def telemetry(card: Card) -> Telemetry:
    """The state of a card now."""
    with _session() as smi:
        if isinstance(smi, str):
            return Telemetry()
        ask = _asker(smi)
        handle = ask("amdsmi_get_processor_handle_from_bdf", card.key)
        if handle is None:
            return Telemetry()
        power = ask("amdsmi_get_power_info", handle) or {}
        activity = _number((ask("amdsmi_get_gpu_activity", handle) or {}).get("gfx_activity"))
        used = _number((ask("amdsmi_get_gpu_vram_usage", handle) or {}).get("vram_used"))
        clock = ask("amdsmi_get_clock_info", handle, smi.AmdSmiClkType.GFX) or {}
        violations = ask("amdsmi_get_violation_status", handle) or {}
        return Telemetry(
            power=_first(power, "current_socket_power", "average_socket_power", "socket_power"),
            temperature=_number(
                ask(
                    "amdsmi_get_temp_metric",
                    handle,
                    smi.AmdSmiTemperatureType.HOTSPOT,
                    smi.AmdSmiTemperatureMetric.CURRENT,
                )
            ),
            utilization=None if activity is None else activity / 100,
            memory_used=None if used is None else int(used) << 20,
            clock=_first(clock, "clk", "cur_clk"),
            throttled=tuple(
                name for key, name in _THROTTLING.items() if violations.get(key) is True
            ),
        )


@contextlib.contextmanager
def _session() -> Iterator[ModuleType | str]:
    """The library between its start and its end, or why it does not start."""
    smi = load_library(_LIBRARY, _PACKAGE)
    if isinstance(smi, str):
        yield smi
        return
    try:
        smi.amdsmi_init()
    except smi.AmdSmiException as error:
        yield f"no AMD driver that answers (amdsmi: {_one_line(error)})"
        return
    try:
        yield smi
    finally:
        smi.amdsmi_shut_down()


def _survey(smi: Any) -> Survey:
    cards: list[tuple[float, Card]] = []
    notes: list[str] = []
    for index, handle in enumerate(smi.amdsmi_get_processor_handles()):
        try:
            card = _card(smi, handle)
        except smi.AmdSmiException as error:
            notes.append(f"card {index} does not answer ({_one_line(error)})")
            continue
        place = (_asker(smi)("amdsmi_get_gpu_enumeration_info", handle) or {}).get("hip_id")
        order = _number(place)
        cards.append((index if order is None else order, card))
    cards.sort(key=lambda pair: pair[0])
    return Survey(tuple(card for _, card in cards), notes=tuple(notes))


def _card(smi: Any, handle: Any) -> Card:
    asic = smi.amdsmi_get_gpu_asic_info(handle)
    known_name, known_architecture = _BY_DEVICE_ID.get(_hex(asic.get("device_id")), ("", ""))
    name = str(asic.get("market_name") or "")
    if name in ("", "N/A") or name.startswith("0x"):
        name = known_name or "AMD device"
    architecture = str(asic.get("target_graphics_version") or "")
    if not architecture.startswith("gfx"):
        architecture = known_architecture
    ask = _asker(smi)
    vram = ask("amdsmi_get_gpu_vram_info", handle) or {}
    size = _number(vram.get("vram_size"))  # MiB
    if not size:
        size = _number((ask("amdsmi_get_gpu_vram_usage", handle) or {}).get("vram_total"))
    serial = _hex(asic.get("asic_serial"))
    return Card(
        uuid=f"GPU-{serial:016x}" if serial > 0 else "",  # 0: the card has none
        name=name,
        memory=int(size or 0) << 20,
        architecture=architecture,
        key=str(ask("amdsmi_get_gpu_device_bdf", handle) or ""),
    )


def _asker(smi: Any) -> Callable[..., Any]:
    """Calls by name that answer None where the card or this release of the library cannot."""

    def ask(name: str, *args: Any) -> Any:
        call = getattr(smi, name, None)
        if call is None:
            return None
        try:
            return call(*args)
        except smi.AmdSmiException:
            return None

    return ask


def _first(answer: dict[str, Any], *keys: str) -> float | None:
    """The first of these fields that is a number above 0."""
    numbers = (_number(answer.get(key)) for key in keys)
    return next((number for number in numbers if number), None)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _hex(value: Any) -> int:
    """A hexadecimal text or a number as a number, -1 for anything else."""
    if isinstance(value, int):
        return value
    try:
        return int(str(value), 16)
    except ValueError:
        return -1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
