"""Which devices a process may see, and as what. These variables are the drivers' own, and what they
hide must be known before a driver is started."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Visibility:
    """The variables as they are set; None: not set. `cuda`, `hip`, `rocr`: lists, of which both
    vendors' runtimes read the first. `order`: how CUDA numbers cards. `gfx`: the version for which
    ROCm takes every card."""

    cuda: str | None = None
    hip: str | None = None
    rocr: str | None = None
    order: str | None = None
    gfx: str | None = None

    @property
    def may_mean_others(self) -> bool:
        """Are there numbers in CUDA's list that go by CUDA's order, not by the bus's? (CUDA C++
        Programming Guide, "CUDA Environment Variables": FASTEST_FIRST unless told otherwise.)"""
        numbered = any(entry.strip().isdecimal() for entry in (self.cuda or "").split(","))
        return numbered and self.order != "PCI_BUS_ID"

    @property
    def overridden(self) -> str:
        """The architecture whose code ROCm's runtime takes for every card's: 10.3.0 is gfx1030
        (issue 1719 of ROCm/TheRock); empty: each card's own. The last part is hexadecimal in a
        name (9.0.10: gfx90a)."""
        parts = (self.gfx or "").strip().split(".")
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            return ""
        major, minor, step = map(int, parts)
        return f"gfx{major}{minor:x}{step:x}"

    @property
    def for_nvidia(self) -> dict[str, str | None]:
        return {"CUDA_VISIBLE_DEVICES": self.cuda}

    @property
    def for_amd(self) -> dict[str, str | None]:
        """In the order in which they apply: the lower runtime renumbers what the upper one sees,
        and HIP reads CUDA's variable where its own is not set (ROCm documentation, "GPU isolation
        techniques")."""
        upper = "CUDA_VISIBLE_DEVICES" if self.hip is None else "HIP_VISIBLE_DEVICES"
        return {
            "ROCR_VISIBLE_DEVICES": self.rocr,
            upper: self.cuda if self.hip is None else self.hip,
        }


def read_visibility(environ: Mapping[str, str] | None = None) -> Visibility:
    """What `environ` (the process's own by default) says."""
    values = os.environ if environ is None else environ
    return Visibility(
        cuda=values.get("CUDA_VISIBLE_DEVICES"),
        hip=values.get("HIP_VISIBLE_DEVICES"),
        rocr=values.get("ROCR_VISIBLE_DEVICES"),
        order=values.get("CUDA_DEVICE_ORDER"),
        gfx=values.get("HSA_OVERRIDE_GFX_VERSION"),
    )


def visible(setting: str | None, uuids: Sequence[str]) -> list[int]:
    """Positions in `uuids` that `setting` lets through, in its order.

    As the drivers read it (CUDA C++ Programming Guide, "CUDA Environment Variables"): integers or
    unambiguous beginnings of UUIDs; the list ends at the first entry that names no device, and one
    that names a device twice names none. So the empty string and -1 hide everything.
    """
    if setting is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for entry in setting.split(","):
        position = _position(entry.strip(), uuids)
        if position is None:
            break
        if position in chosen:
            return []
        chosen.append(position)
    return chosen


def _position(entry: str, uuids: Sequence[str]) -> int | None:
    if entry.isdecimal():
        return int(entry) if int(entry) < len(uuids) else None
    wanted = entry.lower()
    if not wanted.startswith(("gpu-", "mig-")):
        return None
    found = [i for i, uuid in enumerate(uuids) if uuid.lower().startswith(wanted)]
    return found[0] if len(found) == 1 else None
