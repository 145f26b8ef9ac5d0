"""Tuning tables: what a kernel is launched with on an architecture, chosen by the sizes at hand.

A table is a TOML file. Each kernel has a list of entries; the first one whose `when` holds (every
size it names is at most what it says) is taken, and the last one has none:

    architecture = "sm_90"
    fp8 = ["float8_e4m3fn", "float8_e5m2"]

    [[rms_norm]]
    when = { size = 1024 }
    values = { ROWS = 4, num_warps = 4 }
    source = "where these numbers come from"

`values` are the kernel's constants (in capitals) and Triton's launch options. `fp8` names the
8-bit floats that the architecture converts, `max_head_dim` the largest heads whose attention its
registers hold (left out: 256). `kernels` is the `fingerprint` of the sources that a table was
measured with; tables in the box, which change together with them, have none.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class Entry:
    """`source` says where the numbers come from: a measurement, a paper, another table."""

    when: Mapping[str, int]
    values: Mapping[str, Any]
    source: str

    def holds(self, sizes: Mapping[str, int]) -> bool:
        return all(sizes[name] <= most for name, most in self.when.items())


@dataclass(frozen=True, slots=True)
class Table:
    architecture: str
    fp8: tuple[str, ...]
    entries: Mapping[str, tuple[Entry, ...]]
    max_head_dim: int = MAX_HEAD_DIM
    kernels: str = ""

    def number_of(self, kernel: str, sizes: Mapping[str, int]) -> int:
        """Which of `kernel`'s entries is for these sizes. KeyError for a kernel that the table does
        not have, or a size that an entry asks for and the caller does not tell."""
        return next(i for i, entry in enumerate(self.entries[kernel]) if entry.holds(sizes))

    def pick(self, kernel: str, **sizes: int) -> dict[str, Any]:
        """What to launch `kernel` with; raises like `number_of`."""
        return dict(self.entries[kernel][self.number_of(kernel, sizes)].values)

    def with_entry(self, kernel: str, number: int, entry: Entry) -> Table:
        """With `entry` in the place of `kernel`'s `number`th."""
        found = self.entries[kernel]
        changed = (*found[:number], entry, *found[number + 1 :])
        return dataclasses.replace(self, entries={**self.entries, kernel: changed})

    def constants_only(self) -> Table:
        """Without launch options: what Triton's interpreter can run."""

        def plain(entry: Entry) -> Entry:
            kept = {name: value for name, value in entry.values.items() if name.isupper()}
            return dataclasses.replace(entry, values=kept)

        entries = {kernel: tuple(map(plain, found)) for kernel, found in self.entries.items()}
        return dataclasses.replace(self, entries=entries)


class Watched(Table):
    """A table that notes the entries it is asked for, as (kernel, number)."""

    picked: set[tuple[str, int]]

    def __init__(self, table: Table) -> None:
        values = {field.name: getattr(table, field.name) for field in dataclasses.fields(Table)}
        super().__init__(**values)
        object.__setattr__(self, "picked", set())

    def number_of(self, kernel: str, sizes: Mapping[str, int]) -> int:
        number = super().number_of(kernel, sizes)
        self.picked.add((kernel, number))
        return number


def load(path: Path) -> Table:
    """Read a table. ValueError, naming file and kernel, for one that is not well formed."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    architecture = content.pop("architecture", None)
    if not isinstance(architecture, str):
        raise ValueError(f"{path.name}: say which `architecture` the table is for")
    fp8 = tuple(content.pop("fp8", ()))
    most = content.pop("max_head_dim", MAX_HEAD_DIM)
    kernels = content.pop("kernels", "")
    entries = {kernel: _entries(path, kernel, found) for kernel, found in content.items()}
    return Table(architecture, fp8, entries, most, kernels)


def dump(table: Table) -> str:
    """A table as `load` reads it."""
    lines = [f"architecture = {_toml(table.architecture)}", f"fp8 = {_toml(list(table.fp8))}"]
    if table.max_head_dim != MAX_HEAD_DIM:
        lines.append(f"max_head_dim = {table.max_head_dim}")
    if table.kernels:
        lines.append(f"kernels = {_toml(table.kernels)}")
    for kernel, entries in table.entries.items():
        for entry in entries:
            lines += ["", f"[[{kernel}]]"]
            lines += [f"when = {_toml(entry.when)}"] if entry.when else []
            lines += [f"values = {_toml(entry.values)}", f"source = {_toml(entry.source)}"]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """A number, a truth, a text, a list or a map of them: but for the map's, JSON's form."""
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{name} = {_toml(one)}' for name, one in value.items())} }}"
    return json.dumps(value, ensure_ascii=False)


@functools.cache
def fingerprint() -> str:
    """Of the kernels' sources. Cases and spaces launch nothing while serving."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if not path.name.startswith(("case", "spaces")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _entries(path: Path, kernel: str, found: Any) -> tuple[Entry, ...]:
    where = f"{path.name}: [[{kernel}]]"
    try:
        entries = tuple(Entry(one.get("when", {}), one["values"], one["source"]) for one in found)
    except KeyError as error:
        raise ValueError(f"{where}: an entry has no {error}") from None
    if any(not entry.when for entry in entries[:-1]) or entries[-1].when:
        raise ValueError(f"{where}: the last entry, and it alone, goes without `when`")
    return entries
