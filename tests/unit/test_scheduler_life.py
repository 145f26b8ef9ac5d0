"""What happens to a request: preemption, abort, finish, failure, and who pays."""

from __future__ import annotations

import pytest
from helpers.null_model import NullEngine

from trimaran.core.errors import StepError
from trimaran.core.plan import StepOutput
from trimaran.core.request import Status
from trimaran.core.sampling_params import BeamSearchParams
from trimaran.core.types import FinishReason


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_preemption_loses_nothing(run_ahead: int) -> None:
    engine = NullEngine(num_blocks=8, run_ahead=run_ahead)
    for i in range(3):
        engine.add([i] * 6, max_tokens=14, eos=False, logprobs=0, prompt_logprobs=0)
    engine.run()
    engine.check_results()
    engine.check_drained()
    assert engine.results["r0", 0].num_preemptions == 0, "the first is never driven out"
    assert engine.results["r2", 0].num_preemptions > 0
    for i in range(3):
        result = engine.results[f"r{i}", 0]
        assert len(result.logprobs) == 14
        assert [-entry.logprobs[0] for entry in result.prompt_logprobs] == [0, 1, 2, 3, 4]
    assert engine.scheduler.stats().generation_tokens == 42


def test_priority_preempts_the_worst() -> None:
    engine = NullEngine(num_blocks=8, policy="priority")
    for i, priority in enumerate((5, 1, 3)):
        engine.add([i] * 6, max_tokens=14, eos=False, priority=priority)
    engine.run()
    engine.check_results()
    preemptions = [engine.results[f"r{i}", 0].num_preemptions for i in range(3)]
    assert preemptions[1] == 0 and preemptions[0] > 0


def test_sjf_serves_the_shortest_prompt_first() -> None:
    engine = NullEngine(max_num_seqs=1, policy="sjf")
    for length in (9, 3, 6):
        engine.add([length] * length, max_tokens=1)
    engine.run()
    assert list(engine.results) == [("r1", 0), ("r2", 0), ("r0", 0)]


def test_prefix_hit_is_reported_once() -> None:
    engine = NullEngine()
    engine.add(list(range(13)), max_tokens=1, eos=False)
    engine.run()
    plan_tokens = engine.scheduler.stats().last_step_tokens
    assert plan_tokens == 13
    engine.add([*range(12), 40], max_tokens=3, n=2, eos=False)
    assert engine.step().counts == [1]
    engine.run()
    assert [engine.results["r1", index].num_cached for index in (0, 1)] == [12, 12]
    stats = engine.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits, stats.prompt_tokens) == (26, 12, 26)


def test_fork_computes_the_prompt_once() -> None:
    engine = NullEngine()
    engine.add(list(range(9)), n=3, max_tokens=3, eos=False)
    assert engine.step().counts == [9]
    plan = engine.step()
    assert sorted(plan.counts) == [1, 1, 1] and plan.copies == []
    engine.run()
    engine.check_results()
    engine = NullEngine()
    engine.add(list(range(11)), n=3, max_tokens=3, eos=False)
    engine.step()
    assert len(engine.step().copies) == 2, "the partial block is copied for each child"
    engine.run()
    engine.check_results()


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("when", [0, 1, 2, 5])
def test_siblings_survive_the_end_of_the_first(run_ahead: int, when: int) -> None:
    engine = NullEngine(run_ahead=run_ahead, max_num_batched_tokens=6)
    engine.add(list(range(14)), n=3, max_tokens=4, eos=False)
    for _ in range(when):
        engine.step()
    engine.scheduler.finish("r0", 0, 0)
    engine.run()
    for index in (1, 2):
        assert engine.results["r0", index].tokens == engine.expected("r0", index)[0]
    engine.check_drained()


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("when", [0, 1, 2, 3, 4, 6])
def test_abort_frees_everything_in_every_state(run_ahead: int, when: int) -> None:
    engine = NullEngine(run_ahead=run_ahead, max_num_batched_tokens=6, num_blocks=12)
    engine.add(list(range(10)), n=2, max_tokens=9, eos=False)
    beams = BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)
    engine.add(list(range(5)), beam=beams)
    for _ in range(when):
        engine.step()
    for request in ("r0", "r1", "nobody"):
        engine.scheduler.abort(request)
    assert engine.scheduler.num_running == engine.scheduler.num_waiting == 0
    engine.run()
    engine.check_drained()
    reasons = {key: result.finish_reason for key, result in engine.results.items()}
    assert reasons == dict.fromkeys([("r0", 0), ("r0", 1), ("r1", 0)], FinishReason.ABORT)


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_finish_cuts_and_does_not_bill(run_ahead: int) -> None:
    engine = NullEngine(run_ahead=run_ahead)
    request = engine.add([1, 2, 3], max_tokens=20, eos=False, seed=2)
    while (request, 0) not in engine.results or len(engine.results[request, 0].tokens) < 6:
        engine.step()
    other = engine.add([4, 5], max_tokens=3, eos=False)
    counts = [engine.scheduler.stats().generation_tokens]
    engine.scheduler.finish(request, 0, 4)
    engine.scheduler.finish(request, 0, 2)  # it has ended: without effect
    while engine.scheduler.has_work:
        engine.step()
        counts.append(engine.scheduler.stats().generation_tokens)
    assert counts == sorted(counts), "a counter stepped back"
    assert engine.results[other, 0].finish_reason is FinishReason.LENGTH
    assert engine.results[request, 0].finish_reason is FinishReason.STOP
    assert len(engine.results[request, 0].tokens) == 6, "nothing is emitted after the cut"
    assert engine.scheduler.stats().generation_tokens == 6 + 3
    assert engine.scheduler.stats().discarded_tokens == 2
    engine.check_drained()


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_nan_row_ends_alone_and_is_not_cached(run_ahead: int) -> None:
    engine = NullEngine(run_ahead=run_ahead)
    engine.add(list(range(9)), max_tokens=6, eos=False)
    engine.add(list(range(20, 29)), max_tokens=6, eos=False)
    engine.executor.fail_rows = True
    engine.run()
    assert engine.results["r0", 0].finish_reason is FinishReason.ERROR
    assert "not finite" in (engine.results["r0", 0].error or "")
    assert engine.results["r1", 0].tokens == engine.expected("r1", 0)[0]
    engine.add(list(range(9)), max_tokens=6, eos=False)
    engine.run()
    assert engine.results["r2", 0].num_cached == 0
    assert engine.results["r2", 0].tokens == engine.expected("r2", 0)[0]
    engine.check_drained()


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_failed_step_ends_its_requests_and_a_second_one_quarantines(run_ahead: int) -> None:
    engine = NullEngine(run_ahead=run_ahead, max_num_seqs=2)
    prompt = list(range(9))
    for attempt in range(2):
        request = engine.add(prompt, n=2, max_tokens=6, eos=False)
        engine.executor.fail_step = True
        engine.step()
        other = engine.add([7, attempt], max_tokens=3, eos=False)
        engine.run()
        for index in (0, 1):
            result = engine.results[request, index]
            assert result.finish_reason is FinishReason.ERROR and "injected" in str(result.error)
        assert engine.results[other, 0].finish_reason is FinishReason.LENGTH
        engine.check_drained()
    with pytest.raises(StepError, match="quarantined"):
        engine.add(prompt)
    assert engine.scheduler.stats().num_quarantined == 1
    engine.add([*prompt, 9])


def test_success_clears_a_suspicion() -> None:
    engine = NullEngine()
    for fails in (True, False, True):
        engine.add([1, 2, 3], max_tokens=2)
        engine.executor.fail_step = fails
        engine.run()
    engine.add([1, 2, 3])


def test_rows_may_yield_none_or_many_tokens() -> None:
    """What speculation needs: 0 … k tokens a step, those behind a stop discarded."""
    engine = NullEngine()
    engine.add([1, 2, 3, 4], max_tokens=6, eos=False)
    scheduler = engine.scheduler

    def step(tokens: list[int]) -> tuple[int, int]:
        plan = scheduler.schedule()
        outputs, _ = scheduler.update(plan, StepOutput(plan.step_id, [tokens]))
        engine._take(outputs, [])
        return plan.starts[0], plan.counts[0]

    assert step([11]) == (0, 4)
    assert step([12, 13, 14]) == (4, 1)
    assert step([]) == (5, 3), "all but the first of them are still to be computed"
    assert step([15]) == (7, 1), "the last token is computed again"
    assert step([16, 17, 18]) == (8, 1)
    assert engine.results["r0", 0].tokens == [11, 12, 13, 14, 15, 16]
    assert engine.results["r0", 0].finish_reason is FinishReason.LENGTH
    engine.check_drained()


def test_row_without_a_token_voids_what_follows_it() -> None:
    engine = NullEngine(run_ahead=1)
    engine.add([1, 2, 3, 4], max_tokens=4, eos=False)
    scheduler = engine.scheduler
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.update(first, StepOutput(first.step_id, [[]]))
    outputs, _ = scheduler.update(second, StepOutput(second.step_id, [[99]]))
    assert all(not output.token_ids for output in outputs)
    third = scheduler.schedule()
    assert (third.starts, third.counts, third.emits) == ([3], [1], [True])
    outputs, _ = scheduler.update(third, StepOutput(third.step_id, [[5]]))
    assert [output.token_ids for output in outputs] == [[5]]


def test_updates_come_in_order() -> None:
    engine = NullEngine(run_ahead=1)
    engine.add([1, 2], max_tokens=4, eos=False)
    engine.plan()
    plan = engine.plan()
    with pytest.raises(RuntimeError, match="out of order"):
        engine.scheduler.update(plan, StepOutput(plan.step_id, [[1]]))


def test_blocked_children_have_no_row() -> None:
    engine = NullEngine(max_num_batched_tokens=4)
    engine.add(list(range(9)), n=2, max_tokens=2)
    engine.step()
    first, second = engine.scheduler.sequences.by_id["r0"]
    assert (first.status, second.status) == (Status.RUNNING, Status.BLOCKED)
    assert second.block_reason == "fork" and second.row is None and first.row == 0
    assert engine.scheduler.num_waiting == 1
