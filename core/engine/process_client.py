"""An engine in its own process: sockets for messages, and a pipe beside them that tells a death.

ZeroMQ hides a peer's end; the pipe does not. A thread starts the process, reads the pipe until
its end, and reaps the process; it lives exactly as long as the process does, because the kernel's
parent-death signal follows the *thread* that started a child.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Self

import zmq

from ..args import EngineArgs
from ..errors import EngineDeadError, TrimaranError
from ..log_lines import LogStyle
from .client import EngineInfo, FromEngine, ToEngine
from .faults import revive
from .wire import Launch, Status, decode, decode_status, encode, encode_line, info_from_wire

logger = logging.getLogger(__name__)

ENGINE_MODULE = f"{__package__}.process"
HELLO = b"hello"
STOP_GRACE = 3.0  # seconds from `stop` until the process is killed
MAX_DIRECTORY_CHARS = 80  # the path of a Unix socket must fit in 108 bytes


class ProcessClient:
    """The client of an engine process. `start` returns at once; `wait_ready` loads the model."""

    def __init__(self, args: EngineArgs) -> None:
        self._args = args
        self._info: EngineInfo | None = None
        self._status: Status | None = None  # the last words of the process
        self._reason: str | None = None  # why we ended it, if we did
        self._death: TrimaranError | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._settled = threading.Event()  # ready or dead
        self._started = threading.Event()
        self._send_lock = threading.Lock()
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._directory = _make_directory()
        self._context = zmq.Context()
        self._to_engine = self._bind(zmq.PUSH, "in")
        self._from_engine = self._bind(zmq.PULL, "out")
        self._poller = zmq.Poller()
        self._poller.register(self._from_engine, zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)
        self._watcher = threading.Thread(target=self._live, name="engine-watcher", daemon=True)

    @classmethod
    def start(cls, args: EngineArgs) -> Self:
        """Start the process. Follow with `wait_ready`, and whatever happens with `close`."""
        client = cls(args)
        client._watcher.start()
        client._started.wait()
        return client

    def wait_ready(self) -> EngineInfo:
        """Blocks until the model is loaded. Raises the engine's own error, as the class it is."""
        self._shake_hands()
        self._settled.wait()
        if self._info is None:
            raise self._death or EngineDeadError("the engine process ended while it started")
        return self._info

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineDeadError("the engine is not ready")
        return self._info

    @property
    def pid(self) -> int:
        """The engine's process id; -1 if it could not be started."""
        return self._process.pid if self._process is not None else -1

    def send(self, message: ToEngine) -> None:
        frames = encode(message)
        with self._send_lock:
            if self._death is not None or self._closed:
                raise self._death or EngineDeadError("the engine is closed")
            # Without a limit this only fails when the peer is gone; `poll` will soon tell why.
            with contextlib.suppress(zmq.Again):
                self._to_engine.send_multipart(frames, zmq.NOBLOCK)

    def poll(self, timeout: float | None) -> FromEngine | None:
        dead = self._death
        if dead is None:
            self._poller.poll(None if timeout is None else int(timeout * 1000))
            dead = self._death
        # What was on its way when the process ended still counts.
        if self._from_engine.poll(50 if dead is not None else 0):
            message: FromEngine = decode(self._from_engine.recv_multipart())
            return message
        if dead is not None:
            raise dead
        return None

    def stop(self, reason: str = "the engine was closed") -> None:
        if self._reason is None:
            self._reason = reason
        process = self._process
        if process is None:
            return
        if process.stdin is not None and not process.stdin.closed:
            with contextlib.suppress(OSError):  # it is gone already
                process.stdin.close()
        self._watcher.join(STOP_GRACE)
        process.kill()  # does nothing to a process that is gone
        self._watcher.join()

    def kill(self, reason: str) -> None:
        """End a stuck process: it writes its stacks to the standard error, then is killed."""
        self._reason = reason
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGUSR1)
            with contextlib.suppress(subprocess.TimeoutExpired):  # time for it to write
                process.wait(0.5)
            process.kill()

    def close(self) -> None:
        self.stop()
        with self._send_lock:
            if self._closed:
                return
            self._closed = True
            self._context.destroy(linger=0)
        os.close(self._wake)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _shake_hands(self) -> None:
        """Once both sockets are connected their names have served: they are removed, and nothing
        can be left behind, however either side ends."""
        heard = False
        while self._death is None:
            if not heard:
                ready = dict(self._poller.poll(1000))
                heard = self._from_engine in ready and self._from_engine.recv() == HELLO
            elif self._to_engine.poll(100, zmq.POLLOUT):
                self._to_engine.send(HELLO)
                break
        shutil.rmtree(self._directory, ignore_errors=True)

    # ------------------------------------------------------------ the thread beside the process

    def _live(self) -> None:
        try:
            code = self._run_process()
            self._death = self._describe_death(code)
        except Exception as error:  # it could not even be started
            self._death = EngineDeadError(f"the engine process cannot be started: {error}")
        self._started.set()
        self._settled.set()
        os.eventfd_write(self._wake, 1)

    def _run_process(self) -> int:
        """Start, listen, reap; the exit status (negative: the signal that killed it)."""
        reader, writer = os.pipe()
        with open(reader, "rb") as pipe:
            try:
                self._process = process = subprocess.Popen(
                    [sys.executable, "-P", "-m", ENGINE_MODULE],
                    stdin=subprocess.PIPE,
                    stdout=2,  # whatever a library prints must not mix with a program's output
                    pass_fds=(writer,),
                )
            finally:
                os.close(writer)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it ended at once; the pipe tells why
                process.stdin.write(encode_line(self._launch(writer)))
                process.stdin.flush()
            self._started.set()
            for line in pipe:
                self._hear(decode_status(line))
        try:
            code = process.wait(STOP_GRACE)
        except subprocess.TimeoutExpired:  # it said its last words, but does not go
            process.kill()
            code = process.wait()
        with contextlib.suppress(OSError):
            process.stdin.close()
        return code

    def _launch(self, status_fd: int) -> Launch:
        return Launch(
            args=self._args,
            parent_pid=os.getpid(),
            status_fd=status_fd,
            directory=str(self._directory),
            to_engine=self._address("in"),
            from_engine=self._address("out"),
            log=LogStyle.of_this_process(),
        )

    def _hear(self, status: Status) -> None:
        if status.info is None:
            self._status = status
        else:
            self._info = info_from_wire(status.info)
            self._settled.set()

    def _describe_death(self, code: int) -> TrimaranError:
        if self._reason is not None:
            return EngineDeadError(self._reason, cause=self._reason)
        words = self._status
        if words is not None and words.kind is not None:
            if self._info is None:  # it never was ready: the user wants the error itself
                return revive(words.kind, words.message, words.param)
            cause = f"the engine ended with {words.kind}"
            return EngineDeadError(f"the engine ended: {words.message}", cause=cause)
        how = f"ended with exit status {code}"
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (perhaps by the kernel, out of memory)" if -code == signal.SIGKILL else ""
            how = f"was killed by {name}{hint}"
        return EngineDeadError(f"the engine process {how}", cause=f"the engine process {how}")

    # ------------------------------------------------------------------------------- sockets

    def _bind(self, kind: int, name: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(0)  # sending never blocks; admission bounds what can be on its way
        socket.linger = 0
        socket.bind(self._address(name))
        return socket

    def _address(self, name: str) -> str:
        return f"ipc://{self._directory / name}"


def _make_directory() -> Path:
    """Readable by this user only (mode 0700), with a path short enough for a socket."""
    base = tempfile.gettempdir()
    return Path(
        tempfile.mkdtemp(prefix="trm-", dir=base if len(base) <= MAX_DIRECTORY_CHARS else "/tmp")
    )
