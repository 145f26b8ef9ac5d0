"""From token ids to outputs: kinds, intervals, stop strings, log-probabilities, ends."""

import pytest
from helpers.tiny_tokenizers import byte_level, save

from trimaran.core.engine.messages import (
    BeamOutput,
    EngineRequest,
    FinishSequence,
    RejectedRequest,
    SequenceOutput,
    StepMessage,
)
from trimaran.core.errors import QueueFullError, StepError
from trimaran.core.outputs import OutputProcessor
from trimaran.core.sampling_params import BeamSearchParams, SamplingParams
from trimaran.core.streams import merge_deltas
from trimaran.core.text.tokenizer import Tokenizer
from trimaran.core.types import FinishReason, PositionLogprobs, Prompt


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_path(save(byte_level(), tmp_path_factory.mktemp("t"), eos_token="</s>"))


class Run:
    """One request, fed step by step."""

    def __init__(self, tokenizer, **params):
        self.tokenizer = tokenizer
        self.processor = OutputProcessor(tokenizer)
        self.request = EngineRequest("r", Prompt.of_tokens([5, 6], "p"), SamplingParams(**params))
        self.processor.add(self.request, arrival=1.0)
        self.finishes = []

    def step(self, token_ids, index=0, **fields):
        output = SequenceOutput("r", index, list(token_ids), **fields)
        processed = self.processor.process(StepMessage([output]))
        self.finishes += processed.finishes
        assert not processed.failures
        return processed.outputs[0] if processed.outputs else None

    def ids(self, text):
        """One token a byte."""
        return [self.tokenizer.id_of(self._symbol(byte)) for byte in text.encode()]

    def _symbol(self, byte):
        from trimaran.core.text.tokenizer import BYTE_OF_CHAR

        return next(char for char, value in BYTE_OF_CHAR.items() if value == byte)


def test_cumulative_delta_and_final_tell_the_same(tokenizer):
    texts = {}
    for kind in ("cumulative", "delta", "final_only"):
        run = Run(tokenizer, output_kind=kind, max_tokens=None)
        ids = run.ids("héllo")
        outputs = [run.step([token]) for token in ids[:-1]]
        outputs.append(run.step(ids[-1:], finish_reason=FinishReason.LENGTH))
        seen = [output.outputs[0] for output in outputs if output is not None]
        texts[kind] = [output.text for output in seen]
        assert seen[-1].finish_reason == "length" and outputs[-1].finished
        assert len(run.processor) == 0
        tokens = sum((o.token_ids for o in seen), []) if kind == "delta" else seen[-1].token_ids
        assert tokens == ids
    assert texts["cumulative"] == ["h", "h", "hé", "hél", "héll", "héllo"]
    assert texts["delta"] == ["h", "", "é", "l", "l", "o"]
    assert texts["final_only"] == ["héllo"]


def test_an_interval_sends_the_first_then_every_nth_and_the_end(tokenizer):
    run = Run(tokenizer, output_kind="delta", stream_interval=3)
    ids = run.ids("abcdefgh")
    sent = [run.step([token]) for token in ids[:-1]]
    sent.append(run.step(ids[-1:], finish_reason=FinishReason.LENGTH))
    assert [o and o.outputs[0].text for o in sent] == [
        "a", None, None, "bcd", None, None, "efg", "h",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["cumulative", "delta", "final_only"])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_cuts_text_tokens_and_logprobs(tokenizer, kind, include):
    run = Run(
        tokenizer, stop=["STOP"], output_kind=kind, logprobs=0, include_stop_str_in_output=include
    )
    ids = run.ids("ab STOP and more")
    logprobs = [PositionLogprobs([token], [-1.0], [1]) for token in ids]
    outputs = [
        run.step(ids[:4], logprobs=logprobs[:4]),
        run.step(ids[4:], logprobs=logprobs[4:]),  # the stop string and what was run ahead
    ]
    seen = [output.outputs[0] for output in outputs if output is not None]
    last = seen[-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", "STOP")
    join = kind == "delta"
    text = "".join(o.text for o in seen) if join else last.text
    tokens = sum((o.token_ids for o in seen), []) if join else last.token_ids
    entries = sum((o.logprobs for o in seen), []) if join else last.logprobs
    assert text == ("ab STOP" if include else "ab ")
    assert tokens == ids[:7] and len(entries) == 7
    assert last.cumulative_logprob == -7.0
    assert run.finishes == [FinishSequence("r", 0, 7)]
    assert run.step(ids) is None  # what the engine said before it heard of it


def test_a_stop_string_held_back_is_never_streamed(tokenizer):
    run = Run(tokenizer, stop=["\n\nUser"], output_kind="delta")
    shown = [run.step([token]).outputs[0].text for token in run.ids("a\n\nUs!")]
    assert shown == ["a", "", "", "", "", "\n\nUs!"]


def test_stop_strings_wait_for_min_tokens(tokenizer):
    run = Run(tokenizer, stop=["x"], min_tokens=3, output_kind="cumulative")
    outputs = [run.step([token]) for token in run.ids("axxbx")]
    assert [o.outputs[0].finish_reason for o in outputs] == [None, None, None, None, "stop"]
    assert outputs[-1].outputs[0].text == "axxb"


def test_held_back_text_comes_out_at_the_end(tokenizer):
    run = Run(tokenizer, stop=["STOP"], output_kind="delta")
    run.step(run.ids("aST"))
    last = run.step([], finish_reason=FinishReason.ABORT).outputs[0]
    assert (last.text, last.finish_reason, last.stop_reason) == ("ST", "abort", None)
    assert run.finishes == []


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_is_a_token_but_no_text(tokenizer, include):
    run = Run(tokenizer, include_stop_str_in_output=include)
    ids = run.ids("ab!")
    last = run.step(ids, finish_reason=FinishReason.STOP, stop_reason=ids[-1]).outputs[0]
    assert last.text == ("ab!" if include else "ab")
    assert last.token_ids == ids and last.stop_reason == ids[-1]


def test_the_end_of_sequence_token_stays_hidden(tokenizer):
    run = Run(tokenizer, skip_special_tokens=False)
    last = run.step([*run.ids("a"), tokenizer.eos_token_id], finish_reason=FinishReason.STOP)
    assert last.outputs[0].text == "a" and last.outputs[0].stop_reason is None


def test_n_sequences_finish_each_on_its_own(tokenizer):
    run = Run(tokenizer, n=2, output_kind="delta", stop=["!"])
    ids = run.ids("ab!")
    first = run.step(ids[:1], index=1)
    assert [o.index for o in first.outputs] == [1]
    stopped = run.step(ids, index=1)
    assert not stopped.finished and stopped.outputs[0].finish_reason == "stop"
    assert run.step(ids, index=1) is None
    last = run.step(ids[:2], index=0, finish_reason=FinishReason.LENGTH)
    assert last.finished and [o.index for o in last.outputs] == [0]
    assert run.finishes == [FinishSequence("r", 1, 4)]


def test_final_only_gives_every_sequence_once(tokenizer):
    run = Run(tokenizer, n=2, output_kind="final_only")
    assert run.step(run.ids("a"), index=1, finish_reason=FinishReason.LENGTH) is None
    last = run.step(run.ids("bc"), index=0, finish_reason=FinishReason.LENGTH)
    assert [(o.index, o.text) for o in last.outputs] == [(0, "bc"), (1, "a")]


def test_logprobs_become_maps_with_the_chosen_token_first(tokenizer):
    run = Run(tokenizer, logprobs=2, prompt_logprobs=1)
    a, b, c = run.ids("abc")
    at_prompt = [PositionLogprobs([6, 7], [-2.0, -0.1], [3, 1])]
    assert run.step([], prompt_logprobs=at_prompt) is None
    output = run.step([b], logprobs=[PositionLogprobs([b, a, b], [-1.5, -0.5, -1.5], [2, 1, 2])])
    (entry,) = output.outputs[0].logprobs
    assert list(entry) == [b, a]
    assert (entry[b].logprob, entry[b].rank, entry[b].decoded_token) == (-1.5, 2, "b")
    first, second = output.prompt_logprobs
    assert first is None and list(second) == [6, 7] and second[7].rank == 1
    assert c not in entry


def test_prompt_logprobs_come_once_with_deltas(tokenizer):
    run = Run(tokenizer, prompt_logprobs=0, output_kind="delta")
    at_prompt = [PositionLogprobs([6], [-2.0], [3])]
    assert run.step(run.ids("a"), prompt_logprobs=at_prompt).prompt_logprobs is not None
    assert run.step(run.ids("b")).prompt_logprobs is None


def test_without_detokenizing_there_is_no_text(tokenizer):
    run = Run(tokenizer, detokenize=False)
    output = run.step(run.ids("abc"), num_cached=1, num_preemptions=2, first_scheduled=1.5)
    run.step(run.ids("d"))
    assert output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 3
    assert output.num_cached_tokens == 1
    assert output.metrics.num_preemptions == 2 and output.metrics.arrival == 1.0
    assert output.metrics.first_token > output.metrics.first_scheduled == 1.5


def test_an_error_ends_the_sequence_and_says_why(tokenizer):
    run = Run(tokenizer)
    last = run.step([], finish_reason=FinishReason.ERROR, error="out of paper").outputs[0]
    assert (last.finish_reason, last.stop_reason) == ("error", "out of paper")


def test_refusals_are_errors_of_their_class(tokenizer):
    run = Run(tokenizer)
    refused = RejectedRequest("r", "QueueFullError", "full", retry_after=2.5)
    ((request_id, error),) = run.processor.process(StepMessage(rejected=[refused])).failures
    assert request_id == "r" and isinstance(error, QueueFullError) and error.retry_after == 2.5
    assert run.processor.process(StepMessage(rejected=[refused])).failures == []


def test_one_request_that_breaks_is_its_own_failure(tokenizer):
    run = Run(tokenizer)
    other = EngineRequest("other", Prompt.of_tokens([5]), SamplingParams())
    run.processor.add(other)
    outputs = [SequenceOutput("r", 7, [5]), SequenceOutput("other", 0, [5])]
    processed = run.processor.process(StepMessage(outputs))
    ((request_id, error),) = processed.failures
    assert request_id == "r" and isinstance(error, StepError)
    assert [output.request_id for output in processed.outputs] == ["other"]


def test_what_was_discarded_is_ignored_and_ids_are_used_once(tokenizer):
    run = Run(tokenizer)
    with pytest.raises(KeyError):
        run.processor.add(run.request)
    assert run.processor.discard("r") and not run.processor.discard("r")
    assert run.step(run.ids("a")) is None


def test_beams_are_decoded_best_first(tokenizer):
    processor = OutputProcessor(tokenizer)
    params = BeamSearchParams(beam_width=2, max_tokens=3)
    processor.add(EngineRequest("b", Prompt.of_tokens([5]), SamplingParams(), beam=params))
    ids = tokenizer.encode("hello", add_special_tokens=False)
    beam = BeamOutput("b", [ids, [5]], [-1.0, -2.0], [-0.5, -2.0], [FinishReason.LENGTH] * 2)
    ((request_id, result),) = processor.process(StepMessage(beams=[beam])).beams
    assert request_id == "b" and result.sequences[0].text == "hello"
    assert result.sequences[0].score == -0.5 and result.sequences[1].finish_reason == "length"


@pytest.mark.parametrize(("include", "texts"), [(True, ["ab", "ab"]), (False, ["a", "ab"])])
def test_the_stop_token_of_a_beam_is_text_only_if_asked(tokenizer, include, texts):
    processor = OutputProcessor(tokenizer)
    params = BeamSearchParams(beam_width=2, max_tokens=3, include_stop_str_in_output=include)
    processor.add(EngineRequest("b", Prompt.of_tokens([5]), SamplingParams(), beam=params))
    ids = tokenizer.encode("ab", add_special_tokens=False)
    reasons = [FinishReason.STOP, FinishReason.LENGTH]
    beam = BeamOutput("b", [ids, ids], [-1.0, -2.0], [-0.5, -2.0], reasons)
    ((_, result),) = processor.process(StepMessage(beams=[beam])).beams
    assert [sequence.text for sequence in result.sequences] == texts
    assert all(sequence.token_ids == ids for sequence in result.sequences)


@pytest.mark.parametrize(
    ("reason", "error", "words"),
    [(FinishReason.ERROR, "out of paper", "out of paper"), (FinishReason.ABORT, None, "abort")],
)
def test_a_search_that_ends_without_a_result_is_a_failure(tokenizer, reason, error, words):
    processor = OutputProcessor(tokenizer)
    params = BeamSearchParams(beam_width=2, max_tokens=3)
    processor.add(EngineRequest("b", Prompt.of_tokens([5]), SamplingParams(), beam=params))
    end = StepMessage([SequenceOutput("b", 0, [], finish_reason=reason, error=error)])
    processed = processor.process(end)
    ((request_id, failure),) = processed.failures
    assert request_id == "b" and isinstance(failure, StepError) and words in failure.message
    assert not processed.outputs and len(processor) == 0
    assert not processor.process(end).failures


def test_merged_deltas_equal_the_stream(tokenizer):
    def outputs():
        run = Run(tokenizer, n=2, output_kind="delta", logprobs=0, prompt_logprobs=0)
        a, b, c = run.ids("abc")
        at = [PositionLogprobs([9], [-1.0], [1])]
        yield run.step([a], index=0, logprobs=at, prompt_logprobs=at)
        yield run.step([b], index=1, logprobs=at)
        yield run.step([c], index=0, logprobs=at, finish_reason=FinishReason.LENGTH)
        yield run.step([c], index=1, logprobs=at, finish_reason=FinishReason.LENGTH)

    merged = None
    for output in outputs():
        merged = output if merged is None else merge_deltas(merged, output)
    assert [(o.index, o.text, len(o.token_ids), len(o.logprobs)) for o in merged.outputs] == [
        (0, "ac", 2, 2),
        (1, "bc", 2, 2),
    ]
    assert merged.finished and len(merged.prompt_logprobs) == 2
    assert all(o.cumulative_logprob == -2.0 for o in merged.outputs)
