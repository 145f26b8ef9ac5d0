"""`trimaran conform`: proves a platform, level by level, and writes down what was found."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from .flags import check_writable, number

if TYPE_CHECKING:
    from ..conformance.base import Level
    from ..conformance.report import Outcome, Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--platform",
        required=True,
        help="A platform's name, or module:Class for one in the making.",
    )
    parser.add_argument("--device", type=number(int, 0), default=0, help="Its device. (default: 0)")
    parser.add_argument(
        "--isa",
        metavar="avx2|avx512|avx512_bf16|amx",
        help="The instruction set that the cpu platform's kernels use. (default: the best)",
    )
    parser.add_argument("--report", metavar="FILE", help="Write the report there, as JSON.")
    parser.add_argument("--json", action="store_true", help="Print the report as JSON.")
    parser.add_argument("--level", metavar="L0,L1", help="Only these levels. (default: all)")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="Only this check, those whose names begin with it (L1/rms_norm), or a pattern.",
    )
    parser.add_argument("--quick", action="store_true", help="Fewer sizes, specs and programs.")
    parser.add_argument(
        "--seed", type=number(int, 0), default=0, help="What random cases are made from."
    )
    parser.add_argument(
        "--isolate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="A process for each level, so that a crash or a hang fails one check.",
    )
    parser.add_argument(
        "--time-limit",
        type=number(float, 1),
        default=300.0,
        metavar="SECONDS",
        help="The longest that one check may take. (default: 300)",
    )
    parser.add_argument(
        "--skip-budget",
        type=number(float, 0, 1),
        default=None,
        metavar="SHARE",
        help="Most optional checks that may be skipped, as a share of all. (default: 0.25)",
    )


def run(namespace: argparse.Namespace) -> int:
    from ..conformance.base import Subject
    from ..conformance.report import SKIP_BUDGET
    from ..conformance.runner import run_kit

    levels = _levels(namespace.level)
    if namespace.report:
        check_writable(namespace.report)
    if namespace.isa and (refusal := _refusal(namespace.isa, namespace.platform)):
        print(f"trimaran conform: error: {refusal}", file=sys.stderr)
        return 2
    subject = Subject(namespace.platform, namespace.device, namespace.seed, namespace.quick)
    budget = SKIP_BUDGET if namespace.skip_budget is None else namespace.skip_budget
    report = run_kit(
        subject,
        levels,
        namespace.only,
        namespace.isolate,
        namespace.time_limit,
        budget,
        partial=namespace.level is not None,
        progress=_Watch(),
    )
    if report.absent:
        print(f"trimaran conform: error: {report.absent}", file=sys.stderr)
        return 2
    if namespace.report:
        report.write(namespace.report)
    if namespace.json:
        json.dump(report.to_json(), sys.stdout, indent=1)
        print()
    else:
        _print(report)
    return 0 if report.ok else 1


def _refusal(isa: str, platform: str) -> str:
    """Have the kernels use that instruction set; why they cannot, or empty."""
    from ..kernels_cpu.library import NativeUnavailable, use

    if platform != "cpu":
        return f"--isa is for --platform cpu, not for {platform}"
    try:
        use(isa)
    except NativeUnavailable as error:
        return f"--isa {isa}: {error}"
    return ""


def _levels(wanted: str | None) -> list[Level]:
    from ..conformance.levels import LEVELS, level

    if wanted is None:
        return list(LEVELS)
    try:
        return [level(name.strip().upper()) for name in wanted.split(",")]
    except KeyError as error:
        print(f"trimaran conform: error: {error.args[0]}", file=sys.stderr)
        raise SystemExit(2) from None


class _Watch:
    """Progress on stderr: a line that moves where it is a terminal; failures as they come."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, markup=False)
        self._total = self._count = 0

    def level(self, level: Level, checks: int) -> None:
        self._total, self._count = checks, 0
        self._console.print(f"{level.name}: {level.title}, {checks} checks")

    def started(self, full_name: str) -> None:
        if self._console.is_terminal:
            shown = f"  [{self._count + 1}/{self._total}] {full_name}"
            self._console.file.write(f"\r\033[K{shown[: self._console.width - 1]}")
            self._console.file.flush()

    def finished(self, outcome: Outcome) -> None:
        self._count += 1
        if self._console.is_terminal:
            self._console.file.write("\r\033[K")
        if outcome.status == "failed":
            first = outcome.detail.partition("\n")[0]
            self._console.print(f"  FAILED {outcome.full_name}: {first}", style="red")


def _print(report: Report) -> None:
    from rich.console import Console

    console: Any = Console(highlight=False, markup=False, soft_wrap=True)
    for line in report.lines():
        style = "red" if line.startswith("FAILED") else None
        console.print(line, style=style)
