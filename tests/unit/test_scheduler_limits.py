"""Every limit is exact: what fits is served, one more is refused or waits."""

from __future__ import annotations

import random

import pytest
from helpers.null_model import NullEngine

from trimaran.core.errors import ContextLengthError, InvalidRequestError, QueueFullError
from trimaran.core.sampling_params import BeamSearchParams


def test_empty_prompt_and_double_id_are_refused() -> None:
    engine = NullEngine()
    with pytest.raises(InvalidRequestError, match="empty"):
        engine.add([])
    engine.add([1], request_id="a")
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.add([1], request_id="a")
    with pytest.raises(InvalidRequestError, match="beam_width"):
        engine.add([1], n=2, beam=BeamSearchParams(beam_width=2, max_tokens=2))


def test_context_boundary() -> None:
    engine = NullEngine(max_model_len=10)
    with pytest.raises(ContextLengthError, match="10 tokens") as caught:
        engine.add(list(range(10)))
    assert caught.value.code == "context_length_exceeded"
    request = engine.add(list(range(9)), max_tokens=5, seed=2)
    engine.run()
    assert len(engine.results[request, 0].tokens) == 1


@pytest.mark.parametrize("windows", [(None,), (6,), (None, 6)])
@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("chunked", [True, False])
def test_pool_boundary(windows: tuple[int | None, ...], run_ahead: int, chunked: bool) -> None:
    """The longest request that is admitted alone also ends; a token more is refused."""
    engine = NullEngine(
        num_blocks=5, windows=windows, run_ahead=run_ahead, enable_chunked_prefill=chunked
    )
    prompt = [1, 2, 3, 4, 5, 6, 7]
    longest = 64 if windows == (6,) else 17  # 4 blocks of 4 computed, and one token only sampled
    request = engine.add(prompt, max_tokens=longest - len(prompt), eos=False, seed=2)
    other = engine.add(prompt, max_tokens=longest - len(prompt), eos=False, seed=4)
    if longest < 64:
        with pytest.raises(ContextLengthError, match="more than the KV cache holds"):
            engine.add(prompt, max_tokens=longest - len(prompt) + 1, seed=6)
    engine.run()
    assert len(engine.results[request, 0].tokens) == longest - len(prompt)
    assert len(engine.results[other, 0].tokens) == longest - len(prompt)
    engine.check_drained()


def test_whole_prompts_need_the_budget() -> None:
    engine = NullEngine(enable_chunked_prefill=False, max_num_batched_tokens=8)
    with pytest.raises(ContextLengthError, match="chunked prefill is off"):
        engine.add(list(range(9)))
    engine.add(list(range(8)), seed=2)
    engine.add(list(range(20, 25)), seed=4)
    plan = engine.step()
    assert plan.counts == [8], "the second waits for a step with room for all of it"
    engine.run()
    engine.check_results()


def test_token_budget_and_chunks() -> None:
    engine = NullEngine(max_num_batched_tokens=10, long_prefill_token_threshold=4)
    for start in (0, 20, 40):
        engine.add(list(range(start, start + 9)), eos=False)
    assert engine.step().counts == [4, 4, 2]
    assert engine.step().counts == [4, 4, 2]
    engine.run()
    engine.check_results()


def test_rows_are_limited_and_reused() -> None:
    engine = NullEngine(max_num_seqs=2)
    for i in range(5):
        engine.add([i, i + 1], max_tokens=2, eos=False)
    plan = engine.step()
    assert sorted(plan.rows) == [0, 1]
    assert engine.scheduler.num_running == 2 and engine.scheduler.num_waiting == 3
    engine.run()
    engine.check_drained()


def test_queue_limit_in_requests() -> None:
    engine = NullEngine(max_num_queued_reqs=2, max_num_seqs=1)
    engine.add([1], n=3, max_tokens=4)
    engine.add([2], max_tokens=4)
    with pytest.raises(QueueFullError, match="queue is full") as caught:
        engine.add([3])
    assert caught.value.status == 429 and caught.value.retry_after == 1.0
    engine.step()  # the first starts; its children do not count as queued
    engine.add([3])
    with pytest.raises(QueueFullError):
        engine.add([4])
    engine.run()
    engine.check_drained()


def test_queue_limit_in_tokens() -> None:
    engine = NullEngine(max_num_queued_tokens=10)
    engine.add([1] * 6)
    with pytest.raises(QueueFullError):
        engine.add([1] * 5)
    engine.add([1] * 4)
    assert engine.scheduler.stats().num_waiting_tokens == 10
    engine.scheduler.abort("r1")
    engine.add([1] * 4)


def test_retry_after_follows_the_measured_rate() -> None:
    engine = NullEngine(max_num_queued_reqs=3, max_num_queued_tokens=10_000, max_num_seqs=1)
    for i in range(3):
        engine.add([i], max_tokens=1)
    for _ in range(2):  # one request starts every 4 s
        engine.step()
        engine.now += 4.0
    engine.add([7], max_tokens=1)
    engine.add([8], max_tokens=1)
    with pytest.raises(QueueFullError) as caught:
        engine.add([9])
    assert caught.value.retry_after == pytest.approx(4.0)


def test_many_aborts_leave_no_trace_in_the_queue() -> None:
    engine = NullEngine()
    for i in range(500):
        engine.add([1], request_id=f"x{i}")
    for i in range(499):
        engine.scheduler.abort(f"x{i}")
    assert len(engine.scheduler.sequences.queue._heap) < 70
    assert engine.scheduler.num_waiting == 1
    engine.run()
    engine.check_drained()


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("chunked", [True, False])
def test_steps_that_decode_are_kept_apart_where_the_platform_wants_it(
    run_ahead: int, chunked: bool
) -> None:
    """The null executor checks every step; tokens are what they are in any schedule."""
    draw = random.Random(run_ahead)
    engine = NullEngine(
        mixed_batches=False,
        run_ahead=run_ahead,
        enable_chunked_prefill=chunked,
        num_blocks=12,  # few enough for preemptions
    )
    for i in range(40):
        prompt = [draw.randrange(3) for _ in range(draw.randint(1, 16))]
        engine.add(prompt, max_tokens=draw.randint(1, 24), n=draw.choice([1, 1, 2]))
        if i % 10 == 0:
            engine.add(prompt, beam=BeamSearchParams(beam_width=2, max_tokens=3))
        for _ in range(draw.randint(0, 4)):
            engine.step()
    engine.run()
    engine.check_results()
    engine.check_drained()
    assert engine.scheduler.stats().num_preemptions > 0


def test_neither_kind_of_step_starves_the_other() -> None:
    engine = NullEngine(mixed_batches=False, max_num_batched_tokens=4, num_blocks=100)
    engine.add([1, 2], max_tokens=30, eos=False)
    engine.step()
    for _ in range(4):
        engine.add([3] * 20, max_tokens=1)
    kinds = [max(engine.step().counts) > 1 for _ in range(12)]
    assert kinds == [False, True] * 6
    engine.run()
    engine.check_results()
