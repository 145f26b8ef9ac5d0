"""The engine's loop: receive, schedule, execute, update, emit."""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

from ...platforms.interface import DeviceLost
from ..config import EngineConfig
from ..errors import DeviceLostError, EngineDeadError, QueueFullError, TrimaranError
from ..executor import Executor, StepHandle, open_executor
from ..plan import StepOutput, StepPlan
from ..scheduler import Scheduler
from .client import FromEngine, ToEngine
from .faults import kind_of, one_line
from .messages import (
    AbortRequests,
    AddRequests,
    BeamOutput,
    EngineRequest,
    FinishSequence,
    RejectedRequest,
    SequenceOutput,
    StepMessage,
    UtilityCall,
    UtilityResult,
)

logger = logging.getLogger(__name__)

# There is work, yet nothing to run and nothing in flight: requests wait for something outside.
BLOCKED_WAIT = 0.01  # seconds


def num_objects() -> int:
    """Objects that Python's collector tracks in this process."""
    return len(gc.get_objects())


class Inbox(Protocol):
    def take(self, timeout: float | None) -> list[ToEngine]:
        """What has come; waits up to `timeout` seconds for a first message (None: for ever)."""


class FailedStep:
    """The handle of a step that could not even be submitted."""

    def __init__(self, plan: StepPlan, error: BaseException) -> None:
        self._output = failed_output(plan, error)

    def result(self) -> StepOutput:
        return self._output

    def done(self) -> bool:
        return True


class Engine:
    """One model's scheduler and executor, driven by whoever calls `step`.

    A step that raises ends the requests of its batch with an error, and the engine goes on. Only
    `EngineDeadError` (a rank or the device is gone, or so many steps failed that the device must be
    broken) and faults of the scheduler itself come out of `step`: then the engine cannot go on.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor | None = None,
        *,
        inbox: Inbox,
        outbox: Callable[[FromEngine], None],
    ) -> None:
        self.config = config
        self.executor = executor if executor is not None else open_executor(config)
        self.scheduler = Scheduler(config.scheduler, config.cache)
        self._inbox = inbox
        self._outbox = outbox
        self._run_ahead = config.scheduler.run_ahead
        self._in_flight: deque[tuple[StepPlan, StepHandle]] = deque()
        self._rejected: list[RejectedRequest] = []
        self._blocked = False

    def step(self, timeout: float | None = 0.0) -> None:
        """One turn. An idle engine waits up to `timeout` seconds for a message (None: for ever)."""
        self._receive(timeout)
        plan = self.scheduler.schedule()
        self._execute(plan)
        outputs, beams = self._update(plan)
        self._emit(plan, outputs, beams)

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight) or self.scheduler.has_work

    def close(self) -> None:
        self._in_flight.clear()
        self.executor.close()

    # ------------------------------------------------------------------------------- receive

    def _receive(self, timeout: float | None) -> None:
        if self.has_work:
            timeout = BLOCKED_WAIT if self._blocked else 0.0
        for message in self._inbox.take(timeout):
            match message:
                case AddRequests(requests):
                    for request in requests:
                        self._admit(request)
                case AbortRequests(request_ids):
                    for request_id in request_ids:
                        self.scheduler.abort(request_id)
                case FinishSequence(request_id, index, at_token):
                    self.scheduler.finish(request_id, index, at_token)
                case UtilityCall():
                    self._outbox(self._answer(message))

    def _admit(self, request: EngineRequest) -> None:
        try:
            self.scheduler.add(request)
        except Exception as error:
            if not isinstance(error, TrimaranError):
                logger.exception("request %r cannot be admitted", request.request_id)
            refused = RejectedRequest(
                request.request_id,
                kind_of(error),
                one_line(error),
                param=getattr(error, "param", None),
                retry_after=error.retry_after if isinstance(error, QueueFullError) else None,
            )
            self._rejected.append(refused)

    def _answer(self, call: UtilityCall) -> UtilityResult:
        match call.method:
            case "ping":
                return UtilityResult(call.call_id, {"idle": not self.has_work})
            case "stats":
                return UtilityResult(call.call_id, self._stats())
            case "check":
                # For leak hunts: what is still alive once the cycles are collected.
                gc.collect()
                return UtilityResult(call.call_id, self._stats() | {"objects": num_objects()})
            case "reset_prefix_cache":
                return UtilityResult(call.call_id, {"done": self.scheduler.reset_prefix_cache()})
        return UtilityResult(call.call_id, error=f"there is no utility {call.method!r}")

    def _stats(self) -> dict[str, int | str | bool]:
        stats = self.scheduler.stats()
        return {name: getattr(stats, name) for name in stats.__dataclass_fields__}

    # ------------------------------------------------------------------------------- execute

    def _execute(self, plan: StepPlan) -> None:
        if plan.empty:
            return
        try:
            handle = self.executor.submit(plan)
        except EngineDeadError:
            raise
        except DeviceLost as error:
            raise DeviceLostError(f"the device is lost: {one_line(error)}") from error
        except BaseException as error:
            # Also when interrupted from the keyboard: what was planned must still be updated.
            handle = FailedStep(plan, error)
            if not isinstance(error, Exception):
                self._in_flight.append((plan, handle))
                raise
            logger.exception("step %d cannot be submitted", plan.step_id)
        self._in_flight.append((plan, handle))

    # -------------------------------------------------------------------------------- update

    def _update(self, newest: StepPlan) -> tuple[list[SequenceOutput], list[BeamOutput]]:
        """Finish the oldest step once enough are in flight, or if there was nothing to add."""
        self._blocked = newest.empty and not self._in_flight
        if not self._in_flight or (not newest.empty and len(self._in_flight) <= self._run_ahead):
            return self.scheduler.drain_outputs(), []
        plan, handle = self._in_flight[0]
        output = self._result(plan, handle)
        self._in_flight.popleft()
        return self.scheduler.update(plan, output)

    def _result(self, plan: StepPlan, handle: StepHandle) -> StepOutput:
        try:
            return handle.result()
        except EngineDeadError:
            raise
        except Exception as error:
            logger.exception("step %d failed", plan.step_id)
            return failed_output(plan, error)

    # ---------------------------------------------------------------------------------- emit

    def _emit(self, plan: StepPlan, outputs: list[SequenceOutput], beams: list[BeamOutput]) -> None:
        if plan.empty and not (outputs or beams or self._rejected):
            return
        rejected, self._rejected = self._rejected, []
        self._outbox(StepMessage(outputs, beams, rejected, self.scheduler.stats()))


def failed_output(plan: StepPlan, error: BaseException) -> StepOutput:
    return StepOutput(plan.step_id, [[] for _ in plan.rows], error=one_line(error))
