"""Compiles every Triton kernel with every entry of an architecture's tuning table, without a card.

    python ci/compile_kernels.py cuda sm_90 [--report FILE] [--kernel NAME ...]

The cases of `kernels_cuda/portable/cases.py` are called as on a card, with tensors without memory:
so the JIT itself specialises their arguments. A driver that has no device takes its place where it
would launch. Fails for a kernel that spills, one that takes more shared memory than a block may
have, and an entry that no case reaches.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from trimaran.kernels_cuda.portable.cases import CASES
from trimaran.kernels_cuda.portable.tuning import Table, load

ROOT = Path(__file__).resolve().parents[1]
KIB = 1024
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": the most shared
# memory of a thread block. AMD: LDS of a work group, from the instruction set documents.
SHARED_LIMIT = {
    "sm_80": 163 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx90a": 64 * KIB,
    "gfx942": 64 * KIB,
    "gfx950": 160 * KIB,
    "gfx1100": 64 * KIB,
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one binary takes: registers a thread (AMD: vector registers), bytes that a thread
    spills, bytes of shared memory a block."""

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

    def __init__(self, table: Table) -> None:
        super().__init__(table.architecture, table.fp8, table.entries)
        object.__setattr__(self, "picked", set())

    def pick(self, kernel: str, **sizes: int) -> dict[str, Any]:
        number = next(i for i, e in enumerate(self.entries[kernel]) if e.holds(sizes))
        self.picked.add((kernel, number))
        return super().pick(kernel, **sizes)


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


def target_of(backend: str, architecture: str) -> GPUTarget:
    if backend == "cuda":
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 32 if architecture.startswith("gfx1") else 64)


def table_of(backend: str, architecture: str) -> Table:
    path = ROOT / f"kernels_{backend}" / "tuning" / f"{architecture}.toml"
    return load(path)


def catch_launches(target: GPUTarget) -> list[Any]:
    """From now on launches compile, and what they compiled is appended to the returned list."""
    triton.runtime.driver.set_active(NoDevice(target))
    caught: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        caught.append(run(self, *args, grid=grid, warmup=True, **options))
        return caught[-1]

    JITFunction.run = compile_only
    return caught


def resources(binary: Any, backend: str) -> tuple[int, int, int]:
    """Registers a thread, spilled bytes a thread, shared memory a block."""
    if backend == "cuda":
        return *_cubin_usage(binary.asm["cubin"]), binary.metadata.shared
    text = binary.asm["amdgcn"]
    found = {
        name: int(value) for name, value in re.findall(r"^\s*\.(\w+):\s+(\d+)$", text, re.MULTILINE)
    }
    spilled = 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])
    return (
        found["vgpr_count"],
        spilled,
        max(found["group_segment_fixed_size"], binary.metadata.shared),
    )


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (which is where registers spill) a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", told))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def compile_all(table: Watched, backend: str, kernels: Sequence[str]) -> list[Compiled]:
    """Every case that fits the architecture, of `kernels` (none named: of all)."""
    caught = catch_launches(target_of(backend, table.architecture))
    meta = torch.device("meta")
    done = []
    for case in CASES:
        if (kernels and case.kernel not in kernels) or not case.fits(table):
            continue
        caught.clear()
        case.call(meta, table)()
        for binary in caught:
            row = Compiled(case.kernel, case.label, binary.name, *resources(binary, backend))
            print(row.line(), flush=True)
            done.append(row)
    return done


def missed(table: Watched, kernels: Sequence[str]) -> list[str]:
    """Entries that no case reached."""
    return [
        f"{kernel}: no case reaches entry {number} of {table.architecture}"
        for kernel, entries in table.entries.items()
        for number in range(len(entries))
        if (not kernels or kernel in kernels) and (kernel, number) not in table.picked
    ]


def over(one: Compiled, limit: int) -> str:
    """What is wrong with a binary; empty: nothing."""
    if one.spilled:
        return f"{one.kernel}, {one.case}: {one.binary} spills {one.spilled} bytes a thread"
    if one.shared > limit:
        taken = f"{one.shared} bytes of shared memory, a block may have {limit}"
        return f"{one.kernel}, {one.case}: {one.binary} takes {taken}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=("cuda", "hip"))
    parser.add_argument("architecture", choices=SHARED_LIMIT)
    parser.add_argument("--report", type=Path, help="write what each binary takes as JSON")
    parser.add_argument("--kernel", nargs="*", default=[], help="only these kernels of the table")
    args = parser.parse_args()
    table = Watched(table_of(args.backend, args.architecture))
    done = compile_all(table, args.backend, args.kernel)
    limit = SHARED_LIMIT[args.architecture]
    faults = [fault for one in done if (fault := over(one, limit))] + missed(table, args.kernel)
    print(f"{len(done)} binaries for {args.architecture}, {len(faults)} faults")
    for fault in faults:
        print(fault, file=sys.stderr)
    if args.report:
        args.report.write_text(json.dumps([asdict(one) for one in done], indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
