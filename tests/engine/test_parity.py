"""Token-exact against `transformers.generate`: greedy, fp32, tiny models of every family, through
scheduler, runner and sampler, on `cpu` and on `strict` with and without a step in flight."""

from __future__ import annotations

import random
from typing import Any

import pytest
from helpers.engine_loop import Found, Loop, greedy, open_loop
from helpers.generate_reference import Case, describe, greedy_cases
from helpers.tiny_models import FAMILIES, VARIANTS

NUM_TOKENS = 24

PLATFORMS: dict[str, dict[str, Any]] = {
    "cpu": {"platform": "cpu", "block_size": 16},
    "strict": {"platform": "strict"},
    "strict-sync": {"platform": "strict", "async_scheduling": "off"},
}

SCENARIOS: dict[str, dict[str, Any]] = {
    "whole": {"enable_chunked_prefill": False, "enable_prefix_caching": False},
    "chunked": {"max_num_batched_tokens": 24, "max_num_seqs": 16, "enable_prefix_caching": False},
    "one-by-one": {"max_num_seqs": 1, "max_num_batched_tokens": 19},
}


def check(found: dict[tuple[str, int], Found], cases: tuple[Case, ...]) -> None:
    assert len(found) == len(cases)
    for index, case in enumerate(cases):
        row = found[str(index), 0]
        assert row.error is None
        assert row.tokens == case.tokens, f"prompt {index} of {len(case.prompt)} tokens"


def run_all(loop: Loop, cases: tuple[Case, ...], **options: Any) -> dict[tuple[str, int], Found]:
    requests = [greedy(str(i), case.prompt, NUM_TOKENS) for i, case in enumerate(cases)]
    return loop.run(requests, **options)


def cases_for(model: str, platform: str, count: int) -> tuple[Case, ...]:
    """The reference attention of `strict` loops over sequences: fewer of them there."""
    cases = greedy_cases(model, 64, NUM_TOKENS)
    few = cases[:: 64 // count] if platform != "cpu" else cases
    print(model, describe(few))
    return few


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("model", FAMILIES)
def test_whole_prompts_in_one_large_batch(model: str, platform: str) -> None:
    cases = cases_for(model, platform, 16)
    with open_loop(model, **SCENARIOS["whole"], **PLATFORMS[platform]) as loop:
        check(run_all(loop, cases), cases)
        assert loop.largest_batch == len(cases)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("model", FAMILIES)
def test_chunks_and_shuffled_arrivals(model: str, platform: str) -> None:
    cases = cases_for(model, platform, 16)
    with open_loop(model, **SCENARIOS["chunked"], **PLATFORMS[platform]) as loop:
        check(run_all(loop, cases, arrivals=random.Random(1)), cases)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("model", FAMILIES)
def test_a_prefix_cache_changes_nothing(model: str, platform: str) -> None:
    """Everything twice, the second time from the cache, in other company and chunks."""
    cases = cases_for(model, platform, 16)
    with open_loop(model, max_num_batched_tokens=64, **PLATFORMS[platform]) as loop:
        check(run_all(loop, cases), cases)
        again = run_all(loop, cases, arrivals=random.Random(2))
        check(again, cases)
        block = loop.config.cache.groups[0].block_size
        for index, case in enumerate(cases):
            if len(case.prompt) > block:
                assert again[str(index), 0].num_cached >= block
        # Continuations of what was generated are found as well.
        case = max(cases, key=lambda case: len(case.prompt))
        longer = greedy("longer", [*case.prompt, *case.tokens[:20]], NUM_TOKENS - 20)
        found = loop.run([longer])["longer", 0]
        assert found.tokens == case.tokens[20:]
        assert found.num_cached > len(case.prompt) - block


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("caching", [True, False])
def test_preempted_requests_lose_nothing(model: str, platform: str, caching: bool) -> None:
    cases = cases_for(model, platform, 16)
    blocks = 24 if platform == "cpu" else 10
    with open_loop(
        model,
        max_model_len="120",
        num_gpu_blocks_override=blocks,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        enable_prefix_caching=caching,
        **PLATFORMS[platform],
    ) as loop:
        found = run_all(loop, cases, arrivals=random.Random(3))
        check(found, cases)
        assert sum(row.num_preemptions for row in found.values()) > 0
        assert loop.scheduler.stats().kv_used == 0


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("model", VARIANTS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_variant_in_every_scenario(scenario: str, model: str, platform: str) -> None:
    cases = greedy_cases(model, 64, NUM_TOKENS)
    print(model, describe(cases))
    with open_loop(model, **SCENARIOS[scenario], **PLATFORMS[platform]) as loop:
        check(run_all(loop, cases, arrivals=random.Random(4)), cases)
        check(run_all(loop, cases), cases)


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 13, 21, 34, 64])
def test_every_batch_size(batch: int, platform: str) -> None:
    cases = greedy_cases("qwen3", 64, NUM_TOKENS)
    with open_loop("qwen3", max_num_seqs=batch, **PLATFORMS[platform]) as loop:
        check(run_all(loop, cases), cases)
        assert loop.largest_batch == batch
