"""A part of the GPU row: named pieces of work, each kept on disk as soon as it is over.

OUT/NAME.json holds what was found, what failed and how often each piece was begun: a part that is
stopped, or whose process the device takes with it, goes on behind the last piece.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CARDS = ("cuda", "rocm")
DONE, FAILED, UNFINISHED, BROKEN = 0, 1, 2, 3
"""How a part's process ends. BROKEN: the device is of no more use to it, to another process yes."""
MOST_ATTEMPTS = 3
BROKEN_DEVICE = ("CUDA error", "HIP error", "illegal memory access", "DeviceLost", "is lost")

Found = dict[str, Any]
Piece = tuple[str, Callable[[], Found]]


class Skip(Exception):
    """This piece cannot run here; the reason is kept."""


class OutOfTime(Exception):
    """Begun, and not over in the time of this part: it is begun again."""


@dataclass
class Bench:
    """What every part is given. `deadline`: by time.monotonic(); `stack`: is closed behind the
    part, in the order opened last, closed first."""

    platform: str
    out: Path
    tiny: bool = False
    deadline: float = float("inf")
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def on_card(self) -> bool:
        return self.platform in CARDS

    @property
    def shape(self) -> str:
        return "tiny" if self.tiny else "qwen3-0.6b"

    def left(self) -> float:
        """Seconds; OutOfTime where there are none."""
        if (left := self.deadline - time.monotonic()) <= 0:
            raise OutOfTime
        return left

    def opened(self, make: Callable[[], Any]) -> Callable[[], Any]:
        """`make`'s context manager, entered at the first call and left behind the part."""
        return functools.cache(lambda: self.stack.enter_context(make()))

    def rates(self) -> dict[str, float]:
        """What the canary found (GB/s, GFLOP/s); empty where it was not let out."""
        return Record(self.out, "canary").results.get("rates", {})


class Record:
    """OUT/NAME.json, as it is now."""

    def __init__(self, out: Path, name: str) -> None:
        self.file = out / f"{name}.json"
        kept = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.results: dict[str, Found] = kept.get("results", {})
        self.faults: dict[str, str] = kept.get("faults", {})
        self.attempts: dict[str, int] = kept.get("attempts", {})
        self.seconds: float = kept.get("seconds", 0.0)
        self.done: bool = kept.get("done", False)

    def save(self) -> None:
        """In one move: a reader, or a process that comes after this one, never sees half of it."""
        content = {key: value for key, value in vars(self).items() if key != "file"}
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, self.file)

    def forget_faults(self) -> None:
        """What failed is begun again."""
        if self.faults:
            self.attempts = {key: n for key, n in self.attempts.items() if key in self.results}
            self.faults, self.done = {}, False
            self.save()

    def verdict(self) -> str:
        if not self.done:
            return "unfinished" if self.attempts else "not run"
        return "FAILED" if self.faults else "ok"


def run_pieces(bench: Bench, record: Record, pieces: Iterator[Piece]) -> int:
    """Those that are not in the record yet, until the time is over."""
    with bench.stack:
        for key, work in pieces:
            if key in record.results or key in record.faults:
                continue
            if time.monotonic() >= bench.deadline:
                return UNFINISHED
            try:
                if _run_piece(record, key, work) == BROKEN:
                    bench.stack.pop_all()  # a broken device closes nothing
                    return BROKEN
            except OutOfTime:
                return UNFINISHED
    record.done = True
    record.save()
    return FAILED if record.faults else DONE


def _run_piece(record: Record, key: str, work: Callable[[], Found]) -> int:
    begun = record.attempts.get(key, 0)
    if begun >= MOST_ATTEMPTS:
        record.faults[key] = f"not over after being begun {begun} times: it hangs, or is too long"
        record.save()
        return FAILED
    record.attempts[key] = begun + 1
    record.save()
    start = time.monotonic()
    print(f"  {record.file.stem}: {key}", end=" ", flush=True)
    status, said = _attempt(record, key, work)
    record.seconds = round(record.seconds + time.monotonic() - start, 1)
    record.save()
    print(f"{time.monotonic() - start:.1f} s {said}", flush=True)
    return status


def _attempt(record: Record, key: str, work: Callable[[], Found]) -> tuple[int, str]:
    try:
        record.results[key] = work()
    except Skip as reason:
        record.results[key] = {"skipped": str(reason)}
        return DONE, f"skipped: {reason}"
    except OutOfTime:
        print("out of time", flush=True)
        raise
    except Exception as error:
        record.faults[key] = "".join(traceback.format_exception(error))[-6000:]
        broken = any(word in record.faults[key] for word in BROKEN_DEVICE)
        return (BROKEN if broken else FAILED), f"FAILED: {str(error).strip()[-300:]}"
    return DONE, ""
