"""How long a member of a group waits for one that does not come."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trimaran.core.executor_group import collective_timeout
from trimaran.platforms.communicator import open_communicator
from trimaran.platforms.interface import GroupSpec


@pytest.mark.parametrize("step_timeout", [1.0, 600.0, 86_400.0])
def test_who_waits_gives_up_after_the_watcher(step_timeout: float) -> None:
    assert collective_timeout(step_timeout) > step_timeout


def test_a_missing_member_fails_the_collective_after_the_timeout(tmp_path: Path) -> None:
    def join(rank: int, timeout: float) -> object:
        return open_communicator(GroupSpec(rank, 2, f"file://{tmp_path}/group", timeout))

    with ThreadPoolExecutor(2) as threads:
        first, _second = threads.map(join, (0, 1), (2.0, collective_timeout(math.inf)))
        with pytest.raises(RuntimeError, match=r"2000ms|[Tt]imed? ?out"):
            first.barrier()  # type: ignore[attr-defined]
