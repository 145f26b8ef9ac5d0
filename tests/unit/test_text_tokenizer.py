"""Loading a tokenizer, special tokens, and errors that name the file."""

import json
import subprocess
import sys
import threading

import pytest
from helpers.tiny_tokenizers import byte_level, save, sentencepiece, with_bos

from trimaran.core.errors import InvalidRequestError, ModelLoadError
from trimaran.core.text.tokenizer import LONG_TEXT, Tokenizer

NAMED = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}


def test_loads_a_directory_or_its_file(tmp_path):
    path = save(byte_level(), tmp_path, **NAMED)
    for place in (path, str(path), path / "tokenizer.json"):
        tokenizer = Tokenizer.from_path(place)
        assert tokenizer.decode(tokenizer.encode("Hello, world! 😀")) == "Hello, world! 😀"
        assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
        assert tokenizer.eos_token_id == tokenizer.id_of("</s>")
        assert tokenizer.pad_token_id is None
        assert tokenizer.vocab_size == tokenizer.id_of("né tok") + 1


def test_a_tokenizer_that_brings_code_is_refused(tmp_path):
    save(byte_level(), tmp_path, auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json .*tokenization_own\.Own"):
        Tokenizer.from_path(tmp_path)


def test_transformers_is_not_imported(tmp_path):
    save(byte_level(), tmp_path)
    code = (
        "import sys; from trimaran.core.text.tokenizer import Tokenizer;"
        f"Tokenizer.from_path({str(tmp_path)!r}); print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("processor", [False, True])
@pytest.mark.parametrize("flag", [None, False, True])
def test_bos_follows_the_configuration_then_the_post_processor(tmp_path, processor, flag):
    backend = with_bos(byte_level()) if processor else byte_level()
    config = {**NAMED} | ({} if flag is None else {"add_bos_token": flag})
    tokenizer = Tokenizer.from_path(save(backend, tmp_path, **config))
    expected = processor if flag is None else flag
    assert (tokenizer.encode("hello")[0] == tokenizer.bos_token_id) is expected
    assert tokenizer.encode("hello", add_special_tokens=False)[0] != tokenizer.bos_token_id
    # One that the user wrote stays, and does not become two.
    assert tokenizer.encode("<s>hello").count(tokenizer.bos_token_id) >= 1


def test_eos_is_added_when_configured(tmp_path):
    tokenizer = Tokenizer.from_path(save(byte_level(), tmp_path, **NAMED, add_eos_token=True))
    assert tokenizer.encode("hello")[-1] == tokenizer.eos_token_id


def test_special_tokens_that_only_the_configuration_knows_are_added(tmp_path):
    added = {"400": {"content": "<|extra|>", "special": True}}
    tokenizer = Tokenizer.from_path(
        save(byte_level(), tmp_path, eos_token="<|eot|>", added_tokens_decoder=added)
    )
    for token in ("<|extra|>", "<|eot|>"):
        assert tokenizer.encode(token) == [tokenizer.id_of(token)]
        assert tokenizer.id_of(token) in tokenizer.special_ids


def test_token_bytes_and_text(tmp_path):
    tokenizer = Tokenizer.from_path(save(byte_level(), tmp_path))
    ids = tokenizer.encode("😀 né tok<tool_call>")
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == "😀 né tok<tool_call>"
    assert "\ufffd" in tokenizer.token_text(ids[0])
    assert tokenizer.token_bytes(10**6) == b""


def test_long_texts_leave_other_threads_room(tmp_path):
    tokenizer = Tokenizer.from_path(save(byte_level(), tmp_path))
    text = "the quick brown fox " * 40_000
    turns, done = 0, threading.Event()

    def turn():
        nonlocal turns
        while not done.wait(0.001):
            turns += 1

    thread = threading.Thread(target=turn)
    thread.start()
    ids = tokenizer.encode(text)
    done.set()
    thread.join()
    assert turns >= 5  # two, if the call kept the interpreter's lock
    assert len(text) > LONG_TEXT and tokenizer.decode(ids) == text


@pytest.mark.parametrize("length", [1, LONG_TEXT])
def test_a_lone_surrogate_is_refused(tmp_path, length):
    tokenizer = Tokenizer.from_path(save(byte_level(), tmp_path))
    with pytest.raises(InvalidRequestError, match="surrogate"):
        tokenizer.encode("\ud800" * length)


@pytest.mark.parametrize("bad", [-1, 2**32, "x", 1.5])
def test_decoding_what_is_no_token_id_is_refused(tmp_path, bad):
    tokenizer = Tokenizer.from_path(save(byte_level(), tmp_path))
    with pytest.raises(InvalidRequestError, match="token ids"):
        tokenizer.decode([bad])


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ModelLoadError, match="tokenizer.json is missing"):
        Tokenizer.from_path(tmp_path)
    save(byte_level(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="tokenizer_config.json"):
        Tokenizer.from_path(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelLoadError, match="JSON object"):
        Tokenizer.from_path(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        Tokenizer.from_path(tmp_path)


def test_a_vocabulary_of_another_model_is_refused(tmp_path):
    tokenizer = Tokenizer.from_path(save(sentencepiece(), tmp_path))
    tokenizer.check_vocabulary(tokenizer.vocab_size)
    with pytest.raises(ModelLoadError, match="another model"):
        tokenizer.check_vocabulary(tokenizer.vocab_size - 1)
