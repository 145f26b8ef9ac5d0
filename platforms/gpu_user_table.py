"""Which tuning table the kernels are launched with: the user's own, which `trimaran tune` wrote, or
the one in the box."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from ..kernels_cuda.portable.tuning import Table, fingerprint, load
from .gpu_kernels import table_for
from .user_environment import user_cache

logger = logging.getLogger("trimaran.gpu")


@dataclass(frozen=True, slots=True)
class TableInUse:
    """`path`: of a user's table, or None: the one in the box is taken. `refused`: why a user's
    table that is there is not."""

    table: Table
    path: Path | None = None
    refused: str = ""

    @property
    def origin(self) -> str:
        """For people."""
        if self.path is not None:
            return f"tuned for {self.table.architecture} on this machine, {self.path}"
        return f"tuned for {self.table.architecture}" + (
            f"; {self.refused}" if self.refused else ""
        )


def user_table_path(architecture: str) -> Path | None:
    """Where a user's table is looked for; None where there is no home."""
    cache = user_cache()
    return None if cache is None else cache / "tuning" / f"{architecture}.toml"


def table_in_use(architecture: str) -> TableInUse:
    """For a card of `architecture`. A user's table that cannot be taken is told in one logged line,
    and the box's is taken."""
    box, path = table_for(architecture), user_table_path(architecture)
    if path is None or not path.exists():
        return TableInUse(box)
    try:
        table = load(path)
        reason = _mismatch(table, box, architecture)
    except (ValueError, TypeError, AttributeError, OSError) as error:  # anything a file can hold
        reason = f"{type(error).__name__}: {error}"
    if not reason:
        return TableInUse(table, path)
    refused = f"{path} is not used: {reason}; write it again: trimaran tune"
    logger.warning("%s", refused)
    return TableInUse(box, None, refused)


def _mismatch(table: Table, box: Table, architecture: str) -> str:
    """Why a table cannot take the place of the box's; empty: it can."""
    if table.architecture != architecture:
        return f"it is for {table.architecture}, and the card is {architecture}"
    if table.kernels != fingerprint():
        return f"it was written for other kernels ({table.kernels or 'it does not say which'})"
    if (table.fp8, table.max_head_dim) != (box.fp8, box.max_head_dim):
        return "its `fp8` or `max_head_dim` is not that of the table in the box"
    if different := sorted(table.entries.keys() ^ box.entries.keys()):
        return f"it and the table in the box differ in their kernels: {', '.join(different)}"
    for kernel, entries in table.entries.items():
        shapes = [
            [
                (dict(entry.when), {name for name in entry.values if name.isupper()})
                for entry in found
            ]
            for found in (entries, box.entries[kernel])
        ]
        if shapes[0] != shapes[1]:
            return f"[[{kernel}]] is for other sizes, or sets other constants, than in the box"
    return ""
