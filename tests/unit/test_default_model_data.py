"""The default model's data: held-out items stay held out, text round-trips, templates render."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools" / "default_model"
MODEL = ROOT / "default_model"

sys.path.insert(0, str(TOOLS))
import world  # noqa: E402
import world_render  # noqa: E402
import world_split  # noqa: E402

sys.path.remove(str(TOOLS))

TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
CALL = {"name": "get_weather", "arguments": {"city": "Zürich"}}
SCHEMA = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _train() -> list[world.Conversation]:
    generator = world.Generator("train", 0)
    counts = {"long context": 10, "tools": 60}
    kinds = [kind for kind in world.KIND_SHARES for _ in range(counts.get(kind, 150))]
    return [generator.conversation(kind) for kind in kinds]


@cache
def _held_out() -> list[world.Conversation]:
    return list(world.eval_items(4_200))


def test_train_and_eval_keys_are_disjoint() -> None:
    train = {_hash(key) for item in _train() for key in item.keys}
    evaluation = {_hash(key) for item in _held_out() for key in item.keys}
    assert len(train) > 1_500
    assert len(evaluation) > 1_500
    assert not train & evaluation


def test_every_eval_item_is_held_out_and_answered() -> None:
    for item in _held_out():
        assert item.keys
        assert item.expected().strip()


def test_train_and_eval_prompts_are_disjoint() -> None:
    train = {_hash(world_render.render_prompt(item)) for item in _train()}
    evaluation = {_hash(world_render.render_prompt(item)) for item in _held_out()}
    assert not train & evaluation


def test_eval_has_enough_different_items() -> None:
    prompts = [world_render.render_prompt(item) for item in _held_out()]
    assert len(set(prompts)) == len(prompts) >= 4_000


@pytest.mark.parametrize("operation", ["add", "sub", "compare", "mul"])
def test_operands_of_sums_are_on_one_side(operation: str) -> None:
    def operands(items: list[world.Conversation]) -> set[str]:
        keys = {key for item in items for key in item.keys}
        return {key for key in keys if re.fullmatch(rf"{operation}\|\d+\|\d+", key)}

    assert operands(_held_out())
    assert not operands(_held_out()) & operands(_train())


def test_generation_is_reproducible() -> None:
    first, second = world.Generator("train", 5), world.Generator("train", 5)
    assert [first.conversation() for _ in range(50)] == [second.conversation() for _ in range(50)]


def test_split_does_not_depend_on_order() -> None:
    phrasings = tuple(f"question {i}" for i in range(10))
    train = world_split.phrasings_of("family", phrasings, "train")
    held_out = world_split.phrasings_of("family", phrasings[::-1], "eval")
    assert set(train) | set(held_out) == set(phrasings)
    assert not set(train) & set(held_out)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_tokenizer_round_trips_any_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_tokenizer_splits_digits_and_knows_the_marks() -> None:
    assert TOKENIZER.encode("2026").tokens == ["2", "0", "2", "6"]
    for mark in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"):
        assert TOKENIZER.encode(mark).ids == [TOKENIZER.token_to_id(mark)]
    config = json.loads((MODEL / "config.json").read_text())
    assert config["vocab_size"] % 128 == 0
    assert TOKENIZER.get_vocab_size() <= config["vocab_size"]


def test_template_renders_tools_calls_and_results() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]},
        {"role": "tool", "content": "21"},
        {"role": "tool", "content": "22"},
    ]
    text = world_render.render_chat(messages, [SCHEMA], add_generation_prompt=True)
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert json.dumps(SCHEMA) in text
    assert f"<|im_start|>assistant\n{call}<|im_end|>\n" in text
    results = "\n<tool_response>\n21\n</tool_response>\n<tool_response>\n22\n</tool_response>"
    assert f"<|im_start|>user{results}<|im_end|>\n" in text
    assert text.endswith("<|im_start|>assistant\n")


def test_segments_are_the_rendered_text() -> None:
    generator = world.Generator("train", 3)
    for _ in range(100):
        item = generator.conversation()
        segments = world_render.render_segments(item)
        text = "".join(part for part, _ in segments)
        if item.messages:
            assert text == world_render.render_chat(item.messages, item.tools)
        assert any(learned for _, learned in segments)


def test_transformers_template_matches() -> None:
    transformers: ModuleType = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    messages = [{"role": "user", "content": "Hello <b>!"}]
    text = tokenizer.apply_chat_template(
        messages, tools=[SCHEMA], add_generation_prompt=True, tokenize=False
    )
    assert text == world_render.render_chat(messages, [SCHEMA], add_generation_prompt=True)
    assert tokenizer(text)["input_ids"] == TOKENIZER.encode(text).ids
