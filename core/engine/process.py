"""The engine's own process: `python -m trimaran.core.engine.process`.

Started by `ProcessClient` only. It reads one JSON line from its standard input, which stays open:
its end says that the parent is gone or wants an end. That is watched from the first moment on, so
everything heavy is imported afterwards. Draining is the parent's business, so signals that reach
the whole process group are ignored here.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable

from ..imports import uncollected

GRACE = 2.0  # seconds from the parent's end until this process ends, whatever it is doing


class ParentWatch:
    """A thread that waits for the end of the standard input, then ends this process: gracefully
    by `on_end` if that is set, and in any case after `GRACE`."""

    def __init__(self, directory: str) -> None:
        self.on_end: Callable[[], None] | None = None
        self._directory = directory  # of the sockets: nobody else removes it now
        threading.Thread(target=self._watch, name="parent-watch", daemon=True).start()

    def _watch(self) -> None:
        while os.read(0, 4096):  # nothing more is sent: this returns when the parent's end closes
            pass
        shutil.rmtree(self._directory, ignore_errors=True)
        if self.on_end is not None:
            self.on_end()
            threading.Event().wait(GRACE)  # a main thread that ends takes this one with it
        os._exit(1)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the parent asks a stuck engine where it stands
    line = _read_line()
    if not line:  # the parent ended before it could say anything
        return 0
    watch = ParentWatch(json.loads(line)["directory"])
    with uncollected():
        from .host import run  # lazy: takes seconds, in which the parent may end
    gc.freeze()  # modules stay: no collection need look at them

    return run(line, watch)


def _read_line() -> bytes:
    """Unbuffered: a thread that waits in a buffered reader would spoil the interpreter's end."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 65536)
        if not piece:
            return b""
        line += piece
    return line


if __name__ == "__main__":
    sys.exit(main())
