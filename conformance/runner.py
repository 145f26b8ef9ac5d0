"""Runs the levels of the kit, each in a process of its own, so that a crash or a hang fails one
check and the others are still run."""

from __future__ import annotations

import contextlib
import json
import os
import platform as host
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from .. import __version__
from ..core.env import child_environment
from ..platforms.api import PLATFORM_API, version_text
from .base import Level, Subject
from .report import FAILED, SKIP_BUDGET, Outcome, Report
from .worker import ASK_FRAMES, ENDING, FACTS, LISTING, Message, Request, answers

TIME_LIMIT = 300.0
"""Seconds that one check may take, unless it says otherwise. Another limit makes the time of those
that say so longer or shorter by as much."""

START_SECONDS = 120.0
"""Seconds that a child has, at least, to import all it needs and say its first word."""

MAX_DEATHS = 12  # children of one level that may die before the rest of it is given up
WRITE_WITHIN = 5.0  # seconds that a child that hangs has to write down where
END_WITHIN = 15.0  # seconds that a child has to end after its last check
STDERR_SHOWN = 3000  # characters


class Progress(Protocol):
    """Who watches a run."""

    def level(self, level: Level, checks: int) -> None: ...
    def started(self, full_name: str) -> None: ...
    def finished(self, outcome: Outcome) -> None: ...


class Unwatched:
    def level(self, level: Level, checks: int) -> None:
        pass

    def started(self, full_name: str) -> None:
        pass

    def finished(self, outcome: Outcome) -> None:
        pass


def run_kit(
    subject: Subject,
    levels: Sequence[Level],
    only: Sequence[str] = (),
    isolate: bool = True,
    time_limit: float = TIME_LIMIT,
    skip_budget: float = SKIP_BUDGET,
    partial: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Every check of `levels` (those that `only` selects) on `subject`. `isolate`: a child process
    a level; without it a crash ends the caller, and nothing ends a hang."""
    start = time.monotonic()
    report = Report(
        reference=subject.reference,
        device=subject.device,
        seed=subject.seed,
        quick=subject.quick,
        partial=partial or bool(only),
        skip_budget=skip_budget,
        engine=__version__,
        engine_api=version_text(PLATFORM_API),
        torch=torch.__version__,
        host=f"{host.system()} {host.machine()}, Python {host.python_version()}",
    )
    _Run(subject, tuple(only), isolate, time_limit, progress or Unwatched(), report).run(levels)
    report.seconds = round(time.monotonic() - start, 2)
    return report


class _Run:
    def __init__(
        self,
        subject: Subject,
        only: tuple[str, ...],
        isolate: bool,
        time_limit: float,
        progress: Progress,
        report: Report,
    ) -> None:
        self._subject = subject
        self._only = only
        self._isolate = isolate
        self._limit = time_limit
        self._progress = progress
        self._report = report
        self._told = self._hopeless = False

    def run(self, levels: Sequence[Level]) -> None:
        for level in levels:
            if not self._only or any(reaches(level.name, one) for one in self._only):
                self._run_level(level)
            if self._hopeless:
                return

    def _run_level(self, level: Level) -> None:
        """A child for as long as it lives; after a death, another for the checks that are left."""
        done: list[str] = []
        for deaths in range(MAX_DEATHS):
            known = len(done)
            running = ""
            try:
                for message in self._messages(
                    Request(self._subject, level.name, self._only, tuple(done), not self._told)
                ):
                    running = self._take(level, message, done, running, first=not deaths)
                return
            except _Died as death:
                if not self._told:
                    self._hopeless = True
                    self._add(Outcome("L0", FACTS, FAILED, str(death), seconds=death.seconds))
                    return
                name = running or (ENDING if len(done) > known else LISTING)
                self._add(Outcome(level.name, name, FAILED, str(death), seconds=death.seconds))
                if not running:
                    return
        self._add(Outcome(level.name, ENDING, FAILED, f"given up after {MAX_DEATHS} such ends"))

    def _take(
        self, level: Level, message: Message, done: list[str], running: str, first: bool
    ) -> str:
        """Returns the check that is running now; every one that was begun is `done`."""
        if "facts" in message:
            self._told, self._hopeless = True, "hopeless" in message
            self._report.absent = message.get("hopeless", "")
            for name, value in message["facts"].items():
                setattr(self._report, name, value)
        if "checks" in message and first:
            self._progress.level(level, message["checks"])
        elif "start" in message:
            done.append(message["start"])
            self._progress.started(f"{level.name}/{message['start']}")
            return str(message["start"])
        elif "outcome" in message:
            self._add(Outcome(**message["outcome"]))
            return ""
        return running

    def _add(self, outcome: Outcome) -> None:
        self._report.outcomes.append(outcome)
        self._progress.finished(outcome)

    def _messages(self, request: Request) -> Iterator[Message]:
        if not self._isolate:
            return answers(request)
        return _Child(request.to_json()).messages(self._limit)


def reaches(level: str, only: str) -> bool:
    """Can a check of `level` be what `only` asks for?"""
    head = only.partition("/")[0]
    return head == level or any(sign in head for sign in "*?[")


class _Died(Exception):
    """The child crashed or was ended; `seconds` since it was last heard of."""

    def __init__(self, said: str, seconds: float) -> None:
        super().__init__(said)
        self.seconds = round(seconds, 2)


class _Child:
    """A worker process, in a process group of its own so that what it starts ends with it."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the child)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"{__package__}.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            # Ranks and servers that it starts must find the same modules.
            env=child_environment(
                {"PYTHONPATH": os.pathsep.join(p or os.curdir for p in sys.path)}
            ),
            start_new_session=True,
            text=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once: `messages` says so
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.close()

    def messages(self, limit: float) -> Iterator[Message]:
        """Until the last one. Raises `_Died` for a child that ends before it, or does not go on
        within `limit` seconds (a check that has its own time: within its share of that)."""
        heard, allowed, ended = time.monotonic(), max(START_SECONDS, limit), False
        try:
            while True:
                try:
                    line = self._lines.get(timeout=END_WITHIN if ended else allowed)
                except queue.Empty:
                    said = self._end_hung(END_WITHIN if ended else allowed)
                    raise _Died(said, time.monotonic() - heard) from None
                if not line:
                    break
                message = json.loads(line)
                heard, ended = time.monotonic(), "end" in message
                allowed = (message.get("seconds") or TIME_LIMIT) * limit / TIME_LIMIT
                yield message
            status = self._process.wait()
            if status or not ended:
                raise _Died(_how(status) + self._last_words(), time.monotonic() - heard)
        finally:
            self._kill()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")

    def _end_hung(self, limit: float) -> str:
        """Asked first to write down where its threads are."""
        self._signal(ASK_FRAMES)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(WRITE_WITHIN)
        return f"did not end within {limit:g} s" + self._last_words()

    def _last_words(self) -> str:
        self._stderr.seek(0)
        text = self._stderr.read().decode(errors="replace")
        lines = [line for line in text.splitlines() if not line.startswith("Extension modules")]
        shown = re.sub(r'File ".*?([^/"]+)"', r"\1", "\n".join(lines).strip())
        return f"\n{shown[-STDERR_SHOWN:]}" if shown else ""

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join(END_WITHIN)
        self._stderr.close()

    def _signal(self, number: signal.Signals) -> None:
        """To the whole group, which outlives its leader while anything in it runs."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return


def _how(status: int) -> str:
    if status < 0:
        return f"the process was ended by {signal.Signals(-status).name}"
    return f"the process ended with status {status}"
