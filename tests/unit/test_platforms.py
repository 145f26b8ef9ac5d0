"""The platform contract: definition-time checks, strict's queue, collectives."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.minimal_platform import Minimal

from trimaran.platforms import host
from trimaran.platforms.attention_reference import ReferenceAttention
from trimaran.platforms.communicator import LocalCommunicator, open_communicator
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.host_device import FinishedEvent, HostDevice
from trimaran.platforms.interface import (
    Device,
    GroupSpec,
    KVRegion,
    Probe,
)
from trimaran.platforms.ops import DensePacker
from trimaran.platforms.strict import StrictKnobs, StrictPlatform, strict_platform
from trimaran.platforms.strict_device import SENTINEL, StrictDevice

# ---------------------------------------------------------------------------------------------
# The contract
# ---------------------------------------------------------------------------------------------


def test_another_signature_is_refused_when_the_class_is_defined() -> None:
    with pytest.raises(TypeError, match=r"Wrong\.open.*does not match.*open"):

        class Wrong(Minimal):
            def open(self, device: int = 0, stream: int = 0) -> Device:  # type: ignore[override]
                raise NotImplementedError


def test_another_kind_of_method_is_refused() -> None:
    with pytest.raises(TypeError, match="probe"):

        class Instance(Minimal):
            def probe(self) -> Probe:  # type: ignore[override]
                return Probe(1, "")

    with pytest.raises(TypeError, match="probe"):

        class Static(Minimal):
            @staticmethod
            def probe() -> Probe:
                return Probe(1, "")


def test_getattr_is_refused() -> None:
    with pytest.raises(TypeError, match="__getattr__"):

        class Wrong(Minimal):
            def __getattr__(self, name: str) -> Any:
                return None


def test_what_is_mixed_in_is_checked_too() -> None:
    class Mixin:
        def open(self, device: int) -> Any:
            raise NotImplementedError

    class Answering:
        def __getattr__(self, name: str) -> Any:
            return None

    with pytest.raises(TypeError, match=r"Mixin\.open\(self, device\) does not match"):

        class Wrong(Mixin, Minimal):  # type: ignore[misc]
            pass

    with pytest.raises(TypeError, match="Answering defines __getattr__"):

        class Vague(Answering, Minimal):
            pass


def test_every_class_of_the_contract_is_checked() -> None:
    with pytest.raises(TypeError, match=r"Wrong\.alloc\(self, shape, dtype, name\).*alloc\(self,"):

        class Wrong(HostDevice):
            def alloc(self, shape: Any, dtype: Any, name: str) -> Any:  # type: ignore[override]
                raise NotImplementedError

    with pytest.raises(TypeError, match="supports"):

        class Property(ReferenceAttention):
            @property
            def supports(self) -> Any:  # type: ignore[override]
                raise NotImplementedError

    with pytest.raises(TypeError, match=r"timeout=.*does not match"):

        class Waiting(FinishedEvent):
            def wait(self, timeout: float = 1.0) -> None:
                raise NotImplementedError

    with pytest.raises(TypeError, match="__getattr__"):

        class Anything(DensePacker):
            def __getattr__(self, name: str) -> Any:
                return None


def test_a_minimal_platform_is_complete() -> None:
    platform = Minimal()
    assert platform.weight_packers() == {} and platform.fusions() == ()
    assert platform.kv_constraints(None).block_multiple == 1  # type: ignore[arg-type]
    group = platform.communicator(GroupSpec(), platform.open())
    assert isinstance(group, LocalCommunicator)


# ---------------------------------------------------------------------------------------------
# cpu
# ---------------------------------------------------------------------------------------------


def test_cpu_takes_the_threads_it_is_given_or_at_most_the_cores() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(host.physical_cores() + 3)
        CpuPlatform().open()
        assert torch.get_num_threads() == host.physical_cores()
        CpuPlatform().open(num_threads=1)
        assert torch.get_num_threads() == 1
        CpuPlatform().open()
        assert torch.get_num_threads() == 1, "an earlier choice stands"
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="no device 3"):
        CpuPlatform().open(3)


def test_cpu_threads_of_a_rank_are_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "physical_cores", lambda: 8)
    env = CpuPlatform().process_env(1, {"tensor_parallel_size": 4, "num_threads": None})
    assert env == {"OMP_NUM_THREADS": "2"}
    assert CpuPlatform().process_env(0, {"num_threads": 3}) == {"OMP_NUM_THREADS": "3"}


def test_isa_is_the_widest_flag() -> None:
    assert host.isa(frozenset({"avx2", "avx512f", "amx_bf16"})) == "amx"
    assert host.isa(frozenset({"avx2", "avx512f"})) == "avx512"
    assert host.isa(frozenset({"avx2"})) == "avx2"
    assert host.isa(frozenset()) == "baseline"


def test_a_launch_that_raised_raises_at_the_wait() -> None:
    for device in (HostDevice(), StrictDevice(0, delay=0.0)):
        event = device.launch(lambda: [][0])
        with pytest.raises(IndexError):
            event.wait()
        device.launch(lambda: None).wait()
        device.close()


def test_memory_is_accounted_by_tag_until_it_is_freed() -> None:
    for device in (HostDevice(), StrictDevice(0, delay=0.0)):
        weights = device.alloc((4, 8), torch.float32, "weights")
        cache = device.alloc_kv((2, 8), torch.bfloat16)
        assert device.memory().by_tag == {"weights": 128, "kv": 32}
        assert not cache.any()
        view = weights[0]
        del weights
        gc.collect()
        assert device.memory().by_tag["weights"] == 128, "a view still holds it"
        del view
        gc.collect()
        assert device.memory().by_tag == {"kv": 32}
        assert 0 < device.memory().free <= device.memory().total
        device.close()


def test_blocks_move_as_if_at_once() -> None:
    tensor = torch.arange(6.0).unsqueeze(1).repeat(1, 3)
    HostDevice().move_blocks([KVRegion(tensor, 12, 12)], [(0, 1), (1, 2), (5, 4)])
    assert tensor[:, 0].tolist() == [0, 0, 1, 3, 5, 5]
    HostDevice().move_blocks([KVRegion(tensor, 12, 12)], [])


# ---------------------------------------------------------------------------------------------
# strict: what is forgotten shows
# ---------------------------------------------------------------------------------------------


def void(_: object) -> None:
    """What a launched lambda may return."""


@pytest.fixture
def strict() -> Iterator[Device]:
    device = StrictPlatform(StrictKnobs(delay=0.02)).open()
    yield device
    device.close()


def test_strict_memory_is_poisoned(strict: Device) -> None:
    assert strict.alloc((3,), torch.bfloat16, "x").isnan().all()
    assert strict.alloc((3,), torch.int64, "x").eq(SENTINEL).all()
    assert strict.alloc((3,), torch.int32, "x").eq(SENTINEL).all()
    assert strict.alloc((3,), torch.uint8, "x").eq(255).all()


def test_reading_before_the_event_shows_poison(strict: Device) -> None:
    target = strict.alloc((4,), torch.float32, "x")
    event = strict.launch(lambda: void(target.fill_(1.0)))
    assert not event.done() and target.isnan().all()
    event.wait()
    assert event.done() and target.eq(1).all()


def test_a_host_copy_arrives_only_when_its_launch_ends(strict: Device) -> None:
    source = strict.alloc((2,), torch.float32, "x")
    copies: list[torch.Tensor] = []
    inside, go_on = threading.Event(), threading.Event()

    def work() -> None:
        source.fill_(3.0)
        copies.append(strict.to_host(source))
        source.fill_(4.0)
        inside.set()
        go_on.wait(timeout=10)

    event = strict.launch(work)
    inside.wait(timeout=10)
    assert copies[0].isnan().all()
    go_on.set()
    event.wait()
    assert copies[0].eq(3).all(), "the value at the time of the call, not of the arrival"


def test_changing_a_launched_tensor_from_the_host_shows(strict: Device) -> None:
    data, seen = torch.ones(1), []
    event = strict.launch(lambda: seen.append(data.item()))
    data.zero_()
    event.wait()
    assert seen == [0.0]


def test_to_device_takes_a_snapshot_and_comes_late(strict: Device) -> None:
    data = torch.tensor([7])
    on_device = strict.to_device(data)
    data.zero_()
    assert on_device.item() == SENTINEL
    seen: list[int] = []
    strict.launch(lambda: seen.append(int(on_device.item()))).wait()
    assert seen == [7]


def test_strict_runs_launches_in_order(strict: Device) -> None:
    order: list[int] = []
    events = [strict.launch(lambda i=i: order.append(i)) for i in range(4)]  # type: ignore[misc]
    events[-1].wait()
    assert order == [0, 1, 2, 3]


def test_to_host_with_a_launch_in_flight_is_refused(strict: Device) -> None:
    tensor = strict.alloc((1,), torch.float32, "x")
    event = strict.launch(lambda: None)
    with pytest.raises(RuntimeError, match="to_host outside a launch"):
        strict.to_host(tensor)
    event.wait()
    strict.to_host(tensor)


def test_strict_refuses_what_the_contract_forbids(strict: Device) -> None:
    with pytest.raises(RuntimeError, match="move_blocks"):
        strict.move_blocks([], [])
    with pytest.raises(RuntimeError, match="launch inside a launch"):
        strict.launch(lambda: void(strict.launch(lambda: None))).wait()
    with pytest.raises(ValueError, match="3 devices"):
        StrictPlatform().open(3)


def test_a_closed_strict_device_keeps_no_thread() -> None:
    before = threading.active_count()
    device = StrictPlatform().open(2)
    assert threading.active_count() == before + 1
    device.close()
    device.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        device.launch(lambda: None)


def test_knobs_reach_a_platform_made_without_arguments() -> None:
    platform = strict_platform(StrictKnobs(run_ahead=0, block_multiple=5))()
    assert platform.capabilities().run_ahead == 0
    assert platform.kv_constraints(None).block_multiple == 5  # type: ignore[arg-type]
    assert StrictPlatform().capabilities().run_ahead == 1
    assert len(StrictPlatform.probe().devices) == 3


# ---------------------------------------------------------------------------------------------
# Collectives
# ---------------------------------------------------------------------------------------------

RANK = """
import sys, torch
from trimaran.platforms.attention_reference import ReferenceAttention
from trimaran.platforms.communicator import open_communicator
from trimaran.platforms.interface import GroupSpec

rank, rendezvous = int(sys.argv[1]), sys.argv[2]
# Two groups in one process, as two engines would have them.
groups = [open_communicator(GroupSpec(rank, 2, f"{rendezvous}.{i}")) for i in range(2)]
for group in groups:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        own = torch.full((2, 3), rank + 1, dtype=dtype)
        assert group.all_reduce(own).eq(3).all()
        strided = torch.full((3, 2), rank + 1, dtype=dtype).t()
        assert group.all_reduce(strided).eq(3).all()
    part = torch.full((1, 2), float(rank))
    assert group.all_gather(part, 1).tolist() == [[0.0, 0.0, 1.0, 1.0]]
    assert group.all_gather(part, 0).tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert group.broadcast(torch.full((2,), rank), 1).tolist() == [1, 1]
    group.barrier()
for group in groups:
    group.close()
    group.close()
assert not torch.distributed.is_initialized()
"""


@pytest.mark.real
def test_two_ranks_over_gloo(tmp_path: Path) -> None:
    rendezvous = f"file://{tmp_path}/meet"
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), rendezvous]) for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


def test_a_group_of_one_returns_what_it_is_given() -> None:
    group = open_communicator(GroupSpec())
    tensor = torch.ones(2)
    assert group.all_reduce(tensor) is tensor and group.all_gather(tensor, 0) is tensor
    assert group.broadcast(tensor, 0) is tensor
    group.barrier()
    group.close()


def test_a_rendezvous_is_a_file() -> None:
    with pytest.raises(ValueError, match="file://"):
        open_communicator(GroupSpec(0, 2, "tcp://127.0.0.1:1"))
