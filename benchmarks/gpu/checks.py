"""Parts that say right or wrong: what is here, the kernels' tests, the conformance kit, the device
tests."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from canary import describe_machine

from trimaran.core.platform import make_platform

from .part import Bench, Found, OutOfTime, Piece, Skip

CHECKOUT = Path(__file__).resolve().parents[2]
LEVELS = ("L0", "L1", "L2", "L3", "L4", "L5")
SERVED = ("fastapi", "httptools", "msgspec", "prometheus_client", "uvicorn", "uvloop", "zmq")
"""What level 5 serves with."""
PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "numpy", "pytest")
MOST_SIDE_BY_SIDE = 8
# The repository's own options name plugins that such a machine need not have.
PYTEST = [
    *(sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "--color=no"),
    *("-o", "addopts=", "-W", "ignore::pytest.PytestConfigWarning"),
]


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


def facts(bench: Bench) -> Iterator[Piece]:
    yield "machine", partial(_machine, bench)
    for words in (["platforms", "--platform", bench.platform], ["doctor"]):
        yield words[0], partial(run_command, bench, trimaran(*words), 200)


def _machine(bench: Bench) -> Found:
    platform = make_platform(bench.platform)
    return {
        "devices": [
            f"{one.name}, {one.memory / 2**30:.0f} GiB" for one in platform.probe().devices
        ],
        "platform": dict(platform.describe()),
        "packages": {name: _version(name) for name in PACKAGES},
        **describe_machine(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def kernel_tests(bench: Bench) -> Iterator[Piece]:
    """A process a file, some side by side: most of the time kernels are being compiled."""
    files = sorted((CHECKOUT / "tests" / "triton").glob("test_*.py"))
    few = ["-k", "not_in_any_name or 100"] if bench.tiny else []
    if bench.tiny:
        files = [one for one in files if one.name == "test_norm.py"]
    threads = min(MOST_SIDE_BY_SIDE, max(1, (os.cpu_count() or 1) // 2)) if bench.on_card else 1
    pool = bench.stack.enter_context(ThreadPoolExecutor(threads))
    command = [*PYTEST, "-m", "not slow", *few]
    running = {
        file.stem: pool.submit(run_command, bench, [*command, str(file)], 40) for file in files
    }
    bench.stack.callback(pool.shutdown, wait=False, cancel_futures=True)
    for name, future in running.items():
        yield name, future.result


def conform(bench: Bench) -> Iterator[Piece]:
    for level in ("L0",) if bench.tiny else LEVELS:
        yield level, partial(_level, bench, level)


def _level(bench: Bench, level: str) -> Found:
    missing = [name for name in SERVED if importlib.util.find_spec(name) is None]
    if level == "L5" and missing:
        raise Skip(f"serving wants {', '.join(missing)}")
    report = bench.out / f"conform-{level}.json"
    words = ["--platform", bench.platform, "--level", level, "--report", str(report)]
    found = run_command(bench, trimaran("conform", *words))
    return found | {"report": json.loads(report.read_text())}


def device_tests(bench: Bench) -> Iterator[Piece]:
    yield "tests/device", partial(run_command, bench, [*PYTEST, "-m", "device", "tests/device"])
