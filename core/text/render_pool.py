"""Warm processes that render templates, and are killed when one takes too long."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidRequestError

TIME_LIMIT = 2.0  # seconds a job
START_LIMIT = 10.0  # seconds until a fresh process must have answered its first job
MAX_PROCESSES = 4
WORKER_MODULE = f"{__package__}.render_worker"


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    limit: float  # seconds for the next job


class RenderPool:
    """Up to `MAX_PROCESSES` rendering processes, started when first needed, reused after that."""

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        self._time_limit = time_limit
        self._slots = threading.BoundedSemaphore(MAX_PROCESSES)
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._closed = False

    def warm(self) -> None:
        """Start a process for the first job to find; does not wait for it."""
        with self._lock:
            self._idle.append(self._start())

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Blocks for at most about `TIME_LIMIT` seconds. Raises `InvalidRequestError`."""
        try:
            job = json.dumps({"source": source, "variables": variables}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(f"the chat cannot be rendered: {error}") from error
        with self._slots:
            answer = self._exchange(job)
        if answer is None:
            raise InvalidRequestError(
                f"the chat template was ended after {self._time_limit:g} s: it loops, or builds "
                "more text than fits in memory.",
                param="messages",
            )
        if "error" in answer:
            raise InvalidRequestError(
                f"the chat template cannot be rendered: {answer['error']}", param="messages"
            )
        return str(answer["text"])

    def close(self) -> None:
        """End the idle processes; those at work end with their jobs."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for worker in idle:
            _end(worker.process)

    def _exchange(self, job: bytes) -> dict[str, Any] | None:
        """The worker's answer, or None if it died over the job."""
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        if worker is None or worker.process.poll() is not None:
            worker = self._start()
        process = worker.process
        # A worker that even the alarm does not end; also covers a full pipe in either direction.
        killer = threading.Timer(worker.limit, process.kill)
        killer.start()
        line = b""
        try:
            assert process.stdin is not None and process.stdout is not None
            # A worker that ends while it is written to gives a broken pipe, then an empty line.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(job + b"\n")
                process.stdin.flush()
            line = process.stdout.readline()
        finally:
            killer.cancel()
            worker.limit = self._time_limit + 0.5  # the alarm in the process comes first
            with self._lock:
                reused = line.endswith(b"\n") and not self._closed
                if reused:
                    self._idle.append(worker)
            if not reused:
                _end(process)
        return json.loads(line) if line.endswith(b"\n") else None

    def _start(self) -> _Worker:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER_MODULE, str(self._time_limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C in the terminal is the parent's business; this ends with its standard input.
            process_group=0,
        )
        return _Worker(process, START_LIMIT)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # unsent bytes to a process that is gone
                pipe.close()
