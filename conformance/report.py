"""What the kit found, as data that is kept and as text that is read."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"

REFUSED = "refused: "
"""How the reason of a skip begins in which an implementation declined, as it may."""

SKIP_BUDGET = 0.25
"""Most checks that may be skipped, as a share of all."""


@dataclass(frozen=True)
class Outcome:
    """How one check ended. `detail`: what was wrong, or why it was skipped; `case`: the smallest
    input that shows it; `seconds`: how long it took; `measured`: unit → figure; `about`: what the
    check asks for."""

    level: str
    name: str
    status: str
    detail: str = ""
    case: str = ""
    seed: int | None = None
    seconds: float = 0.0
    measured: Mapping[str, float] = field(default_factory=dict)
    about: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.level}/{self.name}"


@dataclass
class Report:
    """The outcomes, and what they hold for. `bindings`: op → dtype → the implementation that
    engines choose. `reference`, `device`, `seed` and `quick` are how the kit was called."""

    reference: str
    device: int = 0
    seed: int = 0
    quick: bool = False
    partial: bool = False  # not all levels, or only some checks
    absent: str = ""  # why there was nothing to examine
    skip_budget: float = SKIP_BUDGET
    platform: str = ""
    vendor: str = ""
    origin: str = ""
    platform_api: str = ""
    engine_api: str = ""
    engine: str = ""
    torch: str = ""
    host: str = ""
    devices: list[dict[str, Any]] = field(default_factory=list)
    capabilities: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    bindings: dict[str, dict[str, str]] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failures(self) -> list[Outcome]:
        return [one for one in self.outcomes if one.status == FAILED]

    @property
    def skipped(self) -> list[Outcome]:
        return [one for one in self.outcomes if one.status == SKIPPED]

    @property
    def over_budget(self) -> bool:
        """Are more checks skipped than allowed? Asked of whole runs alone. What implementations
        refuse is not counted: others run there, and refusing is right whenever one is not sure."""
        allowed = self.skip_budget * len(self.outcomes)
        counted = [one for one in self.skipped if not one.detail.startswith(REFUSED)]
        return not self.partial and len(counted) > allowed

    @property
    def unproved(self) -> list[str]:
        """Levels of which every check was skipped."""
        return [level for level, counts in self.totals().items() if not counts[PASSED]]

    @property
    def ok(self) -> bool:
        return bool(self.outcomes) and not self.failures and not self.over_budget

    def totals(self) -> dict[str, dict[str, int]]:
        """Level → status → count."""
        counts: dict[str, Counter[str]] = {}
        for one in self.outcomes:
            counts.setdefault(one.level, Counter())[one.status] += 1
        return {
            level: {status: found[status] for status in (PASSED, FAILED, SKIPPED)}
            for level, found in counts.items()
        }

    def command(self, outcome: Outcome) -> str:
        """What to type to see that outcome again."""
        words = ["trimaran", "conform", "--platform", self.reference]
        if self.device:
            words += ["--device", str(self.device)]
        words += ["--only", outcome.full_name, "--seed", str(self.seed)]
        return shlex.join(words + (["--quick"] if self.quick else []))

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {"ok": self.ok, "totals": self.totals(), **values}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Report:
        names = {one.name for one in dataclasses.fields(cls)}
        known = {key: value for key, value in values.items() if key in names}
        known["outcomes"] = [Outcome(**one) for one in values["outcomes"]]
        return cls(**known)

    def write(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Report:
        return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))

    def lines(self) -> Iterator[str]:
        """The report for people, plain text, a line each."""
        yield f"{self.platform or self.reference} ({self.vendor or 'vendor unknown'})"
        yield f"  from {self.origin or 'unknown'}, written for platform API {self.platform_api}"
        yield f"  engine {self.engine} (platform API {self.engine_api}), torch {self.torch}"
        for device in self.devices:
            yield f"  device {device.get('index')}: {device.get('name')}"
        yield from (f"  {name}: {said}" for name, said in self.facts.items())
        yield ""
        if self.outcomes:
            yield from _aligned(self._totals_rows())
        if speed := self._speed_rows():
            yield ""
            yield from _aligned(speed)
        for one in self.failures:
            yield ""
            yield from self._failure(one)
        if self.skipped:
            yield ""
            yield from (f"skipped {one.full_name}: {one.detail}" for one in self.skipped)
        yield ""
        yield self.verdict()

    def verdict(self) -> str:
        counts = Counter(one.status for one in self.outcomes)
        words = ", ".join(f"{counts[status]} {status}" for status in (PASSED, FAILED, SKIPPED))
        if self.absent:
            return self.absent
        if not self.outcomes:
            return f"{self.platform or self.reference}: no check is of that name"
        said = "conforms" if self.ok else "does not conform"
        if self.ok and self.unproved:
            said += f", but nothing of {' and '.join(self.unproved)} was run"
        if self.ok and self.partial:
            said = "conforms as far as it was asked"
        said += " (quick)" if self.quick else ""
        over = ""
        if self.over_budget:
            over = f"; more is skipped than the budget of {self.skip_budget:.0%} allows"
        return f"{self.platform or self.reference} {said}: {words} in {self.seconds:.0f} s{over}"

    def _totals_rows(self) -> list[Sequence[str]]:
        rows: list[Sequence[str]] = [("level", PASSED, FAILED, SKIPPED, "seconds")]
        for level, counts in self.totals().items():
            spent = sum(one.seconds for one in self.outcomes if one.level == level)
            rows.append((level, *(str(count) for count in counts.values()), f"{spent:.1f}"))
        return rows

    def _speed_rows(self) -> list[Sequence[str]]:
        measured = [one for one in self.outcomes if one.measured]
        if not measured:
            return []
        rows: list[Sequence[str]] = [("check", "result", "measured")]
        for one in measured:
            shown = ", ".join(f"{value:.4g} {unit}" for unit, value in one.measured.items())
            rows.append((one.full_name, one.status, shown))
        return rows

    def _failure(self, one: Outcome) -> Iterator[str]:
        yield f"FAILED {one.full_name}"
        if one.about:
            yield f"  asked: {one.about}"
        yield from (f"  {line}" for line in one.detail.splitlines())
        if one.case:
            yield "  smallest case" + (f" (seed {one.seed})" if one.seed is not None else "") + ":"
            yield from (f"    {line}" for line in one.case.splitlines())
        yield f"  again: {self.command(one)}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()
