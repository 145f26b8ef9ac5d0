"""`trimaran tune`: measures what the GPU kernels are launched with, and writes a table of its own
for the card at hand."""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError, PlatformError
from .flags import check_writable, number

if TYPE_CHECKING:
    from ..platforms.gpu_platform import GpuPlatform
    from ..platforms.gpu_tune import Tuning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--platform", metavar="NAME", help="cuda or rocm (the one with a card).")
    parser.add_argument(
        "--device", type=number(int, 0), default=0, metavar="N", help="Which of its cards (0)."
    )
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="Only these kernels (all).")
    parser.add_argument(
        "--minutes",
        type=number(float, 0),
        default=math.inf,
        metavar="M",
        help="Stop after so long; the same command goes on from there.",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="Where to write (the user's cache, where it is found)."
    )
    parser.add_argument(
        "--list", action="store_true", help="Show the table in use, and measure nothing."
    )


def run(namespace: argparse.Namespace) -> int:
    hull = find_hull(namespace.platform)
    if namespace.list:
        _list(hull, namespace.kernel or [])
        return 0
    out = _out(namespace.out, _card(hull, namespace.device).architecture)
    return _tune(hull, namespace, out)


def find_hull(name: str | None) -> GpuPlatform:
    """The platform with the cards. PlatformError, with what each of them misses, for none."""
    from ..platforms.gpu_kernels import triton_missing
    from ..platforms.gpu_platform import GpuPlatform
    from ..platforms.registry import available

    reasons = []
    for candidate in available():
        if candidate.cls is None or not issubclass(candidate.cls, GpuPlatform):
            continue
        if name not in (None, candidate.name):
            continue
        if candidate.usable and not triton_missing():
            return candidate.cls()
        reason = triton_missing() if candidate.usable else candidate.probe.reason
        reasons.append(f"{candidate.name}: {reason}")
    known = "; ".join(reasons) or f"{name} is no platform with Triton kernels; cuda and rocm are"
    raise PlatformError(f"There is no card to tune for: {known}")


def _card(hull: GpuPlatform, device: int) -> Any:
    try:
        return hull.card(device)
    except ValueError as error:
        raise ConfigError(f"--device: {error}") from error


def _out(given: str | None, architecture: str) -> Path:
    from ..platforms.gpu_user_table import user_table_path

    path = Path(given) if given else user_table_path(architecture)
    if path is None:
        raise ConfigError("There is no home to write to: name a file with --out.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path.parent} cannot be made: {error.strerror}.") from None
    check_writable(str(path))
    return path


def _list(hull: GpuPlatform, kernels: list[str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    used = hull.kernel_table
    shown = Table("kernel", "when", "values", "source", title=used.origin, title_justify="left")
    for kernel, entries in used.table.entries.items():
        for entry in entries if not kernels or kernel in kernels else ():
            when, values = (
                ", ".join(f"{name} {value}" for name, value in pairs.items())
                for pairs in (entry.when, entry.values)
            )
            shown.add_row(kernel, when or "else", values, escape(entry.source))
    Console().print(shown)


def _tune(hull: GpuPlatform, namespace: argparse.Namespace, out: Path) -> int:
    """0: all entries are measured; 3: the time was over first; 130: interrupted."""
    from ..kernels_cuda.portable.tuning import dump
    from ..platforms.gpu_tune import improved, tunable
    from ..platforms.tune_search import CardLost, OutOfTime

    deadline = time.monotonic() + 60 * namespace.minutes
    tuning, where = _open(hull, namespace.device, out, lambda: time.monotonic() < deadline)
    try:
        kernels = tunable(tuning.table, namespace.kernel or [])
    except ValueError as error:
        raise ConfigError(f"--kernel: {error}") from error
    status = 0
    try:
        _follow(tuning, kernels)
    except OutOfTime:
        status = 3
    except KeyboardInterrupt:
        status = 130
    except CardLost as lost:
        raise PlatformError(
            f"The card answers no more: {lost}. Run this again: it goes on."
        ) from None
    finally:
        whole = out.with_name(f"{out.name}.new")
        whole.write_text(dump(improved(tuning.table, tuning.journal, where)), encoding="utf-8")
        whole.replace(out)
    for entry, reason in tuning.journal.skipped.items():
        print(f"{entry} stays as it is: {reason}", file=sys.stderr)
    total = sum(len(entries) for entries in tuning.table.entries.values())
    done = f"{len(tuning.journal.finished)} of {total} entries are measured"
    print(f"{out}: {done}{'; run this again to go on' if status else ''}")
    return status


def _open(hull: GpuPlatform, device: int, out: Path, in_time: Any) -> tuple[Tuning, str]:
    """What is to be done, and what the table's sources say of where."""
    import hashlib

    import triton

    from ..kernels_cuda.portable.cases import CASES
    from ..kernels_cuda.portable.tuning import dump
    from ..platforms.gpu_tune import GraphTimer, Tuning, starting_table
    from ..platforms.interface import PlatformUnavailable
    from ..platforms.tune_journal import Journal

    card, driver = hull.card(device), hull.survey().driver
    table = starting_table(card.architecture)
    facts = {"card": card.name, "triton": triton.__version__}
    started = hashlib.sha256(dump(table).encode()).hexdigest()
    try:
        there = hull.open(device).torch_device
    except PlatformUnavailable as error:
        raise PlatformError(str(error)) from error
    journal = Journal(out.with_name(f"{out.stem}.jsonl"), {**facts, "table": started})
    if journal.moved:
        print(f"what was measured of something else is now {journal.moved}", file=sys.stderr)
    told = f"driver for {hull.vendor_facts.software} {driver[0]}.{driver[1]}" if driver else ""
    words = (card.name, f"Triton {triton.__version__}", told, str(datetime.date.today()))
    tuning = Tuning(table, CASES, there, GraphTimer(there), journal, in_time, print)
    return tuning, ", ".join(word for word in words if word)


def _follow(tuning: Tuning, kernels: list[str]) -> None:
    from dataclasses import replace

    from rich.progress import Progress

    total = sum(len(tuning.table.entries[kernel]) for kernel in kernels)
    with Progress() as progress:
        task = progress.add_task("tuning", total=total)

        def tell(text: str) -> None:
            progress.console.print(text, markup=False, highlight=False)

        for entry in replace(tuning, tell=tell).run(kernels):
            progress.update(task, advance=1, description=entry)
