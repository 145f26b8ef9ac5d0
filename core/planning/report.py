"""A plan as data: every figure with its unit and where it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...platforms.interface import Finding

BYTES = "bytes"
TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number. `value` None is unknown, and `source` then says why."""

    value: float | None
    unit: str
    source: str


Section = Mapping[str, Figure]


@dataclass(frozen=True, slots=True)
class Plan:
    """One model on one device. All figures are of one rank.

    `sections`: title → name → figure. `findings` are the platform's; `notes` say what is not
    counted and what does not fit. `runnable` False: figures only, this engine cannot run it yet.
    """

    model: str
    architecture: str
    runnable: bool
    platform: str
    device: str
    present: bool
    settings: Mapping[str, Any]
    sections: Mapping[str, Section]
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def value(self, section: str, name: str) -> float | None:
        return self.sections[section][name].value

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = dataclasses.asdict(self)
        plain["findings"] = [
            {**finding, "value": _plain(finding["value"])} for finding in plain["findings"]
        ]
        return plain


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | None) else str(value)
