"""One sequence: its transitions, its stop rules, and what the sampler is told."""

from __future__ import annotations

import itertools

import pytest

from trimaran.core.engine.messages import EngineRequest
from trimaran.core.errors import ConfigError
from trimaran.core.kv.sequence import SequenceKV
from trimaran.core.policies import choose_policy
from trimaran.core.request import TRANSITIONS, IllegalTransitionError, Request, Status
from trimaran.core.sampling_params import BeamSearchParams, SamplingParams
from trimaran.core.types import FinishReason, Prompt

EOS = 2


def make(
    *, prompt: int = 3, index: int = 0, beam: BeamSearchParams | None = None, **params: object
) -> Request:
    origin = EngineRequest(
        "r",
        Prompt.of_tokens(list(range(10, 10 + prompt))),
        SamplingParams(**params),  # type: ignore[arg-type]
        eos_token_ids=[EOS],
        beam=beam,
    )
    kv = SequenceKV(1, bytes(32), reuse=True)
    return Request(origin, index, kv, max_model_len=20, arrival_order=5)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Status, Status)))
def test_only_the_table_is_legal(before: Status, after: Status) -> None:
    request = make()
    request.status = before
    if after in TRANSITIONS[before]:
        request.move_to(after, "fork")
        assert request.status is after
        assert request.block_reason == ("fork" if after is Status.BLOCKED else None)
    else:
        with pytest.raises(IllegalTransitionError, match=rf"{before.value} → {after.value}"):
            request.move_to(after)


def test_eos_ends_a_sequence_unless_it_is_ignored() -> None:
    assert make(max_tokens=5).append(EOS) is FinishReason.STOP
    ignoring = make(max_tokens=5, ignore_eos=True)
    assert ignoring.append(EOS) is None


def test_stop_reason_names_a_stop_token_but_not_eos() -> None:
    request = make(max_tokens=5, stop_token_ids=[7, EOS])
    assert request.append(7) is FinishReason.STOP and request.stop_reason == 7
    request = make(max_tokens=5, stop_token_ids=[7])
    assert request.append(EOS) is FinishReason.STOP and request.stop_reason is None


def test_min_tokens_are_generated_before_a_stop_counts() -> None:
    request = make(max_tokens=5, min_tokens=2, stop_token_ids=[7])
    assert [request.append(token) for token in (7, EOS, 7)] == [None, None, FinishReason.STOP]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "expected"), [(3, 4, 4), (18, 9, 2), (3, None, 17)]
)
def test_length(prompt: int, max_tokens: int | None, expected: int) -> None:
    request = make(prompt=prompt, max_tokens=max_tokens, ignore_eos=True)
    reasons = [request.append(1) for _ in range(expected)]
    assert reasons == [None] * (expected - 1) + [FinishReason.LENGTH]
    assert request.num_generated == expected


def test_truncate() -> None:
    request = make(max_tokens=9)
    for token in (1, 3, 4):
        request.append(token)
    for keep, dropped, left in ((5, 0, [1, 3, 4]), (1, 2, [1]), (-1, 1, [])):
        assert request.truncate(keep) == dropped
        assert request.tokens[request.num_prompt :] == left


def test_sampling_is_resolved() -> None:
    request = make(
        index=2, max_tokens=5, min_tokens=1, stop_token_ids=[9, 4], seed=-1, prompt_logprobs=3, n=3
    )
    sampling = request.sampling
    assert sampling.seed == 2**64 - 1 and sampling.child_index == 2
    assert sampling.suppress_ids == [EOS, 4, 9] and sampling.min_tokens == 1
    assert sampling.prompt_logprobs is None
    assert make(max_tokens=5, stop_token_ids=[9]).sampling.suppress_ids == []
    ignoring = make(max_tokens=5, min_tokens=1, stop_token_ids=[9], ignore_eos=True)
    assert ignoring.sampling.suppress_ids == [9]


def test_beams_report_enough_to_go_on() -> None:
    beam = BeamSearchParams(beam_width=3, max_tokens=4)
    request = make(beam=beam)
    assert request.sampling.beam_width == 3 and request.sampling.logprobs == 6
    assert request.yields == 0 and request.max_total == 7


def test_policies_order_as_they_say() -> None:
    first, second = make(prompt=5), make(prompt=3)
    first.arrival_order, second.arrival_order = 1, 2
    assert choose_policy("fcfs")(first) < choose_policy("fcfs")(second)
    assert choose_policy("sjf")(second) < choose_policy("sjf")(first)
    first.num_preemptions = 1
    assert choose_policy("sjf")(first) < choose_policy("sjf")(second)
    second.priority = -1
    assert choose_policy("priority")(second) < choose_policy("priority")(first)
    with pytest.raises(ConfigError, match="known: fcfs, priority, sjf"):
        choose_policy("lifo")
