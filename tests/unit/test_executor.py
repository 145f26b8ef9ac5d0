"""Which rank runs where."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers.fake_executor import fake_config

from trimaran.core.config import PlatformChoice
from trimaran.core.errors import PlatformError
from trimaran.core.executor import _device_index
from trimaran.platforms.interface import DeviceInfo, Probe
from trimaran.platforms.strict import StrictPlatform


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
