"""What a search for a tuning table has measured: a line of JSON each, written as it comes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Values = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Result:
    """An entry's end: `values` took `seconds` for all its cases where the start took `before` (both
    0: the start stays); `gain` is the part of its time that a candidate had to save, `tried` how
    many there were."""

    values: Values
    seconds: float
    before: float
    gain: float
    tried: int


class Journal:
    """The first line is the identity: of the card, the kernels, the table that is improved. A file
    with another one is moved aside, and `moved` says where. A last line that a kill has cut short
    is dropped; any other that cannot be read is a ValueError."""

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        self._path = path
        self._ratios: dict[str, float] = {}
        self._refused: dict[str, str] = {}
        self.finished: dict[str, Result] = {}
        self.skipped: dict[str, str] = {}
        self.moved: Path | None = None
        lines = self._read()
        if lines and lines[0] != {"identity": dict(identity)}:
            self.moved = path.with_name(f"{path.name}.old")
            path.replace(self.moved)
            lines = []
        for line in lines[1:]:
            self._take(line)
        self._rewrite(lines or [{"identity": dict(identity)}])

    def recall(self, entry: str, values: Values, other: Values) -> float | None:
        return self._ratios.get(_key(entry, values, other))

    def note(self, entry: str, values: Values, other: Values, ratio: float) -> None:
        self._add({"ratio": _key(entry, values, other), "is": ratio})

    def refusal(self, entry: str, values: Values) -> str:
        """Why these values were refused; empty: they were not."""
        return self._refused.get(_key(entry, values), "")

    def refuse(self, entry: str, values: Values, reason: str) -> None:
        self._add({"refused": _key(entry, values), "why": reason})

    def finish(self, entry: str, result: Result) -> None:
        self._add({"finished": entry, "result": asdict(result)})

    def skip(self, entry: str, reason: str) -> None:
        """Of an entry that cannot be tuned here. The next run tries it again."""
        self.skipped[entry] = reason

    def _add(self, line: dict[str, Any]) -> None:
        self._take(line)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _take(self, line: dict[str, Any]) -> None:
        if "ratio" in line:
            self._ratios[line["ratio"]] = line["is"]
        elif "refused" in line:
            self._refused[line["refused"]] = line["why"]
        else:
            self.finished[line["finished"]] = Result(**line["result"])

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        lines, found = self._path.read_text(encoding="utf-8").splitlines(), []
        for number, line in enumerate(lines, 1):
            try:
                found.append(json.loads(line))
            except ValueError:
                if number < len(lines):
                    raise ValueError(f"{self._path}: line {number} is no JSON; delete it") from None
        return found

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._path.with_name(f"{self._path.name}.new")
        whole.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        whole.replace(self._path)


def _key(entry: str, *values: Values) -> str:
    return json.dumps([entry, *(sorted(one.items()) for one in values)])
