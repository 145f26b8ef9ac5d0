"""A group that cannot go on releases its first rank from the collectives it waits in."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trimaran.core import executor_group
from trimaran.core.config import EngineConfig, ParallelConfig
from trimaran.core.errors import EngineDeadError
from trimaran.core.executor_group import RankGroup
from trimaran.core.plan import StepOutput
from trimaran.platforms.accelerator_communicator import HostStagedCommunicator, NcclCommunicator
from trimaran.platforms.communicator import LocalCommunicator
from trimaran.platforms.interface import Communicator


class Spinning(LocalCommunicator):
    """A device that waits for the others until it is aborted, whatever becomes of them."""

    def __init__(self, error: Exception | None = None) -> None:
        self.released = threading.Event()
        self.ended_before_release: list[bool] = []
        self.members: list[Any] = []
        self._error = error

    def all_reduce(self, tensor: Tensor) -> Tensor:
        assert self.released.wait(10), "nobody aborted the collective"
        return tensor

    def abort(self) -> None:
        self.ended_before_release = [member.process.killed for member in self.members]
        self.released.set()
        if self._error is not None:
            raise self._error


class Process:
    pid = 7
    killed = False

    def kill(self) -> None:
        self.killed = True

    def wait(self, seconds: float | None = None) -> int:
        return -9


class Silent:
    """A link on which nothing comes."""

    def __init__(self) -> None:
        self._end = threading.Event()

    def receive(self, kind: type) -> Any:
        self._end.wait()
        raise executor_group.LinkClosed

    def close(self) -> None:
        self._end.set()


class Member:
    def __init__(self, config: EngineConfig, group: Any) -> None:
        self.rank, self.link, self.process = group.rank, Silent(), Process()
        self.reported, self.busy_since = -1, 0.0

    def end(self, seconds: float) -> None:
        self.link.close()


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(executor_group, "RankProcess", Member)
    config = SimpleNamespace(parallel=ParallelConfig(tensor_parallel_size=2, step_timeout=60.0))
    group = RankGroup(config, 2)  # type: ignore[arg-type]
    yield group
    group.close()


def test_a_rank_that_dies_frees_the_first_one(group: RankGroup) -> None:
    collectives = Spinning()
    collectives.members = group._members
    group.joined(collectives)
    group._members[0].link.close()  # its process is gone
    collectives.all_reduce(torch.zeros(1))
    assert collectives.ended_before_release == [True]
    with pytest.raises(EngineDeadError, match="signal 9"):
        group.settle(StepOutput(0, [[1]]))  # what the aborted kernels left are no tokens


def test_who_joins_a_dead_group_is_freed_at_once(group: RankGroup) -> None:
    group._fail("a rank went")
    collectives = Spinning()
    group.joined(collectives)
    assert collectives.released.is_set()


def test_a_failed_abort_keeps_the_reason(
    group: RankGroup, caplog: pytest.LogCaptureFixture
) -> None:
    group.joined(Spinning(RuntimeError("no such communicator")))
    group._fail("a rank went")
    assert "no such communicator" in caplog.text
    with pytest.raises(EngineDeadError, match="a rank went"):
        group.check()


# ---------------------------------------------------------------------------------------------
# Communicators
# ---------------------------------------------------------------------------------------------


class ProcessGroup:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def abort(self) -> None:
        self.calls.append("abort")

    def shutdown(self) -> None:
        self.calls.append("shutdown")


def nccl(joined: ProcessGroup) -> NcclCommunicator:
    """One that has met its group; this torch has no NCCL to meet by."""
    made = NcclCommunicator.__new__(NcclCommunicator)
    made._joined = joined
    return made


def test_nccl_is_aborted_once_and_not_shut_down_after_it() -> None:
    joined = ProcessGroup()
    communicator = nccl(joined)
    for end in (communicator.abort, communicator.abort, communicator.close):
        end()
    assert joined.calls == ["abort"]
    with pytest.raises(RuntimeError, match="closed"):
        communicator.all_reduce(torch.zeros(1))


def test_nccl_is_shut_down_where_all_is_well() -> None:
    joined = ProcessGroup()
    communicator = nccl(joined)
    communicator.close()
    communicator.close()
    assert joined.calls == ["shutdown"]


def test_abort_is_close_where_nothing_else_is_said() -> None:
    class Plain(LocalCommunicator):
        closed = False
        abort = Communicator.abort

        def close(self) -> None:
            self.closed = True

    plain = Plain()
    plain.abort()
    assert plain.closed


def test_a_staged_communicator_aborts_the_hosts() -> None:
    host = Spinning()
    HostStagedCommunicator(host).abort()
    assert host.released.is_set()
