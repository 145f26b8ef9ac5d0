"""Compiles every Triton kernel with every entry of an architecture's tuning table, without a card.

    python ci/compile_kernels.py sm_90 [--report FILE] [--quick] [--kernel NAME ...]

The cases of `kernels_cuda/portable/cases.py` are called as on a card, with tensors without memory:
so the JIT itself specialises their arguments. A driver that has no device takes its place where it
would launch. Fails for a kernel that spills, one that takes more shared memory than a block may
have, and an entry that no case reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # it would turn kernels into Python functions

import torch
import triton

from trimaran.kernels_cuda.portable.cases import CASES, Case
from trimaran.kernels_cuda.portable.tuning import Table, Watched
from trimaran.platforms.gpu_binaries import Resources, compiling_only, resources, without_card
from trimaran.platforms.gpu_kernels import table_for
from trimaran.platforms.gpu_tables import SHARED_LIMIT


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one binary takes: registers a thread (AMD: vector registers), bytes that a thread
    spills, bytes of shared memory a block. `kernel`: its name in the tuning tables."""

    kernel: str
    case: str
    binary: str
    registers: int
    spilled: int
    shared: int

    def line(self) -> str:
        return (
            f"{self.kernel:20} {self.case:40} {self.binary:28}"
            f"{self.registers:5} {self.spilled:6} {self.shared:8}"
        )


def compile_cases(cases: Sequence[Case], table: Table) -> list[Compiled]:
    """Those of the cases that fit the architecture; prints a line for each binary."""
    meta, done = torch.device("meta"), []
    without_card(table.architecture)
    with compiling_only() as caught:
        for case in cases:
            if not case.fits(table):
                continue
            caught.clear()
            case.call(meta, table)()
            for binary in dict.fromkeys(caught):  # one that is launched often is one
                row = Compiled(case.kernel, case.label, binary.name, *resources(binary))
                print(row.line(), flush=True)
                done.append(row)
    return done


def faults_of(done: Sequence[Compiled], architecture: str) -> list[str]:
    """A line for each binary that is over budget."""
    limit, faults = SHARED_LIMIT[architecture], []
    for one in done:
        where = f"{architecture}: {one.kernel}, {one.case}: {one.binary}"
        if excess := Resources(one.registers, one.spilled, one.shared).excess(limit):
            faults.append(f"{where} {excess}")
    return faults


def unreached(table: Watched) -> list[str]:
    """A line for each entry that no case reached."""
    return [
        f"{table.architecture}: no case reaches entry {number} of {kernel}"
        for kernel, entries in table.entries.items()
        for number in range(len(entries))
        if (kernel, number) not in table.picked
    ]


def first_of_each(cases: Sequence[Case]) -> list[Case]:
    """A case a kernel."""
    return list({case.kernel: case for case in reversed(cases)}.values())[::-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", choices=SHARED_LIMIT)
    parser.add_argument("--report", type=Path, help="write what each binary takes as JSON")
    parser.add_argument("--quick", action="store_true", help="one case a kernel")
    parser.add_argument("--kernel", nargs="*", default=[], help="only these, whatever is reached")
    args = parser.parse_args()
    cases = [case for case in CASES if not args.kernel or case.kernel in args.kernel]
    table = Watched(table_for(args.architecture))
    done = compile_cases(first_of_each(cases) if args.quick else cases, table)
    faults = faults_of(done, args.architecture)
    if not (args.quick or args.kernel):
        faults += unreached(table)
    print(f"{len(done)} binaries for {args.architecture}, {len(faults)} faults")
    for fault in faults:
        print(fault, file=sys.stderr)
    if args.report:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        report = {"triton": triton.__version__, "binaries": [asdict(one) for one in done]}
        args.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
