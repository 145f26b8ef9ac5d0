"""Steps out of a real card's recordings; skipped with the probe's reason where there is none."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
from helpers.engine_loop import greedy, open_loop
from helpers.generate_reference import greedy_cases

from trimaran.platforms.cuda import CudaPlatform
from trimaran.platforms.gpu_kernels import triton_missing
from trimaran.platforms.rocm import RocmPlatform
from trimaran.platforms.torch_accelerator import AcceleratorGraph

pytestmark = pytest.mark.device

NUM_TOKENS = 24
DRAWS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
)


@pytest.mark.parametrize("platform", [CudaPlatform, RocmPlatform], ids=lambda cls: cls.name)
def test_tokens_of_replays(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of steps that run, greedy and drawn; and what a step leaves to the host is printed."""
    if platform.probe().score == 0 or triton_missing():
        pytest.skip(platform.probe().reason or triton_missing())
    replays: list[float] = []
    replay = AcceleratorGraph.replay

    def counted(self: AcceleratorGraph) -> None:
        begin = time.perf_counter()
        replay(self)
        replays.append(time.perf_counter() - begin)

    monkeypatch.setattr(AcceleratorGraph, "replay", counted)
    requests = [
        greedy(str(i), case.prompt, NUM_TOKENS, seed=i, **DRAWS[i % 3])
        for i, case in enumerate(greedy_cases("qwen3", 64, NUM_TOKENS)[::4])
    ]
    found = []
    for recording in (True, False):
        replays.clear()
        with open_loop("qwen3", platform=platform.name) as loop:
            if not recording:
                loop.executor._rank.runner._recorded = None  # type: ignore[attr-defined]
            found.append([loop.run(requests), loop.run(requests[:1])])
        if recording:
            assert len(replays) > NUM_TOKENS
            print(f"a replay takes {statistics.median(replays) * 1e6:.0f} µs of the host")
        else:
            assert not replays
    for ours, theirs in zip(*found, strict=True):
        for key, row in theirs.items():
            assert ours[key].error is None and ours[key].tokens == row.tokens
