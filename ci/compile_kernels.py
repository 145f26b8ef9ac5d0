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
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # it would turn kernels into Python functions

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from trimaran.kernels_cuda.portable.cases import CASES, Case
from trimaran.kernels_cuda.portable.tuning import Table
from trimaran.platforms.gpu_kernels import table_for
from trimaran.platforms.gpu_tables import SHARED_LIMIT
from trimaran.platforms.user_environment import fuse_unless_told


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


class Watched(Table):
    """A table that notes the entries it is asked for, as (kernel, number)."""

    picked: set[tuple[str, int]]

    def __init__(self, table: Table) -> None:
        super().__init__(table.architecture, table.fp8, table.entries, table.max_head_dim)
        object.__setattr__(self, "picked", set())

    def number_of(self, kernel: str, sizes: Mapping[str, int]) -> int:
        number = super().number_of(kernel, sizes)
        self.picked.add((kernel, number))
        return number


class NoDevice:
    """Triton's driver where there is no card: it knows the target and nothing else."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def target_of(architecture: str) -> GPUTarget:
    """RDNA runs waves of 32, CDNA of 64."""
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 32 if architecture.startswith("gfx1") else 64)


@contextmanager
def compiling_only(target: GPUTarget) -> Iterator[list[Any]]:
    """Inside, launches compile; what they compiled is appended to the list."""
    fuse_unless_told()
    triton.runtime.driver.set_active(NoDevice(target))
    caught: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        caught.append(run(self, *args, grid=grid, warmup=True, **options))
        return caught[-1]

    JITFunction.run = compile_only
    try:
        yield caught
    finally:
        JITFunction.run = run


def resources(binary: Any) -> tuple[int, int, int]:
    """Registers a thread, spilled bytes a thread, shared memory a block."""
    shared = int(binary.metadata.shared)
    if "cubin" in binary.asm:
        return *_cubin_usage(binary.asm["cubin"]), shared
    told = re.findall(r"^\s*\.(\w+):\s+(\d+)$", binary.asm["amdgcn"], re.MULTILINE)
    found = {name: int(value) for name, value in told}
    spilled = 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])
    return found["vgpr_count"], spilled, max(found["group_segment_fixed_size"], shared)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory, which is where they spill."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", told))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def compile_cases(cases: Sequence[Case], table: Table) -> list[Compiled]:
    """Those of the cases that fit the architecture; prints a line for each binary."""
    meta, done = torch.device("meta"), []
    with compiling_only(target_of(table.architecture)) as caught:
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
        if one.spilled:
            faults.append(f"{where} spills {one.spilled} bytes a thread")
        if one.shared > limit:
            faults.append(f"{where} takes {one.shared} bytes of shared memory, not {limit} at most")
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
