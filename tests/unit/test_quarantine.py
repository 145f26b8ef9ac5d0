"""A poisonous request is found by its own steps; whoever shared a batch with it is served."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
from helpers.null_model import NullEngine

from trimaran.core import admission
from trimaran.core.admission import QUARANTINE_SECONDS
from trimaran.core.errors import StepError
from trimaran.core.plan import StepPlan
from trimaran.core.sampling_params import BeamSearchParams
from trimaran.core.types import FinishReason

POISON = 99  # a token that the null model never draws
RUN_AHEAD = pytest.mark.parametrize("run_ahead", [0, 1])


class Poisoned(NullEngine):
    """Each step raises that computes a row with the poison and at least `length` known tokens.
    `failed` are the requests of those steps."""

    def __init__(self, length: int = 0, **config: object) -> None:
        super().__init__(**config)  # type: ignore[arg-type]
        self._length = length
        self._submit = self.executor.submit
        self.executor.submit = self.submit  # type: ignore[method-assign]
        self.failed: list[set[int]] = []

    def submit(self, plan: StepPlan) -> None:
        tokens = {row: known.tokens for row, known in self.executor.rows.items()}
        seeds = {row: known.sampling.seed for row, known in self.executor.rows.items()}
        tokens |= {new.row: new.token_ids for new in plan.added}
        seeds |= {new.row: new.sampling.seed for new in plan.added}
        bad = [r for r in plan.rows if POISON in tokens[r] and len(tokens[r]) >= self._length]
        if bad:
            self.executor.fail_step = True
            self.failed.append({seeds[row] for row in plan.rows})
        self._submit(plan)

    def reasons(self, *request_ids: str) -> set[FinishReason | None]:
        return {self.results[request_id, 0].finish_reason for request_id in request_ids}


def batch(engine: Poisoned) -> list[str]:
    """The poison among others; with the same seeds every time it comes."""
    prompts = [[1, 2], [POISON, 3], [4, 5, 6]]
    return [engine.add(prompt, eos=False, max_tokens=4) for prompt in prompts]


@RUN_AHEAD
def test_bystanders_of_a_failed_step_are_served_and_the_culprit_is_found(run_ahead: int) -> None:
    engine = Poisoned(run_ahead=run_ahead)
    first = batch(engine)
    engine.run()
    assert engine.reasons(*first) == {FinishReason.ERROR}
    assert engine.failed[0] == {0, 1, 2}
    other = engine.add([7, 8], eos=False, max_tokens=12)
    engine.step()
    again = batch(engine)
    engine.run()
    assert engine.reasons(again[0], again[2], other) == {FinishReason.LENGTH}
    assert engine.reasons(again[1]) == {FinishReason.ERROR}
    assert engine.failed[-1] == {5}, "it failed a step of its own"
    assert engine.scheduler.stats().num_quarantined == 1
    with pytest.raises(StepError, match="quarantined"):
        batch(engine)
    engine.add([4, 5, 6])
    engine.run()
    engine.check_drained()


@RUN_AHEAD
def test_one_that_fails_later_on_is_found_too(run_ahead: int) -> None:
    """Its prompt is computed without fault, so the second time it spoils a batch again."""
    engine = Poisoned(length=4, run_ahead=run_ahead)
    shared = []
    for _ in range(3):
        requests = batch(engine)
        engine.failed.clear()
        engine.run()
        shared.append(len(engine.failed[0]))
    assert shared == [3, 3, 1]
    assert engine.reasons(requests[0], requests[2]) == {FinishReason.LENGTH}
    assert engine.scheduler.stats().num_quarantined == 1
    engine.check_drained()


def test_copies_that_wait_spoil_no_other_batch() -> None:
    engine = Poisoned(max_num_seqs=2)
    engine.add([POISON, 3])
    engine.add([1, 2], eos=False)
    copies = [engine.add([POISON, 3]) for _ in range(3)]
    others = [engine.add([5, i], eos=False) for i in range(3)]
    engine.run()
    assert engine.reasons(*copies) == {FinishReason.ERROR}
    assert engine.reasons(*others) == {FinishReason.LENGTH}
    engine.check_drained()


def test_suspects_leave_every_other_step_to_the_rest() -> None:
    engine = Poisoned(max_num_seqs=4)
    for num_steps in (0, 6):  # twice, so that they are kept apart to their end
        for i in range(3):
            engine.add([i, i, i], eos=False)
        for _ in range(num_steps):
            engine.step()
        engine.executor.fail_step = True
        assert len(engine.step().rows) == 3
    engine.add([9, 9], eos=False, max_tokens=8)
    suspects = [engine.add([i, i, i], eos=False, max_tokens=8) for i in range(3)]
    shares = [len(engine.step().rows) for _ in range(16)]
    assert set(shares) == {1}, "a suspect shared a step"
    assert engine.results["r6", 0].finish_reason is FinishReason.LENGTH
    assert all(engine.results[suspect, 0].tokens for suspect in suspects), "not in turn"
    engine.run()
    assert engine.scheduler.stats().num_quarantined == 0
    engine.check_results()


def test_quarantine_ends() -> None:
    """The fault may have been the machine's: after some time the request may try again, alone."""
    engine = Poisoned()
    for _ in range(2):
        engine.add([POISON])
        engine.run()
    engine.now += QUARANTINE_SECONDS - 1
    with pytest.raises(StepError, match="quarantined for 1 s"):
        engine.add([POISON])
    engine.now += 1
    engine.add([7, 8], eos=False)
    engine.add([POISON])
    engine.run()
    assert [len(requests) for requests in engine.failed] == [1, 1, 1]
    engine._length = 1000  # the machine is mended
    engine.now += QUARANTINE_SECONDS
    for _ in range(2):
        engine.add([POISON])
        engine.run()
    assert engine.scheduler.admission.quarantine.empty, "served: nothing is held against it"


@RUN_AHEAD
@pytest.mark.parametrize("num_failures", [1, 2])
@pytest.mark.parametrize("n", [1, 3])
def test_one_that_is_cleared_leaves_no_other_behind(
    run_ahead: int, num_failures: int, n: int
) -> None:
    """Copies of a prompt, or its samples: the first to be served clears it, the rest go on."""
    engine = NullEngine(run_ahead=run_ahead, max_num_seqs=4)
    for num_steps in (0, 6)[:num_failures]:
        for prompt in ([1, 2], [3, 4]):
            engine.add(prompt, eos=False)
        for _ in range(num_steps):
            engine.step()
        engine.executor.fail_step = True
        engine.run()
    engine.add([3, 4])
    engine.run()  # now only the copies are suspects
    copies = [engine.add([1, 2], max_tokens=length, n=n) for length in (1, 9, 9, 9, 9)]
    other = engine.add([7, 8], eos=False, max_tokens=5)
    engine.run()
    for request in [*copies, other]:
        assert engine.results[request, 0].finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
    engine.check_results()
    engine.check_drained()
    assert not engine.scheduler.sequences.suspects


@pytest.mark.parametrize("how", ["finish", "beam"])
def test_an_end_by_other_ways_clears_too(how: str) -> None:
    engine = NullEngine()
    beam = BeamSearchParams(beam_width=2, max_tokens=3) if how == "beam" else None
    engine.add([1, 2], eos=False, beam=beam)
    engine.executor.fail_step = True
    engine.run()
    request = engine.add([1, 2], eos=False, beam=beam)
    engine.step()
    if how == "finish":
        engine.scheduler.finish(request, 0, 1)
    engine.run()
    assert engine.scheduler.admission.quarantine.empty


def test_a_request_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many steps fail while it waits, and however often it is asked for."""
    num_hashed = 0

    def sha256(data: bytes) -> hashlib._Hash:
        nonlocal num_hashed
        num_hashed += 1
        return hashlib.sha256(data)

    engine = Poisoned(max_num_seqs=1)
    monkeypatch.setattr(admission, "hashlib", SimpleNamespace(sha256=sha256))
    engine.add([1, 2])
    engine.run()
    assert num_hashed == 0, "no step has failed"
    for i in range(4):
        engine.add([POISON, i])
    for i in range(4):
        engine.add([5, i], n=2)
    engine.run()
    assert num_hashed == 8
    engine.add([6, 7], n=2)
    engine.run()
    assert num_hashed == 9


def test_records_expire() -> None:
    """A suspicion is forgotten after a while; one that was refused is watched as long again."""
    engine = Poisoned()
    quarantine = engine.scheduler.admission.quarantine
    engine.add([POISON, 1])
    engine.run()
    engine.now += QUARANTINE_SECONDS - 1
    assert engine.reasons(*run_two(engine)) == {FinishReason.LENGTH}
    assert not quarantine.empty
    engine.now += 1
    run_two(engine)
    assert quarantine.empty, "a suspect that never came again"
    for _ in range(2):
        engine.add([POISON, 2])
        engine.run()
    engine.now += 2 * QUARANTINE_SECONDS - 1
    run_two(engine)
    assert not quarantine.empty
    engine.now += 1
    engine.add([POISON, 3])
    engine.run()
    assert len(quarantine._records) == 1, "only the new one"


def run_two(engine: Poisoned) -> list[str]:
    requests = [engine.add([7, i], eos=False) for i in range(2)]
    engine.run()
    return requests
