"""From the start of a process to its first token: with no kernel compiled yet, and after that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .engine import engine_args
from .part import Bench, Found, OutOfTime, Piece

SCRIPT = Path(__file__).with_name("first_token.py")


def start(bench: Bench) -> Iterator[Piece]:
    """All share a Triton cache of their own, which is empty before the first."""
    yield "cold", partial(_start, bench)
    for number in range(1 if bench.tiny else 3):
        yield f"warm {number}", partial(_start, bench)


def _start(bench: Bench) -> Found:
    """`start_s` ends when the token was printed, before the engine is closed."""
    variables = {**os.environ, "TRITON_CACHE_DIR": str(bench.out / "triton")}
    arguments = json.dumps(engine_args(bench, max_model_len="64" if bench.tiny else "2048"))
    left = bench.left()
    begin = time.monotonic()
    with (bench.out / "start.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT), arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            env=variables,
            text=True,
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            seconds = time.monotonic() - begin
            process.wait(max(1.0, left - seconds))
        except subprocess.TimeoutExpired:
            raise OutOfTime from None
        finally:
            process.kill()
            process.wait()
    if not line:
        raise RuntimeError((bench.out / "start.log").read_text()[-3000:])
    return {"start_s": seconds, **json.loads(line)}
