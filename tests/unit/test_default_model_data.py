"""The default model's data: held-out items stay held out, text round-trips, templates render."""

from __future__ import annotations

import hashlib
import json
import random
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
import world_chat  # noqa: E402
import world_formats  # noqa: E402
import world_render  # noqa: E402
import world_split  # noqa: E402
import world_tasks  # noqa: E402
import world_tools  # noqa: E402

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
    return list(world.held_out_items(4_200))


@cache
def _dev() -> list[world.Conversation]:
    return list(world.held_out_items(2_100, split="dev"))


@cache
def _families() -> dict[str, tuple[str, ...]]:
    """All phrasings of every family that a few thousand conversations meet."""
    families: dict[str, tuple[str, ...]] = {}

    def record(
        rng: random.Random, family: str, phrasings: tuple[str, ...], split: world_split.Split
    ) -> tuple[str, str]:
        families[family] = tuple(phrasings)
        return world_split.pick_phrasing(rng, family, phrasings, split)

    with pytest.MonkeyPatch.context() as patch:
        for module in (world, world_chat, world_formats, world_tasks, world_tools):
            patch.setattr(module, "pick_phrasing", record)
        generator = world.Generator("train", 1)
        for _ in range(4_000):
            generator.conversation()
    return families


def test_keys_of_the_parts_are_disjoint() -> None:
    train, dev, evaluation = (
        {_hash(key) for item in items for key in item.keys}
        for items in (_train(), _dev(), _held_out())
    )
    assert len(train) > 1_500
    assert len(evaluation) > 1_500
    assert not train & evaluation
    assert not train & dev
    assert not dev & evaluation


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


@pytest.mark.parametrize("operation", ["add", "sub", "compare"])
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
    phrasings = world_split.expand("[a|b|c|d] [e|f|g|h] {w}")
    parts = [world_split.phrasings_of("family", phrasings, s) for s in ("train", "dev", "eval")]
    again = world_split.phrasings_of("family", phrasings[::-1], "eval")
    assert parts[2] == again
    assert sorted(text for part in parts for text in part) == sorted(phrasings)
    assert [len(part) for part in parts] == [12, 2, 2]


def test_grammars_expand() -> None:
    texts = world_split.expand("[Add|sum up [|now ]]{a} and {b}.", "what [is|was] {a}.")
    assert texts == ("Add{a} and {b}.", "Sum up {a} and {b}.", "Sum up now {a} and {b}.") + (
        "What is {a}?",
        "What was {a}?",
    )


def test_careless_typing_does_not_cross_the_split() -> None:
    same = ("{a} - {b}", "{a}-{b}", " {a} -{b} ?", "{A} - {B}.")
    assert len({world_split.normalised(text) for text in same}) == 1
    rest = world_split.expand("[what is|compute|tell me] {a} - {b}[| please| now]")
    for split in ("train", "dev", "eval"):
        part = set(world_split.phrasings_of("family", (*rest, *same), split))
        assert part.issuperset(same) or part.isdisjoint(same)


def test_held_out_phrasings_are_new_combinations_of_known_words() -> None:
    assert len(_families()) > 90
    for family, phrasings in _families().items():
        train = world_split.phrasings_of(family, phrasings, "train")
        known = frozenset[str]().union(*map(world_split.words_of, train))
        for split in ("dev", "eval"):
            held_out = world_split.phrasings_of(family, phrasings, split)
            assert held_out, family
            for phrasing in held_out:
                assert world_split.words_of(phrasing) <= known, (family, phrasing)


def test_what_the_documents_ask_is_in_training() -> None:
    everything = {text for phrasings in _families().values() for text in phrasings}
    assert everything >= world_split.PINNED
    for family, phrasings in _families().items():
        train = world_split.phrasings_of(family, phrasings, "train")
        assert world_split.PINNED.intersection(phrasings) <= set(train), family


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
