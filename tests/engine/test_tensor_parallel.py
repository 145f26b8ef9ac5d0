"""Tensor parallel 2: two Gloo ranks, token-exact; and what happens when one of them goes."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from helpers import tiny_models
from helpers.engine_loop import greedy, open_loop
from helpers.generate_reference import describe, greedy_cases

from trimaran.core.errors import ConfigError, EngineDeadError, ModelLoadError
from trimaran.core.plan import StepPlan

pytestmark = [pytest.mark.tp2, pytest.mark.real]

NUM_TOKENS = 24
SLOW = pytest.mark.slow
MODELS = (
    "llama3",
    "qwen3",
    *(pytest.param(name, marks=SLOW) for name in ("llama2", "mistral", "qwen2", "qwen3_tied")),
)


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "trimaran.core.worker" in p.cmdline()]


@pytest.mark.parametrize("platform", ["cpu", "strict"])
@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_are_token_exact(model: str, platform: str) -> None:
    """Greedy against `transformers`; sampled, with log-probabilities, against one rank."""
    cases = greedy_cases(model, 16, NUM_TOKENS)[::2]
    print(model, describe(cases))
    requests = [greedy(str(i), case.prompt, NUM_TOKENS) for i, case in enumerate(cases)]
    sampled = [
        greedy(str(i), case.prompt, 8, temperature=0.8, top_p=0.9, seed=i, logprobs=1)
        for i, case in enumerate(cases)
    ]
    options = {"platform": platform, "max_num_batched_tokens": 64, "max_num_seqs": 8}
    with open_loop(model, tensor_parallel_size=2, **options) as loop:
        found = loop.run(requests, arrivals=random.Random(1))
        drawn = loop.run(sampled)
        assert len(children()) == 1
    assert not children()
    with open_loop(model, **options) as loop:
        alone = loop.run(sampled)
    for i, case in enumerate(cases):
        assert found[str(i), 0].tokens == case.tokens
        assert drawn[str(i), 0].tokens == alone[str(i), 0].tokens


@pytest.mark.parametrize("platform", ["cpu", "strict"])
@pytest.mark.parametrize("busy", [True, False])
def test_a_killed_rank_ends_the_engine_within_two_seconds(platform: str, busy: bool) -> None:
    with open_loop("qwen3", platform=platform, tensor_parallel_size=2) as loop:
        (child,) = children()
        directory = Path(loop.executor._group._directory)  # type: ignore[attr-defined]
        assert directory.stat().st_mode & 0o777 == 0o700
        for i in range(8):
            loop.scheduler.add(greedy(str(i), tiny_models.prompt(40, i), 200))
        for _ in range(5):
            loop.step()
        if busy:
            threading.Timer(0.1, child.kill).start()
        else:
            child.kill()
            time.sleep(0.2)
        start = time.monotonic()
        with pytest.raises(EngineDeadError, match=r"rank 1 .* \(signal 9\)"):
            while time.monotonic() - start < 30:
                loop.step()
        assert time.monotonic() - start < 2
    assert not children()
    assert not directory.exists()


def test_a_hanging_rank_that_is_killed_frees_the_first_one() -> None:
    """The first rank is waiting in a collective when the other goes."""
    with open_loop("qwen3", platform="cpu", tensor_parallel_size=2) as loop:
        (child,) = children()
        loop.scheduler.add(greedy("0", tiny_models.prompt(40), 200))
        loop.step()
        child.suspend()
        killed: list[float] = []

        def kill() -> None:
            killed.append(time.monotonic())
            child.kill()

        threading.Timer(0.5, kill).start()
        with pytest.raises(EngineDeadError, match="rank 1"):
            loop.step()
        assert time.monotonic() - killed[0] < 2


def test_a_hanging_rank_is_noticed_by_the_step_timeout() -> None:
    with open_loop("qwen3", platform="cpu", tensor_parallel_size=2, step_timeout=2.0) as loop:
        loop.scheduler.add(greedy("0", tiny_models.prompt(40), 200))
        loop.step()
        time.sleep(3)  # idle is not stuck
        loop.step()
        (child,) = children()
        child.suspend()
        start = time.monotonic()
        with pytest.raises(EngineDeadError, match=r"not finished by rank 1\b.* in 2 s"):
            loop.step()
        assert time.monotonic() - start < 5
    assert not children()


def test_a_first_rank_that_hangs_itself_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other waits for it in a collective."""
    with open_loop("qwen3", platform="cpu", tensor_parallel_size=2, step_timeout=1.0) as loop:
        loop.scheduler.add(greedy("0", tiny_models.prompt(40), 200))
        runner = loop.executor._rank.runner  # type: ignore[attr-defined]
        monkeypatch.setattr(runner, "submit", lambda plan: time.sleep(3))
        group = loop.executor._group  # type: ignore[attr-defined]
        loop.executor.submit(loop.scheduler.schedule())
        with pytest.raises(EngineDeadError, match="rank 1, nor by rank 0 .* in 1 s"):
            group.check()
    assert not children()


def test_a_step_that_fails_everywhere_ends_only_its_requests() -> None:
    """Not even the group: both ranks fail at the same place and stay in step."""
    cases = greedy_cases("qwen3", 16, NUM_TOKENS)
    with open_loop("qwen3", platform="cpu", tensor_parallel_size=2) as loop:
        runner = loop.executor._rank.runner  # type: ignore[attr-defined]
        too_far = runner._buffers.max_positions
        plan = loop.scheduler.schedule()
        assert plan.empty
        plan.rows, plan.starts, plan.counts, plan.emits = [0], [too_far], [1], [True]
        output = loop.executor.submit(plan).result()
        assert output.error is not None and "IndexError" in output.error
        found = loop.run([greedy("0", cases[0].prompt, NUM_TOKENS)])
        assert found["0", 0].tokens == cases[0].tokens


@pytest.mark.parametrize("step_id", [0, 1000])
def test_a_rank_that_fails_alone_ends_the_group(step_id: int) -> None:
    """Late, in a step that the first rank has settled, or before it comes to that step."""
    with open_loop("qwen3", platform="cpu", tensor_parallel_size=2) as loop:
        loop.run([greedy("0", tiny_models.prompt(9), 2)])
        group = loop.executor._group  # type: ignore[attr-defined]
        too_far = loop.config.scheduler.max_model_len + 100
        plan = StepPlan(step_id, rows=[0], starts=[too_far], counts=[1], emits=[True])
        group._members[0].link.send(plan)
        time.sleep(1.5)
        with pytest.raises(EngineDeadError, match="rank 1 failed alone in a step: IndexError"):
            loop.run([greedy("1", tiny_models.prompt(9), 2)])
    assert not children()


def test_a_rank_that_cannot_start_says_why(tmp_path: Path) -> None:
    source = tiny_models.model_path("qwen3")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with (
        pytest.raises((ModelLoadError, EngineDeadError), match="model.safetensors"),
        open_loop("qwen3", model=str(tmp_path), tensor_parallel_size=2),
    ):
        pass
    assert not children()


def test_sizes_that_do_not_divide_the_model_are_refused() -> None:
    with (
        pytest.raises(ConfigError, match="tensor_parallel_size=3"),
        open_loop("qwen3", tensor_parallel_size=3),
    ):
        pass


PARENT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from helpers.engine_loop import open_loop
with open_loop("qwen3", model=sys.argv[2], platform="strict", tensor_parallel_size=2) as loop:
    print(loop.executor._group.process_ids[0], flush=True)
    time.sleep(120)
"""


def test_ranks_end_with_their_parent() -> None:
    """The parent is killed: nobody is left to tell its child to end."""
    arguments = [str(Path(__file__).parents[1]), str(tiny_models.model_path("qwen3"))]
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *arguments], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        _, alive = psutil.wait_procs([child], timeout=2)
    # Who adopts the orphan may take its time to collect it.
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)
