"""What Triton makes of the portable kernels: compiled and not launched, and what a binary takes.
Importing this imports Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from .user_environment import fuse_unless_told


class Resources(NamedTuple):
    """What a binary takes: registers a thread (AMD: vector registers), bytes that a thread spills,
    bytes of shared memory a block."""

    registers: int
    spilled: int
    shared: int

    def excess(self, shared_limit: int | None) -> str:
        """What a card should not be given; empty: nothing. `shared_limit`: None is not known."""
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes a thread")
        if shared_limit is not None and self.shared > shared_limit:
            found.append(f"takes {self.shared} bytes of shared memory, not {shared_limit} at most")
        return ", ".join(found)


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


def without_card(architecture: str) -> None:
    """From here on this process compiles for `architecture` and can launch nothing."""
    triton.runtime.driver.set_active(NoDevice(target_of(architecture)))


@contextmanager
def compiling_only() -> Iterator[list[Any]]:
    """Inside, launches compile for the active driver's target; what they compiled is appended to
    the list. (The interpreter compiles nothing: there they run.)"""
    fuse_unless_told()
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


def resources(binary: Any) -> Resources:
    shared = int(binary.metadata.shared)
    if "cubin" in binary.asm:
        return Resources(*_cubin_usage(binary.asm["cubin"]), shared)
    told = re.findall(r"^\s*\.(\w+):\s+(\d+)$", binary.asm["amdgcn"], re.MULTILINE)
    found = {name: int(value) for name, value in told}
    spilled = 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])
    return Resources(found["vgpr_count"], spilled, max(found["group_segment_fixed_size"], shared))


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
