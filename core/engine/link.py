"""One started engine as an event loop sees it: a client, and the thread that polls it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from ..args import EngineArgs
from ..errors import EngineDeadError
from .client import EngineClient, EngineInfo, ToEngine
from .faults import one_line
from .messages import StepMessage, UtilityCall, UtilityResult

logger = logging.getLogger(__name__)

POLL_TIME = 1.0  # seconds
PING_AFTER = 1.0  # seconds of silence
PING_ID = 0
IDLE_TIMEOUT = 60.0  # seconds in which an engine that has nothing to do answers a ping

# The engine's modules are heavy (the runner), and ZeroMQ is an extra of the server: each program
# imports only the client it uses.
INPROC = (".inproc", "InprocClient")
PROCESS = (".process_client", "ProcessClient")


class EngineLink:
    """Starts an engine, polls it in a thread, and tells the event loop what it says.

    Everything but the polling runs in the loop that called `start`.
    """

    def __init__(self, args: EngineArgs, in_process: bool) -> None:
        self._args = args
        self._in_process = in_process
        self._client: EngineClient | None = None
        self._thread: threading.Thread | None = None
        self._death: EngineDeadError | None = None
        self._calls: dict[int, asyncio.Future[UtilityResult]] = {}
        self._last_call = PING_ID
        self._last_heard = 0.0
        self._pinged: float | None = None  # since when a ping is unanswered
        self._num_sent = 0  # pings apart
        self._sent_at_ping = 0
        self._idle_after = -1  # so many messages: then the engine said that it was idle
        self._closing = False
        self._go = threading.Event()

    def fresh(self) -> EngineLink:
        """A link for another engine of the same kind."""
        return EngineLink(self._args, self._in_process)

    async def start(
        self,
        on_step: Callable[[StepMessage], Callable[[], None]],
        on_death: Callable[[EngineDeadError], None],
    ) -> EngineInfo:
        """Raises the engine's own error if it cannot load. `on_step` is called in the polling
        thread, and what it returns in the event loop; `on_death` in the loop, once."""
        self._loop = asyncio.get_running_loop()
        self._on_step, self._on_death = on_step, on_death
        ready: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._live, args=(ready,), name="engine-poll", daemon=True
        )
        self._thread.start()
        try:
            return await asyncio.shield(ready)
        except asyncio.CancelledError:  # nobody waits for the engine any more, or for its error
            ready.add_done_callback(lambda future: future.cancelled() or future.exception())
            await asyncio.shield(self.close())
            raise

    def run(self) -> None:
        """Begin to poll; before that nothing is read and nobody is called."""
        self._go.set()

    @property
    def alive(self) -> bool:
        return self._client is not None and self._death is None

    def check(self) -> None:
        """Raises `EngineDeadError` if the engine is not there."""
        if self._death is not None:
            raise EngineDeadError(self._death.message)
        if self._client is None:
            raise EngineDeadError("the engine has not been started")

    def send(self, message: ToEngine) -> None:
        self.check()
        assert self._client is not None
        self._client.send(message)
        self._num_sent += 1  # not before: a ping that claims to follow the message must do so

    async def call(self, method: str) -> dict[str, Any]:
        """Ask the engine; waits for the end of its step. Raises `EngineDeadError`."""
        self._last_call += 1
        call_id = self._last_call
        future = self._calls[call_id] = self._loop.create_future()
        try:
            self.send(UtilityCall(call_id, method))
            result = await future
        finally:
            del self._calls[call_id]
        if result.error is not None:
            raise ValueError(result.error)
        return dict(result.value)

    async def close(self) -> None:
        """End the engine, whatever it is doing, and its thread. May be called again."""
        self._closing = True
        if self._client is not None:
            await asyncio.to_thread(self._client.stop)
        self._go.set()
        if self._thread is not None and (self._client is not None or not self._in_process):
            # (An engine that still loads in this process cannot be stopped: its thread closes it.)
            await asyncio.to_thread(self._thread.join)

    # ---------------------------------------------------------------------- the polling thread

    def _live(self, ready: asyncio.Future[EngineInfo]) -> None:
        """Open the engine and poll it: an engine in this process must not change its thread."""
        try:
            client = self._open()
        except BaseException as error:
            self._tell(_settle, ready, None, error)
            return
        try:
            self._last_heard = time.monotonic()
            self._tell(_settle, ready, client.info, None)
            self._go.wait()
            self._last_heard = time.monotonic()
            self._poll_for_ever(client)
        finally:
            client.close()

    def _open(self) -> EngineClient:
        if self._in_process:
            client: EngineClient = _load(INPROC).from_args(self._args)
            self._client = client
            if self._closing:
                client.stop()
            return client
        process = self._client = _load(PROCESS).start(self._args)
        try:
            if self._closing:
                raise EngineDeadError("the engine was closed while it started")
            process.wait_ready()
        except BaseException:
            process.close()
            raise
        return process

    def _poll_for_ever(self, client: EngineClient) -> None:
        try:
            while True:
                message = client.poll(POLL_TIME)
                if message is None:
                    self._watch(client)
                    continue
                self._last_heard, self._pinged = time.monotonic(), None
                if isinstance(message, StepMessage):
                    self._tell(self._on_step(message))
                    continue
                if message.call_id == PING_ID and message.value.get("idle"):
                    self._idle_after = self._sent_at_ping
                self._tell(self._answer, message)
        except EngineDeadError as error:
            self._tell(self._die, error)
        except Exception as error:
            logger.exception("the front end of the engine failed")
            self._tell(self._die, EngineDeadError(f"the front end failed: {one_line(error)}"))

    def _watch(self, client: EngineClient) -> None:
        """Ping after some silence. The engine answers between two steps: one that does not for
        longer than a step may take is stuck, and sooner if it can have no step to take."""
        now = time.monotonic()
        if self._pinged is None:
            if now - self._last_heard > PING_AFTER:
                self._pinged, self._sent_at_ping = now, self._num_sent
                client.send(UtilityCall(PING_ID, "ping"))
            return
        limit, which = self._args.step_timeout, "--step-timeout"
        if self._idle_after == self._num_sent and limit > IDLE_TIMEOUT:
            limit, which = IDLE_TIMEOUT, "it had nothing to do"
        if now - self._pinged > limit:
            kill = getattr(client, "kill", None)  # an engine in this thread answers or is stuck
            if kill is not None:
                kill(f"the engine was stuck: no answer for {now - self._pinged:.0f} s ({which})")

    def _tell(self, callback: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed before the engine
            self._loop.call_soon_threadsafe(callback, *arguments)

    # -------------------------------------------------------------------------- the event loop

    def _answer(self, result: UtilityResult) -> None:
        future = self._calls.get(result.call_id)
        if future is not None and not future.done():
            future.set_result(result)

    def _die(self, error: EngineDeadError) -> None:
        self._death = error
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDeadError(error.message))
        if not self._closing:
            self._on_death(error)


def _settle(
    future: asyncio.Future[EngineInfo], info: EngineInfo | None, error: BaseException | None
) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    elif info is not None:
        future.set_result(info)


def _load(place: tuple[str, str]) -> Any:
    module, name = place
    return getattr(importlib.import_module(module, __package__), name)
