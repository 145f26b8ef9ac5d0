"""Builds of the native kernels for tests, made once: `python tests/helpers/native.py NAME` prints
the path of one of `BUILDS`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from trimaran.kernels_cpu.build import EMULATED, FLAGS, SANITIZED, built

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

if __name__ == "__main__":
    print(BUILDS[sys.argv[1]]())
