"""The runner by hand-made plans: queues of steps, blocks, errors, and rows that fail alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.engine_loop import greedy, open_loop
from helpers.generate_reference import greedy_cases

from trimaran.core.args import EngineArgs
from trimaran.core.executor import UniExecutor
from trimaran.core.plan import BlockAppend, BlockCopy, BlockRef, NewRow, RowSampling, StepPlan
from trimaran.core.resolve import resolve
from trimaran.core.types import FinishReason

GREEDY = RowSampling(temperature=0.0)
PLATFORMS: dict[str, dict[str, Any]] = {
    "cpu": {"platform": "cpu", "block_size": 24},
    "strict": {"platform": "strict"},
}


@pytest.fixture(params=PLATFORMS)
def executor(request: pytest.FixtureRequest) -> Iterator[UniExecutor]:
    executor = UniExecutor(
        resolve(
            EngineArgs(
                model=str(tiny_models.model_path("qwen3")),
                dtype="float32",
                max_model_len="96",
                max_num_seqs=4,
                num_gpu_blocks_override=12,
                num_threads=1,
                **PLATFORMS[request.param],
            )
        )
    )
    yield executor
    executor.close()


def test_many_steps_may_be_queued(executor: UniExecutor) -> None:
    """Prefill in two chunks, then decoding, without reading any result: sampled tokens are read
    from the token table on the device."""
    case = next(c for c in greedy_cases("qwen3", 64, 24) if len(c.prompt) == 31)
    new = NewRow(2, case.prompt, 31, [[5, 3]], GREEDY)
    handles = [
        executor.submit(StepPlan(0, added=[new], rows=[2], starts=[0], counts=[20], emits=[False])),
        executor.submit(StepPlan(1, rows=[2], starts=[20], counts=[11], emits=[True])),
    ]
    for i in range(23):
        blocks = [BlockAppend(2, 0, [9])] if 31 + i == 48 else []
        plan = StepPlan(2 + i, blocks=blocks, rows=[2], starts=[31 + i], counts=[1], emits=[True])
        handles.append(executor.submit(plan))
    outputs = [handle.result() for handle in handles]
    assert all(output.error is None for output in outputs)
    assert [output.tokens[0] for output in outputs] == [[], *([token] for token in case.tokens)]


def test_a_row_changes_hands_between_queued_steps(executor: UniExecutor) -> None:
    first, second = [c for c in greedy_cases("qwen3", 64, 24) if len(c.prompt) == 16][:2]
    handles = []
    for step, case in enumerate((first, second, first, second)):
        new = NewRow(1, case.prompt, 16, [[1 + step]], GREEDY)
        removed = [1] if step else []
        plan = StepPlan(
            step, removed=removed, added=[new], rows=[1], starts=[0], counts=[16], emits=[True]
        )
        handles.append(executor.submit(plan))
    found = [handle.result().tokens[0] for handle in handles]
    assert found == [[case.tokens[0]] for case in (first, second, first, second)]


def test_copied_blocks_hold_the_same(executor: UniExecutor) -> None:
    """A row's only block is copied; another row goes on from the copy."""
    case = next(c for c in greedy_cases("qwen3", 64, 24) if len(c.prompt) == 16)
    new = NewRow(0, case.prompt, 16, [[4]], GREEDY)
    executor.submit(StepPlan(0, added=[new], rows=[0], starts=[0], counts=[16], emits=[True]))
    known = case.prompt + case.tokens[:1]
    plan = StepPlan(
        1,
        removed=[0],
        added=[NewRow(3, known, 16, [[7]], GREEDY)],
        copies=[BlockCopy(0, 4, 7)],
        rows=[3],
        starts=[16],
        counts=[1],
        emits=[True],
    )
    assert executor.submit(plan).result().tokens == [[case.tokens[1]]]


def test_scrubbed_blocks_are_zero(executor: UniExecutor) -> None:
    runner = executor._rank.runner  # type: ignore[union-attr]
    regions = runner._regions[0]
    executor.device.launch(lambda: [r.tensor.fill_(float("nan")) for r in regions] and None)
    executor.submit(StepPlan(0, scrubs=[BlockRef(0, 2), BlockRef(0, 5)])).result()
    for region in regions:
        clean = (region.tensor == 0).flatten(1).all(1)
        assert clean.nonzero()[:, 0].tolist() == [2, 5]


def test_a_failing_step_says_why_and_the_next_ones_run(
    executor: UniExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, calls = executor.model.embed, itertools.count()
    assert embed is not None

    def fails_once(token_ids: torch.Tensor) -> torch.Tensor:
        if next(calls) == 0:
            raise IndexError("no such token")
        return embed(token_ids)

    monkeypatch.setattr(executor.model, "embed", fails_once)
    case = next(c for c in greedy_cases("qwen3", 64, 24) if len(c.prompt) == 16)
    bad = NewRow(0, [5], 1, [[1]], GREEDY)
    good = NewRow(1, case.prompt, 16, [[2]], GREEDY)
    handles = [
        executor.submit(StepPlan(0, added=[bad], rows=[0], starts=[0], counts=[1], emits=[True])),
        executor.submit(
            StepPlan(1, removed=[0], added=[good], rows=[1], starts=[0], counts=[16], emits=[True])
        ),
    ]
    failed, fine = (handle.result() for handle in handles)
    assert failed.error is not None and "IndexError: no such token" in failed.error
    assert failed.tokens == [[]]
    assert fine.error is None and fine.tokens == [[case.tokens[0]]]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_row_with_nan_ends_alone(platform: str) -> None:
    """One prompt's embedding is NaN. Its blocks are given on clean."""
    cases = greedy_cases("qwen3", 16, 24)
    poisoned = next(
        t for t in range(900, 1000) if not any(t in [*c.prompt, *c.tokens] for c in cases)
    )
    options = {"max_model_len": "120", "num_gpu_blocks_override": 12, "max_num_seqs": 4}
    with open_loop("qwen3", **options, **PLATFORMS[platform]) as loop:
        embed = loop.executor.model.embed  # type: ignore[attr-defined]
        embed.table[poisoned] = torch.nan
        requests = [greedy(str(i), case.prompt, 24) for i, case in enumerate(cases)]
        bad = [greedy(f"bad{i}", [*cases[-1].prompt[:30], poisoned], 24) for i in range(4)]
        found = loop.run(
            [x for pair in zip(bad, requests[:4], strict=True) for x in pair] + requests[4:]
        )
    for i, case in enumerate(cases):
        assert found[str(i), 0].tokens == case.tokens
    for i in range(4):
        assert found[f"bad{i}", 0].finish_reason is FinishReason.ERROR
        assert found[f"bad{i}", 0].tokens == []


def test_two_engines_in_one_process_do_not_mix() -> None:
    """Different models on different platforms, step by step in turns."""
    cases = {name: greedy_cases(name, 16, 24)[:4] for name in ("qwen3", "llama2")}
    with (
        open_loop("qwen3", **PLATFORMS["cpu"]) as first,
        open_loop("llama2", **PLATFORMS["strict"]) as second,
    ):
        loops = {"qwen3": first, "llama2": second}
        for name, loop in loops.items():
            for i, case in enumerate(cases[name]):
                loop.scheduler.add(greedy(str(i), case.prompt, 24))
        while any(loop.busy for loop in loops.values()):
            for loop in loops.values():
                loop.step()
        for name, loop in loops.items():
            for i, case in enumerate(cases[name]):
                assert loop.found[str(i), 0].tokens == case.tokens
