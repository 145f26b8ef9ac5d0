"""An engine and its sockets, in the engine's own process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal

import zmq

from ..errors import TrimaranError
from ..resolve import resolve
from .client import FromEngine, ToEngine
from .engine import Engine
from .faults import kind_of, one_line
from .inproc import describe_engine
from .process import ParentWatch
from .wire import Launch, Status, decode, decode_launch, encode, encode_line, info_to_wire

logger = logging.getLogger(__name__)

HELLO = b"hello"
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


def run(line: bytes, watch: ParentWatch) -> int:
    """Serve until the parent ends it; the exit status. `line` is the parent's `Launch`."""
    launch = decode_launch(line)
    os.set_inheritable(launch.status_fd, False)
    launch.log.apply()
    context = zmq.Context()
    try:
        _serve(launch, watch, context)
    except Closed:
        return 0
    except BaseException as error:
        # An error of ours is told by whoever started this process; of others, the place matters.
        level = logging.DEBUG if isinstance(error, TrimaranError) else logging.ERROR
        logger.log(level, "the engine ends", exc_info=error)
        param = getattr(error, "param", None)
        _tell(launch, Status(kind=kind_of(error), message=one_line(error), param=param))
        return 1
    finally:
        context.destroy(linger=0)
    return 0


def _serve(launch: Launch, watch: ParentWatch, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    inbox_socket, outbox_socket = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox_socket.connect(launch.to_engine)
    outbox_socket.connect(launch.from_engine)
    _shake_hands(inbox_socket, outbox_socket)
    _die_with_parent(launch.parent_pid)
    inbox = ZmqInbox(inbox_socket)

    def outbox(message: FromEngine) -> None:
        outbox_socket.send_multipart(encode(message))

    engine = Engine(resolve(launch.args), inbox=inbox, outbox=outbox)
    watch.on_end = inbox.close  # from here on there is something to close
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
    """From now on the kernel kills this process when the thread that started it ends (the
    client's watcher, which lives until this process is reaped)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        raise Closed


def _tell(launch: Launch, status: Status) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody is there to read it
        os.write(launch.status_fd, encode_line(status))
