"""Collectives over shared memory: against arithmetic and Gloo, and however a member goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.native import needs_native
from torch import Tensor

from trimaran.kernels_cpu import collective
from trimaran.kernels_cpu.library import NativeUnavailable
from trimaran.platforms import cpu_communicator
from trimaran.platforms.communicator import GlooCommunicator, LocalCommunicator
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.cpu_communicator import SharedMemoryCommunicator, open_cpu_communicator
from trimaran.platforms.host_device import HostDevice
from trimaran.platforms.interface import Communicator, GroupSpec

pytestmark = needs_native

Open = Callable[..., list[Any]]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# One value; less than a vector; more than one; summed by all and by parts; more than two slots.
SIZES = [1, 7, 129, 16_384, 16_449, 1_200_007]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Groups whose members are threads of this process."""
    made: list[Communicator] = []

    def of(size: int, timeout: float = 20.0) -> list[Any]:
        rendezvous = f"file://{tmp_path}/group{len(made)}"
        with ThreadPoolExecutor(size) as threads:
            groups = (GroupSpec(rank, size, rendezvous, timeout) for rank in range(size))
            members = list(threads.map(open_cpu_communicator, groups))
        made.extend(members)
        return members

    yield of
    for member in made:
        member.close()


def everywhere(members: list[Any], work: Callable[[Any], Any]) -> list[Any]:
    """`work` on all members at once; raises what the first of them raised."""
    with ThreadPoolExecutor(len(members)) as threads:
        return list(threads.map(work, members))


def given(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    seeded = torch.Generator().manual_seed(1000 * size + rank)
    return torch.randn(size, generator=seeded).to(dtype)


def test_the_platform_offers_it_and_says_so(tmp_path: Path) -> None:
    platform, device = CpuPlatform(), HostDevice()
    assert isinstance(platform.communicator(GroupSpec(), device), LocalCommunicator)
    rendezvous = f"file://{tmp_path}/group"
    with ThreadPoolExecutor(2) as threads:
        groups = (GroupSpec(rank, 2, rendezvous, 20.0) for rank in range(2))
        members = list(threads.map(lambda group: platform.communicator(group, device), groups))
    assert all(isinstance(member, SharedMemoryCommunicator) for member in members)
    assert platform.describe()["ranks meet through"] == "shared memory"
    for member in members:
        member.close()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_those_of_fp32_in_order_of_the_ranks(
    size: int, dtype: torch.dtype, opened: Open
) -> None:
    members = opened(size)
    for count in SIZES:
        parts = [given(rank, count, dtype) for rank in range(size)]
        expected = parts[0].float()
        for part in parts[1:]:
            expected = expected + part.float()

        def reduce(member: Any, parts: list[Tensor] = parts) -> Tensor:
            mine = parts[member.rank].clone()
            assert member.all_reduce(mine) is mine
            return mine

        for found in everywhere(members, reduce):
            assert torch.equal(found, expected.to(dtype)), count


def test_the_number_of_threads_changes_nothing(opened: Open) -> None:
    assert torch.equal(summed(opened, 1), summed(opened, 3))


def summed(opened: Open, threads: int) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        members = opened(2)
        work = lambda one: one.all_reduce(given(one.rank, 700_001, torch.bfloat16))  # noqa: E731
        first, second = everywhere(members, work)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first, second)
    return first


def test_infinities_and_nan_arrive(opened: Open) -> None:
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), 3e38, 1.0])
    for dtype in FLOATS:
        work = lambda one, dtype=dtype: one.all_reduce(values.to(dtype, copy=True))  # noqa: E731
        expected = (2 * values.to(dtype).float()).to(dtype)
        for found in everywhere(opened(2), work):
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float64], ids=str
)
def test_other_types_are_summed_as_gloo_sums_them(
    dtype: torch.dtype, opened: Open, tmp_path: Path
) -> None:
    def join(rank: int) -> GlooCommunicator:
        return GlooCommunicator(GroupSpec(rank, 2, f"file://{tmp_path}/gloo", 20.0))

    with ThreadPoolExecutor(2) as threads:
        gloo = list(threads.map(join, range(2)))

    def reduce(member: Any) -> Tensor:
        return member.all_reduce((torch.arange(300) * (member.rank + 1)).to(dtype).view(3, 100).t())

    expected, found = everywhere(gloo, reduce), everywhere(opened(2), reduce)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(1,), (5, 3), (2, 129, 3), (3, 0), (700, 1000)])
def test_parts_are_gathered_along_every_dimension(shape: tuple[int, ...], opened: Open) -> None:
    members = opened(3)
    parts = [torch.randn(shape) for _ in range(3)]
    for dim in range(-len(shape), len(shape)):
        turned = len(shape) > 1  # what is not contiguous must be gathered as well

        def gather(member: Any, dim: int = dim, turned: bool = turned) -> Tensor:
            mine = parts[member.rank]
            return member.all_gather(mine.mT.contiguous().mT if turned else mine, dim)

        for found in everywhere(members, gather):
            assert torch.equal(found, torch.cat(parts, dim))


@pytest.mark.parametrize("count", [1, 1_500_001])
def test_a_broadcast_reaches_all(count: int, opened: Open) -> None:
    members = opened(3)
    for source in range(3):

        def send(member: Any, source: int = source) -> Tensor:
            mine = torch.full((2, count), member.rank, dtype=torch.uint8).t()
            assert member.broadcast(mine, source) is mine
            return mine

        assert all(found.eq(source).all() for found in everywhere(members, send))


def test_a_barrier_waits_for_the_last(opened: Open) -> None:
    members, come = opened(3), []

    def work(member: Any) -> int:
        time.sleep(0.2 * member.rank)  # longer than anyone spins
        come.append(member.rank)
        member.barrier()
        return len(come)

    assert everywhere(members, work) == [3, 3, 3]


def test_slots_are_not_overwritten_while_they_are_read(opened: Open) -> None:
    """Many pieces in a row, ranks that come late at random, and each sum of the one before."""
    members = opened(3)

    def work(member: Any) -> Tensor:
        late = torch.Generator().manual_seed(member.rank)
        tensor = torch.full((400_000,), float(member.rank))
        for _ in range(30):
            if torch.rand((), generator=late) < 0.3:
                time.sleep(0.002)
            tensor = member.all_reduce(tensor) / 3
            small = member.all_gather(tensor[:5], 0)
            assert small.eq(1).all(), small
        return tensor

    assert all(found.eq(1).all() for found in everywhere(members, work))


# ---------------------------------------------------------------------------------------------
# When it cannot go on
# ---------------------------------------------------------------------------------------------


def test_a_missing_member_is_named_after_the_timeout(opened: Open) -> None:
    first, second = opened(2, timeout=0.5)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"timed out after 500ms waiting for rank 1"):
        first.all_reduce(torch.ones(3))
    assert 0.4 < time.monotonic() - start < 3
    with pytest.raises(RuntimeError, match="aborted"):
        second.all_reduce(torch.ones(3))  # alone it would read what nobody gave


def test_an_abort_frees_who_waits_and_ends_the_group(opened: Open) -> None:
    first, second = opened(2)
    aborted: list[float] = []

    def abort() -> None:
        aborted.append(time.monotonic())
        first.abort()

    threading.Timer(0.3, abort).start()
    with pytest.raises(RuntimeError, match="aborted"):
        first.barrier()
    assert time.monotonic() - aborted[0] < 1
    for member in (first, second):
        with pytest.raises(RuntimeError, match="aborted"):
            member.barrier()
        member.close()
        member.close()
        member.abort()
        with pytest.raises(RuntimeError, match="closed"):
            member.barrier()


def test_a_group_that_is_closed_meanwhile_keeps_its_memory(opened: Open) -> None:
    first, _second = opened(2)
    threading.Timer(0.2, lambda: (first.abort(), first.close())).start()
    with pytest.raises(RuntimeError, match="aborted"):
        first.all_reduce(torch.ones(3))


def test_who_waits_for_one_that_has_left_is_told(opened: Open) -> None:
    first, second = opened(2)
    threading.Timer(0.3, second.close).start()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 has closed the group"):
        first.barrier()
    assert time.monotonic() - start < 3


def test_the_last_collective_counts_for_one_that_comes_after_the_end(opened: Open) -> None:
    first, second = opened(2)

    def work(member: Any) -> float:
        if member is first:
            time.sleep(0.2)
        total = member.all_reduce(torch.ones(3)).sum().item()
        member.close()
        return total

    assert everywhere([first, second], work) == [6.0, 6.0]


@pytest.mark.parametrize("count", [4, 8])
def test_ranks_in_different_collectives_are_told(count: int, opened: Open) -> None:
    def work(member: Any) -> str:
        with pytest.raises(RuntimeError) as raised:
            member.all_reduce(torch.ones(3)) if member.rank else member.broadcast(
                torch.ones(count), 0
            )
        return str(raised.value)

    assert any("another collective" in text for text in everywhere(opened(2), work))


# ---------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------

RANK = """
import sys, time, torch
from trimaran.platforms.cpu_communicator import open_cpu_communicator
from trimaran.platforms.interface import GroupSpec

rank, rendezvous, then = int(sys.argv[1]), sys.argv[2], sys.argv[3]
# Two groups in one process, as two engines would have them.
groups = [open_cpu_communicator(GroupSpec(rank, 2, f"{rendezvous}.{i}")) for i in range(2)]
for group in groups:
    assert group.all_reduce(torch.full((2, 3), rank + 1)).eq(3).all()
    assert group.all_gather(torch.full((1, 2), rank), 1).tolist() == [[0, 0, 1, 1]]
    group.barrier()
print(type(groups[0]).__name__, flush=True)
if then == "wait" and rank == 1:
    time.sleep(60)
if then == "wait":
    try:
        groups[0].barrier()
    except RuntimeError as error:
        print(error, flush=True)
for group in groups:
    group.close()
assert not torch.distributed.is_initialized()
"""


def ranks(
    rendezvous: Path, then: str, environments: tuple[dict[str, str], ...] = ({}, {})
) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), f"file://{rendezvous}", then],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        for rank, environment in enumerate(environments)
    ]


def left_behind() -> list[str]:
    """Other processes of this host have their own there."""
    return [name for name in os.listdir("/dev/shm") if "trimaran" in name]


@pytest.mark.real
def test_two_processes_leave_nothing(tmp_path: Path) -> None:
    members = ranks(tmp_path / "meet", "end")
    assert [one.communicate(timeout=120)[0] for one in members] == [
        "SharedMemoryCommunicator\n"
    ] * 2
    assert [one.returncode for one in members] == [0, 0]
    assert not left_behind() and not list(tmp_path.iterdir())


@pytest.mark.real
def test_a_killed_process_is_noticed_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    first, second = ranks(tmp_path / "meet", "wait")
    assert second.stdout is not None and second.stdout.readline()
    second.send_signal(signal.SIGKILL)  # not collected: a zombie has ended, too
    killed = time.monotonic()
    out, err = first.communicate(timeout=60)
    assert time.monotonic() - killed < 5
    assert "the process of rank 1 has ended" in out, err
    second.communicate()
    assert not left_behind()


@pytest.mark.real
@pytest.mark.parametrize("without", [0, 1])
def test_one_that_cannot_share_memory_takes_all_to_gloo(tmp_path: Path, without: int) -> None:
    environments = [{}, {}]
    environments[without] = {"TRIMARAN_CPU_LIBRARY": str(tmp_path / "none.so")}
    members = ranks(tmp_path / "meet", "end", tuple(environments))
    found = [one.communicate(timeout=120) for one in members]
    assert [out for out, _ in found] == ["GlooCommunicator\n"] * 2
    assert [one.returncode for one in members] == [0, 0]
    assert "through Gloo" in found[0][1] and "none.so" in found[0][1]


@pytest.mark.parametrize(
    ("offer", "reason"),
    [
        ("somewhere/1 1 1 00", "another host"),
        (f"{{space}} {os.getpid()} {{file}} {'00' * 16}", "another version"),
        (f"{{space}} {os.getpid()} {{memory}} {'00' * 16}", "is not there"),
        ("{space} 1 1000000 00", "No such file|denied"),
    ],
    ids=["host", "version", "place", "process"],  # the same in every process: no PID in them
)
def test_what_is_not_the_groups_memory_is_refused(offer: str, reason: str, tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file, open(tmp_path / "memory", "w+b") as memory:
        memory.write(b"x" * collective.shared_bytes(2))
        memory.flush()
        space = cpu_communicator._process_space()
        said = offer.format(space=space, file=file.fileno(), memory=memory.fileno())
        found, answer = cpu_communicator._found(said, GroupSpec(1, 2))
    assert found is None
    with pytest.raises(OSError, match=reason):
        raise OSError(answer)


def test_more_ranks_than_it_is_made_for_are_refused() -> None:
    with pytest.raises(NativeUnavailable, match="65 ranks"):
        collective.shared_bytes(65)


def test_descriptors_and_memory_end_with_the_group(opened: Open) -> None:
    def held() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text().count("/memfd:trimaran-")
        return len(os.listdir("/proc/self/fd")), maps

    everywhere(opened(2), lambda member: member.close())
    before = held()
    members = opened(3)
    everywhere(members, lambda member: member.all_reduce(torch.ones(3)))
    assert held()[1] == before[1] + 3
    everywhere(members, lambda member: member.close())
    assert held() == before
