"""What a request asks for, over what the model's own files say."""

import dataclasses
import time

import pytest
from helpers.fake_executor import fake_config
from helpers.tiny_tokenizers import byte_level, save

from trimaran.core.engine.client import EngineInfo
from trimaran.core.engine.intake import LONG_TEXT_FACTOR, Intake
from trimaran.core.errors import ContextLengthError, InvalidRequestError
from trimaran.core.model_files import read_generation
from trimaran.core.sampling_params import SamplingParams
from trimaran.core.text.tokenizer import Tokenizer


@pytest.fixture
def open_intake(tmp_path):
    """An intake of a model with this generation_config.json and these overrides of it."""

    def build(own="{}", overrides=None, tokenizer=None):
        (tmp_path / "generation_config.json").write_text(own)
        generation, _ = read_generation(tmp_path, "auto", overrides or {}, {})
        model = dataclasses.replace(fake_config(tmp_path).model, generation=generation)
        return Intake(EngineInfo(
            model=model, kv_dtype="float32", kv_tokens=1024, max_num_seqs=8, max_num_queued_reqs=8
        ), tokenizer, clamp=False)  # fmt: skip

    return build


def test_the_models_values_are_the_defaults(open_intake):
    own = '{"temperature": 0.6, "max_new_tokens": 64, "top_k": null, "other": 1}'
    intake = open_intake(own)
    expected = SamplingParams(temperature=0.6, max_tokens=64)
    assert intake.default_sampling_params() == expected
    assert intake.default_sampling_params(max_tokens=7, top_p=0.5) == SamplingParams(
        temperature=0.6, max_tokens=7, top_p=0.5
    )
    assert intake.default_sampling_params(max_tokens=None).max_tokens is None
    for name in ("max_new_tokens", "max_tokens"):
        over = open_intake(own, {name: 32})
        assert over.default_sampling_params() == SamplingParams(temperature=0.6, max_tokens=32)
    assert open_intake().default_sampling_params() == SamplingParams()


def test_the_least_asked_for_beats_the_models_most(open_intake):
    intake = open_intake('{"max_new_tokens": 64}')
    assert intake.default_sampling_params(min_tokens=64).max_tokens == 64
    assert intake.default_sampling_params(min_tokens=65).max_tokens is None
    with pytest.raises(InvalidRequestError, match="min_tokens"):
        intake.default_sampling_params(min_tokens=65, max_tokens=64)


@pytest.mark.parametrize("ids", [None, 5, 0.5, object()])
def test_token_ids_that_are_no_list_are_refused(open_intake, ids):
    with pytest.raises(InvalidRequestError, match="list of token ids") as caught:
        open_intake().prepare({"prompt_token_ids": ids}, SamplingParams(), "x")
    assert caught.value.param == "prompt_token_ids"


@pytest.mark.parametrize("ids", ["56", [5, "6"], {"5": 6}])
def test_token_ids_of_another_kind_are_refused(open_intake, ids):
    with pytest.raises(InvalidRequestError, match="whole numbers"):
        open_intake().prepare({"prompt_token_ids": ids}, SamplingParams(), "x")


def test_token_ids_may_come_from_any_iterable(open_intake):
    for ids in ((5, 6), range(5, 7), iter([5, 6])):
        request = open_intake().prepare({"prompt_token_ids": ids}, SamplingParams(), "x")
        assert request.prompt.token_ids == [5, 6]


def test_a_request_that_bans_every_token_is_refused(open_intake, tmp_path):
    save(byte_level(), tmp_path, eos_token="</s>")
    tokenizer = Tokenizer.from_path(tmp_path)
    intake = open_intake(tokenizer=tokenizer)
    (letter,) = tokenizer.encode("a", add_special_tokens=False)
    end = tokenizer.eos_token_id
    wrong = [
        {"allowed_token_ids": [letter], "bad_words": ["a"]},
        {"allowed_token_ids": [end], "min_tokens": 1},
        {"allowed_token_ids": [end, letter, 9], "min_tokens": 1, "bad_words": ["a"],
         "stop_token_ids": [9]},
    ]  # fmt: skip
    for params in wrong:
        with pytest.raises(InvalidRequestError, match="leave no token") as caught:
            intake.prepare([5], SamplingParams(**params), "x")
        assert caught.value.param == "allowed_token_ids"
        assert all(name in caught.value.message for name in set(params) - {"stop_token_ids"})
    for params in ({**wrong[0], "allowed_token_ids": [letter, 9]}, {"bad_words": ["a"]}):
        intake.prepare([5], SamplingParams(**params), "x")
    intake.prepare([5], SamplingParams(allowed_token_ids=[letter], bad_words=["aa"]), "x")


def test_a_text_beyond_the_context_is_tokenised_while_that_is_cheap(open_intake, tmp_path):
    """For `/tokenize`, and for those who cut it to fit; as a prompt it is refused."""
    save(byte_level(), tmp_path, eos_token="</s>")
    tokenizer = Tokenizer.from_path(tmp_path)
    intake = open_intake(tokenizer=tokenizer)
    long, huge = "hello " * 4_000, "hello " * 10**6
    assert len(long) > LONG_TEXT_FACTOR * intake.info.model.max_model_len
    ids = intake.encode(long, add_special_tokens=False)
    assert tokenizer.decode(ids) == long
    for text, use in [
        (long, lambda text: intake.prepare(text, SamplingParams(), "x")),
        (huge, lambda text: intake.prepare(text, SamplingParams(), "x")),
        (huge, intake.encode),
    ]:
        begin = time.thread_time()
        with pytest.raises(ContextLengthError, match="context holds 256"):
            use(text)
        assert time.thread_time() - begin < 1, "0.1 s on a quiet machine"
