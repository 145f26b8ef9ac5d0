"""The executor of a tensor-parallel group: the first rank here, the others as child processes.

Each plan goes to every rank as one frame; the ranks meet in the collectives of the forward and
draw the same tokens, so only errors come back. A rank that dies, hangs, or fails where the first
one does not, would leave the group waiting in a collective: then all of it is ended, and its reason
raised.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any

from ..platforms.interface import Communicator, GroupSpec
from .config import EngineConfig
from .env import child_environment
from .errors import EngineDeadError
from .executor import Rank, StepHandle
from .log_lines import LogStyle
from .plan import StepOutput, StepPlan
from .platform import make_platform
from .rank_link import Boot, Link, LinkClosed, Report

logger = logging.getLogger("trimaran.executor")

GRACE = 1.0
"""Seconds between one rank's failure and the end of a group that has not settled it itself."""

_CLOSE_SECONDS = 5.0


class RankProcess:
    """A child process and what it last reported."""

    def __init__(self, config: EngineConfig, group: GroupSpec) -> None:
        platform = make_platform(config.platform.name)
        plan = {
            "tensor_parallel_size": group.size,
            "num_threads": config.platform.num_threads,
        }
        ours, theirs = socket.socketpair()
        self.rank = group.rank
        self.reported = -1  # the last step that is over here
        self.busy_since = 0.0  # `time.monotonic()`, while there are steps it has not reported
        self.link = Link(ours)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"{__package__}.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=child_environment(platform.process_env(group.rank, plan)),
            )
        log = LogStyle.of_this_process()
        # What all ranks do alike, the first one says.
        quiet = dataclasses.replace(log, level=max(log.level, logging.WARNING))
        self.link.send(Boot(config, group, quiet))

    def end(self, seconds: float) -> None:
        """Close the link, on which a healthy rank ends by itself; kill it after `seconds`."""
        self.link.close()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def collective_timeout(step_timeout: float) -> float:
    """Seconds. Whoever waits for a stuck rank must not give up before the watcher names that rank;
    and a time without end ("inf") is one that the platform can still express."""
    return min(max(GroupSpec().timeout, 2 * step_timeout), 1e9)


class RankGroup:
    """The child ranks, watched by one thread each."""

    def __init__(self, config: EngineConfig, size: int) -> None:
        self._directory = tempfile.mkdtemp(prefix="trimaran-")  # mode 0700
        self._size = size
        self._changed = threading.Condition()
        self._dead: str | None = None
        self._closing = False
        self._collectives: Communicator | None = None  # the first rank's
        self._errors: dict[int, dict[int, str | None]] = {}  # step → rank → its error
        self._steps: dict[int, StepHandle] = {}  # the first rank's, until they are settled
        self._sent = self._settled = -1
        self._timeout = config.parallel.step_timeout
        self._low_latency = config.parallel.low_latency_collectives
        self._members = [RankProcess(config, self.member(rank)) for rank in range(1, size)]
        for member in self._members:
            name = f"trimaran-rank-{member.rank}"
            threading.Thread(target=self._watch, args=(member,), name=name, daemon=True).start()
        threading.Thread(target=self._watch_steps, name="trimaran-ranks", daemon=True).start()

    # -- what the first rank asks --------------------------------------------------------------

    def member(self, rank: int) -> GroupSpec:
        rendezvous = f"file://{self._directory}/group"
        timeout = collective_timeout(self._timeout)
        return GroupSpec(rank, self._size, rendezvous, timeout, self._low_latency)

    def joined(self, collectives: Communicator) -> None:
        """The first rank has met the others, through these."""
        with self._changed:
            self._collectives = collectives
            dead = self._dead is not None
        if dead:
            self._release()

    def send(self, plan: StepPlan) -> None:
        self.check()
        frame = self._members[0].link.encode(plan)
        for member in self._members:
            if member.reported == self._sent:  # it was idle
                member.busy_since = time.monotonic()
        self._sent = plan.step_id
        for member in self._members:
            try:
                member.link.send_frame(frame)
            except LinkClosed:
                self.wait_for_death()

    @property
    def process_ids(self) -> list[int]:
        return [member.process.pid for member in self._members]

    def check(self) -> None:
        """Raise what a rank died of."""
        if self._dead is not None:
            raise EngineDeadError(self._dead)

    def wait_for_death(self) -> None:
        """A rank is known to be gone: wait until its watcher says why, and raise that."""
        with self._changed:
            self._changed.wait_for(lambda: self._dead is not None, GRACE)
        self._fail("a rank of the parallel group is gone")
        self.check()

    def wait_built(self, build: threading.Thread) -> None:
        """Until `build`, the first rank's, is over; raises what another rank died of meanwhile.
        The others need no waiting for: they read their first plan when they are built."""
        with self._changed:
            while self._dead is None and build.is_alive():
                self._changed.wait(0.02)
        self.check()

    def settle(self, output: StepOutput) -> StepOutput:
        """The first rank has finished a step. If it failed, so must have all the others in the
        same way: then the group is still in step, and only that step's requests end."""
        step = output.step_id
        with self._changed:
            if output.error is not None:
                self._changed.wait_for(
                    lambda: self._dead is not None or self._all_failed(step), GRACE
                )
            expected = self._all_failed(step) if output.error else not self._any_failed(step)
            self._settled = max(self._settled, step)
            self._steps.pop(step, None)
            self._errors.pop(step, None)
        if not expected:
            self._fail(f"step {step} failed on some ranks only: {output.error or 'not on rank 0'}")
        self.check()  # a step that a dead group's collectives were aborted in computed nothing
        return output

    def follow(self, step_id: int, step: StepHandle) -> None:
        """The first rank runs this step too."""
        with self._changed:
            self._steps[step_id] = step

    def _any_failed(self, step: int) -> bool:
        return any(error is not None for error in self._errors.get(step, {}).values())

    def _all_failed(self, step: int) -> bool:
        reports = self._errors.get(step, {})
        return len(reports) == len(self._members) and None not in reports.values()

    # -- watching ------------------------------------------------------------------------------

    def _watch(self, member: RankProcess) -> None:
        try:
            while True:
                self._take(member, member.link.receive(Report))
        except LinkClosed:
            if self._closing:
                return
            code = member.process.wait()
            ended = f"signal {-code}" if code < 0 else f"exit status {code}"
            self._fail(f"rank {member.rank} of the parallel group ended ({ended})")

    def _take(self, member: RankProcess, report: Report) -> None:
        if report.state in ("failed", "lost"):
            what = "cannot start" if report.state == "failed" else "cannot go on"
            self._fail(f"rank {member.rank} of the parallel group {what}: {report.error}")
            return
        with self._changed:
            member.reported, member.busy_since = report.step_id, time.monotonic()
            late = report.state == "step" and report.step_id <= self._settled
            if report.state == "step" and not late:
                self._errors.setdefault(report.step_id, {})[member.rank] = report.error
            self._changed.notify_all()
        if report.error is None:
            return
        # Where the first rank failed as well, it waited for this report before it settled.
        if late or not self._comes_to_an_end(report.step_id):
            self._fail(f"rank {member.rank} failed alone in a step: {report.error}")

    def _watch_steps(self) -> None:
        """End the group when ranks make nothing of a step for too long: one that hangs keeps all
        the others waiting."""
        while self._dead is None and not self._closing:
            with self._changed:
                self._changed.wait(min(1.0, self._timeout / 4))
            late = time.monotonic() - self._timeout
            stuck = [m for m in self._members if m.reported < self._sent and m.busy_since < late]
            if stuck:
                step_id = stuck[0].reported + 1
                ranks = ", ".join(f"rank {member.rank}" for member in stuck)
                if not self._first_is_done(step_id):
                    ranks += ", nor by rank 0 (one that hangs keeps the others waiting),"
                self._fail(
                    f"step {step_id} of the parallel group is stuck: not finished by {ranks} in "
                    f"{self._timeout:g} s (--step-timeout)"
                )

    def _comes_to_an_end(self, step_id: int) -> bool:
        """Or is the first rank stuck in a collective that another one will never reach?"""
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and not self._closing:
            if self._first_is_done(step_id):
                return True
            time.sleep(0.02)
        return self._closing

    def _first_is_done(self, step_id: int) -> bool:
        step = self._steps.get(step_id)
        return self._settled >= step_id or (step is not None and step.done())

    def _fail(self, reason: str) -> None:
        """The group cannot go on: end every child, and the first rank's wait for them."""
        with self._changed:
            if self._dead is not None or self._closing:
                return
            self._dead = reason
            self._changed.notify_all()
        logger.error("%s", reason)
        for member in self._members:
            member.process.kill()
        self._release()

    def _release(self) -> None:
        """A device may wait for the others in a kernel, which their end alone does not end."""
        if self._collectives is None:
            return
        try:
            self._collectives.abort()
        except Exception:  # the reason that counts is known already
            logger.exception("the collectives of a group that has ended could not be aborted")

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for member in self._members:
            member.end(max(0.1, deadline - time.monotonic()))
        shutil.rmtree(self._directory, ignore_errors=True)


class _GroupStep:
    """A step that every rank runs."""

    def __init__(self, group: RankGroup, step: StepHandle) -> None:
        self._group = group
        self._step = step

    def done(self) -> bool:
        return self._step.done()

    def result(self) -> StepOutput:
        return self._group.settle(self._step.result())


class GroupExecutor:
    """Tensor parallelism over processes of this machine.

    Create it on a thread that lives as long as the executor: the kernel ends the children when
    the thread that started them ends. Raises EngineDeadError, with the reason, from then on when
    a rank has died.
    """

    def __init__(self, config: EngineConfig) -> None:
        size = config.parallel.tensor_parallel_size
        self._group = RankGroup(config, size)
        self._rank: Rank | None = None
        try:
            self._rank = self._build(config, self._group.member(0))
        except BaseException:
            self._group.close()
            raise
        self.description: Mapping[str, Any] = {
            **self._rank.description,
            "tensor parallel": f"{size} processes ({os.getpid()}, "
            f"{', '.join(map(str, self._group.process_ids))})",
        }

    def _build(self, config: EngineConfig, group: GroupSpec) -> Rank:
        """Build the first rank beside the others. On a thread of its own, because it waits for
        them: if one of them fails, that is raised here instead of the end of that wait."""
        built: list[Rank] = []
        errors: list[BaseException] = []

        def build() -> None:
            try:
                built.append(Rank(config, group))
                self._group.joined(built[0].comm)
            except BaseException as error:  # raised again below
                errors.append(error)

        thread = threading.Thread(target=build, name="trimaran-rank-0", daemon=True)
        thread.start()
        self._group.wait_built(thread)
        if errors:
            raise errors[0]
        return built[0]

    def submit(self, plan: StepPlan) -> StepHandle:
        assert self._rank is not None, "the executor is closed"
        self._group.send(plan)
        step = self._rank.runner.submit(plan)
        self._group.follow(plan.step_id, step)
        return _GroupStep(self._group, step)

    def close(self) -> None:
        if self._rank is not None:
            self._group.close()
            self._rank.close()
            self._rank = None
