"""Sums over symmetric memory: which message goes which way, with stand-ins for torch's kernels."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from trimaran.platforms import accelerator_communicator, symmetric_memory
from trimaran.platforms.accelerator_communicator import NcclCommunicator
from trimaran.platforms.host_device import HostDevice
from trimaran.platforms.symmetric_memory import (
    LIMITS,
    MULTICAST,
    NCCL,
    ONE_SHOT,
    TWO_SHOTS,
    NamedGroup,
    SymmetricSums,
    forget_group,
    missing,
    register_group,
)

OURS = NamedGroup("ours", None)


class Kernels:
    """Those of rank 0 of two; the other's buffer holds `theirs`. What torch's check, they check."""

    def __init__(self, theirs: float) -> None:
        self.theirs = theirs
        self.called: list[str] = []

    def _check(self, message: Tensor, op: str, group: str) -> None:
        assert message.is_contiguous() and message.dtype in (torch.bfloat16, torch.float32)
        assert message.storage_offset() == 0 and message.nbytes % 32 == 0
        assert op == "sum" and group == "ours"

    def one_shot_all_reduce_out(self, message: Tensor, op: str, group: str, out: Tensor) -> None:
        self._check(message, op, group)
        assert out.shape == message.shape and out.dtype == message.dtype and out.is_contiguous()
        assert out.data_ptr() != message.data_ptr() and out.data_ptr() % 16 == 0
        self.called.append(ONE_SHOT)
        torch.add(message, self.theirs, out=out)

    def two_shot_all_reduce_(self, message: Tensor, op: str, group: str) -> Tensor:
        self._check(message, op, group)
        self.called.append(TWO_SHOTS)
        return message.add_(self.theirs)

    def multimem_all_reduce_(self, message: Tensor, op: str, group: str) -> Tensor:
        self._check(message, op, group)
        self.called.append(MULTICAST)
        return message.add_(self.theirs)


def sums(multicast: bool = False, theirs: float = 0.0) -> tuple[SymmetricSums, Kernels]:
    kernels = Kernels(theirs)
    buffer = torch.full((LIMITS.two,), 0xFF, dtype=torch.uint8)
    return SymmetricSums(buffer, OURS, 2, multicast, kernels), kernels


def of_bytes(size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(size // dtype.itemsize, dtype=dtype)


@pytest.mark.parametrize(
    ("size", "way"),
    [
        (32, ONE_SHOT),
        (LIMITS.one, ONE_SHOT),
        (LIMITS.one + 32, TWO_SHOTS),
        (LIMITS.two, TWO_SHOTS),
        (LIMITS.two + 32, NCCL),
        (16, NCCL),  # half of the widest load for each
        (LIMITS.one + 16, NCCL),
        (0, NCCL),
    ],
)
def test_the_way_goes_by_size(size: int, way: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert sums()[0].way(of_bytes(size, dtype)) == way
        by_switch = MULTICAST if way == TWO_SHOTS else way
        assert sums(multicast=True)[0].way(of_bytes(size, dtype)) == by_switch


def test_what_the_kernels_do_not_add_goes_by_nccl() -> None:
    ours, _ = sums()
    for dtype in (torch.float16, torch.int32, torch.uint8, torch.float64):
        assert ours.way(of_bytes(64, dtype)) == NCCL
    assert ours.way(torch.zeros(8, 16).t()) == NCCL
    assert ours.way(of_bytes(96)[8:40]) == ONE_SHOT
    assert ours.way(of_bytes(96)[1:33]) == ONE_SHOT, "where a rank's begins is its own matter"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 600, 5000])
def test_a_sum_is_in_place(rows: int, dtype: torch.dtype) -> None:
    for multicast in (False, True):
        ours, kernels = sums(multicast, theirs=2.0)
        tensor = torch.arange(rows * 256, dtype=torch.int32).remainder(50).view(rows, 256).to(dtype)
        expected, way = tensor + 2, ours.way(tensor)
        assert way != NCCL
        assert ours.add(tensor, way) is tensor and torch.equal(tensor, expected)
        assert kernels.called == [way]


def test_a_message_that_begins_off_is_added_in_place() -> None:
    ours, kernels = sums(theirs=2.0)
    tensor = of_bytes(96)[1:33]
    assert ours.add(tensor, ONE_SHOT) is tensor and tensor.eq(2.0).all()
    assert kernels.called == [ONE_SHOT]


def test_where_there_is_none_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing(rocm=False, peers=True) == ""
    assert "CUDA's" in missing(rocm=True, peers=True)
    assert "do not reach" in missing(rocm=False, peers=False)
    monkeypatch.setattr(torch.ops, "symm_mem", SimpleNamespace(two_shot_all_reduce_=1))
    assert "lacks one_shot_all_reduce_out, multimem_all_reduce_" in missing(False, True)


def test_a_group_has_a_name_of_its_own(tmp_path: Path) -> None:
    found: Any = torch._C._distributed_c10d._resolve_process_group
    kind: Any = dist.ProcessGroup.BackendType
    groups = []
    for number in range(2):
        store = dist.FileStore(str(tmp_path / str(number)), 1)
        joined = dist.ProcessGroupGloo(store, 0, 1)
        groups.append(register_group(store, joined, kind.GLOO, 0, 1, torch.device("cpu")))
    for group in groups:
        assert found(group.name).group_name == group.name and found(group.name).size() == 1
        forget_group(group)
        with pytest.raises(RuntimeError):
            found(group.name)
    assert groups[0].name != groups[1].name and not dist.is_initialized()


# -- the choice at open ---------------------------------------------------------------------------


class Work:
    def wait(self) -> None:
        return None


class Backend:
    """NCCL's, of a group of two; the other rank sends what this one does, or `theirs` in turn,
    the last one again and again."""

    def __init__(self, *theirs: float) -> None:
        self.theirs, self.calls = list(theirs), 0

    def allreduce(self, tensors: list[Tensor]) -> Work:
        self.calls += 1
        theirs = self.theirs.pop(0) if len(self.theirs) > 1 else (self.theirs or [tensors[0]])[0]
        tensors[0].add_(theirs)
        return Work()

    def shutdown(self) -> None:
        return None

    abort = shutdown


def member(backend: Backend) -> NcclCommunicator:
    made = NcclCommunicator.__new__(NcclCommunicator)
    made.rank, made.size = 0, 2
    made._joined, made._token = backend, torch.zeros(1)
    return made


def opened(monkeypatch: pytest.MonkeyPatch, made: NcclCommunicator, found: Any) -> None:
    def open_sums(*given: Any) -> SymmetricSums:
        if isinstance(found, Exception):
            raise found
        return found  # type: ignore[no-any-return]

    monkeypatch.setattr(accelerator_communicator, "register_group", lambda *given: OURS)
    monkeypatch.setattr(accelerator_communicator, "open_sums", open_sums)
    monkeypatch.setattr(accelerator_communicator, "alloc_buffer", lambda device: torch.empty(1))
    monkeypatch.setattr(torch.version, "hip", None)
    made._sums = made._open_sums(None, HostDevice(), True)


@pytest.mark.parametrize("end", ["close", "abort"])
def test_small_sums_go_one_way_and_large_ones_the_other(
    end: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forgotten: list[NamedGroup] = []
    monkeypatch.setattr(accelerator_communicator, "forget_group", forgotten.append)
    backend, (ours, kernels) = Backend(), sums(theirs=1.0)
    made = member(backend)
    with caplog.at_level(logging.INFO, "trimaran.platforms"):
        opened(monkeypatch, made, ours)
    assert "sums of 2 ranks go over symmetric memory" in caplog.text
    asked = backend.calls
    assert made.all_reduce(torch.ones(16)).tolist() == [2.0] * 16
    assert (kernels.called, backend.calls) == ([ONE_SHOT], asked)
    assert made.all_reduce(torch.ones(7)).tolist() == [2.0] * 7
    large = torch.ones(LIMITS.two // 4 + 8)
    assert made.all_reduce(large) is large and math.isclose(large[-1], 2.0)
    assert (kernels.called, backend.calls) == ([ONE_SHOT], asked + 2)
    getattr(made, end)()
    made.close()
    assert forgotten == [OURS]
    with pytest.raises(RuntimeError, match="closed"):
        made.all_reduce(torch.ones(16))


@pytest.mark.parametrize(
    ("found", "theirs", "reason"),
    [
        (RuntimeError("no fabric handles"), [1.0], "RuntimeError: no fabric handles"),
        (None, [0.0], "another rank has none"),
        (None, [1.0, 0.0], "another rank has none"),  # no name for it, and no memory
    ],
)
def test_all_ranks_have_it_or_none(
    found: Exception | None,
    theirs: list[float],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made, forgotten = member(Backend(*theirs)), list[NamedGroup]()
    monkeypatch.setattr(accelerator_communicator, "forget_group", forgotten.append)
    with caplog.at_level(logging.INFO, "trimaran.platforms"):
        opened(monkeypatch, made, found or sums()[0])
    assert f"by NCCL alone: {reason}" in caplog.text
    assert made._sums is None and forgotten == [OURS]
    assert made.all_reduce(torch.ones(16)).tolist() == [1.0 + theirs[-1]] * 16


def test_cards_without_a_link_are_not_asked(caplog: pytest.LogCaptureFixture) -> None:
    made = member(Backend(0.0))
    with caplog.at_level(logging.INFO, "trimaran.platforms"):
        assert made._open_sums(None, HostDevice(), False) is None
    assert "do not reach each other's memory" in caplog.text
    assert symmetric_memory.missing(False, False) in caplog.text


def test_a_rank_without_memory_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others know before they wait for it."""

    def fail(*given: Any) -> Tensor:
        raise RuntimeError("no fabric handles")

    made = member(Backend(1.0))
    opened_sums: list[Any] = []
    monkeypatch.setattr(accelerator_communicator, "register_group", lambda *given: OURS)
    monkeypatch.setattr(accelerator_communicator, "forget_group", lambda group: None)
    monkeypatch.setattr(accelerator_communicator, "alloc_buffer", fail)
    monkeypatch.setattr(accelerator_communicator, "open_sums", lambda *g: opened_sums.append(g))
    monkeypatch.setattr(torch.version, "hip", None)
    assert made._open_sums(None, HostDevice(), True) is None and not opened_sums
    assert made._joined.calls == 2  # as often as the others
