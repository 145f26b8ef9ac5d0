"""Whatever the schedule is, a request yields the same tokens; and nothing is left behind."""

from __future__ import annotations

import pytest
from helpers.null_model import NullEngine, reference_beams

from trimaran.core.config import CacheConfig, CacheGroupConfig, SchedulerConfig
from trimaran.core.engine.messages import EngineRequest
from trimaran.core.plan import StepOutput
from trimaran.core.sampling_params import BeamSearchParams, SamplingParams
from trimaran.core.scheduler import Scheduler
from trimaran.core.types import Prompt

WINDOWS = [(None,), (6,), (None, 6), (None, 5, 1)]


def prompts(count: int, shared: int = 9) -> list[list[int]]:
    head = [(i * 7) % 50 for i in range(shared)]
    return [head + [(i * 13 + j) % 50 for j in range(1 + i * 3 % 11)] for i in range(count)]


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("windows", WINDOWS)
def test_every_schedule_yields_the_same_tokens(
    run_ahead: int, chunked: bool, prefix_caching: bool, windows: tuple[int | None, ...]
) -> None:
    cases = ((12, 0, "fcfs"), (12, 3, "priority"), (12, 0, "sjf"), (100, 3, "fcfs"))
    for num_blocks, threshold, policy in cases:
        engine = NullEngine(
            num_blocks=num_blocks,
            windows=windows,
            prefix_caching=prefix_caching,
            run_ahead=run_ahead,
            enable_chunked_prefill=chunked,
            long_prefill_token_threshold=threshold,
            max_num_batched_tokens=24,
            policy=policy,
        )
        for i, prompt in enumerate(prompts(8)):
            engine.add(prompt, max_tokens=3 + 3 * i, n=1 + i % 3, priority=-i, salt=i % 2)
        engine.run()
        engine.check_results()
        engine.check_drained()
        if num_blocks == 12 and windows == (None,):
            assert engine.scheduler.stats().num_preemptions > 0


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("num_blocks", [9, 16, 200])
@pytest.mark.parametrize("windows", WINDOWS)
def test_beam_search_is_that_of_transformers(
    run_ahead: int, num_blocks: int, windows: tuple[int | None, ...]
) -> None:
    engine = NullEngine(num_blocks=num_blocks, windows=windows, run_ahead=run_ahead)
    searches = {}
    for i, prompt in enumerate(prompts(6)):
        params = BeamSearchParams(
            beam_width=1 + i,
            max_tokens=4 + i,
            length_penalty=[1.0, 0.0, 2.0, -1.0][i % 4],
            ignore_eos=i % 3 == 2,
        )
        searches[engine.add(prompt, beam=params, salt=i % 2)] = (prompt, params, i % 2)
        engine.add(prompt, max_tokens=6, n=2, salt=i % 2)
    engine.run()
    engine.check_results()
    engine.check_drained()
    for request_id, (prompt, params, salt) in searches.items():
        root = salt.to_bytes(32, "little")
        expected = reference_beams(root, prompt, params, engine.config.max_model_len)
        found = engine.beams[request_id]
        assert found.token_ids == [tokens for _, tokens in expected]
        assert found.scores == pytest.approx([score for score, _ in expected])


def test_the_first_output_says_when_the_request_was_first_scheduled():
    now = [100.0]
    scheduler = Scheduler(
        SchedulerConfig(max_model_len=64),
        CacheConfig(
            groups=(CacheGroupConfig(name="full", layers=(0,), block_size=4, num_blocks=32),),
            dtype=None,
        ),
        clock=lambda: now[0],
    )
    scheduler.add(
        EngineRequest("a", Prompt.of_tokens([1, 2, 3]), SamplingParams(max_tokens=2, seed=1))
    )
    now[0] = 105.0
    plan = scheduler.schedule()
    now[0] = 107.0
    (output,), _ = scheduler.update(plan, StepOutput(plan.step_id, [[7]]))
    assert output.first_scheduled == 105.0
