"""The native kernels for tests: whether they have to be here, and other builds of them, made once.
`python tests/helpers/native.py NAME` prints the path of one of `BUILDS`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trimaran.kernels_cpu.build import EMULATED, FLAGS, SANITIZED, BuildError, built, compiler
from trimaran.kernels_cpu.library import unavailable
from trimaran.platforms import host

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".ci" / "cache" / "native"
DRIVER = ROOT / "tests" / "native" / "driver.cpp"

BUILDS: dict[str, Callable[[], Path]] = {
    "library": lambda: built(CACHE, FLAGS),
    "emulated-library": lambda: built(CACHE, EMULATED),
    "driver": lambda: built(CACHE, FLAGS, program=DRIVER),
    "emulated-driver": lambda: built(CACHE, EMULATED, program=DRIVER),
    "sanitized-driver": lambda: built(CACHE, EMULATED, SANITIZED, DRIVER),
}
"""The driver runs every kernel without torch."""


def no_compiler() -> str:
    """Why nothing can be built here; empty where it can."""
    try:
        compiler()
    except BuildError as error:
        return str(error)
    return ""


def _absent() -> str:
    """Why the kernels are not here. Empty as well where they should be, on a processor for them and
    with a compiler: then their absence is a fault, which tests have to show."""
    possible = not no_compiler() and {"avx2", "fma", "f16c"} <= host.cpu_flags()
    return "" if possible else unavailable()


_reason = _absent()
needs_native = pytest.mark.skipif(bool(_reason), reason=f"no native kernels: {_reason}")


def build_of(name: str) -> Path:
    """One of `BUILDS`. Skips the test where there is no compiler; raises BuildError where that
    refuses."""
    if reason := no_compiler():
        pytest.skip(reason)
    return BUILDS[name]()


if __name__ == "__main__":
    print(BUILDS[sys.argv[1]]())
