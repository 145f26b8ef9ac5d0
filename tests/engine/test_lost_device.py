"""A device that is lost ends the engine with an error that names it, wherever it is noticed; one
without memory refuses, and goes on."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine_loop import greedy, open_loop
from helpers.fake_executor import FakeExecutor, fake_config

from trimaran.core.args import EngineArgs
from trimaran.core.engine.inproc import InprocClient
from trimaran.core.engine.messages import AddRequests, EngineRequest
from trimaran.core.errors import DeviceLostError, EngineDeadError, KVMemoryError
from trimaran.core.plan import StepPlan
from trimaran.core.sampling_params import SamplingParams
from trimaran.core.settlement import MAX_FAILED_NOTICES
from trimaran.core.types import Prompt
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.host_device import HostDevice
from trimaran.platforms.interface import Device, DeviceLost, DeviceOutOfMemory, Event
from trimaran.platforms.strict import StrictPlatform


class Losing(HostDevice):
    """Lost from its third launch on."""

    launches = 0

    def launch(self, work: Callable[[], None]) -> Event:
        self.launches += 1

        def lost() -> None:
            raise DeviceLost("it fell off the bus")

        return super().launch(work if self.launches < 3 else lost)


class LosingSecond(CpuPlatform):
    """Ranks share the one device; the process of the second rank has lost it."""

    def open(self, device: int = 0, num_threads: int | None = None) -> Device:
        healthy = super().open(device, num_threads)
        return Losing() if os.environ.get("LOSING") == "1" else healthy

    def process_env(self, rank: int, plan: object) -> dict[str, str]:  # type: ignore[override]
        return {"LOSING": "1", "OMP_NUM_THREADS": "1"}


def one_request() -> EngineRequest:
    params = SamplingParams(max_tokens=8, seed=1)
    return EngineRequest("0", Prompt.of_tokens([5, 6, 7]), params)


@pytest.mark.parametrize("where", ["on_submit", "on_result"])
@pytest.mark.parametrize("run_ahead", [0, 1])
def test_the_engine_ends_and_names_it(tmp_path: Path, where: str, run_ahead: int) -> None:
    def lose(number: int, plan: StepPlan) -> None:
        if number == 2:
            # `submit` raises the device's own error, the result the runner's
            gone = DeviceLost if where == "on_submit" else DeviceLostError
            raise gone("the device is lost: it fell off the bus")

    client = InprocClient(fake_config(tmp_path, run_ahead=run_ahead), FakeExecutor(**{where: lose}))
    client.send(AddRequests([one_request()]))
    with pytest.raises(EngineDeadError, match="the device is lost.*fell off the bus"):
        for _ in range(20):
            client.poll(0.0)
    with pytest.raises(EngineDeadError, match="the device is lost"):
        client.send(AddRequests([one_request()]))
    client.close()


@pytest.mark.parametrize("platform", ["cpu", "strict"])
def test_a_step_on_a_lost_device_raises(platform: str) -> None:
    with open_loop("qwen3", platform=platform) as loop:
        device = loop.executor.device  # type: ignore[attr-defined]
        launch = device.launch

        def lost() -> None:
            raise DeviceLost("it fell off the bus")

        device.launch = lambda work: launch(lost)
        with pytest.raises(DeviceLostError, match="lost: DeviceLost: it fell off the bus"):
            loop.run([greedy("0", [5, 6, 7], 4)])


@pytest.mark.parametrize("call", ["launch", "to_device"])
def test_a_call_that_tells_of_the_loss(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract lets any method of a device raise it, not only an event's `wait`."""
    calls, honest = 0, getattr(HostDevice, call)

    def lost_in_the_end(self: HostDevice, argument: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise DeviceLost("it fell off the bus")
        return honest(self, argument)

    args = EngineArgs(
        platform="cpu", max_model_len="256", kv_cache_memory_bytes="64M", num_threads=1
    )
    with contextlib.closing(InprocClient.from_args(args)) as client:
        monkeypatch.setattr(HostDevice, call, lost_in_the_end)
        client.send(AddRequests([greedy("0", [5, 6, 7], 200)]))
        with pytest.raises(EngineDeadError, match="the device is lost.*fell off the bus"):
            for _ in range(100):
                client.poll(0.0)
        with pytest.raises(EngineDeadError, match="the device is lost"):
            client.send(AddRequests([one_request()]))


@pytest.mark.real
@pytest.mark.tp2
def test_the_device_of_another_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(__file__).parents[1]}")
    reference = f"{__name__}:LosingSecond"
    with (
        open_loop("qwen3", platform=reference, tensor_parallel_size=2) as loop,
        pytest.raises(EngineDeadError, match="rank 1 .*cannot go on: .*it fell off the bus"),
    ):
        loop.run([greedy("0", [5, 6, 7], 20)])


def test_notices_that_all_fail_end_the_engine(tmp_path: Path) -> None:
    """Nobody asks for anything, and still each step that only frees a row fails."""

    def fail(number: int, plan: StepPlan) -> None:
        if number >= 2:
            raise RuntimeError("an illegal memory access was encountered")

    client = InprocClient(fake_config(tmp_path), FakeExecutor(on_result=fail))
    client.send(AddRequests([one_request()]))
    with pytest.raises(EngineDeadError, match=f"{MAX_FAILED_NOTICES} steps in a row failed"):
        for _ in range(MAX_FAILED_NOTICES + 10):
            client.poll(0.0)
    client.close()


@pytest.mark.parametrize("platform", [CpuPlatform, StrictPlatform])
def test_no_room_is_told_as_such(platform: type[CpuPlatform]) -> None:
    device = platform().open()
    for ask in (
        lambda: device.alloc((1 << 50,), torch.uint8, "weights"),
        lambda: device.alloc_kv((1 << 50,), torch.uint8),
    ):
        with pytest.raises(DeviceOutOfMemory, match="1125899906842624 bytes"):
            ask()
    assert device.memory().by_tag == {}
    assert device.alloc((4,), torch.float32, "weights").shape == (4,)
    device.close()


def test_other_errors_of_torch_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="negative"):
        HostDevice().alloc((-1,), torch.uint8, "weights")


@pytest.mark.parametrize("room", [0, 2])
def test_an_engine_without_room_says_what_to_change(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only some of its caches fit: they are given back."""
    devices, honest = list[HostDevice](), HostDevice.alloc_kv

    def little_room(self: HostDevice, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        devices.append(self)
        if len(devices) > room:
            raise DeviceOutOfMemory("5 bytes for 'kv' cannot be allocated.")
        return honest(self, shape, dtype)

    monkeypatch.setattr(HostDevice, "alloc_kv", little_room)
    with (
        pytest.raises(KVMemoryError, match="5 bytes.*--kv-cache-memory-bytes"),
        open_loop("qwen3", platform="cpu"),
    ):
        pass
    gc.collect()
    assert len(devices) == room + 1 and devices[-1].memory().by_tag == {}
