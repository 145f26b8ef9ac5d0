"""Building the native library with gcc: by `setup.py`, and by the tests for other variants.

One object for each instruction set from the same sources; the flags of a set apply to its object
alone. No torch headers and no libraries: `-fopenmp` is given to the compiler and not to the
linker, so that the library uses the pool of the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

Flags = Mapping[str, Sequence[str]]

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
FLAGS: Flags = {
    "run": ["-fopenmp"],
    "collective": [*_AVX2, "-fopenmp"],
    "threads": ["-fopenmp"],
    "isa_avx2": _AVX2,
    "isa_avx512": [*_AVX512, "-mprefer-vector-width=512"],
    "isa_avx512_bf16": [*_AVX512_BF16, "-mprefer-vector-width=512"],
    "isa_amx": [
        *_AVX512_BF16,
        *["-mamx-tile", "-mamx-bf16", "-mamx-int8", "-mprefer-vector-width=512"],
    ],
}
"""Flags by object; each is compiled from the source of its name."""

EMULATED: Flags = {
    **FLAGS,
    "run": [*FLAGS["run"], "-DTRIMARAN_EMULATED"],
    **{
        name: [*_AVX2, "-DTRIMARAN_EMULATED", "-Wno-psabi", "-Og"]
        for name in ("isa_avx512", "isa_avx512_bf16", "isa_amx")
    },
}
"""The same sources for a processor with AVX2 alone: what wider sets compute, without their
instructions. For tests."""
FOLDERS_KEPT = 8  # of a cache
ERROR_SHOWN = 4000  # characters of a compiler's
SANITIZED = [
    *["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"],
    *["--param", "asan-instrumentation-with-call-threshold=0"],  # compiles in half the time
]


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
    flags: Flags = FLAGS,
    extra: Sequence[str] = (),
    program: Path | None = None,
    keep: bool = False,
) -> None:
    """Compile the objects into `work`, as many at once as there are cores, and link `target`: a
    library, or with the source of a `program` that, with an OpenMP runtime of its own. `extra`:
    further flags for compiler and linker. `keep`: a kernel's object that is there is the right
    one. Raises BuildError."""
    command = compiler()
    work.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    sources = {SOURCES / f"{name}.cpp": own for name, own in flags.items()}
    if program:
        sources[program] = [f"-I{SOURCES}"]

    def compile_one(source: Path, own: Sequence[str]) -> str:
        made = work / f"{source.stem}.o"
        if not keep or source == program or not made.exists():
            partial = made.with_suffix(".partial")
            _run([*command, *COMMON, *own, *extra, "-c", str(source), "-o", str(partial)])
            partial.replace(made)
        return str(made)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda item: compile_one(*item), sources.items()))
    partial = target.with_suffix(f".{os.getpid()}")
    _run([*command, "-fopenmp" if program else "-shared", *extra, *objects, "-o", str(partial)])
    partial.replace(target)


def built(
    cache: Path, flags: Flags = FLAGS, extra: Sequence[str] = (), program: Path | None = None
) -> Path:
    """What `build` makes, made once: kept in a folder of `cache` named by a hash of all that the
    kernels are made of. Raises BuildError."""
    work = cache / _fingerprint(SOURCES, compiler(), COMMON, flags, extra)
    target = work / (f"{program.stem}-{_fingerprint(program.parent)}" if program else LIBRARY)
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests side by side build a library once
        if not target.exists():
            build(target, work, flags, extra, program, keep=True)
    folders = sorted((path for path in cache.iterdir() if path.is_dir()), key=os.path.getmtime)
    for old in folders[:-FOLDERS_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _fingerprint(folder: Path, *others: object) -> str:
    """Of the files in a folder and whatever else is given."""
    digest = hashlib.sha256(repr(others).encode())
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr.strip()[:ERROR_SHOWN]}")


def main() -> None:
    """`python -m trimaran.kernels_cpu.build` builds the package's library again, after a change;
    with `emulated CACHE`, the emulated one, and prints its path."""
    if sys.argv[1:2] == ["emulated"]:
        print(built(Path(sys.argv[2]), EMULATED))
        return
    with tempfile.TemporaryDirectory() as directory:
        build(Path(__file__).parent / LIBRARY, Path(directory))


if __name__ == "__main__":
    main()
