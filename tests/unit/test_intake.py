"""What a request asks for, over what the model's own files say."""

import dataclasses

import pytest
from helpers.fake_executor import fake_config

from trimaran.core.engine.client import EngineInfo
from trimaran.core.engine.intake import Intake
from trimaran.core.errors import InvalidRequestError
from trimaran.core.model_files import read_generation
from trimaran.core.sampling_params import SamplingParams


@pytest.fixture
def open_intake(tmp_path):
    """An intake of a model with this generation_config.json and these overrides of it."""

    def build(own="{}", overrides=None):
        (tmp_path / "generation_config.json").write_text(own)
        generation, _ = read_generation(tmp_path, "auto", overrides or {}, {})
        model = dataclasses.replace(fake_config(tmp_path).model, generation=generation)
        return Intake(EngineInfo(
            model=model, kv_dtype="float32", kv_tokens=1024, max_num_seqs=8, max_num_queued_reqs=8
        ), None, clamp=False)  # fmt: skip

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
