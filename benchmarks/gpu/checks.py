"""Parts that say right or wrong by commands: the kernels' tests, the conformance kit, the device
tests. No torch here: the commands bring their own."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from .part import Bench, Found, OutOfTime, Piece, Record, Skip

CHECKOUT = Path(__file__).resolve().parents[2]
LEVELS = ("L0", "L1", "L2", "L3", "L4", "L5")
SERVER = ("fastapi", "httptools", "msgspec", "prometheus_client", "uvicorn", "uvloop", "zmq")
WANTED_BY = {"L4": ("msgspec",), "L5": SERVER}
"""The packages of the server extra that a level runs with: ranks talk by msgspec."""
MOST_SIDE_BY_SIDE = 8
PYTEST = [
    *(sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "--color=no"),
    *("-c", os.devnull, "-W", "ignore::pytest.PytestUnknownMarkWarning"),
    *(f"--{option}={CHECKOUT / 'tests'}" for option in ("rootdir", "confcutdir")),
]
"""Without the repository's own options, which name plugins that such a machine need not have; and
below its root, which is a package that would be imported by the name of the folder."""


def run_command(bench: Bench, command: list[str], keep: int = 60) -> Found:
    """The end of what it says. RuntimeError, with that, where it fails."""
    try:
        done = subprocess.run(
            command, cwd=CHECKOUT, capture_output=True, text=True, timeout=bench.left()
        )
    except subprocess.TimeoutExpired:
        raise OutOfTime from None
    tail = (done.stderr + done.stdout).splitlines()[-keep:]
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}\n" + "\n".join(tail))
    return {"tail": tail}


def trimaran(*words: str) -> list[str]:
    return [sys.executable, "-m", "trimaran", *words]


def kernel_tests(bench: Bench) -> Iterator[Piece]:
    """A process a file, some side by side: most of the time kernels are being compiled."""
    files = sorted((CHECKOUT / "tests" / "triton").glob("test_*.py"))
    if bench.tiny:
        files = [one for one in files if one.name == "test_norm.py"]
    threads = min(MOST_SIDE_BY_SIDE, max(1, (os.cpu_count() or 1) // 2)) if bench.on_card else 1
    pool = bench.stack.enter_context(ThreadPoolExecutor(threads))
    command = [*PYTEST, "-m", "not slow", *(["-k", "inf"] if bench.tiny else [])]
    done = Record(bench.out, "kernel-tests").results
    running = {
        file.stem: pool.submit(run_command, bench, [*command, str(file)], 40)
        for file in files
        if file.stem not in done
    }
    bench.stack.callback(pool.shutdown, wait=False, cancel_futures=True)
    for name, future in running.items():
        yield name, future.result


def conform(bench: Bench) -> Iterator[Piece]:
    for level in ("L0",) if bench.tiny else LEVELS:
        yield level, partial(_level, bench, level)


def _level(bench: Bench, level: str) -> Found:
    if missing := [name for name in WANTED_BY.get(level, ()) if not _importable(name)]:
        raise Skip(f"{level} wants {', '.join(missing)}")
    report = bench.out / f"conform-{level}.json"
    words = ["--platform", bench.platform, "--level", level, "--report", str(report)]
    words += ["--quick", "--no-isolate"] * bench.tiny
    found = run_command(bench, trimaran("conform", *words))
    return found | {"report": json.loads(report.read_text())}


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def device_tests(bench: Bench) -> Iterator[Piece]:
    yield "tests/device", partial(run_command, bench, [*PYTEST, "-m", "device", "tests/device"])
