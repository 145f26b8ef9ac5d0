"""Tokens to text piece by piece: equal to the whole, linear, and no code point is split."""

import time

import pytest
from helpers.tiny_tokenizers import byte_level, save, sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from trimaran.core.text.detokenizer import (
    MAX_HELD_TOKENS,
    ByteDetokenizer,
    WindowDetokenizer,
    open_detokenizer,
)
from trimaran.core.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory):
    return Tokenizer.from_path(save(byte_level(), tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def words_tokenizer(tmp_path_factory):
    return Tokenizer.from_path(save(sentencepiece(), tmp_path_factory.mktemp("words")))


def test_the_kind_follows_the_tokenizer(bytes_tokenizer, words_tokenizer):
    assert isinstance(open_detokenizer(bytes_tokenizer), ByteDetokenizer)
    assert isinstance(open_detokenizer(words_tokenizer), WindowDetokenizer)


@settings(deadline=None, max_examples=300)
@given(st.data(), st.booleans())
def test_any_tokens_of_a_byte_level_tokenizer_equal_the_whole_decode(bytes_tokenizer, data, skip):
    # Any ids at all: broken UTF-8, special tokens, ids that no token has.
    ids = data.draw(st.lists(st.integers(0, bytes_tokenizer.vocab_size + 3), max_size=30))
    detokenizer = open_detokenizer(bytes_tokenizer, skip_special_tokens=skip)
    text = detokenizer.extend(ids) + detokenizer.flush()
    assert text == bytes_tokenizer.decode(ids, skip_special_tokens=skip)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40), st.integers(1, 40))
def test_text_of_a_word_tokenizer_equals_the_whole_decode(words_tokenizer, text, split):
    ids = words_tokenizer.encode(text, add_special_tokens=False)
    prompt, rest = ids[:split], ids[split:]
    detokenizer = open_detokenizer(words_tokenizer, prompt)
    got = detokenizer.extend(rest) + detokenizer.flush()
    whole, before = words_tokenizer.decode(ids), words_tokenizer.decode(prompt)
    if not before.endswith("\ufffd"):  # otherwise the prompt itself ends inside a code point
        assert before + got == whole


@pytest.mark.parametrize("kind", ["bytes_tokenizer", "words_tokenizer"])
@pytest.mark.parametrize("text", ["😀", "héllo 😀 wörld", "👩‍👩‍👧‍👦你"])
def test_a_code_point_is_never_split(kind, text, request):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = open_detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "" in pieces  # several tokens make one code point here
    assert "".join(pieces).strip() == text


@pytest.mark.parametrize("kind", ["bytes_tokenizer", "words_tokenizer"])
def test_an_unfinished_code_point_comes_out_at_the_end(kind, request):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode("a😀", add_special_tokens=False)[:-1]
    detokenizer = open_detokenizer(tokenizer)
    assert "\ufffd" not in detokenizer.extend(ids)
    assert detokenizer.flush().startswith("\ufffd")
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("kind", ["bytes_tokenizer", "words_tokenizer"])
def test_special_tokens_are_skipped_or_shown(kind, request):
    tokenizer = request.getfixturevalue(kind)
    end = tokenizer.id_of("<|im_end|>")
    ids = [*tokenizer.encode("hello", add_special_tokens=False), end]
    assert open_detokenizer(tokenizer).extend(ids).strip() == "hello"
    shown = open_detokenizer(tokenizer, skip_special_tokens=False).extend(ids)
    assert shown.strip().startswith("hello") and shown.endswith("<|im_end|>")


def test_special_tokens_in_a_row_without_spaces(words_tokenizer):
    ids = [words_tokenizer.id_of("<s>"), words_tokenizer.id_of("<|im_end|>")] * 2
    detokenizer = open_detokenizer(
        words_tokenizer, skip_special_tokens=False, spaces_between_special_tokens=False
    )
    assert detokenizer.extend(ids) == "<s><|im_end|><s><|im_end|>"


def test_a_leading_space_follows_the_prompt(words_tokenizer):
    ids = words_tokenizer.encode("hello world", add_special_tokens=False)
    prompt = words_tokenizer.encode("hello", add_special_tokens=False)
    assert ids[: len(prompt)] == prompt
    assert open_detokenizer(words_tokenizer, prompt).extend(ids[len(prompt) :]) == " world"


@pytest.mark.parametrize("kind", ["bytes_tokenizer", "words_tokenizer"])
@pytest.mark.parametrize("what", ["broken", "special", "text"])
def test_the_cost_of_a_token_does_not_grow(kind, what, request, monkeypatch):
    tokenizer = request.getfixturevalue(kind)
    most = 0

    def counted(ids, skip_special_tokens=True, decode=tokenizer.decode):
        nonlocal most
        most = max(most, len(ids))
        return decode(ids, skip_special_tokens)

    monkeypatch.setattr(tokenizer, "decode", counted)
    start = tokenizer.encode("😀", add_special_tokens=False)[-1]
    ids = {
        "broken": [start] * 20_000,
        "special": [tokenizer.id_of("<s>")] * 20_000,
        "text": tokenizer.encode("hello wörld " * 2_000, add_special_tokens=False),
    }[what]
    begin = time.process_time()
    detokenizer = open_detokenizer(tokenizer)
    detokenizer.extend(ids)
    detokenizer.flush()
    assert most <= 2 * MAX_HELD_TOKENS
    assert time.process_time() - begin < 10
