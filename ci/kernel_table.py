"""What every Triton kernel takes on every architecture: docs/kernels.md.

    python ci/kernel_table.py            compile for all architectures, write the table
    python ci/kernel_table.py --check    from the reports that the compile rows left, those that are
                                         missing compiled now; exit status 1 where the table says
                                         something else

Registers and shared memory are those of the Triton that the Makefile names.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trimaran.platforms.gpu_tables import SHARED_LIMIT

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / ".ci" / "cache" / "kernels"
TABLE = ROOT / "docs" / "kernels.md"
ARCHITECTURES = tuple(SHARED_LIMIT)

HEAD = """\
# What the Triton kernels take

Written by `ci/kernel_table.py` from what the compile rows of `ci/matrix.yaml` report (Triton
{triton}): registers a thread / KiB of shared memory a block, the most of a case's binaries. Nothing
spills: a row that finds one fails. `-`: the architecture has no such numbers (an 8-bit
float), or no registers for such heads.

"""


def compile_for(architectures: Iterable[str]) -> None:
    """Two at a time: a compilation is one thread's."""

    def one(architecture: str) -> None:
        report = REPORTS / f"{architecture}.json"
        command = [sys.executable, "ci/compile_kernels.py", architecture, "--report", str(report)]
        print(architecture, flush=True)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{architecture}:\n{done.stderr[-4000:]}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, architectures))


def read_reports() -> dict[str, Any]:
    """By architecture."""
    return {
        name: json.loads((REPORTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ARCHITECTURES
    }


def cells(report: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """(kernel, case) -> registers / KiB."""
    most: dict[tuple[str, str], tuple[int, int]] = {}
    for one in report["binaries"]:
        key = one["kernel"], one["case"]
        registers, shared = most.get(key, (0, 0))
        most[key] = max(registers, one["registers"]), max(shared, one["shared"])
    return {key: f"{registers} / {shared / 1024:.0f}" for key, (registers, shared) in most.items()}


def table(reports: Mapping[str, Any]) -> str:
    columns = {name: cells(report) for name, report in reports.items()}
    rows = list(dict.fromkeys(key for column in columns.values() for key in column))
    lines = [
        f"| kernel | case | {' | '.join(columns)} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for key in sorted(rows, key=lambda key: (key[0], rows.index(key))):
        found = " | ".join(column.get(key, "-") for column in columns.values())
        lines.append(f"| {key[0]} | {key[1]} | {found} |")
    (triton,) = {report["triton"] for report in reports.values()}
    return HEAD.format(triton=triton) + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        compile_for(ARCHITECTURES)
        TABLE.write_text(table(read_reports()), encoding="utf-8")
        return 0
    compile_for(name for name in ARCHITECTURES if not (REPORTS / f"{name}.json").exists())
    if TABLE.read_text(encoding="utf-8") != table(read_reports()):
        print(f"{TABLE.name} is stale; run: python ci/kernel_table.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
