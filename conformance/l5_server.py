"""L5, a real server in processes of its own, and clients that go away in the middle of answers."""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import psutil

from .base import Check, Failed, Skipped, Subject
from .engines import dtype_of

NEEDED = ("fastapi", "msgspec", "uvicorn", "zmq")
START_SECONDS = 120.0
END_SECONDS = 15.0
SETTLE_SECONDS = 15.0
NUM_STREAMS = 12
NUM_TOKENS = 24
MEGABYTE = 1e6
RSS_SLACK = 16.0  # MB a process may still grow by after the warm-up
SAID = 1500  # characters of a server's log in an error

Figures = Mapping[str, float] | None


def checks(subject: Subject) -> list[Check]:
    """They share one server, which the last of them ends."""
    listed: tuple[tuple[str, Callable[[Subject], Figures], str], ...] = (
        ("server/answers", answers, "a chat, a stream, and how it is"),
        ("server/cancelled_streams", cancelled_streams, "of many a third, in the middle"),
        ("server/leaks", leaks, "memory, threads and files of its processes"),
        ("server/shutdown", shutdown, "SIGTERM ends all of it"),
    )
    return [
        Check(name, partial(run, subject), about=about, seconds=START_SECONDS + 120)
        for name, run, about in listed
    ]


def answers(subject: Subject) -> Figures:
    server = _server(subject)
    start = time.monotonic()
    status, answer = server.post("/v1/chat/completions", _chat(max_tokens=16))
    seconds = time.monotonic() - start
    if status != 200:
        raise Failed(f"a chat request was answered {status}: {answer}")
    if not answer["choices"][0]["message"]["content"]:
        raise Failed(f"a chat request was answered with nothing: {answer}")
    again = server.post("/v1/chat/completions", _chat(max_tokens=16))[1]
    same = again["choices"][0]["message"] == answer["choices"][0]["message"]
    # The second time a part of the prompt is cached: in 16 bits that is rounded otherwise.
    if dtype_of(subject) == "float32" and not same:
        raise Failed("the same greedy request was answered differently the second time")
    if not server.stream():
        raise Failed("a stream did not come to its end")
    if server.get("/health")[0] != 200:
        raise Failed("a server that answers says that it is not ready")
    return {"s to answer": seconds}


def cancelled_streams(subject: Subject) -> Figures:
    server = _server(subject)
    finished = server.load(0)
    wanted = NUM_STREAMS - NUM_STREAMS // 3
    if finished != wanted:
        raise Failed(f"of {wanted} streams that were read, {finished} came to their end")
    _expect_idle(server)
    return {"streams": NUM_STREAMS}


def leaks(subject: Subject) -> Figures:
    server = _server(subject)
    rounds = 3 if subject.quick else 10
    for number in range(3):
        server.load(number)
    _expect_idle(server)
    before = server.books()
    for number in range(rounds):
        server.load(number)
    _expect_idle(server)
    deadline = time.monotonic() + 3.0  # connections that were dropped are collected
    while (found := _growth(before, server.books())) and time.monotonic() < deadline:
        time.sleep(0.2)
    if found:
        raise Failed(f"after {rounds * NUM_STREAMS} more requests: {'; '.join(found)}")
    now = server.books()
    return {"MB grown": sum(now[one][2] - before[one][2] for one in before)}


def shutdown(subject: Subject) -> Figures:
    server = _server(subject)
    family = [server.process, *psutil.Process(server.process.pid).children(recursive=True)]
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    try:
        status = server.process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        raise Failed(
            f"the server did not end within {END_SECONDS:g} s of SIGTERM:\n{server.said()}"
        ) from None
    finally:
        _servers.pop(subject, None)
    seconds = time.monotonic() - start
    if status != 0:
        raise Failed(f"the server ended with status {status} on SIGTERM:\n{server.said()}")
    _, alive = psutil.wait_procs([one for one in family if one is not server.process], timeout=5)
    left = [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
    server.close()
    if left:
        raise Failed(f"{len(left)} processes of the server go on after its end")
    return {"s to end": seconds}


def _growth(before: dict[int, list[float]], now: dict[int, list[float]]) -> list[str]:
    found = []
    for pid in before:
        if pid not in now:
            return [f"process {pid} of the server has ended"]
        for what, old, new, slack in zip(
            ("threads", "file descriptors", "MB"),
            before[pid],
            now[pid],
            (0, 2, RSS_SLACK),
            strict=True,
        ):
            if new > old + slack:
                found.append(f"{what} of process {pid}: {old:.0f} → {new:.0f}")
    return found


def _expect_idle(server: Server) -> None:
    """Nothing runs, waits, or holds a block once the clients are gone."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        metrics = server.metrics()
        busy = {name: metrics[name] for name in names if metrics.get(name) != 0.0}
        if not busy:
            return
        if time.monotonic() > deadline:
            raise Failed(f"{SETTLE_SECONDS:g} s after the last client had gone: {busy}")
        time.sleep(0.05)


def _chat(**values: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    return {"messages": messages, "temperature": 0, **values}


# ---------------------------------------------------------------------------------------------
# The server and its clients
# ---------------------------------------------------------------------------------------------


class Server:
    """A running server of the model in the box; returns when it is ready."""

    def __init__(self, subject: Subject) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the server)
        atexit.register(self.close)
        self._start(subject)
        try:
            self._wait_ready()
        except Failed:
            if " is in use: " not in self.said():
                raise
            self._start(subject)  # another process took the port that was free a moment before
            self._wait_ready()

    def _start(self, subject: Subject) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        flags = {
            "platform": subject.reference,
            "device": subject.device,
            "dtype": dtype_of(subject),
            "port": self.port,
            "num-threads": 1,
            "max-num-seqs": 16,
            "max-model-len": 512,
            "kv-cache-memory-bytes": "64M",
            "engine-restarts": 0,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "trimaran", "serve"]
            + [f"--{name}={value}" for name, value in flags.items()],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise Failed(f"the server ended while it started:\n{self.said()}")
            with contextlib.suppress(OSError):
                if self.get("/health")[0] == 200:
                    return
            time.sleep(0.05)
        raise Failed(f"the server was not ready within {START_SECONDS:g} s:\n{self.said()}")

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self._posted(path, body) as answer:
            return answer.status, json.loads(answer.read())

    @contextlib.contextmanager
    def _posted(self, path: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body), headers)
            yield connection.getresponse()

    def stream(self, leave_after: int | None = None) -> bool:
        """Read a stream; leave it after so many events. Did it come to its end?"""
        body = _chat(max_tokens=NUM_TOKENS, stream=True, ignore_eos=True)
        if leave_after is not None:
            body["max_tokens"] = 400
        events = 0
        with self._posted("/v1/chat/completions", body) as answer:
            for line in answer:
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    return True
                if b'"error"' in line:
                    return False
                events += 1
                if leave_after is not None and events >= leave_after:
                    return False
        return False

    def load(self, seed: int) -> int:
        """Streams all at once, of which every third is left; how many came to their end."""
        ended: list[bool] = []

        def read(number: int) -> None:
            leave = 2 + (number + seed) % 7 if number % 3 == 0 else None
            with contextlib.suppress(OSError, http.client.HTTPException):
                ended.append(self.stream(leave))

        threads = [threading.Thread(target=read, args=(n,)) for n in range(NUM_STREAMS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(ended)

    def metrics(self) -> dict[str, float]:
        """Gauges by their name without prefix and labels."""
        found = {}
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith("trimaran:"):
                name, _, value = line.removeprefix("trimaran:").rpartition(" ")
                found[name.partition("{")[0]] = float(value)
        return found

    def books(self) -> dict[int, list[float]]:
        """Of each process of the server: threads, file descriptors, resident megabytes."""
        first = psutil.Process(self.process.pid)
        found: dict[int, list[float]] = {}
        for one in (first, *first.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                rss = one.memory_info().rss / MEGABYTE
                found[one.pid] = [one.num_threads(), one.num_fds(), rss]
        return found

    def said(self) -> str:
        """The end of its log."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-SAID:]

    def close(self) -> None:
        atexit.unregister(self.close)
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            self.process.kill()
            self.process.wait()
        self.log.close()


_servers: dict[Subject, Server] = {}


def _server(subject: Subject) -> Server:
    """The one that the checks of a subject share; started by the first that needs it."""
    try:
        for name in NEEDED:
            __import__(name)
    except ModuleNotFoundError as error:
        raise Skipped(f"the server needs {error.name}: pip install '.[server]'") from None
    if subject not in _servers or _servers[subject].process.poll() is not None:
        _servers[subject] = Server(subject)
    return _servers[subject]
