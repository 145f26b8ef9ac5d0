"""Steps out of a real card's recordings; skipped with the probe's reason where there is none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.engine_loop import greedy, open_loop
from helpers.generate_reference import greedy_cases

from trimaran.core.runner import recorded
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


@pytest.fixture(params=[CudaPlatform, RocmPlatform], ids=lambda cls: cls.name)
def platform(request: pytest.FixtureRequest) -> Any:
    if request.param.probe().score == 0 or triton_missing():
        pytest.skip(request.param.probe().reason or triton_missing())
    return request.param


def test_tokens_of_replays(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of steps that run, greedy and drawn; and what a step leaves to the host is printed."""
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


def test_recordings_made_anew_for_longer_sequences(
    platform: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All graphs of a pool go, twice and more, and it with them: others are captured after that."""
    caplog.set_level("INFO", "trimaran.runner")
    monkeypatch.setattr(recorded, "FIRST_REACH", 16)
    cases = sorted(greedy_cases("qwen3", 64, NUM_TOKENS), key=lambda case: len(case.prompt))
    with open_loop("qwen3", platform=platform.name, enable_prefix_caching=False) as loop:
        for case in (cases[0], cases[20], cases[40], cases[-1], cases[0]):
            found = loop.run([greedy("0", case.prompt, NUM_TOKENS)])
            assert found["0", 0].tokens == case.tokens
        steps = loop.executor._rank.runner._recorded  # type: ignore[attr-defined]
        assert steps._reach == 128
        assert sum(one._graph is not None for one in steps._recordings.values()) >= 3
    assert "not recorded" not in caplog.text


def test_a_capture_that_fails_and_others_after_it(platform: Any) -> None:
    """Asking for a value spoils a capture: those before and after it replay what they should, and
    no memory is kept from the driver."""
    device = platform().open(0)
    total = device.alloc((1,), torch.int64, tag="test").zero_()
    graphs: list[Any] = []

    def record(work: Callable[[], Any]) -> None:
        device.launch(lambda: graphs.append(device.capture(work))).wait()

    record(lambda: total.add_(1))
    for _ in range(3):
        with pytest.raises(RuntimeError):
            record(lambda: int((total * 2).item()))
        record(lambda: total.add_((total * 0 + 10).sum()))
    torch.cuda.empty_cache()
    for graph in graphs:
        device.launch(graph.replay)
    device.synchronize()
    assert device.to_host(total).tolist() == [31]
    graphs.clear()
    record(lambda: total.add_(1))
    device.close()


def test_memory_of_recordings_stays_in_its_room(platform: Any) -> None:
    """What was recorded at start serves sizes that come later: little is added."""
    cases = greedy_cases("qwen3", 64, NUM_TOKENS)
    with open_loop("qwen3", platform=platform.name, max_num_seqs=64) as loop:
        device = loop.executor.device  # type: ignore[attr-defined]
        before = device.memory().by_tag["graphs"]
        for count in (40, 24, 16, 8, 3):
            loop.run([greedy(str(i), case.prompt, 8) for i, case in enumerate(cases[:count])])
        after = device.memory().by_tag["graphs"]
        print(f"recordings took {before >> 10} KiB at start, {after >> 10} KiB after five sizes")
        assert after <= 2 * before
