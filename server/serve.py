"""`trimaran serve`: one HTTP server and its engine, from the start to a clean end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import uvicorn

from .. import __version__
from ..core.args import EngineArgs, ServerArgs
from ..core.async_engine import AsyncEngine
from ..core.env import read_environment
from ..core.errors import TrimaranError
from ..core.log_lines import escape
from . import logs
from .app import create_app
from .guards.auth import KeyRing
from .guards.hosts import is_loopback
from .http_protocol import protocol_class
from .listen import base_url
from .router import EngineRouter, ServedModel
from .stats_log import StatsLog
from .supervisor import Supervisor

logger = logging.getLogger(__name__)

# When the engine is given up, open streams get this long to pass on their error event.
FAREWELL_SECONDS = 0.5
# An engine that has not stopped by then goes with this process.
CLOSE_SECONDS = 3.8
KILLED = 143  # what a shell reports for SIGTERM


class HTTPServer(uvicorn.Server):
    """uvicorn, leaving signals to whoever runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Service:
    """The server, its engine and their life. `run` returns the exit status."""

    def __init__(
        self, engine_args: EngineArgs, args: ServerArgs, sock: socket.socket, keys: KeyRing
    ) -> None:
        self.args = args
        self.sock = sock
        self.started = time.monotonic()
        self.engine = AsyncEngine.from_args(
            engine_args, in_process=args.in_process_engine, chat_template=args.chat_template
        )
        self.model = ServedModel(self.engine, engine_args)
        app, self.state = create_app(EngineRouter(self.model), args, keys=keys)
        config = uvicorn.Config(
            app,
            http=protocol_class(args),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            root_path=args.root_path,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=3,
        )
        self.http = HTTPServer(config)
        self.stop = asyncio.Event()
        self.supervisor = Supervisor(self.model, self.state, args.engine_restarts)
        self._signals = 0

    async def run(self, out: logs.DroppingHandler) -> int:
        """Serves until a signal comes or the engine is gone for good."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        http = asyncio.ensure_future(self.http.serve(sockets=[self.sock]))
        try:
            if not await self._load():
                return 0
            out.put(self._ready_line())
            gc.freeze()  # what is loaded stays; collections need not walk through it
            return await self._watch(http)
        finally:
            await self._shut_down(http)

    def _on_signal(self) -> None:
        self._signals += 1
        if self._signals > 1:
            os._exit(KILLED)  # asked twice: children notice by themselves
        logger.info("shutting down; a second signal ends the process at once")
        self.state.draining = True
        self.stop.set()

    async def _load(self) -> bool:
        """Starts the engine; False if a signal came first. Raises what the engine raised."""
        start = asyncio.ensure_future(self.engine.start())
        stop = asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not start.done():
                return False
            start.result()
        finally:
            start.cancel()  # ends the engine by itself; `_shut_down` bounds the time it has
            stop.cancel()
        self.model.mark_ready()
        return True

    def _ready_line(self) -> str:
        seconds = time.monotonic() - self.started
        url = base_url(self.sock, self.args)
        return (
            f"Trimaran {__version__} serves {', '.join(self.model.names)} at {url} "
            f"(ready in {seconds:.1f} s)"
        )

    async def _watch(self, http: asyncio.Task[None]) -> int:
        """Until the stop signal, or until engine or HTTP server cannot go on."""
        watch = asyncio.ensure_future(self.supervisor.run())
        stop = asyncio.ensure_future(self.stop.wait())
        tasks = [watch, stop]
        if not self.args.disable_log_stats:
            tasks.append(asyncio.ensure_future(StatsLog(self.state.router).run()))
        await asyncio.wait({watch, stop, http}, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        if self.stop.is_set():
            await self._drain()
            return 0
        _log_failures(watch, http)
        self.state.draining = True
        await asyncio.sleep(FAREWELL_SECONDS)
        return 1

    async def _drain(self) -> None:
        """Waits until nothing is in flight, at most `--shutdown-timeout`."""
        deadline = time.monotonic() + self.args.shutdown_timeout
        while self.state.num_in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self.state.num_in_flight:
            logger.warning("%d requests are cut short", self.state.num_in_flight)

    async def _shut_down(self, http: asyncio.Task[None]) -> None:
        self.state.draining = True
        closing = asyncio.ensure_future(self.engine.close())
        # At the same time: uvicorn waits for streams, and they end as the engine does.
        self.http.should_exit = True
        await asyncio.wait({closing, http}, timeout=CLOSE_SECONDS)
        if closing.done() and (error := closing.exception()):
            logger.error("the engine did not close cleanly: %s", error)
        if self.args.uds:
            Path(self.args.uds).unlink(missing_ok=True)


def _log_failures(*tasks: asyncio.Task[None]) -> None:
    """What ended these tasks, for those that have ended by an exception."""
    for task in tasks:
        if task.done() and not task.cancelled() and (error := task.exception()):
            logger.error("the server cannot go on", exc_info=error)


def serve(
    engine_args: EngineArgs, args: ServerArgs, sock: socket.socket, keys: Sequence[str]
) -> NoReturn:
    """Runs the server on a socket that listens already, and ends the process."""
    log = logs.configure(read_environment().log_level or args.log_level, args.log_format)
    out = logs.DroppingHandler(sys.stdout)
    try:
        status = _serve(engine_args, args, sock, KeyRing(keys), log, out)
    except TrimaranError as error:
        _say(error, log, args)
        status = 1
    out.finish()
    log.finish()
    # Everything that matters has ended. Taking the interpreter apart would cost seconds, and
    # for ever where a thread hangs: in a write to a full pipe, or in an engine that does not stop.
    os._exit(status)


def _say(error: TrimaranError, log: logs.DroppingHandler, args: ServerArgs) -> None:
    """What ends the server, as every command says it; a reader of JSON gets JSON."""
    if args.log_format == "json":
        logger.error("%s", error.message)
    else:
        lines = map(escape, error.message.split("\n"))
        log.put("trimaran: error: " + "\n".join(lines))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed."""
    return uvicorn.Config("", log_config=None).get_loop_factory()


def _serve(
    engine_args: EngineArgs,
    args: ServerArgs,
    sock: socket.socket,
    keys: KeyRing,
    log: logs.DroppingHandler,
    out: logs.DroppingHandler,
) -> int:
    if not keys and not args.uds and not is_loopback(args.host):
        logger.warning("no --api-key is set: whoever reaches %s may use this server", args.host)

    async def main() -> int:
        try:
            service = Service(engine_args, args, sock, keys)
            service.state.metrics.collector.dropped_lines = lambda: log.dropped + out.dropped
            return await service.run(out)
        except TrimaranError as error:  # a model that cannot be loaded, for one
            _say(error, log, args)
        except Exception:
            logger.exception("the server failed")
        return 1

    # Never closed: that waits for threads.
    return asyncio.Runner(loop_factory=_loop_factory()).run(main())
