"""Runs the checks of one level and says what came of each: in the kit's own process, or as a child
(`python -m trimaran.conformance.worker`) that reads a request and answers with lines of JSON."""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from ..platforms.interface import PlatformUnavailable
from .base import Check, Failed, Skipped, Subject
from .facts import facts
from .levels import level as level_named
from .report import FAILED, PASSED, SKIPPED, Outcome

Message = dict[str, Any]
"""One key says what it is: `facts`, `checks`, `start`, `outcome` or `end`."""

LISTING = "checks"
"""The name of the outcome of a level that could not even say what it checks."""

FACTS = "facts"
"""The name of the outcome of a platform that cannot be loaded, or say what it is."""

ENDING = "process"
"""The name of the outcome of a level whose process did not end as it should, its checks done."""

ASK_FRAMES = signal.SIGUSR1
"""Makes a worker write down where its threads are, and end."""

THREADS_END_WITHIN = 2.0  # seconds that the threads of a closed device have
FRAMES_SHOWN = 3


@dataclass(frozen=True)
class Request:
    """What a worker is to do: the checks of `level` that `only` selects (all, if empty) but for
    those already `done`; if `tell`, the platform's facts before them."""

    subject: Subject
    level: str
    only: tuple[str, ...] = ()
    done: tuple[str, ...] = ()
    tell: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "path": sys.path}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Request:
        return cls(
            Subject(**values["subject"]),
            values["level"],
            tuple(values["only"]),
            tuple(values["done"]),
            values["tell"],
        )


def selected(full_name: str, only: tuple[str, ...]) -> bool:
    """Does `only` ask for it: by its name, the beginning of that up to a `/`, or a pattern?"""
    return not only or any(
        full_name == one or full_name.startswith(one + "/") or fnmatchcase(full_name, one)
        for one in only
    )


def answers(request: Request) -> Iterator[Message]:
    """The messages that answer `request`, each as soon as it is known."""
    subject = request.subject
    if request.tell:
        told = _facts(subject)
        yield told
        if "hopeless" in told:
            yield {"end": True}
            return
    level = level_named(request.level)
    try:
        found = level.checks(subject)
    except Exception as error:  # the platform's, while it was asked what it has
        yield {"outcome": _failure(level.name, LISTING, error, 0.0)}
        yield {"end": True}
        return
    wanted = [
        check
        for check in found
        if check.name not in request.done and selected(f"{level.name}/{check.name}", request.only)
    ]
    yield {"checks": len(wanted)}
    for check in wanted:
        yield {"start": check.name, "seconds": check.seconds}
        yield {"outcome": dataclasses.asdict(run_check(level.name, check))}
    yield {"end": True}


def _facts(subject: Subject) -> Message:
    """With an outcome where they cannot be told; `hopeless` where there is nothing to examine."""
    try:
        _find(subject)
        return {"facts": facts(subject)}
    except PlatformUnavailable as error:
        return {"facts": {}, "hopeless": str(error)}
    except Exception as error:  # the platform's, of what it says about itself
        return {"facts": {}, "outcome": _failure("L0", FACTS, error, 0.0)}


def _find(subject: Subject) -> None:
    """Raises `PlatformUnavailable` where there is no such device."""
    indices = [device.index for device in subject.cls.probe().devices]
    if subject.device not in indices:
        raise PlatformUnavailable(
            f"Platform {subject.reference!r} has the devices {indices}; there is no device "
            f"{subject.device}."
        )


def run_check(level: str, check: Check) -> Outcome:
    """Whatever the check raises is its outcome; threads that it leaves behind fail it."""
    before = set(threading.enumerate())
    start = time.perf_counter()
    try:
        measured = dict(check.run() or {})
        outcome = Outcome(level, check.name, PASSED, measured=measured)
    except Skipped as skip:
        outcome = Outcome(level, check.name, SKIPPED, skip.reason)
        if check.required:
            said = f"a required check may not be skipped: {skip.reason}"
            outcome = Outcome(level, check.name, FAILED, said)
    except Exception as error:
        outcome = Outcome(**_failure(level, check.name, error, 0.0))
    seconds = time.perf_counter() - start
    if outcome.status != FAILED and (left := _threads_left(before)):
        said = f"left threads running: {', '.join(left)}"
        outcome = Outcome(level, check.name, FAILED, said)
    return dataclasses.replace(outcome, seconds=round(seconds, 4), about=check.about)


def _threads_left(before: set[threading.Thread]) -> list[str]:
    """Names of the threads that began since and do not end."""
    deadline = time.monotonic() + THREADS_END_WITHIN
    while left := [one.name for one in threading.enumerate() if one not in before]:
        if time.monotonic() > deadline:
            return sorted(left)
        time.sleep(0.005)
    return []


def _failure(level: str, name: str, error: Exception, seconds: float) -> dict[str, Any]:
    detail, case, seed = _told(error)
    return dataclasses.asdict(
        Outcome(level, name, FAILED, detail, case=case, seed=seed, seconds=seconds)
    )


def _told(error: Exception) -> tuple[str, str, int | None]:
    """What, with which case and seed. Another error than the kit's own is shown with the frames
    that raised it."""
    if isinstance(error, Failed):
        return error.message, error.case, error.seed
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES_SHOWN:]
    where = "".join(f"\n  {os.path.basename(f.filename)}:{f.lineno} {f.name}" for f in frames)
    return f"{type(error).__name__}: {error}{where}", "", None


def main() -> int:
    """Request on stdin, messages on stdout; what the platform prints goes to stderr."""
    # Of a crash the one thread's frames: the others run on, and change under whoever walks theirs.
    faulthandler.enable(all_threads=False)
    # Of a hang all frames, and then (the handler there was before) its end.
    faulthandler.register(ASK_FRAMES, all_threads=True, chain=True)
    answer = _take_stdout()
    values = json.loads(sys.stdin.readline())
    sys.path[:] = values["path"]
    torch.set_num_threads(1)  # thousands of tiny tensors: a pool would wait for itself
    for message in answers(Request.from_json(values)):
        answer(message)
    return 0


def _take_stdout() -> Callable[[Message], None]:
    """stdout for the messages alone: descriptor 1 becomes stderr."""
    ours = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(message: Message) -> None:
        ours.write(json.dumps(message) + "\n")
        ours.flush()

    return answer


if __name__ == "__main__":
    raise SystemExit(main())
