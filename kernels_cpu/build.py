"""Building the native library with gcc: by `setup.py`, and by the tests for other variants.

One object for each instruction set from the same sources; the flags of a set apply to its object
alone. No torch headers and no libraries: `-fopenmp` is given to the compiler and not to the
linker, so that the library uses the pool of the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = "native.so"

COMMON = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, *["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]]
_AVX512_BF16 = [*_AVX512, "-mavx512bf16", "-mavx512vnni"]
FLAGS = {
    "run": ["-fopenmp"],
    "isa_avx2": _AVX2,
    "isa_avx512": [*_AVX512, "-mprefer-vector-width=512"],
    "isa_avx512_bf16": [*_AVX512_BF16, "-mprefer-vector-width=512"],
    "isa_amx": [
        *_AVX512_BF16,
        *["-mamx-tile", "-mamx-bf16", "-mamx-int8", "-mprefer-vector-width=512"],
    ],
}
"""Flags by object; each is compiled from the source of its name."""

EMULATED = {
    name: [*_AVX2, "-DTRIMARAN_EMULATED"] if name.startswith("isa_") else flags
    for name, flags in FLAGS.items()
}
"""The same sources for a processor with AVX2 alone: what wider sets compute, without their
instructions. For tests."""


class BuildError(RuntimeError):
    """The compiler is missing or refused; the message is its own."""


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else g++. gcc alone: other compilers emit calls of another
    OpenMP runtime. Raises BuildError."""
    command = shlex.split(os.environ.get("CXX", "g++"))
    if not command or shutil.which(command[0]) is None:
        raise BuildError(f"no C++ compiler: {' '.join(command)} is not found (Debian: g++)")
    return command


def build(
    target: Path,
    work: Path,
    flags: dict[str, list[str]] | None = None,
    extra: Sequence[str] = (),
) -> None:
    """Compile the objects into `work`, as many at once as there are cores, and link `target`.
    `extra`: further flags for compiler and linker. Raises BuildError."""
    command = compiler()
    work.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)

    def compile_one(name: str, own: list[str]) -> Path:
        made = work / f"{name}.o"
        source = SOURCES / f"{name}.cpp"
        _run([*command, *COMMON, *own, *extra, "-c", str(source), "-o", str(made)])
        return made

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda item: compile_one(*item), (flags or FLAGS).items()))
    partial = target.with_suffix(f".{os.getpid()}")
    _run([*command, "-shared", *extra, *map(str, objects), "-o", str(partial)])
    partial.replace(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr.strip()}")


if __name__ == "__main__":  # python -m trimaran.kernels_cpu.build: again, after a change
    with tempfile.TemporaryDirectory() as directory:
        build(Path(__file__).parent / LIBRARY, Path(directory))
