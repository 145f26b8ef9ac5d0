"""Which rank runs where, and what it opens and closes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
from helpers.fake_executor import fake_config

from trimaran.core import executor as executor_module
from trimaran.core.args import EngineArgs
from trimaran.core.config import EngineConfig, PlatformChoice
from trimaran.core.errors import PlatformError
from trimaran.core.executor import UniExecutor, _device_index
from trimaran.core.resolve import resolve
from trimaran.platforms.interface import Device, DeviceInfo, DeviceLost, MemoryInfo, Probe
from trimaran.platforms.strict import StrictPlatform
from trimaran.platforms.strict_device import StrictDevice


class Gaps(StrictPlatform):
    """Its devices' indices are not their positions (some are hidden from this process)."""

    @classmethod
    def probe(cls) -> Probe:
        return Probe(1, "", tuple(DeviceInfo(index, "a device") for index in (2, 5, 7)))


@pytest.mark.parametrize(
    ("device", "expected"), [(2, [2, 5, 7, 2]), (5, [5, 7, 2, 5]), (7, [7, 2, 5, 7])]
)
def test_ranks_take_the_devices_in_turn(tmp_path: Path, device: int, expected: list[int]) -> None:
    choice = PlatformChoice(name="gaps", device=device)
    config = dataclasses.replace(fake_config(tmp_path), platform=choice)
    assert [_device_index(Gaps(), config, rank) for rank in range(4)] == expected


def test_a_rank_that_does_not_see_the_device_says_what_to_change(tmp_path: Path) -> None:
    choice = PlatformChoice(name="gaps", device=3)
    config = dataclasses.replace(fake_config(tmp_path), platform=choice)
    with pytest.raises(PlatformError, match=r"rank 1 .* device 3 .* \[2, 5, 7\].*process_env"):
        _device_index(Gaps(), config, 1)


# ---------------------------------------------------------------------------------------------
# Nothing is left open
# ---------------------------------------------------------------------------------------------


class Counted(StrictDevice):
    opened = 0
    memory_error: Exception | None = None

    def __init__(self, index: int, delay: float) -> None:
        super().__init__(index, delay)
        type(self).opened += 1

    def memory(self) -> MemoryInfo:
        if self.memory_error:
            raise self.memory_error
        return super().memory()

    def close(self) -> None:
        super().close()
        type(self).opened -= 1


class Careless(StrictPlatform):
    """Says nothing of itself, and its devices are counted."""

    def open(self, device: int = 0, num_threads: int | None = None) -> Device:
        return Counted(device, 0)

    def describe(self) -> Mapping[str, str]:
        raise OSError("no such file")


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    monkeypatch.setattr(Counted, "opened", 0)
    args = EngineArgs(platform="strict", dtype="float32", max_num_seqs=2, max_model_len="64")
    config = resolve(args)
    monkeypatch.setattr(executor_module, "make_platform", lambda name: Careless())
    return config


def test_an_engine_starts_on_a_platform_that_cannot_describe_itself(careless: EngineConfig) -> None:
    executor = UniExecutor(careless)
    assert executor.description["describe"] == "OSError: no such file"
    assert Counted.opened == 1
    executor.close()
    assert Counted.opened == 0


def test_a_device_that_fails_at_the_end_of_the_start_is_closed(
    careless: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Counted, "memory_error", DeviceLost("it fell off the bus"))
    with pytest.raises(DeviceLost):
        UniExecutor(careless)
    assert Counted.opened == 0


def test_a_device_is_closed_even_if_its_group_does_not_close(
    careless: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("the others are gone")

    executor = UniExecutor(careless)
    assert executor._rank is not None
    monkeypatch.setattr(executor._rank.comm, "close", fail)
    with pytest.raises(RuntimeError, match="the others are gone"):
        executor.close()
    assert Counted.opened == 0
    executor.close()
