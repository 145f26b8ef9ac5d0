"""The engine's own process: `python -m trimaran.core.engine.process`.

Started by `ProcessClient` only. It reads one JSON line from its standard input, which stays open:
its end says that the parent is gone or wants an end. Draining is the parent's business, so
signals that reach the whole process group are ignored here.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import shutil
import signal
import sys
import threading
import traceback

import zmq

from ..resolve import resolve
from .client import FromEngine, ToEngine
from .engine import Engine
from .faults import kind_of, one_line
from .inproc import describe_engine
from .wire import (
    Launch,
    Status,
    decode,
    decode_launch,
    encode,
    encode_line,
    info_to_wire,
)

logger = logging.getLogger(__name__)

HELLO = b"hello"
GRACE = 2.0  # seconds from the parent's end until this process ends, whatever it is doing
PR_SET_PDEATHSIG = 1


class Closed(Exception):
    """The parent is gone, or has asked for the end."""


class ZmqInbox:
    """Messages from the parent; `close` may be called from another thread."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._closed = False
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)

    def take(self, timeout: float | None) -> list[ToEngine]:
        """Raises `Closed` once the parent's end of the pipe is gone."""
        if timeout != 0.0:
            self._poller.poll(None if timeout is None else int(timeout * 1000))
        if self._closed:
            raise Closed
        messages = []
        with contextlib.suppress(zmq.Again):  # everything has been read
            while True:
                messages.append(decode(self._socket.recv_multipart(zmq.NOBLOCK)))
        return messages

    def close(self) -> None:
        self._closed = True
        os.eventfd_write(self._wake, 1)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the parent asks a stuck engine where it stands
    line = _read_line()
    if not line:  # the parent ended before it could say anything
        return 0
    launch = decode_launch(line)
    os.set_inheritable(launch.status_fd, False)
    logging.basicConfig(level=launch.log_level, format="%(levelname)s %(name)s: %(message)s")
    context = zmq.Context()
    try:
        return _run(launch, context)
    except Closed:
        return 0
    except BaseException as error:
        traceback.print_exc()
        _tell(launch, Status(kind=kind_of(error), message=one_line(error), param=_param(error)))
        return 1
    finally:
        context.destroy(linger=0)


def _run(launch: Launch, context: zmq.Context[zmq.Socket[bytes]]) -> int:
    inbox_socket, outbox_socket = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox = ZmqInbox(inbox_socket)
    threading.Thread(target=_watch_parent, args=(launch, inbox), daemon=True).start()
    inbox_socket.connect(launch.to_engine)
    outbox_socket.connect(launch.from_engine)
    _shake_hands(inbox_socket, outbox_socket)
    _die_with_parent(launch.parent_pid)

    def outbox(message: FromEngine) -> None:
        outbox_socket.send_multipart(encode(message))

    engine = Engine(resolve(launch.args), inbox=inbox, outbox=outbox)
    try:
        _tell(launch, Status(info=info_to_wire(describe_engine(engine))))
        # What was loaded lives as long as the process: no collection need ever look at it.
        gc.collect()
        gc.freeze()
        while True:
            engine.step(timeout=None)
    finally:
        engine.close()


def _shake_hands(inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]) -> None:
    """Returns once both sockets are connected."""
    outbox.send(HELLO)
    if inbox.recv() != HELLO:
        raise RuntimeError("the first message was not the parent's greeting")


def _die_with_parent(parent_pid: int) -> None:
    """The kernel kills this process when the thread that started it ends (the client's watcher,
    which lives until this process is reaped)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        raise Closed


def _watch_parent(launch: Launch, inbox: ZmqInbox) -> None:
    while os.read(0, 4096):  # nothing more is sent: this returns when the parent's end closes
        pass
    shutil.rmtree(launch.directory, ignore_errors=True)
    inbox.close()
    threading.Event().wait(GRACE)  # a main thread that ends takes this one with it
    os._exit(1)


def _read_line() -> bytes:
    """Unbuffered: a thread that waits in a buffered reader would spoil the interpreter's end."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 65536)
        if not piece:
            return b""
        line += piece
    return line


def _tell(launch: Launch, status: Status) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody is there to read it
        os.write(launch.status_fd, encode_line(status))


def _param(error: BaseException) -> str | None:
    return getattr(error, "param", None)


if __name__ == "__main__":
    sys.exit(main())
